"""How fast a server may be asked that has asked for fewer requests, for all workers, on fakeredis."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest

from courier.ledger.jobs import PREFIX
from courier.ledger.slots import SLOTS
from worker.pacs.server_rates import (
    FIRST_PER_S,
    LOWEST_PER_S,
    SLOWED,
    SPREAD_S,
    STAY_S,
    ServerRate,
    ServerRates,
    asks_to_slow_down,
)
from worker.pacs.transport import retry_after_s

KEY = f"{PREFIX}{SLOWED}a"


@pytest.fixture
def client() -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield client


@pytest.fixture
def rates(client: fakeredis.FakeRedis) -> ServerRates:
    return ServerRates(client, retry_after_cap_s=100)


def read_rate(rates: ServerRates) -> ServerRate:
    return rates.read(["a"])["a"]


def lower(rates: ServerRates, *, cuts: int | None = None, **more: Any) -> ServerRate:
    known = read_rate(rates).cuts if cuts is None else cuts
    asked = {"status": 429, "retry_after_s": None, "measured_per_s": 0.0, **more}
    return rates.lower("a", cuts=known, **asked)


def per_s(rates: ServerRates) -> float:
    rate = read_rate(rates).per_s
    assert rate is not None
    return rate


def age(client: fakeredis.FakeRedis, seconds: float) -> None:
    """As if the rate had been lowered so long before, and no turn were taken."""
    for name in ("from_us", "next_us", "until_us", "later_us"):
        client.hset(KEY, name, f"{float(client.hget(KEY, name) or 0) - seconds * 1_000_000:.0f}")


def test_a_server_that_has_asked_for_nothing_may_be_asked_at_once(rates: ServerRates) -> None:
    assert read_rate(rates) == ServerRate("a")
    assert rates.take("a") == ServerRate("a")
    assert rates.read([]) == {}


def test_the_rate_is_first_lowered_to_half_of_what_was_measured_over_all_processes(
    rates: ServerRates, client: fakeredis.FakeRedis
) -> None:
    client.hset(f"{PREFIX}{SLOTS}a", mapping={"one": "3:1", "two": "4:1"})
    lower(rates, measured_per_s=50)
    assert per_s(rates) == pytest.approx(50, rel=0.02)


def test_where_hardly_anything_was_measured_the_rate_does_not_begin_at_nothing(rates: ServerRates) -> None:
    lower(rates, measured_per_s=0.5)
    assert per_s(rates) == pytest.approx(FIRST_PER_S / 2, rel=0.02)


def test_each_further_answer_halves_it_down_to_the_lowest(rates: ServerRates) -> None:
    seen = []
    for _ in range(10):
        lower(rates)
        seen.append(round(per_s(rates), 1))
    assert seen == [8, 4, 2, 1, *[LOWEST_PER_S] * 6]


def test_the_answers_to_requests_that_were_under_way_together_halve_it_once(rates: ServerRates) -> None:
    for _ in range(8):
        lower(rates, cuts=0)
    assert (read_rate(rates).cuts, per_s(rates)) == (1, pytest.approx(FIRST_PER_S / 2, rel=0.02))
    for _ in range(8):
        lower(rates, cuts=1)
    assert (read_rate(rates).cuts, per_s(rates)) == (2, pytest.approx(FIRST_PER_S / 4, rel=0.02))


def test_turns_are_given_one_by_one_at_the_rate(rates: ServerRates) -> None:
    lower(rates)
    waits = [rates.take("a").wait_s for _ in range(8)]
    assert waits == sorted(waits)
    assert waits[0] > 0
    assert waits[-1] == pytest.approx(8 / (FIRST_PER_S / 2), rel=0.3)


def test_the_rate_grows_back_to_what_was_refused_within_a_minute(
    rates: ServerRates, client: fakeredis.FakeRedis
) -> None:
    lower(rates)
    age(client, 30)
    assert per_s(rates) == pytest.approx(FIRST_PER_S * 0.75, rel=0.02)
    age(client, 30)
    assert per_s(rates) == pytest.approx(FIRST_PER_S, rel=0.02)


def test_a_server_that_refused_many_in_a_row_and_is_well_again_is_soon_asked_as_before(
    rates: ServerRates, client: fakeredis.FakeRedis
) -> None:
    for _ in range(10):
        lower(rates)
    assert per_s(rates) == pytest.approx(LOWEST_PER_S, rel=0.02)
    age(client, 10)
    assert per_s(rates) < 1, "no request has been accepted"
    client.hset(KEY, "turns", 10)
    assert per_s(rates) == pytest.approx(4 * LOWEST_PER_S * (1 + 10 / 60), rel=0.05)
    client.hset(KEY, "turns", 100)
    assert per_s(rates) == pytest.approx(FIRST_PER_S / 2 * (1 + 10 / 60), rel=0.05)


def test_a_refusal_after_some_requests_were_accepted_says_how_fast_is_too_fast(
    rates: ServerRates, client: fakeredis.FakeRedis
) -> None:
    lower(rates)
    for expected in (FIRST_PER_S / 4, FIRST_PER_S / 8, FIRST_PER_S / 16):
        client.hset(KEY, "turns", 20)
        lower(rates)
        assert per_s(rates) == pytest.approx(expected, rel=0.05)
        client.hset(KEY, "turns", 1000)
        assert per_s(rates) == pytest.approx(expected, rel=0.05), "it does not return at once to what was too fast"


def test_ten_minutes_without_such_an_answer_end_the_limit(rates: ServerRates, client: fakeredis.FakeRedis) -> None:
    lower(rates)
    assert 590 < client.pttl(KEY) / 1000 <= 600
    client.delete(KEY)  # as it goes then
    assert rates.take("a") == ServerRate("a")


def test_a_request_takes_its_turn_up_to_what_it_may_wait_and_its_job_is_put_aside_beyond(rates: ServerRates) -> None:
    for _ in range(10):
        lower(rates)
    turns = [rates.take("a") for _ in range(40)]
    waits = [one.wait_s for one in turns if one.is_turn]
    late = [one.wait_s for one in turns if not one.is_turn]
    assert 4 < len(waits) < 30
    assert max(waits) <= STAY_S < min(late)


def test_jobs_that_are_put_aside_come_back_one_by_one_and_within_a_while(rates: ServerRates) -> None:
    lower(rates, retry_after_s=50)
    waits = [rates.take("a").wait_s for _ in range(600)]
    assert min(waits) > 40
    assert max(waits) <= 50 + SPREAD_S + 0.2
    assert len({round(wait_s, 1) for wait_s in waits}) > 300


@pytest.mark.parametrize(
    ("header", "held_s"),
    [
        ("30", 30),
        ("0", 0),
        (" 30 ", 30),
        ("Thu, 01 Jan 1970 00:00:40 GMT", 30),
        ("Thursday, 01-Jan-70 00:00:40 GMT", 30),
        ("Thu Jan  1 00:00:40 1970", 30),
        ("Thu, 01 Jan 1970 00:00:01 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 100),
        ("86400", 100),
        ("9" * 400, 100),
        ("-5", 0),
        ("1.5", 0),
        ("soon", 0),
        ("٣٠", 0),
        ("", 0),
        (None, 0),
    ],
)
def test_nothing_is_sent_before_the_time_that_the_server_names(
    rates: ServerRates, header: str | None, held_s: float
) -> None:
    rate = lower(rates, retry_after_s=retry_after_s(header, now=10))
    assert rate.held_s == pytest.approx(held_s, abs=0.5)
    assert held_s <= rate.wait_s < held_s + 2
    assert math.isfinite(rate.wait_s)


def test_the_latest_time_counts_whoever_was_told_it(rates: ServerRates) -> None:
    lower(rates, cuts=0, retry_after_s=5)
    lower(rates, cuts=0, retry_after_s=60)
    assert lower(rates, cuts=0, retry_after_s=1).held_s == pytest.approx(60, abs=1)


@pytest.mark.parametrize(
    ("status", "after_s", "expected"),
    [(429, None, True), (429, 0.0, True), (503, 5.0, True), (503, 0.0, True), (503, None, False), (500, 5.0, False)],
)
def test_what_asks_for_fewer_requests(status: int, after_s: float | None, expected: bool) -> None:
    assert asks_to_slow_down(status, after_s) is expected


def test_what_is_known_reads_as_a_sentence(rates: ServerRates) -> None:
    lower(rates, retry_after_s=30)
    assert str(read_rate(rates)).startswith(
        "a asked for fewer requests (429): at most 8.0 per second is sent, and none in the"
    )
    for _ in range(8):
        lower(rates)
    assert "at most one in 2 s is sent" in str(read_rate(rates))


def test_servers_have_a_rate_each(rates: ServerRates) -> None:
    lower(rates)
    assert rates.read(["b", "a"])["b"] == ServerRate("b")
