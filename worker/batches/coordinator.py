"""The course of a batch: plan, then pass after pass over its chunks, to the end. What an item is, its `BatchKind` says.

A batch has a job of its own, its *coordinator*, which plans, then sleeps in the ledger and looks now and then; each
chunk of the plan is in each pass a job of the ledger as well (``chunks.py``). So a batch survives whatever a job
survives, and nothing here loops. The first coordinator bears the batch's id; each later wish (apply a plan, retry,
verify, undo) is a coordinator of its own, one at a time.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import redis

from courier.batches.planner import Planned, Planner
from courier.batches.result import end_payload
from courier.batches.store import (
    ACTIVE,
    DONE_AGAIN,
    NOT_DONE,
    NOWHERE,
    Batch,
    Batches,
    Item,
    ItemOutcome,
    Pass,
    Row,
    State,
    chunk_job,
)
from courier.errors import Cancelled, CourierError, InvalidRequest, NotFound, Refused
from courier.ledger.jobs import LeaseLost
from courier.messages import BatchContinueJob, BatchItem, BatchJob, BatchOrderJob, old_spellings, read_job
from courier.results import BatchStatePayload
from courier.waits import BATCH_PAUSED, BATCH_RUNNING, BATCH_SLOTS
from worker.batches.confirmations import Command, check_may_begin
from worker.jobs.attempt import Attempt, Postpone
from worker.jobs.services import Services

#: How many chunks of a batch are open at a time, over all workers, unless its order says so.
CONCURRENCY = 4
#: How soon the coordinator looks again, if no message wakes it before.
LOOK_AGAIN_S = 1.0
#: How soon somebody looks again who is paused, or whose items others have; and who stands in line for a slot.
TURN_S = 1.0
IN_LINE_S = 3.0

#: What a kind says of an item: settled; an error (`Refused` and `NeedsPerson` settle it as refused and failed, any
#: other leaves it open for another attempt); or None: another job is at it, look again soon.
ItemResult = ItemOutcome | CourierError | None
#: What may be asked of a batch whose plan is frozen.


@dataclass
class Usage:
    """What a group has cost, for the batch's rates. Safe for threads.

    What servers were asked and sent is added for every kind (``throttle.py``). None: no pass has said anything; then it
    was one request per item, and the bytes that the results tell.
    """

    requests: float | None = None
    size_bytes: int | None = None
    _till: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, *, requests: float = 0, size_bytes: int = 0) -> None:
        with self._till:
            self.requests = (self.requests or 0) + requests
            self.size_bytes = (self.size_bytes or 0) + size_bytes


@dataclass
class PassCheckpoint:
    """What an attempt at a chunk leaves to the next, for itself, for the kind and for the pace.

    ``begun`` are the items that this attempt or an earlier one may have done, ``at`` those that it is at; who finds
    any knows that the attempt has died of them, perhaps.
    """

    begun: set[int] = field(default_factory=set)
    kind: Mapping[str, Any] = field(default_factory=dict)
    throttle: Mapping[str, Any] = field(default_factory=dict)
    at: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any] | None, *, throttle: Mapping[str, Any]) -> PassCheckpoint:
        checkpoint = checkpoint or {}
        return cls(
            set(checkpoint.get("begun", ())), checkpoint.get("kind", {}), throttle, set(checkpoint.get("at", ()))
        )

    def as_json(self) -> dict[str, Any]:
        told = {"begun": sorted(self.begun), "at": sorted(self.at), "kind": self.kind}
        return {**{name: what for name, what in told.items() if what}, **self.throttle}


@dataclass(frozen=True)
class PassContext:
    """What a kind works with: the batch, the attempt at one of its chunks (or at its plan), and the tools."""

    batch: Batch
    attempt: Attempt
    services: Services
    #: What is known of the chunk's items, by number.
    rows: Mapping[int, Row] = field(default_factory=dict)
    #: The servers that failed in this attempt, by name, and how: not asked again in it, or their time-outs add up.
    down: dict[str, CourierError] = field(default_factory=dict)
    #: What has to be known of the plan.
    warnings: list[str] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    pass_checkpoint: PassCheckpoint = field(default_factory=PassCheckpoint)

    @property
    def checkpoint(self) -> Mapping[str, Any]:
        """What the kind has written down of this chunk in this pass, also in an earlier attempt."""
        return self.pass_checkpoint.kind

    def save_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Write down what an attempt after a death has to know, before it is acted upon."""
        self.pass_checkpoint.kind = checkpoint
        self.attempt.write_intent(self.pass_checkpoint.as_json())

    def known(self, item: Item, which: Pass = "apply") -> ItemOutcome:
        """What an earlier pass made of the item: where, and its result; `open` if it has not come to it."""
        row = self.rows.get(item.number)
        return (row.passes.get(which) if row else None) or ItemOutcome(item, "open")


