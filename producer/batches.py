"""Batches from a program: how far they are, pausing, resuming and cancelling them, and their report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import redis

from producer.errors import BrokerUnavailable, NotFound
from worker.batches import Batch, Batches
from worker.ledger import Ledger


@dataclass(frozen=True)
class BatchDesk:
    """All batches of a ledger. A batch's id is that of the job that began it."""

    ledger: Ledger

    def list(self) -> list[Batch]:
        """The latest first."""
        with _reachable():
            return Batches(self.ledger).list()

    def get(self, batch_id: str) -> Batch:
        """The batch as it stands; `NotFound` if there is none of that id."""
        with _reachable():
            batch = Batches(self.ledger).get(batch_id)
        if batch is None:
            raise NotFound(f"No batch is called {batch_id}; batches are kept as long as results.")
        return batch

    def pause(self, batch_id: str) -> Batch:
        """Begin nothing new until it is resumed; what is under way comes to its end."""
        return self._steered(batch_id, Batches.pause)

    def resume(self, batch_id: str) -> Batch:
        """Go on with it."""
        return self._steered(batch_id, Batches.resume)

    def cancel(self, batch_id: str) -> Batch:
        """End it; what was done stays done."""
        return self._steered(batch_id, Batches.cancel)

    def report(self, batch_id: str) -> Iterator[dict[str, Any]]:
        """What became of each item, one after the other."""
        batch = self.get(batch_id)
        with _reachable():
            for row in Batches(self.ledger).rows(batch):
                yield row.as_json(batch.types)

    def _steered(self, batch_id: str, steer: Callable[[Batches, str], object]) -> Batch:
        with _reachable():
            steer(Batches(self.ledger), batch_id)
        return self.get(batch_id)


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise BrokerUnavailable(f"The ledger cannot be reached ({type(error).__name__}); check LEDGER_URL.") from error
