"""What a program holds of a job that it enqueued, and what is known of the job.

The client that asks the result back-end and the ledger is ``client.py``; here it is a `Reports`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, cast

from typing_extensions import TypeVar

from courier.ledger.jobs import JobStanding
from courier.waits import SERVER_BUSY, waiting_in
from producer.errors import Cancelled, CourierError, StillRunning, from_payload
from producer.results import WaitingDict

Status = Literal["queued", "running", "waiting", "done", "failed", "unknown"]
#: The TypedDict of a result (``producer/results.py``). ``Handle`` alone is one whose result may be any.
Result_co = TypeVar("Result_co", covariant=True, default=Any)


class Reports(Protocol):
    """What a handle needs of `Courier`."""

    def reports(self, job_ids: Iterable[str]) -> dict[str, Report]: ...

    def as_completed(
        self, handles: Iterable[Handle[Result_co]], *, timeout_s: float | None = None
    ) -> Iterator[tuple[Handle[Result_co], Report[Result_co]]]: ...

    def cancel(self, job_id: str) -> bool: ...


@dataclass(frozen=True)
class Report(Generic[Result_co]):
    """What is known of a job now. ``result`` is set once it is done, ``error`` once it has failed or is ``unknown``."""

    status: Status
    stage: str
    result: Result_co | None = None
    error: CourierError | None = None
    meta: Mapping[str, Any] | None = None
    #: Why the job waits (`Handle.waiting`).
    waiting: Mapping[str, Any] | None = None
    #: Another Celery worker has dropped a message of the job; what becomes of the job, the ledger says.
    revoked: bool = False

    @property
    def over(self) -> bool:
        return self.status in ("done", "failed", "unknown")

    @property
    def waits_for(self) -> str:
        """Code and server of what the job waits for, in short; "" where it does not wait, or only for a worker."""
        if self.waiting is None or self.status == "queued":
            return ""
        return ", ".join(str(self.waiting[name]) for name in ("code", "server_name") if self.waiting.get(name))


@dataclass(frozen=True)
class Handle(Generic[Result_co]):
    """One enqueued job, by its ``id``, which any program may use to ask for it."""

    id: str
    courier: Reports
    #: The batch that the job is about, if it is.
    batch_id: str = ""

    def report(self) -> Report[Result_co]:
        """Everything that is known of the job now."""
        return self.courier.reports([self.id])[self.id]

    def status(self) -> Status:
        """``queued``, ``running``, ``waiting``, ``done`` or ``failed``.

        ``unknown``: neither the result back-end nor the ledger has an entry of the job. Without a ``ledger_url`` such
        a job counts as ``queued``.
        """
        return self.report().status

    def stage(self) -> str:
        """The step the job is at: ``fetch`` … ``describe`` while it runs, otherwise its status."""
        return self.report().stage

    def waiting(self) -> WaitingDict | None:
        """Why the job waits: ``code``, ``message``, ``server_name``, ``since``, ``next_try``; None if it does not wait.

        ``since`` and ``next_try`` are RFC 3339, UTC; ``server_name`` is None where it waits for no server, ``next_try``
        where no time is known. A job in its queue waits for a worker (``queued``).
        """
        waiting = self.report().waiting
        return None if waiting is None else cast(WaitingDict, dict(waiting))

    def result(self, timeout_s: float | None = None) -> Result_co:
        """The payload, waited for.

        Raises
        ------
        CourierError
            The job ended otherwise; the class is the one of its code.
        NotFound
            Neither the result back-end nor the ledger has an entry of the job, and none has appeared within
            ``jobs.grace_s`` (a plain Celery client's job is in the ledger only once a worker has seen it).
        StillRunning
            It did not end within ``timeout_s``. It goes on.
        """
        for _, report in self.courier.as_completed([self], timeout_s=timeout_s):
            if report.error is not None:
                raise report.error
            if report.result is not None:
                return report.result
        raise StillRunning(
            f"Job {self.id} has not ended within {timeout_s} s; it goes on. Ask again: pacs result {self.id}"
        )

    def cancel(self) -> bool:
        """Ask for the job to end before its push; False if it is over already."""
        return self.courier.cancel(self.id)


def read_result(meta: Mapping[str, Any]) -> Report:
    state, result = meta["status"], meta["result"]
    if state == "SUCCESS":
        return Report("done", "done", result=result)
    if state == "REVOKED":
        return Report("failed", "failed", error=Cancelled("A Celery worker revoked the job."), revoked=True)
    if state == "FAILURE":
        return Report("failed", "failed", error=_error(result))
    if state == "PROGRESS":
        stage = str(result["stage"])
        waiting = waiting_in(result)
        return Report("waiting" if waiting else "running", stage, meta=result, waiting=waiting)
    if state == "STARTED":
        return Report("running", "started")
    return Report("queued", "queued")


def read_standing(known: JobStanding) -> Report:
    """The same of a job that only the ledger has an entry of."""
    if known.outcome is not None:
        if "error" in known.outcome:
            return Report("failed", "failed", error=from_payload(known.outcome["error"]))
        return Report("done", "done", result=known.outcome["payload"])
    if known.state == "waiting":
        meta = {"stage": "waiting", "attempt": known.attempts, **(known.waiting or {})}
        return Report("waiting", "waiting", meta=meta, waiting=known.waiting)
    if known.state == "running":
        return Report("running", "started", waiting=known.waiting)
    return Report("queued", "queued", waiting=known.waiting)


def newer(stored: Report | None, known: Report) -> Report:
    """Of a job that has not ended in the result back-end: what the ledger says, unless only the back-end knows it.

    A running job shows its stage there; but one that it put there before it was put aside is over.
    """
    if stored is None or known.status == "unknown":
        return stored or known
    if known.status != "running" or known.waiting is not None:
        return known
    is_over = stored.waiting is not None and stored.waiting["code"] != SERVER_BUSY
    return known if is_over else stored


def _error(result: Any) -> CourierError:
    """The error of a failed job as Celery's JSON back-end stores it: the wire object is the only argument.

    Celery rebuilds it, as a class of its own making where this process has not loaded the module that the worker named:
    in version 0.1 that was ``worker.errors``.
    """
    if isinstance(result, CourierError):
        return result
    arguments = result.args if isinstance(result, BaseException) else None
    if isinstance(result, Mapping):
        arguments = result.get("exc_message")
    if isinstance(arguments, list | tuple) and arguments and isinstance(arguments[0], Mapping):
        return from_payload(arguments[0])
    kind = result.get("exc_type", "unknown") if isinstance(result, Mapping) else type(result).__name__
    return from_payload({"code": "poisoned", "message": f"The worker itself failed ({kind}); see its log."})