class PassHandler(Protocol):
    """One pass over a group of a chunk's items."""

    def __call__(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]: ...


class BatchKind(Protocol):
    """What a batch is about. One module per kind in ``worker/batches``, one line in ``worker/tasks/batches.py``.

    It SHALL keep no state of its own: what it needs later it says in `ItemOutcome.result` and finds again by
    `PassContext.known`.

    A pass is a function like this, say ``apply(items, context, *, resumed)``; it

    * SHALL return one `ItemResult` per item, in the order given;
    * SHALL accept what is done already: ``resumed`` are the numbers of those that an earlier attempt may have done, or
      half done, and whose end nobody has seen;
    * SHALL raise only our errors; a raised one is the answer for the whole group;
    * SHALL NOT sleep, retry, or write receipts and history: an item's receipt is its result;
    * SHALL leave alone what other jobs hold (None), and hold nothing when it returns but what may be half done;
    * SHOULD not ask servers in `PassContext.down`, and add to it those that it finds silent;
    * SHOULD add to `PassContext.usage` what it took beside what it asked the servers of `PassContext.services`, which
      is counted for it.

    A kind that deletes has two methods more: ``refuse_forbidden(command, batch, fleet)`` raises `InvalidRequest` if the
    settings forbid what the command deletes on a server that the order names; ``study_at_stake(command, row, batch,
    fleet)`` gives the UID of the study of which the command deletes images for an item, or None.

    A kind whose checkpoint says what may have been done has a method ``leave(items, context)`` too: of items that
    stay open when their job ends, it gives the `open` `ItemOutcome` whose results a retry or an undo have to know.

    Which items come to it: ``survey`` and ``apply`` get what is open; ``verify`` what was done (`NOT_DONE` says what
    was not), ``undo`` that and whatever left a result. What survey settles as anything but ``planned`` is not applied;
    apply SHALL not rely on a survey having been made. The server of an item is configured when the item comes here.
    """

    @property
    def group_items(self) -> int:
        """How many items of a chunk a pass takes at a time; what is done together is settled together."""
        ...

    @property
    def passes(self) -> Mapping[Pass, PassHandler]:
        """The passes that it has, ``apply`` at least: ``{"apply": self.apply, "verify": self.verify}``."""
        ...

    def check(self, item: Planned) -> Planned:
        """An item from a message as it shall be planned; `InvalidRequest` or `InvalidUid` say what is wrong with it."""
        ...

    def pages(self, context: PassContext) -> Iterator[Sequence[Planned]]:
        """List what there is to do, lazily, page by page, where an order brings no items. The batch's order says what.

        The same item may come twice. What has to be known of the plan goes to `PassContext.warnings`. An error begins
        the plan anew, or ends the batch, as it does with any job: nothing is done before the last page.
        """
        ...


def in_turns(pages: Sequence[Iterator[Sequence[Planned]]]) -> Iterator[Sequence[Planned]]:
    """A page of each in turn, so that a chunk has items of several servers."""
    left = list(pages)
    while left:
        for one in list(left):
            page = next(one, None)
            if page is None:
                left.remove(one)
            else:
                yield page


def to_do(which: Pass, row: Row) -> bool:
    """Whether a pass has anything to do with an item that is still open in it."""
    applied = row.outcome
    if row.passes[which].status != "open":
        return False
    if which in ("survey", "apply"):
        return applied.status == "open"
    return applied.status not in NOT_DONE or (which == "undo" and bool(applied.result))


@contextmanager
def slot(attempt: Attempt, services: Services) -> Iterator[None]:
    """Batches never take all of a worker: who finds no slot makes room, and is woken when its turn has come.

    It is woken before the one that gives its slot back sends for its next piece, so that no batch starves another.
    """
    if not services.batch_slots.take(attempt.job_id):
        sentence = "batches have all the slots of this worker that batches may have"
        raise Postpone(sentence, delay_s=IN_LINE_S, steady=True, code=BATCH_SLOTS)
    try:
        with services.batch_slots.taken():
            yield
    finally:
        with suppress(redis.RedisError):  # who stands in line looks again by itself
            _call_next(services)


