"""The course of a batch: plan, then pass after pass over its chunks, to the end. What an item is, its `Kind` says.

A batch has a job of its own, its *conductor*, which plans, then sleeps in the ledger and looks now and then; each
chunk of the plan is in each pass a job of the ledger as well (``chunks.py``). So a batch survives whatever a job
survives, and nothing here loops. The first conductor bears the batch's id; each later wish (apply a plan, retry,
verify, undo) is a conductor of its own, one at a time.
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
    Pass,
    Row,
    Settled,
    State,
    chunk_job,
)
from courier.errors import Cancelled, CourierError, InvalidRequest, NotFound, Refused
from courier.ledger.jobs import LeaseLost
from courier.messages import BatchContinueJob, BatchItem, BatchJob, BatchOrderJob, old_spellings, read_job
from courier.results import BatchStatePayload
from courier.waits import BATCH_PAUSED, BATCH_RUNNING, BATCH_SLOTS
from worker.batches.confirmations import Command, check_may_begin
from worker.jobs.attempt import NotYet, Run
from worker.jobs.services import Tools

#: How many chunks of a batch are open at a time, over all workers, unless its order says so.
WIDTH = 4
#: How soon the conductor looks again, if nobody wakes it before.
LOOK_AGAIN_S = 1.0
#: How soon somebody looks again who is paused, or whose items others have; and who stands in line for a slot.
TURN_S = 1.0
IN_LINE_S = 3.0

#: What a kind says of an item: settled; an error (`Refused` and `NeedsPerson` settle it as refused and failed, any
#: other leaves it open for another attempt); or None: another job is at it, look again soon.
Answer = Settled | CourierError | None
#: What may be asked of a batch whose plan is frozen.


@dataclass
class Spent:
    """What a group has cost, for the batch's rates. Safe for threads.

    What servers were asked and sent is added for every kind (``pace.py``). None: nobody has said anything; then it was
    one request per item, and the bytes that the results tell.
    """

    requests: float | None = None
    size_bytes: int | None = None
    _till: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, *, requests: float = 0, size_bytes: int = 0) -> None:
        with self._till:
            self.requests = (self.requests or 0) + requests
            self.size_bytes = (self.size_bytes or 0) + size_bytes


@dataclass
class Notes:
    """What an attempt at a chunk leaves to the next, for itself, for the kind and for the pace.

    ``begun`` are the items that this attempt or an earlier one may have done, ``at`` those that it is at; who finds
    any knows that the attempt has died of them, perhaps.
    """

    begun: set[int] = field(default_factory=set)
    kind: Mapping[str, Any] = field(default_factory=dict)
    pace: Mapping[str, Any] = field(default_factory=dict)
    at: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, memo: Mapping[str, Any] | None, *, pace: Mapping[str, Any]) -> Notes:
        memo = memo or {}
        return cls(set(memo.get("begun", ())), memo.get("kind", {}), pace, set(memo.get("at", ())))

    def as_json(self) -> dict[str, Any]:
        told = {"begun": sorted(self.begun), "at": sorted(self.at), "kind": self.kind}
        return {**{name: what for name, what in told.items() if what}, **self.pace}


@dataclass(frozen=True)
class Desk:
    """What a kind works with: the batch, the attempt at one of its chunks (or at its plan), and the tools."""

    batch: Batch
    run: Run
    tools: Tools
    #: What is known of the chunk's items, by number.
    rows: Mapping[int, Row] = field(default_factory=dict)
    #: The servers that failed in this attempt, by name, and how: not asked again in it, or their time-outs add up.
    down: dict[str, CourierError] = field(default_factory=dict)
    #: What has to be known of the plan.
    warnings: list[str] = field(default_factory=list)
    spent: Spent = field(default_factory=Spent)
    notes: Notes = field(default_factory=Notes)

    @property
    def memo(self) -> Mapping[str, Any]:
        """What the kind has written down of this chunk in this pass, also in an earlier attempt."""
        return self.notes.kind

    def remember(self, memo: Mapping[str, Any]) -> None:
        """Write down what an attempt after a death has to know, before it is acted upon."""
        self.notes.kind = memo
        self.run.intend(self.notes.as_json())

    def known(self, item: Item, which: Pass = "apply") -> Settled:
        """What an earlier pass made of the item: where, and its result; `open` if it has not come to it."""
        row = self.rows.get(item.number)
        return (row.passes.get(which) if row else None) or Settled(item, "open")


class Work(Protocol):
    """One pass over a group of a chunk's items."""

    def __call__(self, items: Sequence[Item], desk: Desk, *, resumed: set[int]) -> list[Answer]: ...


