"""The engine of batches: plan, apply chunk by chunk, see to the end. What an item is, is said by the batch's kind.

A batch has a job of its own, its *conductor*, which plans, then sleeps in the ledger and looks now and then; each
chunk of the plan is a job of the ledger as well. So a batch survives whatever a job survives, and nothing here loops.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from worker.batches import CHUNK_ITEMS, Batch, Batches, Item, Settled
from worker.errors import Cancelled, CourierError, NotFound
from worker.jobs.run import NotYet, Run
from worker.jobs.tools import Tools
from worker.pacs.protocol import Pacs
from worker.payloads import BatchChunkJob, BatchChunkPayload, BatchJob, BatchStatePayload, read_job

#: How many chunks of a batch are open at a time, over all workers, and how many items of each are worked at together.
WIDTH = 4
GROUP_ITEMS = 8
#: How soon the conductor looks again; how soon a chunk does, if it is paused or its items are in other jobs' hands.
LOOK_AGAIN_S = 1.0
TURN_S = 1.0


@dataclass(frozen=True)
class Desk:
    """What a kind works with: the batch, the attempt at one of its chunks, and the tools."""

    batch: Batch
    run: Run
    tools: Tools


class Kind(Protocol):
    """What a batch is about. It SHALL keep no state of its own."""

    def pages(self, pacs: Pacs, order: Mapping[str, Any], warnings: list[str]) -> Iterator[list[str]]:
        """The texts of the items on one server, page by page; what has to be known of the plan goes to ``warnings``."""
        ...

    def apply(self, items: Sequence[Item], desk: Desk, *, resumed: set[int]) -> list[Settled | CourierError | None]:
        """Do the items at the same time. ``resumed``: those that an earlier attempt may have done.

        An error leaves its item open, for another attempt; None: another job is at it.
        """
        ...


# --- the conductor ----------------------------------------------------------------------------------------------


def conduct(kind: Kind, batch: Batch, run: Run, tools: Tools, *, dry_run: bool) -> Batch:
    """One look at a batch: plan it, start what may start, and give it back when it is over.

    Raises
    ------
    NotYet
        It goes on; look again.
    Cancelled
        Somebody has ended it; ``details`` say how far it came.
    """
    batches = Batches(tools.ledger)
    if batch.state == "planning":
        with run.step("plan"):
            _plan(kind, batch, run, tools, dry_run=dry_run)
    batches.fill(batch.id)
    batch = _current(batches, batch.id)
    _bury_lost_chunks(batch, batches, run, tools)
    batch = _current(batches, batch.id)
    if batch.state == "cancelled" and not batches.open_chunks(batch):
        batches.expire(batch.id)
        raise Cancelled(
            f"The batch was cancelled after {batch.settled} of {batch.items} items.", details=batch.as_json()
        )
    if batch.state == "running" and batch.finished == batch.chunks:
        batches.steer(batch.id, "done", out_of=["running"])
        batch = _current(batches, batch.id)
    if not batch.over or batch.state == "cancelled":
        raise NotYet(f"{batch.settled} of {batch.items} items are settled", delay_s=LOOK_AGAIN_S)
    batches.expire(batch.id)
    return batch


def _plan(kind: Kind, batch: Batch, run: Run, tools: Tools, *, dry_run: bool) -> None:
    """List what there is to do, server by server in turns, and freeze it. From the start, if an earlier try broke."""
    batches = Batches(tools.ledger)
    batches.clear_plan(batch.id)
    warnings: list[str] = []
    pages = {name: kind.pages(tools.fleet[name], batch.order, warnings) for name in batch.servers}
    planned = dict.fromkeys(batch.servers, 0)
    lines: list[tuple[int, str]] = []
    chunks = 0
    while pages:
        for position, name in enumerate(batch.servers):
            texts = next(pages[name], None) if name in pages else []
            if texts is None:
                del pages[name]
                continue
            new = batches.unseen(batch.id, position, texts)
            planned[name] += len(new)
            lines += [(position, text) for text in new]
        while len(lines) >= CHUNK_ITEMS or (lines and not pages):
            batches.plan_chunk(batch.id, chunks, lines[:CHUNK_ITEMS])
            lines, chunks = lines[CHUNK_ITEMS:], chunks + 1
        run.stage = f"plan {sum(planned.values())}"
        if batches.state(batch.id) != "planning":
            return
    state: Any = "planned" if dry_run else "running"
    batches.freeze(batch.id, chunks=chunks, planned=planned, warnings=warnings, state=state)


def _bury_lost_chunks(batch: Batch, batches: Batches, run: Run, tools: Tools) -> None:
    """A chunk whose job is over without having ended it (a dead letter) is settled as failed, with its code."""
    for chunk in batches.open_chunks(batch):
        record = tools.ledger.look(f"{batch.id}.{chunk}")
        if record.get("state") not in ("done", "dead"):
            continue
        still_open = [one.item for one in batches.items(batch, chunk) if one.status == "open"]
        message = "The job that was to do it has ended; see the dead letters."
        failed = [Settled(item, "failed", record.get("code", ""), message) for item in still_open]
        batches.settle(batch.id, failed, job_id=run.job_id, fence=run.fence)
        batches.end_chunk(batch.id, chunk)


def _current(batches: Batches, batch_id: str) -> Batch:
    batch = batches.get(batch_id)
    if batch is None:
        raise NotFound(f"No batch is called {batch_id}; batches are kept as long as results.")
    return batch


# --- a chunk ----------------------------------------------------------------------------------------------------


@dataclass
class _Left:
    """Why items of a chunk are still open after an attempt."""

    down: dict[str, CourierError] = field(default_factory=dict)
    busy: bool = False
    stopped: bool = False


def chunk(message: Mapping[str, Any], run: Run, tools: Tools, *, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Do what is still open of one chunk, and let the next one begin."""
    job = read_job(BatchChunkJob, message)
    batches = Batches(tools.ledger)
    batch = _current(batches, job.batch_id)
    with run.step("apply"):
        left = _apply(kinds[batch.kind], job.chunk, Desk(batch, run, tools))
    still_open = [one.item for one in batches.items(batch, job.chunk) if one.status == "open"]
    if still_open and not left.stopped:
        if left.down and not run.last:
            raise next(iter(left.down.values()))
        if left.busy:
            raise NotYet("other jobs are at the same studies", delay_s=TURN_S)
        _give_up(batches, batch, still_open, left, run)
    batches.end_chunk(batch.id, job.chunk)
    batches.fill(batch.id)
    return BatchChunkPayload(job_id=run.job_id, batch_id=batch.id, chunk=job.chunk).as_json()