def _call_next(services: Services) -> None:
    while (job_id := services.batch_slots.next()) is not None:
        job = services.ledger.wake_now(job_id)
        if job is not None:
            services.wake([job])
            return


# --- the coordinator ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coordinator:
    """An attempt of a job to see a batch through."""

    kind: BatchKind
    batch_id: str
    attempt: Attempt
    services: Services
    may_be_empty: bool = False
    confirm_studies: int | None = None

    @property
    def batches(self) -> Batches:
        return Batches(self.services.ledger)

    @property
    def batch(self) -> Batch:
        return current(self.batches, self.batch_id)

    def order(self, items: Sequence[str | BatchItem] | None = None) -> Batch:
        """Plan it, unless it is planned, then see it through; a dry run ends before anything is done.

        Raises
        ------
        Postpone
            It goes on; look again.
        Cancelled
            Somebody has ended it; ``details`` say how far it came.
        """
        batch = self._take()
        if batch.current is None:
            types = {name: self.services.fleet[name].server.type for name in self.services.fleet.names}
            self.batches.set_fleet(self.batch_id, types)
        if not batch.frozen:
            with slot(self.attempt, self.services), self.attempt.step("plan"):
                self._plan(items)
        self._refuse_an_empty_plan()
        if self.batch.order.get("survey", True):
            self._walk("survey", out_of=["planning"], to="planned")
        else:
            self.batches.steer(self.batch_id, "planned", out_of=["planning"])
        if self.batch.order.get("dry_run"):
            self.batches.expire(self.batch_id)
            return self.batch
        try:
            self._check_may_begin("apply", "apply", out_of=["planned"])
        except Refused:
            self.batches.expire(self.batch_id)  # it stays planned, to be looked at and applied
            raise
        return self._apply(out_of=["planned"])

    def apply(self) -> Batch:
        """See a plan through that was looked at."""
        self._take("planned")
        self._check_may_begin("apply", "apply", out_of=["planned"])
        return self._apply(out_of=["planned"])

    def retry(self) -> Batch:
        """Try again what failed, what verify found missing, and what a cancelled batch had left open."""
        batch = self._take("done", "cancelled")
        self._refuse_what_is_taken_back(batch)
        if batch.order.get("dry_run") and not batch.of("apply").begun_ms:
            raise InvalidRequest("The batch was planned and then cancelled, not begun; order anew what is wanted.")
        self._check_may_begin("retry", "apply", out_of=["done", "cancelled"])
        if self._is_new("apply") and batch.state in ("done", "cancelled"):
            lost = self.batches.reopen_missing(batch) if batch.kind in DONE_AGAIN else 0
            if not self.batches.reopen(batch, "apply", ["failed"]) and not lost:
                raise InvalidRequest("There is nothing to try again: no item of the batch has failed or is open.")
            self.batches.reopen(batch, "verify", ["failed", "differs", "missing", "unverified"])
        return self._apply(out_of=["done", "cancelled"])

    def verify(self) -> Batch:
        """Look once more whether all that was done is so, also of a batch that was cancelled, unless in its undo."""
        batch = self._take("done", "cancelled")
        self._needs("verify")
        self._refuse_what_is_taken_back(batch)
        self._check_may_begin("verify", "verify", out_of=["done", "cancelled"])
        if self._is_new("verify"):
            self.batches.forget_pass(batch, "verify")
        before: State = "done" if batch.of("apply").ended_ms else "cancelled"
        self._walk("verify", out_of=["done", "cancelled"], to=before)
        return self._ended()

    def undo(self) -> Batch:
        """Take back what was done; what an earlier undo could not, once more."""
        batch = self._take("done", "cancelled", "undone")
        self._needs("undo")
        self._check_may_begin("undo", "undo", out_of=["done", "cancelled", "undone"])
        if self._is_new("undo") and batch.state in ("done", "cancelled", "undone"):
            self.batches.reopen(batch, "undo", ["failed", "refused"])
        self._walk("undo", out_of=["done", "cancelled", "undone"], to="undone")
        return self._ended()

    def _apply(self, *, out_of: Sequence[State]) -> Batch:
        batch = self.batch
        verifies = "verify" in self.kind.passes and batch.order.get("verify", True)
        self._walk("apply", out_of=out_of, to="verifying" if verifies else "done")
        if verifies:
            self._walk("verify", out_of=["verifying"], to="done")
        return self._ended()

    def _take(self, *states: State) -> Batch:
        """Be the coordinator, of a batch that is in one of ``states`` unless this one has begun already."""
        batch = self.batch
        mine = batch.coordinator == self.attempt.job_id
        if states and not mine and batch.state not in states:
            raise InvalidRequest(f"The batch is {batch.state}; that can be done when it is {' or '.join(states)}.")
        if other := self.batches.take(self.batch_id, self.attempt.job_id):
            raise InvalidRequest(f"Job {other} is at this batch; wait for it, or cancel it.")
        batch = self.batch
        if batch.state in states and self._is_left_at_work(batch):
            sentence = "chunks that an ended job of this batch had begun are under way"
            raise Postpone(sentence, delay_s=LOOK_AGAIN_S, code=BATCH_RUNNING)
        return batch

    def _is_left_at_work(self, batch: Batch) -> bool:
        """Whether chunks outlive a coordinator that was cancelled or has died: two rounds would do the same items."""
        which, ledger = batch.current, self.services.ledger
        jobs = (
            [chunk_job(batch, which, chunk).job_id for chunk in self.batches.open_chunks(batch, which)] if which else []
        )
        return any(ledger.read_record(job_id).get("state") == "running" for job_id in jobs)

    def _check_may_begin(self, command: Command, first: Pass, *, out_of: Sequence[State]) -> None:
        """Once per command, before its first pass: what has begun is not asked for a confirmation any more."""
        batch = self.batch
        if self._is_new(first) and batch.state in out_of:
            _refuse_unmatched_plan(command, batch)
            _refuse_where_all_is_left_out(command, batch)
            check_may_begin(self.kind, command, batch, self.services, self.confirm_studies)

    def _needs(self, which: Pass) -> None:
        if which not in self.kind.passes:
            raise InvalidRequest(f"A batch of the kind {self.batch.kind} has no {which}.")

    def _refuse_what_is_taken_back(self, batch: Batch) -> None:
        """Verification tops up, and moves; so it would do again what an undo has taken back."""
        if "undo" in batch.passes:
            raise InvalidRequest("The batch is being taken back; undo it to its end, then order anew what is wanted.")

    def _is_new(self, which: Pass) -> bool:
        return self.batch.of(which).begun_by != self.attempt.job_id

    def _refuse_an_empty_plan(self) -> None:
        batch = self.batch
        if batch.items or self.may_be_empty:
            return
        self.batches.cancel(self.batch_id)
        self.batches.expire(self.batch_id)
        sentence = "There is nothing to do: what was asked for holds no item."
        raise InvalidRequest(" ".join([sentence, *batch.warnings]), details=batch.as_json())

    def _walk(self, which: Pass, *, out_of: Sequence[State], to: State) -> None:
        """Look after a pass; returns when it is over, at once if the kind has no such pass."""
        batches = self.batches
        if which not in self.kind.passes:
            batches.steer(self.batch_id, to, out_of=out_of)
            return
        if not self._is_new(which) and self.batch.of(which).ended_ms:
            return
        if not batches.begin(self.batch_id, which, job_id=self.attempt.job_id, out_of=out_of):
            self._stand_aside(which)
        self.services.wake(batches.fill(self.batch, which))
        fail_lost_chunks(self.batch, which, self.attempt, self.services, self.kind)
        batch = self.batch
        if batch.state in ("cancelled", "paused"):
            self._stand_aside(which)
        if batch.of(which).finished == batch.chunks and batches.end_pass(self.batch_id, which, to):
            return
        told = f"{which}: {batch.of(which).settled} of {batch.items} items are settled"
        raise Postpone(told, delay_s=LOOK_AGAIN_S, code=BATCH_RUNNING)

    def _stand_aside(self, which: Pass) -> None:
        """The batch has been steered elsewhere: wait, or end with it when what is under way has ended."""
        batch = self.batch
        if batch.state == "paused":
            raise Postpone("the batch is paused", delay_s=LOOK_AGAIN_S, code=BATCH_PAUSED)
        if batch.state in ACTIVE or self.batches.open_chunks(batch, which):
            raise Postpone(f"the batch is {batch.state}", delay_s=LOOK_AGAIN_S, code=BATCH_RUNNING)
        self.batches.expire(self.batch_id)
        done = batch.of(which).settled
        sentence = f"The batch was cancelled in its {which} after {done} of {batch.items} items."
        raise Cancelled(sentence, details=batch.as_json())

    def _ended(self) -> Batch:
        self.batches.expire(self.batch_id)
        return self.batch

    # --- its plan

    def _plan(self, items: Sequence[str | BatchItem] | None) -> None:
        """Write the plan, and freeze it. From the start, if an earlier try broke."""
        batch = self.batch
        context = PassContext(batch, self.attempt, self.services, warnings=list(batch.warnings))
        pages = iter([[self.kind.check(_planned(one)) for one in items]]) if items else self.kind.pages(context)
        with Planner(self.batches, self.batch_id) as planner:
            for page in pages:
                planner.add_all(page)
                self.attempt.stage = f"plan {planner.items}"
                if self.attempt.lost:
                    raise LeaseLost
                if self.batches.state(self.batch_id) != "planning":
                    break
            planner.freeze(warnings=context.warnings)


