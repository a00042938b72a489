"""What a batch of migrations writes down, by many threads at a time. No server, no Redis."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest

from worker.batches import Item, Settled
from worker.jobs.migrations import _Book
from worker.ledger import LeaseLost


class Slow(_Book):
    """A book in which writing takes a while; ``written`` are the entries of each time."""

    def __init__(self, *, breaks_at: int | None = None) -> None:
        super().__init__(cast(Any, SimpleNamespace()))
        self.written: list[list[Settled]] = []
        self.alone = threading.Lock()
        self.breaks_at = breaks_at

    def _settle(self, entries: Sequence[Settled]) -> None:
        assert self.alone.acquire(blocking=False), "two have the pen"
        time.sleep(0.01)
        self.alone.release()
        if self.breaks_at is not None and len(self.written) == self.breaks_at:
            raise LeaseLost
        self.written.append(list(entries))


def entries(count: int) -> list[Settled]:
    return [Settled(Item(number, "", f"1.{number}"), "open") for number in range(count)]


def test_every_entry_is_written_once_and_many_of_them_together() -> None:
    book, ours = Slow(), entries(64)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(book.write, ours))
    written = [one.item.number for some in book.written for one in some]
    assert sorted(written) == list(range(64))
    assert len(book.written) < 32


def test_whoever_returns_knows_that_his_entry_stands() -> None:
    book, lost = Slow(breaks_at=1), 0
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