class Kind(Protocol):
    """What a batch is about. One module per kind in ``worker/jobs``, one line in ``worker/tasks/batches.py`` (KINDS).

    It SHALL keep no state of its own: what it needs later it says in `Settled.result` and finds again by `Desk.known`.

    A pass is a function like this, say ``apply(items, desk, *, resumed)``; it

    * SHALL return one `Answer` per item, in the order given;
    * SHALL accept what is done already: ``resumed`` are the numbers of those that an earlier attempt may have done, or
      half done, and whose end nobody has seen;
    * SHALL raise only our errors; a raised one is the answer for the whole group;
    * SHALL NOT sleep, retry, or write receipts and trails: an item's receipt is its result;
    * SHALL leave alone what other jobs hold (None), and hold nothing when it returns but what may be half done;
    * SHOULD not ask servers in `Desk.down`, and add to it those that it finds silent;
    * SHOULD add to `Desk.spent` what it took beside what it asked the servers of `Desk.tools`, which is counted for it.

    A kind that deletes has two methods more: ``refuse_forbidden(command, batch, fleet)`` raises `InvalidRequest` if the
    settings forbid what the command deletes on a server that the order names; ``study_at_stake(command, row, batch,
    fleet)`` gives the UID of the study of which the command deletes images for an item, or None.

    A kind whose memo says what may have been done has a method ``leave(items, desk)`` too: of items that stay open when
    their job ends, it gives the `open` `Settled` whose results a retry or an undo have to know.

    Which items come to it: ``survey`` and ``apply`` get what is open; ``verify`` what was done (`NOT_DONE` says what
    was not), ``undo`` that and whatever left a result. What survey settles as anything but ``planned`` is not applied;
    apply SHALL not rely on a survey having been made. The server of an item is configured when the item comes here.
    """

    @property
    def group_items(self) -> int:
        """How many items of a chunk a pass takes at a time; what is done together is settled together."""
        ...

    @property
    def passes(self) -> Mapping[Pass, Work]:
        """The passes that it has, ``apply`` at least: ``{"apply": self.apply, "verify": self.verify}``."""
        ...

    def check(self, item: Planned) -> Planned:
        """An item from a message as it shall be planned; `InvalidRequest` or `InvalidUid` say what is wrong with it."""
        ...

    def pages(self, desk: Desk) -> Iterator[Sequence[Planned]]:
        """List what there is to do, lazily, page by page, where an order brings no items. The batch's order says what.

        The same item may come twice. What has to be known of the plan goes to `Desk.warnings`. An error begins the plan
        anew, or ends the batch, as it does with any job: nothing is done before the last page.
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
    applied = row.settled
    if row.passes[which].status != "open":
        return False
    if which in ("survey", "apply"):
        return applied.status == "open"
    return applied.status not in NOT_DONE or (which == "undo" and bool(applied.result))


@contextmanager
def slot(run: Run, tools: Tools) -> Iterator[None]:
    """Batches never take all of a worker: who finds no slot makes room, and is woken when its turn has come.

    It is woken before the one that gives its slot back sends for its next piece, so that no batch starves another.
    """
    if not tools.turns.take(run.job_id):
        sentence = "batches have all the slots of this worker that batches may have"
        raise NotYet(sentence, delay_s=IN_LINE_S, steady=True, code=BATCH_SLOTS)
    try:
        with tools.turns.taken():
            yield
    finally:
        with suppress(redis.RedisError):  # who stands in line looks again by itself
            _call_next(tools)


def _call_next(tools: Tools) -> None:
    while (job_id := tools.turns.next()) is not None:
        job = tools.ledger.rouse(job_id)
        if job is not None:
            tools.wake([job])
            return


# --- the conductor ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conductor:
    """An attempt of a job to see a batch through."""

    kind: Kind
    batch_id: str
    run: Run
    tools: Tools
    may_be_empty: bool = False
    confirm_studies: int | None = None

    @property
    def batches(self) -> Batches:
        return Batches(self.tools.ledger)

    @property
    def batch(self) -> Batch:
        return current(self.batches, self.batch_id)

    def order(self, items: Sequence[str | BatchItem] | None = None) -> Batch:
        """Plan it, unless it is planned, then see it through; a dry run ends before anything is done.

        Raises
        ------
        NotYet
            It goes on; look again.
        Cancelled
            Somebody has ended it; ``details`` say how far it came.
        """
        batch = self._take()
        if batch.current is None:
            types = {name: self.tools.fleet[name].server.type for name in self.tools.fleet.names}
            self.batches.set_fleet(self.batch_id, types)
        if not batch.frozen:
            with slot(self.run, self.tools), self.run.step("plan"):
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
        """Be the conductor, of a batch that is in one of ``states`` unless this one has begun already."""
        batch = self.batch
        mine = batch.conductor == self.run.job_id
        if states and not mine and batch.state not in states:
            raise InvalidRequest(f"The batch is {batch.state}; that can be done when it is {' or '.join(states)}.")
        if other := self.batches.take(self.batch_id, self.run.job_id):
            raise InvalidRequest(f"Job {other} is at this batch; wait for it, or cancel it.")
        batch = self.batch
        if batch.state in states and self._is_left_at_work(batch):
            sentence = "chunks that an ended job of this batch had begun are under way"
            raise NotYet(sentence, delay_s=LOOK_AGAIN_S, code=BATCH_RUNNING)
        return batch

    def _is_left_at_work(self, batch: Batch) -> bool:
        """Whether chunks outlive a conductor that was cancelled or has died: two rounds would do the same items."""
        which, ledger = batch.current, self.tools.ledger
        jobs = (
            [chunk_job(batch, which, chunk).job_id for chunk in self.batches.open_chunks(batch, which)] if which else []
        )
        return any(ledger.look(job_id).get("state") == "running" for job_id in jobs)

    def _check_may_begin(self, command: Command, first: Pass, *, out_of: Sequence[State]) -> None:
        """Once per command, before its first pass: what has begun is not asked for a confirmation any more."""
        batch = self.batch
        if self._is_new(first) and batch.state in out_of:
            _refuse_unmatched_plan(command, batch)
            _refuse_where_all_is_left_out(command, batch)
            check_may_begin(self.kind, command, batch, self.tools, self.confirm_studies)

    def _needs(self, which: Pass) -> None:
        if which not in self.kind.passes:
            raise InvalidRequest(f"A batch of the kind {self.batch.kind} has no {which}.")

    def _refuse_what_is_taken_back(self, batch: Batch) -> None:
        """Verification tops up, and moves; so it would do again what an undo has taken back."""
        if "undo" in batch.passes:
            raise InvalidRequest("The batch is being taken back; undo it to its end, then order anew what is wanted.")

    def _is_new(self, which: Pass) -> bool:
        return self.batch.of(which).begun_by != self.run.job_id

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
        if not batches.begin(self.batch_id, which, job_id=self.run.job_id, out_of=out_of):
            self._stand_aside(which)
        self.tools.wake(batches.fill(self.batch, which))
        bury_lost_chunks(self.batch, which, self.run, self.tools, self.kind)
        batch = self.batch
        if batch.state in ("cancelled", "paused"):
            self._stand_aside(which)
        if batch.of(which).finished == batch.chunks and batches.end_pass(self.batch_id, which, to):
            return
        told = f"{which}: {batch.of(which).settled} of {batch.items} items are settled"
        raise NotYet(told, delay_s=LOOK_AGAIN_S, code=BATCH_RUNNING)

    def _stand_aside(self, which: Pass) -> None:
        """The batch has been steered elsewhere: wait, or end with it when what is under way has ended."""
        batch = self.batch
        if batch.state == "paused":
            raise NotYet("the batch is paused", delay_s=LOOK_AGAIN_S, code=BATCH_PAUSED)
        if batch.state in ACTIVE or self.batches.open_chunks(batch, which):
            raise NotYet(f"the batch is {batch.state}", delay_s=LOOK_AGAIN_S, code=BATCH_RUNNING)
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
        desk = Desk(batch, self.run, self.tools, warnings=list(batch.warnings))
        pages = iter([[self.kind.check(_planned(one)) for one in items]]) if items else self.kind.pages(desk)
        with Planner(self.batches, self.batch_id) as planner:
            for page in pages:
                planner.add_all(page)
                self.run.stage = f"plan {planner.items}"
                if self.run.lost:
                    raise LeaseLost
                if self.batches.state(self.batch_id) != "planning":
                    break
            planner.freeze(warnings=desk.warnings)


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


def bury_lost_chunks(batch: Batch, which: Pass, run: Run, tools: Tools, kind: Kind) -> None:
    """A chunk whose job is over without having ended it (a dead letter) is settled as failed, with its code.

    One whose job nobody knows any more is written down again.
    """
    batches, ended = Batches(tools.ledger), False
    for chunk in batches.open_chunks(batch, which):
        job = chunk_job(batch, which, chunk)
        record = tools.ledger.look(job.job_id)
        if not record:
            tools.ledger.submit(job.job_id, task=job.task, job=job.job, due_in_s=0)
        if record.get("state") not in ("done", "dead"):
            continue
        rows = batches.chunk_rows(batch, chunk, list(dict.fromkeys(("apply", which))))
        message = "The job that was to do it has ended; see the dead letters."
        items = [row.item for row in rows if to_do(which, row)]
        desk = Desk(batch, run, tools, notes=Notes.of(json.loads(record.get("memo") or "{}"), pace={}))
        left = {one.item: one for one in left_open(kind, which, items, desk)}
        code = record.get("code", "")
        unplaced = unplaced_at(batch, which)
        failed = [
            replace(
                left.get(item) or Settled(item, "failed", server=unplaced), status="failed", code=code, message=message
            )
            for item in items
        ]
        settle(batch, which, chunk, failed, run=run)
        batches.end_chunk(batch.id, which, chunk)
        ended = True
    if ended:
        tools.wake(batches.fill(batch, which))


def unplaced_at(batch: Batch, which: Pass) -> str:
    """Where an item is counted that ended without a server being named: a file that came to none is at none."""
    return NOWHERE if batch.kind == "upload" and which == "apply" else ""


def left_open(kind: Kind, which: Pass, items: Sequence[Item], desk: Desk) -> list[Settled]:
    """What has to be known of open items whose job ends with them: of what may have been done, the receipt."""
    leave: Callable[[Sequence[Item], Desk], list[Settled]] | None = getattr(kind, "leave", None)
    return leave(items, desk) if leave is not None and which == "apply" else []


def settle(batch: Batch, which: Pass, chunk: int, outcomes: Sequence[Settled], *, run: Run) -> None:
    """Write outcomes of a pass down. What a survey leaves out is out for good."""
    batches = Batches(run.ledger)
    batches.settle(batch, which, chunk, outcomes, job_id=run.job_id, fence=run.fence)
    if which == "survey":
        out = [one for one in outcomes if one.status not in ("planned", "open")]
        batches.settle(batch, "apply", chunk, out, job_id=run.job_id, fence=run.fence)


def current(batches: Batches, batch_id: str) -> Batch:
    batch = batches.get(batch_id)
    if batch is None:
        raise NotFound(f"No batch is called {batch_id}; batches are kept as long as results.")
    return batch


# --- orders -----------------------------------------------------------------------------------------------------


def order(
    message: Mapping[str, Any], run: Run, tools: Tools, *, kind: Kind, name: str, form: type[BatchOrderJob]
) -> dict[str, Any]:
    """`pacs.batch.upload` and the like: plan a batch of a kind, and see it through; it bears the job's id."""
    job = read_job(form, message)
    batches = Batches(tools.ledger)
    if batches.get(run.job_id) is None:
        if job.planned:
            raise InvalidRequest("The plan of this batch is gone: plans are kept as long as results. Plan it again.")
        wishes = job.model_dump(mode="json", exclude={"version", "items", "planned", "name"}, exclude_none=True)
        batches.open(run.job_id, kind=name, order=wishes, width=job.width or WIDTH, name=job.name)
    batches.warn(current(batches, run.job_id), old_spellings(form, message))
    confirmed = getattr(job, "confirm_studies", None)
    batch = Conductor(kind, run.job_id, run, tools, confirm_studies=confirmed).order(job.items)
    return end_payload(batch, batches, job_id=run.job_id)