def _refuse_unmatched_plan(command: Command, batch: Batch) -> None:
    """Carry out no plan by filters that version 0.1 made: it listed whatever the server returned."""
    if command in ("apply", "retry") and batch.order.get("filters") and not batch.filters_applied:
        raise InvalidRequest(
            "Version 0.1 planned this batch and did not match its filters itself, so the plan may name studies that do"
            " not match. Order it again."
        )


def _refuse_where_all_is_left_out(command: Command, batch: Batch) -> None:
    """Do not say "done" of files of which none is an image: a script may remove what it takes for stored."""
    if command == "apply" and batch.kind == "upload" and batch.of("apply").totals.get("skipped") == batch.items:
        raise InvalidRequest(
            f"There is nothing to upload: by its name none of the {batch.items} files found is an image; see the report"
            " of the batch for the reasons.",
            details=batch.as_json(),
        )


def _planned(one: str | BatchItem) -> Planned:
    return Planned(one) if isinstance(one, str) else Planned(one.item, one.server or "", one.size_bytes)


def fail_lost_chunks(batch: Batch, which: Pass, attempt: Attempt, services: Services, kind: BatchKind) -> None:
    """A chunk whose job is over without having ended it (a dead letter) is settled as failed, with its code.

    One whose job nobody knows any more is written down again.
    """
    batches, ended = Batches(services.ledger), False
    for chunk in batches.open_chunks(batch, which):
        job = chunk_job(batch, which, chunk)
        record = services.ledger.read_record(job.job_id)
        if not record:
            services.ledger.submit(job.job_id, task=job.task, job=job.job, due_in_s=0)
        if record.get("state") not in ("done", "dead"):
            continue
        rows = batches.chunk_rows(batch, chunk, list(dict.fromkeys(("apply", which))))
        message = "The job that was to do it has ended; see the dead letters."
        items = [row.item for row in rows if to_do(which, row)]
        context = PassContext(
            batch,
            attempt,
            services,
            pass_checkpoint=PassCheckpoint.of(json.loads(record.get("memo") or "{}"), throttle={}),
        )
        left = {one.item: one for one in left_open(kind, which, items, context)}
        code = record.get("code", "")
        unplaced = unplaced_at(batch, which)
        failed = [
            replace(
                left.get(item) or ItemOutcome(item, "failed", server=unplaced),
                status="failed",
                code=code,
                message=message,
            )
            for item in items
        ]
        record_outcomes(batch, which, chunk, failed, attempt=attempt)
        batches.end_chunk(batch.id, which, chunk)
        ended = True
    if ended:
        services.wake(batches.fill(batch, which))


