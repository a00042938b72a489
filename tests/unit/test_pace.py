"""How fast a batch may go: its window of the day, and its rates over all who work at it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast
from zoneinfo import ZoneInfo

import fakeredis
import pytest

from courier.batches.store import Batch, Item, ItemOutcome
from courier.errors import InvalidRequest
from courier.ledger.jobs import Ledger
from courier.messages import BatchOrderJob, read_job
from courier.settings import Settings
from courier.windows import Window
from worker.batches.coordinator import Usage
from worker.batches.throttle import _QUESTIONS, Rate, Throttle
from worker.jobs.attempt import Attempt, Postpone
from worker.jobs.services import Services
from worker.pacs.protocol import Pacs

BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("window", "at", "hours"),
    [
        ("20:00-06:00 Europe/Berlin", "2026-07-01T19:00", 1),
        ("20:00-06:00 Europe/Berlin", "2026-07-01T20:00", 0),
        ("20:00-06:00 Europe/Berlin", "2026-07-01T23:30", 0),
        ("20:00-06:00 Europe/Berlin", "2026-07-02T05:59", 0),
        ("20:00-06:00 Europe/Berlin", "2026-07-02T06:00", 14),
        ("09:00-17:00 Europe/Berlin", "2026-07-02T17:00", 16),
        ("09:00-17:00 Europe/Berlin", "2026-07-02T08:00", 1),
        ("03:00-04:00 Europe/Berlin", "2026-03-29T01:00", 1),  # the clocks go forward at 2
        ("03:00-04:00 Europe/Berlin", "2026-10-25T01:00", 3),  # and back at 3
        ("03:00-04:00", "2026-07-01T04:00", 1),  # UTC is two hours behind
    ],
)
def test_a_window_opens_by_the_clocks_of_its_place(window: str, at: str, hours: float) -> None:
    now_s = datetime.fromisoformat(at).replace(tzinfo=BERLIN).timestamp()
    assert Window.read(window).opens_in_s(now_s) == hours * 3600


@pytest.mark.parametrize(
    "window", ["", "20:00", "20:00-20:00", "24:00-06:00", "20:00-06:00 Nowhere/Town", "20:00-06:00 ../passwd", "8-9"]
)
def test_a_window_that_is_none_is_refused_before_anything_is_planned(window: str) -> None:
    with pytest.raises(InvalidRequest, match="20:00-06:00 Europe/Berlin"):
        read_job(BatchOrderJob, {"window": window})


@pytest.mark.parametrize("per_s", [0.01, 0.3, 0.7, 1, 1.5, 3, 9.5, 49, 50, 1000, 7.5e6])
def test_a_rate_in_tickets_is_never_faster_and_hardly_slower(per_s: float) -> None:
    rate = Rate.of(per_s)
    really = rate.amount * rate.worth / rate.window_s
    assert 0.9 * per_s <= really <= per_s * (1 + 1e-9)


@dataclass
class SleepClock:
    """Time goes on when somebody sleeps; `limits` looks at it as well."""

    now_s: float = 1_700_000_000.0
    slept: list[float] = field(default_factory=list)

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


@dataclass
class ThrottleBench:
    client: fakeredis.FakeRedis
    clock: SleepClock

    def throttle(self, checkpoint: Mapping[str, Any] | None = None, **order: Any) -> Throttle:
        ledger = Ledger(self.client)
        none = cast(Any, None)
        services = Services(Settings(), ledger, none, none, now=self.clock.now, sleep=self.clock.sleep)
        attempt = Attempt("B.apply.0", 1, 1, last=False, ledger=ledger, checkpoint=cast(Any, checkpoint))
        return Throttle(Batch("B", "running", "imagined", order), attempt, services)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThrottleBench]:
    clock = SleepClock()
    monkeypatch.setattr("limits.storage.redis.time.time", clock.now)
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield ThrottleBench(client, clock)


def items(number: int, size_bytes: int | None = None) -> list[Item]:
    return [Item(at, "a", f"1.{at}", size_bytes) for at in range(number)]


def test_a_batch_without_limits_waits_for_nothing(bench: ThrottleBench) -> None:
    throttle = bench.throttle()
    throttle.wait(items(100))
    throttle.account([], Usage(requests=1000, size_bytes=10**9))
    throttle.wait(items(100))
    assert (bench.clock.slept, throttle.checkpoint, throttle.group_items(100)) == ([], {}, 100)


def test_outside_its_window_a_chunk_makes_room_until_it_opens(bench: ThrottleBench) -> None:
    at = datetime.fromtimestamp(bench.clock.now_s, ZoneInfo("UTC"))
    shut = f"{(at.hour + 1) % 24:02}:00-{(at.hour + 2) % 24:02}:00"
    with pytest.raises(Postpone, match="window") as caught:
        bench.throttle(window=shut).wait(items(1))
    assert (caught.value.steady, 0 < caught.value.delay_s <= 30) == (True, True)
    bench.throttle(window=f"{at.hour:02}:00-{(at.hour + 1) % 24:02}:00").wait(items(1))


def test_what_is_counted_as_a_request_are_methods_of_a_server() -> None:
    assert {name for name in _QUESTIONS if not callable(getattr(Pacs, name, None))} == set()


def test_two_chunks_together_keep_to_the_rate_of_their_batch(bench: ThrottleBench) -> None:
    one, other = bench.throttle(requests_per_s=10), bench.throttle(requests_per_s=10)
    begun_s = bench.clock.now_s
    for _ in range(25):
        for throttle in (one, other):
            throttle.wait(items(2))
            throttle.account([], Usage())
    took_s = bench.clock.now_s - begun_s
    assert 8.5 <= took_s <= 11  # 100 requests, the first second's are had at once


def test_what_a_group_really_took_is_paid_before_the_next_one_begins(bench: ThrottleBench) -> None:
    throttle = bench.throttle(bytes_per_s=1000)
    group = items(2, 100)
    throttle.wait(group)
    assert bench.clock.slept == []
    throttle.account([ItemOutcome(group[0], "stored", result={"size_bytes": 1500})], Usage(size_bytes=2000))
    throttle.wait(items(1))
    assert 0.9 <= sum(bench.clock.slept) <= 1.6


def test_a_wait_that_is_long_leaves_the_slot_to_others_and_is_not_forgotten(bench: ThrottleBench) -> None:
    throttle = bench.throttle(bytes_per_s=1000)
    throttle.wait(items(1))
    throttle.account([], Usage(size_bytes=60_000))
    with pytest.raises(Postpone) as caught:
        throttle.wait(items(1))
    assert caught.value.steady
    assert caught.value.delay_s == 1
    assert 55_000 < throttle.checkpoint["owed"]["bytes"] < 60_000
    again = bench.throttle(checkpoint={"begun": [], **throttle.checkpoint}, bytes_per_s=1000)
    with pytest.raises(Postpone):
        again.wait(items(1))
    bench.clock.now_s += 3600
    assert throttle.checkpoint["owed"]["bytes"] > again.checkpoint["owed"]["bytes"]


def test_groups_are_no_larger_than_a_second_allows(bench: ThrottleBench) -> None:
    assert bench.throttle(requests_per_s=3.5).group_items(8) == 3
    assert bench.throttle(requests_per_s=0.2).group_items(8) == 1
    assert bench.throttle(requests_per_s=1000).group_items(8) == 8


def test_a_group_of_unknown_size_is_one_item_and_then_as_many_as_a_second_allows(bench: ThrottleBench) -> None:
    throttle = bench.throttle(bytes_per_s=1000)
    assert throttle.group_items(8, items(8, 300)) == 3
    assert throttle.group_items(8, items(8, 5000)) == 1
    assert throttle.group_items(8, items(8)) == 1
    throttle.wait(items(1))
    throttle.account([], Usage(size_bytes=250))
    assert throttle.group_items(8, items(8)) == 4
    throttle.wait(items(4))
    throttle.account([], Usage(size_bytes=0))
    assert throttle.group_items(8, items(8)) == 8
    assert throttle.group_items(8, items(2)) >= 2


def test_what_a_chunk_owes_at_its_end_is_paid_at_any_time_of_the_day(bench: ThrottleBench) -> None:
    at = datetime.fromtimestamp(bench.clock.now_s, ZoneInfo("UTC"))
    throttle = bench.throttle(bytes_per_s=1000, window=f"{at.hour:02}:00-{(at.hour + 1) % 24:02}:00")
    throttle.wait(items(1))
    throttle.account([], Usage(size_bytes=2000))
    bench.clock.now_s += 2 * 3600
    assert 0.9 <= throttle.clear_deficit() <= 1.6
    throttle.account([], Usage(size_bytes=60_000))
    with pytest.raises(Postpone):
        throttle.clear_deficit()
    assert 50_000 < throttle.checkpoint["owed"]["bytes"] < 60_000


def test_a_long_debt_is_paid_not_much_slower_than_the_rate(bench: ThrottleBench) -> None:
    throttle = bench.throttle(bytes_per_s=1000, requests_per_s=0.05)
    throttle.wait([])
    throttle.account([], Usage(size_bytes=60_000, requests=0))
    begun_s = bench.clock.now_s
    while throttle.checkpoint:
        try:
            throttle.clear_deficit()
        except Postpone as wait:
            bench.clock.now_s += wait.delay_s
    assert 58 <= bench.clock.now_s - begun_s <= 90
    throttle.account([], Usage(size_bytes=0, requests=2))
    with pytest.raises(Postpone) as caught:
        throttle.clear_deficit()
    assert caught.value.delay_s == 20, "a rate that gives out a ticket in twenty seconds is looked at that often"


def test_requests_and_bytes_are_paid_for_at_the_same_time(bench: ThrottleBench) -> None:
    throttle = bench.throttle(bytes_per_s=1000, requests_per_s=10)
    throttle.wait([])
    throttle.account([], Usage(size_bytes=2000, requests=20))
    assert 0.9 <= throttle.clear_deficit() <= 1.6
