"""One chunk of a batch in one pass: group by group, each outcome written down as soon as it is known.

The course of a batch is in ``batches.py``; what is done to an item, with its kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from worker.batches import STATE_OF, Batch, Batches, Item, Pass, Row, Settled
from worker.errors import CourierError, InvalidRequest, NeedsPerson, Refused
from worker.jobs.batches import Answer, Desk, Kind, Spent, current, settle, to_do
from worker.jobs.run import NotYet, Run
from worker.jobs.tools import Tools
from worker.payloads import BatchChunkJob, BatchChunkPayload, read_job

#: How soon a chunk looks again that is paused, has no slot, or whose items are in other jobs' hands.
TURN_S = 1.0


@dataclass
class _Left:
    """Why items of a chunk are still open after an attempt."""

    errors: dict[int, CourierError] = field(default_factory=dict)
    down: dict[str, CourierError] = field(default_factory=dict)
    busy: bool = False
    stopped: bool = False

    def error_of(self, item: Item) -> CourierError | None:
        return self.errors.get(item.number) or self.down.get(item.server)


def chunk(message: Mapping[str, Any], run: Run, tools: Tools, *, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Do what is still open of one chunk, and let the next one begin."""
    run.shown = False
    job = read_job(BatchChunkJob, message)
    batches = Batches(tools.ledger)
    batch = current(batches, job.batch_id)
    with _slot(tools), run.step(job.which):
        left = _do(kinds[batch.kind], job, batch, run, tools)
        still_open = [row.item for row in _open_rows(batches, batch, job.which, job.chunk)]
        if still_open and not left.stopped:
            if any(left.error_of(item) for item in still_open) and not run.last:
                raise next(error for item in still_open if (error := left.error_of(item)))
            if left.busy:
                raise NotYet("other jobs are at the same studies", delay_s=TURN_S)
            _give_up(batch, job, still_open, left, run)
    over = batches.end_chunk(batch.id, job.which, job.chunk)
    if left.stopped:
        _leave(batches, batch)
    elif over:
        _tell_conductor(batch, tools)
    else:
        tools.wake(batches.fill(batch, job.which))
    return BatchChunkPayload(job_id=run.job_id, batch_id=batch.id, which=job.which, chunk=job.chunk).as_json()


@contextmanager
def _slot(tools: Tools) -> Iterator[None]:
    """Batches never take all of a worker: a chunk that finds no slot makes room."""
    if not tools.batch_slots.acquire(blocking=False):
        raise NotYet("as many chunks as may be are under way here", delay_s=TURN_S, steady=True)
    try:
        yield
    finally:
        tools.batch_slots.release()


def _open_rows(batches: Batches, batch: Batch, which: Pass, number: int) -> list[Row]:
    """What the pass still has to do of a chunk, with all that is known of it."""
    surveyed: tuple[Pass, ...] = ("survey",) if "survey" in batch.passes else ()
    passes: list[Pass] = list(dict.fromkeys(("apply", which, *surveyed)))
    return [row for row in batches.chunk_rows(batch, number, passes) if to_do(which, row)]


def _do(kind: Kind, job: BatchChunkJob, batch: Batch, run: Run, tools: Tools) -> _Left:
    """Group by group. A server that fails is not asked again in this attempt, so that its time-outs do not add up."""
    batches = Batches(tools.ledger)
    begun: set[int] = set(run.memo["begun"]) if run.memo else set()
    rows = _open_rows(batches, batch, job.which, job.chunk)
    left = _Left()
    known = {row.item.number: row for row in rows}
    items = _configured([row.item for row in rows], batch, job, run, tools)
    items.sort(key=lambda item: item.number in begun)  # what failed before comes last, and keeps nobody from his turn
    for at in range(0, len(items), kind.group_items):
        state = batches.state(batch.id)
        if state == "paused":
            raise NotYet("the batch is paused", delay_s=TURN_S)
        if state != STATE_OF[job.which]:
            left.stopped = True
            break
        group = [item for item in items[at : at + kind.group_items] if item.server not in left.down]
        if not group:
            continue
        resumed = begun & {item.number for item in group}
        begun |= {item.number for item in group}
        run.intend({"begun": sorted(begun)})
        desk = Desk(batch, run, tools, rows=known, down=left.down, spent=Spent())
        answers = _answers(kind, job.which, group, desk, resumed)
        settled = [one for one in map(_settled, group, answers) if one]
        settle(batch, job.which, job.chunk, settled, run=run)
        begun -= {one.item.number for one in settled if one.status != "open"}
        begun -= {item.number for item, answer in zip(group, answers, strict=True) if answer is None}
        _note_what_is_left(group, answers, left)
    if begun:
        run.ledger.intend(run.job_id, run.fence, {"begun": sorted(begun)})  # what nobody began is not resumed
    return left


def _configured(items: list[Item], batch: Batch, job: BatchChunkJob, run: Run, tools: Tools) -> list[Item]:
    """The items whose server the settings still know; the others have failed."""
    gone = [item for item in items if item.server and item.server not in tools.fleet.names]
    failed = [
        Settled(
            item,
            "failed",
            InvalidRequest.code,
            f"No server is called {item.server} any more; put it back into the settings, then retry the batch.",
        )
        for item in gone
    ]
    settle(batch, job.which, job.chunk, failed, run=run)
    return [item for item in items if item not in gone] if gone else items


def _answers(kind: Kind, which: Pass, group: Sequence[Item], desk: Desk, resumed: set[int]) -> list[Answer]:
    try:
        return kind.passes[which](group, desk, resumed=resumed)
    except CourierError as error:
        return [error] * len(group)


def _settled(item: Item, answer: Answer) -> Settled | None:
    if isinstance(answer, Refused | NeedsPerson):
        status = "refused" if isinstance(answer, Refused) else "failed"
        server = answer.server_name or ""
        return Settled(item, cast(Any, status), answer.payload["code"], answer.message, server=server)
    return answer if isinstance(answer, Settled) else None


def _note_what_is_left(group: Sequence[Item], answers: Sequence[Answer], left: _Left) -> None:
    """A server is down when all that it was asked in a group came to an error."""
    answered = set()
    down = {}
    for item, answer in zip(group, answers, strict=True):
        if answer is None or (isinstance(answer, Settled) and answer.status == "open"):
            left.busy = True
        if not isinstance(answer, CourierError) or isinstance(answer, Refused | NeedsPerson):
            answered.add(item.server)
            continue
        left.errors[item.number] = answer
        if item.server and answer.payload["code"].startswith("pacs_"):
            down[answer.server_name or item.server] = answer
    left.down.update({name: error for name, error in down.items() if name not in answered})


def _give_up(batch: Batch, job: BatchChunkJob, items: Sequence[Item], left: _Left, run: Run) -> None:
    """The last attempt: what its servers did not do has failed."""
    errors = [(item, cast(CourierError, left.error_of(item))) for item in items]
    failed = [
        Settled(item, "failed", error.payload["code"], error.message, server=error.server_name or "")
        for item, error in errors
    ]
    settle(batch, job.which, job.chunk, failed, run=run)


def _leave(batches: Batches, batch: Batch) -> None:
    """The batch was ended, perhaps with its conductor: then nobody else sees to it that it expires."""
    if batches.state(batch.id) == "cancelled":
        batches.expire(batch.id)


def _tell_conductor(batch: Batch, tools: Tools) -> None:
    job = tools.ledger.rouse(batch.conductor)
    if job:
        tools.wake([job])
