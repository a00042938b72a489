"""What a batch of migrations writes down, by many threads at a time. No server, no Redis."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest

from courier.batches.store import Item, ItemOutcome
from courier.ledger.jobs import LeaseLost
from worker.batches.migrations import _ChunkBook


class SlowBook(_ChunkBook):
    """A book in which writing takes a while; ``written`` are the entries of each time."""

    def __init__(self, *, breaks_at: int | None = None, waits_for: int = 0) -> None:
        super().__init__(cast(Any, SimpleNamespace()))
        self.written: list[list[ItemOutcome]] = []
        self.alone = threading.Lock()
        self.breaks_at = breaks_at
        self.waits_for = waits_for

    def _record_outcomes(self, entries: Sequence[ItemOutcome]) -> None:
        assert self.alone.acquire(blocking=False), "two have the pen"
        deadline = time.monotonic() + 30
        while not self.written and len(self._waiting) < self.waits_for and time.monotonic() < deadline:
            time.sleep(0.001)
        self.alone.release()
        if self.breaks_at is not None and len(self.written) == self.breaks_at:
            raise LeaseLost
        self.written.append(list(entries))


def entries(count: int) -> list[ItemOutcome]:
    return [ItemOutcome(Item(number, "", f"1.{number}"), "open") for number in range(count)]


def test_those_who_wait_for_the_pen_are_written_together_and_each_once() -> None:
    book = SlowBook(waits_for=15)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(book.write, entries(16)))
    assert [len(some) for some in book.written] == [1, 15]
    assert sorted(one.item.number for some in book.written for one in some) == list(range(16))


def test_whoever_returns_knows_that_his_entry_stands() -> None:
    book, lost = SlowBook(breaks_at=1), 0
    with ThreadPoolExecutor(16) as pool:
        futures = {one.item.number: pool.submit(book.write, one) for one in entries(64)}
    stands = {one.item.number for some in book.written for one in some}
    for number, future in futures.items():
        if future.exception() is None:
            assert number in stands
        else:
            lost += 1
            with pytest.raises(LeaseLost):
                future.result()
    assert lost == 64 - len(stands)
