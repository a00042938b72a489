"""One chunk of a batch in one pass: group by group, each outcome written down as soon as it is known.

The course of a batch is in ``batches.py``; what is done to an item, with its kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from courier.batches.store import STATE_OF, Batch, Batches, Item, ItemOutcome, Pass, Row
from courier.errors import CourierError, InvalidRequest, Refused, first_to_wait_for, is_final, waits_for_server
from courier.ledger.breakers import is_suspension
from courier.messages import BatchChunkJob, read_job
from courier.results import BatchChunkPayload
from courier.waits import BATCH_PAUSED
from worker.batches.coordinator import (
    TURN_S,
    BatchKind,
    ItemResult,
    PassCheckpoint,
    PassContext,
    Usage,
    current,
    left_open,
    record_outcomes,
    slot,
    to_do,
    unplaced_at,
)
from worker.batches.throttle import Throttle, metered_fleet
from worker.jobs.attempt import Attempt, Postpone
from worker.jobs.delete_lock import is_given_up
from worker.jobs.services import Services


@dataclass
class _OpenItems:
    """Why items of a chunk are still open after an attempt."""

    errors: dict[int, CourierError] = field(default_factory=dict)
    down: dict[str, CourierError] = field(default_factory=dict)
    busy: bool = False
    stopped: bool = False

    def error_of(self, item: Item) -> CourierError | None:
        return self.errors.get(item.number) or self.down.get(item.server)


def chunk(
    message: Mapping[str, Any], attempt: Attempt, services: Services, *, kinds: Mapping[str, BatchKind]
) -> dict[str, Any]:
    """Do what is still open of one chunk, and let the next one begin."""
    attempt.shown = False
    services = replace(services, fleet=services.bulk or services.fleet)
    job = read_job(BatchChunkJob, message)
    batches = Batches(services.ledger)
    batch = current(batches, job.batch_id)
    told = BatchChunkPayload(job_id=attempt.job_id, batch_id=batch.id, which=job.which, chunk=job.chunk).as_json()
    if job.round != batch.of(job.which).round:  # a message that is very late: this round is over
        return told
    with slot(attempt, services), attempt.step(job.which):
        chunk_attempt = _ChunkAttempt(kinds[batch.kind], job, batch, attempt, services)
        left = chunk_attempt.go()
        still_open = [row.item for row in _open_rows(batches, batch, job)]
        if still_open and not left.stopped:
            errors = [error for item in still_open if (error := left.error_of(item))]
            _wait_or_try_again(errors, left, attempt)
            _give_up(batch, job, still_open, left, attempt)
        if not left.stopped:
            chunk_attempt.clear_deficit()
    if left.stopped and current(batches, batch.id).of(job.which).round != job.round:
        return told  # the chunk is another job's now
    over = batches.end_chunk(batch.id, job.which, job.chunk)
    if left.stopped:
        _leave(batches, batch)
    elif over:
        _wake_coordinator(batch, services)
    else:
        services.wake(batches.fill(batch, job.which))
    return told


def _wait_or_try_again(errors: Sequence[CourierError], left: _OpenItems, attempt: Attempt) -> None:
    """Raise what the chunk does next for its open items; return if this was the last attempt at them.

    Items whose server an operator has taken out of service keep the others from no attempt: for those the chunk waits
    when nothing else is left to do.
    """
    suspended = [error for error in errors if is_suspension(error.open_circuit)]
    others = [error for error in errors if error not in suspended]
    if others and (not attempt.last or any(map(waits_for_server, others))):
        raise first_to_wait_for(others)
    if left.busy:
        raise _busy(attempt)
    if suspended:
        raise first_to_wait_for(suspended)


def _busy(attempt: Attempt) -> Postpone:
    """Open items have a further step to go, or another job holds what they need; the first such job is named."""
    owner = next(iter(attempt.owners), "")
    sentence = (
        f"job {owner} is at the same studies" if owner else "items have a further step to go, or wait for other jobs"
    )
    return Postpone(sentence, delay_s=TURN_S, owner=owner)


def _open_rows(batches: Batches, batch: Batch, job: BatchChunkJob) -> list[Row]:
    """What the pass still has to do of a chunk, with all that is known of it."""
    preflight: tuple[Pass, ...] = ("survey",) if "survey" in batch.passes else ()
    passes: list[Pass] = list(dict.fromkeys(("apply", job.which, *preflight)))
    return [row for row in batches.chunk_rows(batch, job.chunk, passes) if to_do(job.which, row)]


@dataclass
class _ChunkAttempt:
    """An attempt at a chunk in a pass. ``begun`` are the items that it or an earlier one may have done."""

    kind: BatchKind
    job: BatchChunkJob
    batch: Batch
    attempt: Attempt
    services: Services
    left: _OpenItems = field(default_factory=_OpenItems)

    def __post_init__(self) -> None:
        self.batches = Batches(self.services.ledger)
        self.throttle = Throttle(self.batch, self.attempt, self.services)
        self.pass_checkpoint = PassCheckpoint.of(self.attempt.checkpoint, throttle=self.throttle.checkpoint)
        self.rows: dict[int, Row] = {}

    def go(self) -> _OpenItems:
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
        self._save_checkpoint()
        return self.left

    def _groups(self, items: list[Item]) -> Iterator[Sequence[Item]]:
        """What failed before keeps nobody else from its turn; what killed a worker, perhaps, comes last and alone."""
        crash_suspects = frozenset(self.pass_checkpoint.at)
        first = sorted((item for item in items if item.number not in crash_suspects), key=self._was_begun)
        while first:
            size = self.throttle.group_items(self.kind.group_items, first)
            group, first = first[:size], first[size:]
            yield group
        yield from ([item] for item in items if item.number in crash_suspects)

    def _was_begun(self, item: Item) -> bool:
        return item.number in self.pass_checkpoint.begun

    def _may_go_on(self, group: Sequence[Item]) -> bool:
        try:
            if not self._is_on():
                return False
            return not self.throttle.wait(group) or self._is_on()
        except Postpone:
            self._save_checkpoint()
            raise

    def _is_on(self) -> bool:
        """Whether the batch is still in this round of this pass."""
        batch = current(self.batches, self.batch.id)
        if batch.of(self.job.which).round != self.job.round:
            return False
        if batch.state == "paused":
            raise Postpone("the batch is paused", delay_s=TURN_S, code=BATCH_PAUSED)
        return batch.state == STATE_OF[self.job.which]

    def _do(self, group: Sequence[Item]) -> None:
        resumed = self.pass_checkpoint.begun & {item.number for item in group}
        self.pass_checkpoint.at = {item.number for item in group}
        self.pass_checkpoint.begun |= self.pass_checkpoint.at
        self.pass_checkpoint.throttle = self.throttle.checkpoint
        self.attempt.write_intent(self.pass_checkpoint.as_json())
        usage = Usage()
        services = replace(self.services, fleet=metered_fleet(self.services.fleet, usage))
        context = PassContext(
            self.batch,
            self.attempt,
            services,
            rows=self.rows,
            down=self.left.down,
            usage=usage,
            pass_checkpoint=self.pass_checkpoint,
        )
        answers = [
            self._or_given_up(*pair)
            for pair in zip(group, _answers(self.kind, self.job.which, group, context, resumed), strict=True)
        ]
        unplaced = unplaced_at(self.batch, self.job.which)
        outcomes = [one for one in (_outcome_of(*pair, unplaced) for pair in zip(group, answers, strict=True)) if one]
        record_outcomes(self.batch, self.job.which, self.job.chunk, outcomes, attempt=self.attempt)
        self.throttle.account(outcomes, usage)
        self.pass_checkpoint.begun -= {one.item.number for one in outcomes if one.status != "open"}
        self.pass_checkpoint.begun -= {
            item.number for item, answer in zip(group, answers, strict=True) if answer is None
        }
        _note_what_is_left(group, answers, self.left)

    def _or_given_up(self, item: Item, answer: ItemResult) -> ItemResult:
        """``answer``, or that it waits no longer for an archive to end the deletion of a study."""
        if not isinstance(answer, CourierError):
            return answer
        if not is_given_up(answer, job_id=self.attempt.job_id, ledger=self.services.ledger, last=self.attempt.last):
            return answer
        server = answer.server_name or unplaced_at(self.batch, self.job.which)
        return ItemOutcome(item, "failed", answer.payload["code"], answer.message, server=server)

    def clear_deficit(self) -> None:
        """The chunk ends when it has paid for what it took, or each would begin with nothing owed."""
        if self.throttle.checkpoint and self._is_on():
            try:
                self.throttle.clear_deficit()
            finally:
                self._save_checkpoint()

    def _leave_open(self) -> None:
        """The checkpoint goes with this job; what it says of open items has to be known to a retry and to an undo."""
        items = [row.item for row in _open_rows(self.batches, self.batch, self.job)]
        context = PassContext(
            self.batch, self.attempt, self.services, rows=self.rows, pass_checkpoint=self.pass_checkpoint
        )
        record_outcomes(
            self.batch,
            self.job.which,
            self.job.chunk,
            left_open(self.kind, self.job.which, items, context),
            attempt=self.attempt,
        )

    def _save_checkpoint(self) -> None:
        """What nobody has begun is not resumed by the next attempt, and what this one has survived not suspected."""
        self.pass_checkpoint.at = set()
        self.pass_checkpoint.throttle = self.throttle.checkpoint
        checkpoint = self.pass_checkpoint.as_json()
        if any(checkpoint.values()) or self.attempt.checkpoint:
            self.attempt.note(checkpoint)

    def _configured(self, items: list[Item]) -> list[Item]:
        """The items whose servers the settings still know; the others have failed."""
        gone = {item.number: name for item in items if (name := self._unknown_server(item)) is not None}
        context = PassContext(
            self.batch, self.attempt, self.services, rows=self.rows, pass_checkpoint=self.pass_checkpoint
        )
        lost = [item for item in items if item.number in gone]
        begun = {one.item: one for one in left_open(self.kind, self.job.which, lost, context)}
        why = "No server is called {} any more; put it back into the settings, then {} the batch."
        command = "retry" if self.job.which in ("survey", "apply") else self.job.which
        unplaced = unplaced_at(self.batch, self.job.which)
        failed = [
            replace(
                begun.get(item) or ItemOutcome(item, "failed", server=unplaced or gone[item.number]),
                status="failed",
                code=InvalidRequest.code,
                message=why.format(gone[item.number], command),
            )
            for item in lost
        ]
        record_outcomes(self.batch, self.job.which, self.job.chunk, failed, attempt=self.attempt)
        return [item for item in items if item.number not in gone]

    def _unknown_server(self, item: Item) -> str | None:
        """The server that is planned for an item, or where it was done, if that is looked at or taken back."""
        names = [item.server] if item.server else self._ordered(item)
        names += [self.batch.order.get("from_server"), self.batch.order.get("to_server")]
        if self.job.which in ("verify", "undo"):
            names.append(self.rows[item.number].outcome.server_name)
        return next((name for name in names if name and name not in self.services.fleet.names), None)

    def _ordered(self, item: Item) -> list[Any]:
        """The servers that the order names, and those on which the survey has seen the item."""
        order, preflight = self.batch.order, self.rows[item.number].passes.get("survey")
        return [
            order.get("server"),
            *(order.get("servers") or ()),
            *(preflight.result.get("on", ()) if preflight else ()),
        ]


def _answers(
    kind: BatchKind, which: Pass, group: Sequence[Item], context: PassContext, resumed: set[int]
) -> list[ItemResult]:
    try:
        return kind.passes[which](group, context, resumed=resumed)
    except CourierError as error:
        return [error] * len(group)


def _outcome_of(item: Item, answer: ItemResult, unplaced: str) -> ItemOutcome | None:
    if is_final(answer):
        status = "refused" if isinstance(answer, Refused) else "failed"
        server = answer.server_name or unplaced
        return ItemOutcome(item, cast(Any, status), answer.payload["code"], answer.message, server=server)
    return answer if isinstance(answer, ItemOutcome) else None


def _note_what_is_left(group: Sequence[Item], answers: Sequence[ItemResult], left: _OpenItems) -> None:
    """A server is down when all that it was asked in a group came to an error."""
    answered = set()
    down = {}
    for item, answer in zip(group, answers, strict=True):
        if answer is None or (isinstance(answer, ItemOutcome) and answer.status == "open"):
            left.busy = True
        if not isinstance(answer, CourierError) or is_final(answer):
            answered.add(item.server)
            continue
        left.errors[item.number] = answer
        if item.server and answer.payload["code"].startswith("pacs_"):
            down[answer.server_name or item.server] = answer
    left.down.update({name: error for name, error in down.items() if name not in answered})


def _give_up(batch: Batch, job: BatchChunkJob, items: Sequence[Item], left: _OpenItems, attempt: Attempt) -> None:
    """The last attempt: what its servers did not do has failed."""
    errors = [(item, cast(CourierError, left.error_of(item))) for item in items]
    unplaced = unplaced_at(batch, job.which)
    failed = [
        ItemOutcome(item, "failed", error.payload["code"], error.message, server=error.server_name or unplaced)
        for item, error in errors
    ]
    record_outcomes(batch, job.which, job.chunk, failed, attempt=attempt)


def _leave(batches: Batches, batch: Batch) -> None:
    """The batch was ended, perhaps with its coordinator: then no other job sets its expiry."""
    if batches.state(batch.id) == "cancelled":
        batches.expire(batch.id)


def _wake_coordinator(batch: Batch, services: Services) -> None:
    job = services.ledger.wake_now(batch.coordinator)
    if job:
        services.wake([job])
