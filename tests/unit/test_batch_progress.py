"""The pace of a batch is that of its last half minute, and of the pass it is in."""

from __future__ import annotations

from typing import Any

import pytest

from courier.batches.progress import WINDOW_S, Meter, Throughput, is_at_work
from courier.batches.store import Batch


def measure(meter: Meter, at_s: float, settled: int, *, about: str = "apply") -> Throughput:
    return meter.measure(at_s, about=about, settled=settled, carried_bytes=settled * 1000, items=1000)


def test_the_first_look_says_nothing_and_the_second_how_fast_and_how_long() -> None:
    meter = Meter()
    assert measure(meter, 100.0, 200) == Throughput()
    assert measure(meter, 110.0, 300) == Throughput(10.0, 10_000.0, 70.0)


def test_what_was_long_ago_does_not_count() -> None:
    meter = Meter()
    for second in range(60):
        measure(meter, second, 0)
    for second in range(60, 100):
        throughput = measure(meter, second, (second - 59) * 5)
    assert throughput.items_per_s == pytest.approx(5, abs=0.2)
    assert len(meter._samples) <= WINDOW_S + 2


def test_nothing_settled_is_no_pace_and_nobody_knows_when_it_ends() -> None:
    meter = Meter()
    measure(meter, 0, 10)
    assert measure(meter, 10, 10) == Throughput(0.0, 0.0, None)


def test_another_pass_or_a_retry_begins_anew() -> None:
    meter = Meter()
    measure(meter, 0, 0)
    assert measure(meter, 10, 1000).left_s == 0
    assert measure(meter, 11, 0, about="verify") == Throughput()
    assert measure(meter, 12, 100, about="verify").items_per_s == 100
    assert measure(meter, 13, 50, about="verify") == Throughput()


@pytest.mark.parametrize(
    ("state", "window", "at_work"),
    [
        ("running", None, True),
        ("verifying", None, True),
        ("planning", None, False),
        ("paused", None, False),
        ("done", None, False),
        ("running", "00:00-23:59", True),
        ("running", "23:58-23:59", False),
    ],
)
def test_a_batch_is_at_work_while_items_are_to_be_settled(state: Any, window: str | None, at_work: bool) -> None:
    noon_s = 12 * 3600
    assert is_at_work(Batch("b", state, "upload", {"window": window}), noon_s) is at_work