def _apply(kind: Kind, number: int, desk: Desk) -> _Left:
    """Group by group. A server that fails is not asked again in this attempt, so that its time-outs do not add up."""
    batches, run = Batches(desk.tools.ledger), desk.run
    begun: set[int] = set(run.memo["begun"]) if run.memo else set()
    still_open = [one.item for one in batches.items(desk.batch, number) if one.status == "open"]
    left = _Left()
    for at in range(0, len(still_open), GROUP_ITEMS):
        state = batches.state(desk.batch.id)
        if state == "paused":
            raise NotYet("the batch is paused", delay_s=TURN_S)
        if state != "running":
            left.stopped = True
            break
        group = [item for item in still_open[at : at + GROUP_ITEMS] if item.server not in left.down]
        resumed = begun & {item.number for item in group}
        begun |= {item.number for item in group}
        run.intend({"begun": sorted(begun)})
        results = kind.apply(group, desk, resumed=resumed)
        settled = [one for one in results if isinstance(one, Settled)]
        batches.settle(desk.batch.id, settled, job_id=run.job_id, fence=run.fence)
        for item, result in zip(group, results, strict=True):
            if isinstance(result, CourierError):
                left.down[item.server] = result
            else:
                begun.discard(item.number)
                left.busy |= result is None
    run.ledger.intend(run.job_id, run.fence, {"begun": sorted(begun)})  # what nobody began is not resumed
    return left


def _give_up(batches: Batches, batch: Batch, items: Sequence[Item], left: _Left, run: Run) -> None:
    """The last attempt: what its servers did not do has failed."""
    errors = [left.down[item.server] for item in items]
    failed = [
        Settled(item, "failed", error.payload["code"], error.message) for item, error in zip(items, errors, strict=True)
    ]
    batches.settle(batch.id, failed, job_id=run.job_id, fence=run.fence)


# --- by hand ----------------------------------------------------------------------------------------------------


def show(message: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
    return _told(message, run, tools)


def pause(message: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
    """Begin nothing new until it is resumed; what is under way comes to its end."""
    job = read_job(BatchJob, message)
    Batches(tools.ledger).steer(job.batch_id, "paused", out_of=["running"])
    return _told(message, run, tools)


def resume(message: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
    job = read_job(BatchJob, message)
    batches = Batches(tools.ledger)
    batches.steer(job.batch_id, "running", out_of=["paused"])
    batches.fill(job.batch_id)
    return _told(message, run, tools)


def cancel(message: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
    """End it; what was done stays done."""
    job = read_job(BatchJob, message)
    Batches(tools.ledger).steer(job.batch_id, "cancelled", out_of=["planning", "running", "paused"])
    return _told(message, run, tools)


def _told(message: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
    batch = _current(Batches(tools.ledger), read_job(BatchJob, message).batch_id)
    return BatchStatePayload.model_validate({"job_id": run.job_id, **batch.as_json()}).as_json()