def unplaced_at(batch: Batch, which: Pass) -> str:
    """Where an item is counted that ended without a server being named: a file that came to none is at none."""
    return NOWHERE if batch.kind == "upload" and which == "apply" else ""


def left_open(kind: BatchKind, which: Pass, items: Sequence[Item], context: PassContext) -> list[ItemOutcome]:
    """What has to be known of open items whose job ends with them: of what may have been done, the receipt."""
    leave: Callable[[Sequence[Item], PassContext], list[ItemOutcome]] | None = getattr(kind, "leave", None)
    return leave(items, context) if leave is not None and which == "apply" else []


def record_outcomes(
    batch: Batch, which: Pass, chunk: int, outcomes: Sequence[ItemOutcome], *, attempt: Attempt
) -> None:
    """Write outcomes of a pass down. What a survey leaves out is out for good."""
    batches = Batches(attempt.ledger)
    batches.record_outcomes(batch, which, chunk, outcomes, job_id=attempt.job_id, fence=attempt.fence)
    if which == "survey":
        out = [one for one in outcomes if one.status not in ("planned", "open")]
        batches.record_outcomes(batch, "apply", chunk, out, job_id=attempt.job_id, fence=attempt.fence)


def current(batches: Batches, batch_id: str) -> Batch:
    batch = batches.get(batch_id)
    if batch is None:
        raise NotFound(f"No batch is called {batch_id}; batches are kept as long as results.")
    return batch


