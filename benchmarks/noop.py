"""A kind of batch that does nothing, so that what remains is what batches themselves cost.

Loaded into a worker by ``celery worker -I benchmarks.noop``; the product does not have it. Set by the environment:

``NOOP_SLEEP_S``     how long a group takes
``NOOP_GROUP``       how many items are a group (100)
``NOOP_LOG``         receives one line per item done; what an earlier attempt may have done is looked up in it
``NOOP_RECEIPTS``    each item leaves a result as an upload does: three UIDs, a digest, a size
``NOOP_LISTS``       how many items a worker finds, if an order brings none; a thousand at a time
``NOOP_LIST_S``      how long it looks for each thousand

An item whose text ends in ``!kill`` kills its worker.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from celery import Task

from benchmarks.listing import listed
from courier.batches.planner import Planned
from courier.batches.store import Item, ItemOutcome, Pass
from courier.messages import BatchOrderJob
from worker.app import app
from worker.batches import coordinator
from worker.batches.coordinator import ItemResult, PassContext, PassHandler
from worker.tasks.batches import KINDS
from worker.tasks.door import deliver

SLEEP_S = float(os.environ.get("NOOP_SLEEP_S", "0"))
LOG = Path(os.environ["NOOP_LOG"]) if "NOOP_LOG" in os.environ else None
RECEIPTS = "NOOP_RECEIPTS" in os.environ
LISTS = int(os.environ.get("NOOP_LISTS", "0"))
LIST_S = float(os.environ.get("NOOP_LIST_S", "0"))


class Noop:
    """Done as soon as it is asked for."""

    group_items = int(os.environ.get("NOOP_GROUP", "100"))

    @property
    def passes(self) -> Mapping[Pass, PassHandler]:
        return {"apply": self.apply, "verify": self.verify, "undo": self.undo}

    def check(self, item: Planned) -> Planned:
        return item

    def pages(self, context: PassContext) -> Iterator[Sequence[Planned]]:  # noqa: ARG002 - of a kind
        for first in range(0, LISTS, 1000):
            time.sleep(LIST_S)
            yield [Planned(listed(number)) for number in range(first, min(first + 1000, LISTS))]

    def apply(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:  # noqa: ARG002
        done = _done(items) if resumed else set()
        for item in items:
            if item.text.endswith("!kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            if LOG and item.text not in done:
                _write(item.text)
        time.sleep(SLEEP_S)
        return [ItemOutcome(item, "stored", result=_receipt(item) if RECEIPTS else {}, server="here") for item in items]

    def verify(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:  # noqa: ARG002
        return [ItemOutcome(item, "verified") for item in items]

    def undo(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:  # noqa: ARG002
        return [ItemOutcome(item, "undone") for item in items]


def _receipt(item: Item) -> dict[str, Any]:
    digest = hashlib.sha256(item.text.encode()).hexdigest()
    study = f"2.25.{int(hashlib.sha256(item.text.rpartition('/')[0].encode()).hexdigest()[:32], 16)}"
    return {
        "study_uid": study,
        "series_uid": study + ".1",
        "image_uid": f"2.25.{int(digest[:32], 16)}",
        "sha256": digest,
        "size_bytes": 500_000 + item.number % 1000,
    }


def _done(items: Sequence[Item]) -> set[str]:
    lines = set(LOG.read_text().splitlines()) if LOG and LOG.exists() else set()
    return lines & {item.text for item in items}


def _write(text: str) -> None:
    assert LOG
    log = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(log, f"{text}\n".encode())  # in one piece, however many write
    finally:
        os.close(log)


KINDS["noop"] = NOOP = Noop()


@app.task(name="pacs.batch.noop", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_batch_noop(self: Task, job: object = None, **_: Any) -> dict[str, Any]:
    return deliver(self, partial(coordinator.order, kind=NOOP, name="noop", form=BatchOrderJob), job)
