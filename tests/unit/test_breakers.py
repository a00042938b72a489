"""The state of the circuit breakers, which all workers share, on fakeredis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import fakeredis
import pytest

from courier.ledger.breakers import BREAKER, CHANGES, FAILURES, Breakers, BreakerState, by_server
from courier.ledger.jobs import PREFIX
from courier.settings import BreakerSettings

SETTINGS = BreakerSettings(failures=3, window_s=60, pause_s=4, pause_cap_s=10)


@pytest.fixture
def client() -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield client


@pytest.fixture
def breakers(client: fakeredis.FakeRedis) -> Breakers:
    return Breakers(client, SETTINGS, retry_after_cap_s=100)


def read_state(breakers: Breakers, name: str = "a") -> BreakerState:
    return breakers.read([name])[name]


def open_it(breakers: Breakers) -> BreakerState:
    return [breakers.failed("a") for _ in range(SETTINGS.failures)][-1]


def end_pause(client: fakeredis.FakeRedis) -> None:
    client.hset(f"{PREFIX}{BREAKER}a", "until_ms", 0)


def test_it_opens_when_enough_calls_failed_in_a_row(breakers: Breakers) -> None:
    assert [breakers.failed("a").name for _ in range(3)] == ["closed", "closed", "open"]
    assert read_state(breakers, "b").name == "closed"


def test_a_success_between_begins_the_count_anew(breakers: Breakers) -> None:
    breakers.failed("a")
    breakers.failed("a")
    assert breakers.succeeded("a").failures == 0
    assert [breakers.failed("a").name for _ in range(3)] == ["closed", "closed", "open"]


def test_failures_that_lie_too_far_apart_do_not_open_it(breakers: Breakers, client: fakeredis.FakeRedis) -> None:
    breakers.failed("a")
    client.lset(f"{PREFIX}{FAILURES}a", 0, cast(str, int(client.time()[0]) * 1000 - 61_000))
    breakers.failed("a")
    assert breakers.failed("a").name == "closed"
    assert breakers.failed("a").name == "open"


def test_only_one_is_let_through_when_the_pause_is_over(breakers: Breakers, client: fakeredis.FakeRedis) -> None:
    open_it(breakers)
    assert not breakers.probe("a", "early", for_s=10)[0]
    end_pause(client)
    assert read_state(breakers).name == "half-open"
    assert breakers.probe("a", "one", for_s=10)[0]
    assert not breakers.probe("a", "two", for_s=10)[0]
    assert read_state(breakers).probing


def test_the_probe_closes_it(breakers: Breakers, client: fakeredis.FakeRedis) -> None:
    open_it(breakers)
    end_pause(client)
    breakers.probe("a", "one", for_s=10)
    assert breakers.succeeded("a", probe="one").name == "closed"
    assert breakers.failed("a").failures == 1


def test_a_failed_probe_opens_it_for_twice_as_long_up_to_the_cap(
    breakers: Breakers, client: fakeredis.FakeRedis
) -> None:
    pauses = [open_it(breakers).pause_left_s]
    for number in range(3):
        end_pause(client)
        assert breakers.probe("a", str(number), for_s=10)[0]
        pauses.append(breakers.failed("a", probe=str(number)).pause_left_s)
    for pause_s, most in zip(pauses, (4, 8, 10, 10), strict=True):
        assert pause_s is not None
        assert 0.74 * most <= pause_s <= most


def test_a_call_that_began_before_says_nothing_of_an_open_breaker(
    breakers: Breakers, client: fakeredis.FakeRedis
) -> None:
    open_it(breakers)
    end_pause(client)
    assert breakers.succeeded("a").name == "half-open"
    assert breakers.failed("a").name == "half-open"
    assert breakers.succeeded("a", probe="nobody's").name == "half-open"


def test_a_probe_that_dies_makes_room_for_another(breakers: Breakers, client: fakeredis.FakeRedis) -> None:
    open_it(breakers)
    end_pause(client)
    breakers.probe("a", "one", for_s=10)
    assert breakers.renew("a", "one", for_s=10)
    assert breakers.renew("a", "one", for_s=0)
    assert breakers.probe("a", "two", for_s=10)[0]
    assert not breakers.renew("a", "one", for_s=10)


def test_a_beat_that_comes_late_does_not_renew_a_probe_that_was_given_up(
    breakers: Breakers, client: fakeredis.FakeRedis
) -> None:
    open_it(breakers)
    end_pause(client)
    breakers.probe("a", "one", for_s=10)
    breakers.renew("a", "one", for_s=0)
    assert not breakers.renew("a", "one", for_s=10)
    assert not breakers.read(["a"])["a"].probing
    assert breakers.probe("a", "two", for_s=10)[0]


@pytest.mark.parametrize(("asked_s", "most"), [(50, 50), (86_400, 100)])
def test_slow_down_opens_it_at_once_for_as_long_as_asked_up_to_the_cap(
    breakers: Breakers, asked_s: float, most: float
) -> None:
    pause_s = breakers.failed("a", retry_after_s=asked_s).pause_left_s
    assert pause_s is not None
    assert most - 1 < pause_s <= most


def test_a_servers_state_is_that_of_its_changes_where_only_they_fail(breakers: Breakers) -> None:
    assert breakers.states(["a"])["a"] == BreakerState("a")
    breakers.failed("a" + CHANGES)
    state = breakers.states(["a"])["a"]
    assert (state.breaker, state.lately) == ("a" + CHANGES, True)
    open_it(breakers)
    assert breakers.states(["a"])["a"].breaker == "a"


def test_counts_of_both_breakers_are_their_servers() -> None:
    assert by_server({"a": 1, "a" + CHANGES: 2, "b": 3}) == {"a": 3, "b": 3}