@contextmanager
def unbegun(run: Run, tools: Tools) -> Iterator[None]:
    """What is refused inside begins no batch; the plan that a producer may have written for it is given up.

    A batch that has begun goes on: where the settings have changed since, each of its items says what comes of that.
    """
    try:
        yield
    except Refused:
        if has_begun(run, tools):
            return
        Batches(tools.ledger).cancel(run.job_id)
        raise


def has_begun(run: Run, tools: Tools) -> bool:
    """Whether the batch that bears the job's id is in a pass, or was."""
    batch = Batches(tools.ledger).get(run.job_id)
    return batch is not None and batch.current is not None


def conducted(
    message: Mapping[str, Any],
    run: Run,
    tools: Tools,
    *,
    kinds: Mapping[str, Kind],
    wish: Callable[[Conductor], Batch],
) -> dict[str, Any]:
    """`pacs.batch.apply`, `.retry`, `.verify` and `.undo`: a further conductor of a batch that is there."""
    job = read_job(BatchContinueJob, message)
    batch = current(Batches(tools.ledger), job.batch_id)
    ended = wish(Conductor(kinds[batch.kind], job.batch_id, run, tools, confirm_studies=job.confirm_studies))
    return end_payload(ended, Batches(tools.ledger), job_id=run.job_id)


# --- by hand ----------------------------------------------------------------------------------------------------


def show(message: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
    return _told(message, run, tools)


def pause(message: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
    """Begin nothing new until it is resumed; what is under way comes to its end."""
    Batches(tools.ledger).pause(read_job(BatchJob, message).batch_id)
    return _told(message, run, tools)


def resume(message: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
    job = read_job(BatchJob, message)
    Batches(tools.ledger).resume(job.batch_id)
    return _told(message, run, tools)


def cancel(message: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
    """End it; what was done stays done."""
    Batches(tools.ledger).cancel(read_job(BatchJob, message).batch_id)
    return _told(message, run, tools)


def _told(message: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
    batches = Batches(tools.ledger)
    batch = current(batches, read_job(BatchJob, message).batch_id)
    return BatchStatePayload.model_validate({"job_id": run.job_id, **batches.told(batch)}).as_json()
