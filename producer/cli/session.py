"""The connection of one command, and what is said when the command is interrupted while its jobs go on.

An interruption (Ctrl-C, SIGTERM, Ctrl-C at a question) ends the command, not its jobs: those are named, with how to
follow and how to cancel them. A deletion that has not begun is cancelled, and only then that is said.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import click
import redis

from courier.batches.store import Batches
from courier.ledger.jobs import Ledger, job_id_for
from courier.messages import Job
from producer.cli.no_worker import said_if_no_worker_answers
from producer.client import Courier
from producer.errors import BrokerUnavailable, Cancelled, NotFound
from producer.handle import Handle, Report, Result_co

#: So many jobs are named one by one.
NAMED: Final = 20
#: How long it is waited for the end of what was cancelled, before it is said that no worker will begin it.
_SETTLE_S: Final = 3.0
_POLL_S: Final = 0.1
_CONTINUED: Final = {f"pacs.batch.{command}": command for command in ("apply", "retry", "verify", "undo")}


class Interrupted(Exception):
    """The command was interrupted; the sentence says what goes on without it."""


@dataclass(frozen=True)
class EnqueuedJob:
    """A job that the command has enqueued, or was about to."""

    handle: Handle
    task: str
    job: Mapping[str, Any]

    @property
    def deletes(self) -> bool:
        """Whether it is an order to delete or to move."""
        if self.job.get("dry_run"):
            return False
        return self.task in ("pacs.delete", "pacs.delete_all", "pacs.batch.delete") or bool(
            self.job.get("delete_source")
        )


class Session(Courier):
    """A `Courier` that remembers what its command has enqueued, and says so when the command is interrupted.

    ``expects``: how many jobs the command is about to enqueue, if it is more than one.

    Raises
    ------
    Interrupted
        On leaving it by an interruption.
    """

    def __init__(self) -> None:
        super().__init__()
        self.expects = 0
        self.sent: dict[str, EnqueuedJob] = {}

    def enqueue(
        self, task: str, kind: type[Job], job: Mapping[str, Any], *, job_id: str | None = None, batch_id: str = ""
    ) -> Handle:
        """As `Courier.enqueue`; the job is known by its id before it is written down."""
        job_id = job_id or job_id_for(job.get("idempotency_key"))
        self.sent[job_id] = EnqueuedJob(Handle(job_id, self, batch_id), task, job)
        return super().enqueue(task, kind, job, job_id=job_id, batch_id=batch_id)

    def watch(
        self, handles: Iterable[Handle[Result_co]], *, timeout_s: float | None = None
    ) -> Iterator[tuple[Handle[Result_co], Report[Result_co]]]:
        """As `Courier.watch`; if no worker answers meanwhile, standard error says so."""
        with said_if_no_worker_answers(self):
            yield from super().watch(handles, timeout_s=timeout_s)

    def __exit__(self, *raised: object) -> None:
        try:
            if len(raised) > 1 and is_interruption(raised[1]):
                raise Interrupted(f"Interrupted. {self._left_behind()}") from None
        finally:
            super().__exit__()

    def _left_behind(self) -> str:
        """What became of the jobs, asked and cancelled once more; a second interruption ends even that."""
        try:
            return " ".join(_sentences(self))
        except (KeyboardInterrupt, BrokerUnavailable, redis.RedisError):
            return f"The ledger did not say what goes on. {_may_go_on(list(self.sent))}"


def is_interruption(error: object) -> bool:
    """Ctrl-C, also at a question, which click turns into its own exception; not the end of the input."""
    if isinstance(error, click.Abort):
        return not isinstance(error.__context__, EOFError)
    return isinstance(error, KeyboardInterrupt)


def _sentences(session: Session) -> Iterator[str]:
    ledger = session.ledger
    left = _under_way(session)
    if not left:
        yield _nothing_under_way(session)
        return
    told = {sent.handle.id: sentence for sent in left if ledger and (sentence := _stopped(sent, session, ledger))}
    yield from told.values()
    goes_on = [sent for sent in left if sent.handle.id not in told]
    batches = [sent.handle for sent in goes_on if sent.handle.batch_id]
    for handle in batches:
        yield batch_goes_on(handle.batch_id)
    jobs = [sent for sent in goes_on if not sent.handle.batch_id]
    if jobs:
        yield _jobs_go_on(jobs, of=session.expects)


def _under_way(session: Session) -> list[EnqueuedJob]:
    """What was enqueued and has not ended. The last one may not have come as far as the ledger."""
    sent = list(session.sent.values())
    if sent and session.ledger is not None and not session.ledger.read_record(sent[-1].handle.id):
        del session.sent[sent.pop().handle.id]
    found: list[EnqueuedJob] = []
    for first in range(0, len(sent), 1000):
        some = sent[first : first + 1000]
        reports = session.reports(one.handle.id for one in some)
        found += [one for one in some if not reports[one.handle.id].over]
    return found


def _nothing_under_way(session: Session) -> str:
    if not session.sent:
        return "Nothing was begun."
    last = list(session.sent.values())[-1]
    if last.job.get("dry_run"):
        return "Nothing was changed."
    return f"Job {last.handle.id} had ended already: pacs result {last.handle.id}"


def _may_go_on(job_ids: Sequence[str]) -> str:
    if not job_ids:
        return "No job had been enqueued."
    which = f"Job {job_ids[0]}" if len(job_ids) == 1 else f"{len(job_ids):,} jobs, {job_ids[-1]} the last,"
    return f"{which} may have been enqueued and go on: pacs result {job_ids[-1]}"


def _jobs_go_on(jobs: Sequence[EnqueuedJob], *, of: int) -> str:
    if len(jobs) == 1 and of <= 1:
        return job_goes_on(jobs[0].handle.id)
    how_many = f"{len(jobs):,}" + (f" of {of:,}" if of > len(jobs) else "")
    lines = [f"{how_many} jobs go on. Follow one: pacs result ID. Cancel one: pacs cancel ID."]
    lines += [f"  {one.handle.id}" for one in jobs[:NAMED]]
    if len(jobs) > NAMED:
        lines.append(f"  and {len(jobs) - NAMED:,} more")
    return "\n".join(lines)


def job_goes_on(job_id: str) -> str:
    return f"Job {job_id} goes on. Follow it: pacs result {job_id}. Cancel it: pacs cancel {job_id}"


def batch_goes_on(batch_id: str) -> str:
    return f"The batch goes on. Come back with: pacs batch watch {batch_id}. Cancel it: pacs batch cancel {batch_id}"


# --- deletions ------------------------------------------------------------------------------------------------------


def _stopped(sent: EnqueuedJob, session: Session, ledger: Ledger) -> str:
    """What became of a deletion that was to be cancelled; "" where it is none, or goes on like any other job."""
    job_id, batch_id = sent.handle.id, sent.handle.batch_id
    if sent.task in _CONTINUED:
        return _continued_stopped(sent, session, ledger)
    if not sent.deletes:
        return ""
    if not batch_id:
        return _deletion_stopped(sent.handle, ledger)
    if _batch_stopped(job_id, batch_id, ledger):
        return f"Batch {batch_id} was cancelled before it began; nothing was deleted."
    return f"The deletion has begun. {batch_goes_on(batch_id)}" if Batches(ledger).get(batch_id) else ""


def _deletion_stopped(handle: Handle, ledger: Ledger) -> str:
    state = ledger.cancel(handle.id, unless="begun")
    if state == "begun":
        return f"The deletion has begun and goes on: job {handle.id}. Follow it: pacs result {handle.id}"
    deadline = time.monotonic() + _SETTLE_S
    report = handle.report()
    while not report.over and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        report = handle.report()
    if report.over and not isinstance(report.error, Cancelled):
        return f"Job {handle.id} had ended already: pacs result {handle.id}"
    return f"Job {handle.id} was cancelled before it began; nothing was deleted."


def _batch_stopped(job_id: str, batch_id: str, ledger: Ledger) -> bool:
    """Whether a batch was cancelled before its first item was; a plan that no worker has seen yet as well."""
    batches, deadline = Batches(ledger), time.monotonic() + _SETTLE_S
    while True:
        state = batches.steer(batch_id, "cancelled", out_of=["planning", "planned"])
        if state:
            batches.wake_now(batch_id)
            if state == "cancelled":
                ledger.cancel(job_id, unless="taken")  # its message may not have been sent: it ends at the next sweep
            return state == "cancelled"
        if ledger.cancel(job_id, unless="taken") == "queued":
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)  # a worker is about to open it


def _continued_stopped(sent: EnqueuedJob, session: Session, ledger: Ledger) -> str:
    """Of ``apply``, ``retry``, ``verify`` and ``undo`` of a batch, if they delete and no worker has taken them."""
    try:
        batch = session.batch.get(sent.handle.batch_id)
    except NotFound:
        return ""
    command: Any = _CONTINUED[sent.task]
    deletes = batch.kind == "delete" and command in ("apply", "retry")
    deletes = deletes or bool(batch.order.get("delete_source")) or (command == "undo" and batch.kind != "delete")
    if not deletes or ledger.cancel(sent.handle.id, unless="taken") != "queued":
        return ""
    return f"Job {sent.handle.id} was cancelled before it began; nothing was deleted. The batch is still {batch.state}."
