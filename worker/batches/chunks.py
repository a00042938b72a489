"""One chunk of a batch in one pass: group by group, each outcome written down as soon as it is known.

The course of a batch is in ``batches.py``; what is done to an item, with its kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from courier.batches.store import STATE_OF, Batch, Batches, Item, Pass, Row, Settled
from courier.errors import CourierError, InvalidRequest, Refused, first_to_wait_for, is_final, is_resting
from courier.messages import BatchChunkJob, read_job
from courier.results import BatchChunkPayload
from courier.waits import BATCH_PAUSED
from worker.batches.coordinator import (
    TURN_S,
    Answer,
    Desk,
    Kind,
    Notes,
    Spent,
    current,
    left_open,
    settle,
    slot,
    to_do,
    unplaced_at,
)
from worker.batches.throttle import Pace, metered_fleet
from worker.jobs.attempt import NotYet, Run
from worker.jobs.delete_lock import is_given_up
from worker.jobs.services import Tools


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
    tools = replace(tools, fleet=tools.bulk or tools.fleet)
    job = read_job(BatchChunkJob, message)
    batches = Batches(tools.ledger)
    batch = current(batches, job.batch_id)
    told = BatchChunkPayload(job_id=run.job_id, batch_id=batch.id, which=job.which, chunk=job.chunk).as_json()
    if job.round != batch.of(job.which).round:  # a message that is very late: this round is over
        return told
    with slot(run, tools), run.step(job.which):
        attempt = _Attempt(kinds[batch.kind], job, batch, run, tools)
        left = attempt.go()
        still_open = [row.item for row in _open_rows(batches, batch, job)]
        if still_open and not left.stopped:
            errors = [error for item in still_open if (error := left.error_of(item))]
            if errors and (not run.last or any(map(is_resting, errors))):
                raise first_to_wait_for(errors)
            if left.busy:
                raise _busy(run)
            _give_up(batch, job, still_open, left, run)
        if not left.stopped:
            attempt.pay_up()
    if left.stopped and current(batches, batch.id).of(job.which).round != job.round:
        return told  # the chunk is another job's now
    over = batches.end_chunk(batch.id, job.which, job.chunk)
    if left.stopped:
        _leave(batches, batch)
    elif over:
        _tell_conductor(batch, tools)
    else:
        tools.wake(batches.fill(batch, job.which))
    return told


def _busy(run: Run) -> NotYet:
    """Another job holds what the open items need; the first of them is named."""
    owner = next(iter(run.owners), "")
    who = f"job {owner} is" if owner else "other jobs are"
    return NotYet(f"{who} at the same studies", delay_s=TURN_S, owner=owner)


def _open_rows(batches: Batches, batch: Batch, job: BatchChunkJob) -> list[Row]:
    """What the pass still has to do of a chunk, with all that is known of it."""
    surveyed: tuple[Pass, ...] = ("survey",) if "survey" in batch.passes else ()
    passes: list[Pass] = list(dict.fromkeys(("apply", job.which, *surveyed)))
    return [row for row in batches.chunk_rows(batch, job.chunk, passes) if to_do(job.which, row)]


@dataclass
class _Attempt:
    """An attempt at a chunk in a pass. ``begun`` are the items that it or an earlier one may have done."""

    kind: Kind
    job: BatchChunkJob
    batch: Batch
    run: Run
    tools: Tools
    left: _Left = field(default_factory=_Left)

    def __post_init__(self) -> None:
        self.batches = Batches(self.tools.ledger)
        self.pace = Pace(self.batch, self.run, self.tools)
        self.notes = Notes.of(self.run.memo, pace=self.pace.memo)
        self.rows: dict[int, Row] = {}

    def go(self) -> _Left:
        """Group by group. A server that is down is not asked again, so that its time-outs do not add up."""
        self.rows = {row.item.number: row for row in _open_rows(self.batches, self.batch, self.job)}
        items = self._configured([row.item for row in self.rows.values()])
        for planned in self._groups(items):
            group = [item for item in planned if item.server not in self.left.down]
            if group and not self._may_go_on(group):
                self.left.stopped = True
                self._leave_open()
                break
            if group:
                self._do(group)
        self._remember()
        return self.left

    def _groups(self, items: list[Item]) -> Iterator[Sequence[Item]]:
        """What failed before keeps nobody else from its turn; what killed a worker, perhaps, comes last and alone."""
        suspects = frozenset(self.notes.at)
        first = sorted((item for item in items if item.number not in suspects), key=self._was_begun)
        while first:
            size = self.pace.group_items(self.kind.group_items, first)
            group, first = first[:size], first[size:]
            yield group
        yield from ([item] for item in items if item.number in suspects)

    def _was_begun(self, item: Item) -> bool:
        return item.number in self.notes.begun

    def _may_go_on(self, group: Sequence[Item]) -> bool:
        try:
            if not self._is_on():
                return False
            return not self.pace.wait(group) or self._is_on()
        except NotYet:
            self._remember()
            raise

    def _is_on(self) -> bool:
        """Whether the batch is still in this round of this pass."""
        batch = current(self.batches, self.batch.id)
        if batch.of(self.job.which).round != self.job.round:
            return False
        if batch.state == "paused":
            raise NotYet("the batch is paused", delay_s=TURN_S, code=BATCH_PAUSED)
        return batch.state == STATE_OF[self.job.which]

    def _do(self, group: Sequence[Item]) -> None:
        resumed = self.notes.begun & {item.number for item in group}
        self.notes.at = {item.number for item in group}
        self.notes.begun |= self.notes.at
        self.notes.pace = self.pace.memo
        self.run.intend(self.notes.as_json())
        spent = Spent()
        tools = replace(self.tools, fleet=metered_fleet(self.tools.fleet, spent))
        desk = Desk(self.batch, self.run, tools, rows=self.rows, down=self.left.down, spent=spent, notes=self.notes)
        answers = [
            self._or_given_up(*pair)
            for pair in zip(group, _answers(self.kind, self.job.which, group, desk, resumed), strict=True)
        ]
        unplaced = unplaced_at(self.batch, self.job.which)
        settled = [one for one in (_settled(*pair, unplaced) for pair in zip(group, answers, strict=True)) if one]
        settle(self.batch, self.job.which, self.job.chunk, settled, run=self.run)
        self.pace.account(settled, spent)
        self.notes.begun -= {one.item.number for one in settled if one.status != "open"}
        self.notes.begun -= {item.number for item, answer in zip(group, answers, strict=True) if answer is None}
        _note_what_is_left(group, answers, self.left)

    def _or_given_up(self, item: Item, answer: Answer) -> Answer:
        """``answer``, or that it waits no longer for an archive to end the deletion of a study."""
        if not isinstance(answer, CourierError):
            return answer
        if not is_given_up(answer, job_id=self.run.job_id, ledger=self.tools.ledger, last=self.run.last):
            return answer
        server = answer.server_name or unplaced_at(self.batch, self.job.which)
        return Settled(item, "failed", answer.payload["code"], answer.message, server=server)

    def pay_up(self) -> None:
        """The chunk ends when it has paid for what it took, or each would begin with nothing owed."""
        if self.pace.memo and self._is_on():
            try:
                self.pace.pay_up()
            finally:
                self._remember()

    def _leave_open(self) -> None:
        """The memo goes with this job; what it says of open items has to be known to a retry and to an undo."""
        items = [row.item for row in _open_rows(self.batches, self.batch, self.job)]
        desk = Desk(self.batch, self.run, self.tools, rows=self.rows, notes=self.notes)
        settle(
            self.batch, self.job.which, self.job.chunk, left_open(self.kind, self.job.which, items, desk), run=self.run
        )

    def _remember(self) -> None:
        """What nobody has begun is not resumed by the next attempt, and what this one has survived not suspected."""
        self.notes.at = set()
        self.notes.pace = self.pace.memo
        memo = self.notes.as_json()
        if any(memo.values()) or self.run.memo:
            self.run.note(memo)

    def _configured(self, items: list[Item]) -> list[Item]:
        """The items whose servers the settings still know; the others have failed."""
        gone = {item.number: name for item in items if (name := self._unknown_server(item)) is not None}
        desk = Desk(self.batch, self.run, self.tools, rows=self.rows, notes=self.notes)
        lost = [item for item in items if item.number in gone]
        begun = {one.item: one for one in left_open(self.kind, self.job.which, lost, desk)}
        why = "No server is called {} any more; put it back into the settings, then {} the batch."
        wish = "retry" if self.job.which in ("survey", "apply") else self.job.which
        unplaced = unplaced_at(self.batch, self.job.which)
        failed = [
            replace(
                begun.get(item) or Settled(item, "failed", server=unplaced or gone[item.number]),
                status="failed",
                code=InvalidRequest.code,
                message=why.format(gone[item.number], wish),
            )
            for item in lost
        ]
        settle(self.batch, self.job.which, self.job.chunk, failed, run=self.run)
        return [item for item in items if item.number not in gone]

    def _unknown_server(self, item: Item) -> str | None:
        """The server that is planned for an item, or where it was done, if that is looked at or taken back."""
        names = [item.server] if item.server else self._ordered(item)
        names += [self.batch.order.get("from_server"), self.batch.order.get("to_server")]
        if self.job.which in ("verify", "undo"):
            names.append(self.rows[item.number].settled.server_name)
        return next((name for name in names if name and name not in self.tools.fleet.names), None)

    def _ordered(self, item: Item) -> list[Any]:
        """The servers that the order names, and those on which the survey has seen the item."""
        order, survey = self.batch.order, self.rows[item.number].passes.get("survey")
        return [order.get("server"), *(order.get("servers") or ()), *(survey.result.get("on", ()) if survey else ())]


def _answers(kind: Kind, which: Pass, group: Sequence[Item], desk: Desk, resumed: set[int]) -> list[Answer]:
    try:
        return kind.passes[which](group, desk, resumed=resumed)
    except CourierError as error:
        return [error] * len(group)


def _settled(item: Item, answer: Answer, unplaced: str) -> Settled | None:
    if is_final(answer):
        status = "refused" if isinstance(answer, Refused) else "failed"
        server = answer.server_name or unplaced
        return Settled(item, cast(Any, status), answer.payload["code"], answer.message, server=server)
    return answer if isinstance(answer, Settled) else None


def _note_what_is_left(group: Sequence[Item], answers: Sequence[Answer], left: _Left) -> None:
    """A server is down when all that it was asked in a group came to an error."""
    answered = set()
    down = {}
    for item, answer in zip(group, answers, strict=True):
        if answer is None or (isinstance(answer, Settled) and answer.status == "open"):
            left.busy = True
        if not isinstance(answer, CourierError) or is_final(answer):
            answered.add(item.server)
            continue
        left.errors[item.number] = answer
        if item.server and answer.payload["code"].startswith("pacs_"):
            down[answer.server_name or item.server] = answer
    left.down.update({name: error for name, error in down.items() if name not in answered})


def _give_up(batch: Batch, job: BatchChunkJob, items: Sequence[Item], left: _Left, run: Run) -> None:
    """The last attempt: what its servers did not do has failed."""
    errors = [(item, cast(CourierError, left.error_of(item))) for item in items]
    unplaced = unplaced_at(batch, job.which)
    failed = [
        Settled(item, "failed", error.payload["code"], error.message, server=error.server_name or unplaced)
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