# --- orders -----------------------------------------------------------------------------------------------------


def order(
    message: Mapping[str, Any],
    attempt: Attempt,
    services: Services,
    *,
    kind: BatchKind,
    name: str,
    form: type[BatchOrderJob],
) -> dict[str, Any]:
    """`pacs.batch.upload` and the like: plan a batch of a kind, and see it through; it bears the job's id."""
    job = read_job(form, message)
    batches = Batches(services.ledger)
    if batches.get(attempt.job_id) is None:
        if job.planned:
            raise InvalidRequest("The plan of this batch is gone: plans are kept as long as results. Plan it again.")
        fields = job.model_dump(mode="json", exclude={"version", "items", "planned", "name"}, exclude_none=True)
        batches.open(attempt.job_id, kind=name, order=fields, concurrency=job.width or CONCURRENCY, name=job.name)
    batches.warn(current(batches, attempt.job_id), old_spellings(form, message))
    confirmed = getattr(job, "confirm_studies", None)
    batch = Coordinator(kind, attempt.job_id, attempt, services, confirm_studies=confirmed).order(job.items)
    return end_payload(batch, batches, job_id=attempt.job_id)


@contextmanager
def unbegun(attempt: Attempt, services: Services) -> Iterator[None]:
    """What is refused inside begins no batch; the plan that a producer may have written for it is given up.

    A batch that has begun goes on: where the settings have changed since, each of its items says what comes of that.
    """
    try:
        yield
    except Refused:
        if has_begun(attempt, services):
            return
        Batches(services.ledger).cancel(attempt.job_id)
        raise


def has_begun(attempt: Attempt, services: Services) -> bool:
    """Whether the batch that bears the job's id is in a pass, or was."""
    batch = Batches(services.ledger).get(attempt.job_id)
    return batch is not None and batch.current is not None


def coordinated(
    message: Mapping[str, Any],
    attempt: Attempt,
    services: Services,
    *,
    kinds: Mapping[str, BatchKind],
    command: Callable[[Coordinator], Batch],
) -> dict[str, Any]:
    """`pacs.batch.apply`, `.retry`, `.verify` and `.undo`: a further coordinator of a batch that is there."""
    job = read_job(BatchContinueJob, message)
    batch = current(Batches(services.ledger), job.batch_id)
    ended = command(
        Coordinator(kinds[batch.kind], job.batch_id, attempt, services, confirm_studies=job.confirm_studies)
    )
    return end_payload(ended, Batches(services.ledger), job_id=attempt.job_id)


# --- by hand ----------------------------------------------------------------------------------------------------


def show(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    return _published(message, attempt, services)


def pause(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    """Begin nothing new until it is resumed; what is under way comes to its end."""
    Batches(services.ledger).pause(read_job(BatchJob, message).batch_id)
    return _published(message, attempt, services)


def resume(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    job = read_job(BatchJob, message)
    Batches(services.ledger).resume(job.batch_id)
    return _published(message, attempt, services)


def cancel(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    """End it; what was done stays done."""
    Batches(services.ledger).cancel(read_job(BatchJob, message).batch_id)
    return _published(message, attempt, services)


def _published(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    batches = Batches(services.ledger)
    batch = current(batches, read_job(BatchJob, message).batch_id)
    return BatchStatePayload.model_validate({"job_id": attempt.job_id, **batches.published(batch)}).as_json()
