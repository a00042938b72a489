"""Batches from a program: how far they are, pausing, resuming and cancelling them, and their report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import redis

from producer.errors import BrokerUnavailable, NotFound
from worker.batches import Batch, Batches, State
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
        return self._steer(batch_id, "paused", "running")

    def resume(self, batch_id: str) -> Batch:
        """Go on with it."""
        return self._steer(batch_id, "running", "paused")

    def cancel(self, batch_id: str) -> Batch:
        """End it; what was done stays done."""
        return self._steer(batch_id, "cancelled", "planning", "running", "paused")

    def report(self, batch_id: str) -> Iterator[dict[str, Any]]:
        """What became of each item, one after the other."""
        batch = self.get(batch_id)
        with _reachable():
            for one in Batches(self.ledger).report(batch):
                yield one.as_json(batch.types[one.item.server])

    def _steer(self, batch_id: str, to: State, *out_of: State) -> Batch:
        with _reachable():
            Batches(self.ledger).steer(batch_id, to, out_of=out_of)
        return self.get(batch_id)


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise BrokerUnavailable(f"The ledger cannot be reached ({type(error).__name__}); check LEDGER_URL.") from error
