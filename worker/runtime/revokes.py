"""A revoke, as Celery's `control` and Flower send it to all workers: here it cancels the job in the ledger.

Celery's own worker remembers a revoked id by itself, acknowledges its message unseen and writes REVOKED over whatever
the ledger says; the job stays due, keeps its locks, and another worker does it. So Celery's commands are replaced.
An id that comes to a worker another way (``--statedb``, a worker of version 0.1, ``expires``) is cancelled when a
message with it is seen. How a cancelled job ends, the ledger and the job decide.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Protocol, cast

import redis
from celery.worker import control, state
from celery.worker.request import Request
from celery.worker.state import task_ready

from courier.redaction import shown_id
from worker.runtime import envelope
from worker.runtime.shortage import PAUSE_S

log = logging.getLogger(__name__)

#: What is said of a job by the state in which the revoke has found it.
_TOLD: Final[Mapping[str, str]] = {
    "": "unknown here; a message that comes for it ends as cancelled",
    "queued": "cancelled before it began",
    "waiting": "cancelled; what a server may have done of it already is looked up first",
    "running": "cancelled; it runs, and ends before its next change to a server, if it has not made its last one",
    "taken": "it has begun in time",
}
_OVER: Final = "it has ended before"
_NOT_KILLED: Final = (
    "A job is not killed in the middle of a request to a server, so terminate does no more than revoke: %s"
)


class Canceller(Protocol):
    """What cancels. Raises a `redis.RedisError` where the ledger does not answer."""

    def job(self, job_id: str, *, unless_taken: bool = False) -> str:
        """Cancel a job, also one that is not known yet; gives the state that it was in, "" for an unknown one."""
        ...

    def stamps(self, header: str, values: Sequence[str]) -> None:
        """Cancel whatever comes with one of these stamps."""
        ...


class _Nothing:
    def job(self, job_id: str, *, unless_taken: bool = False) -> str:  # noqa: ARG002 - a `Canceller`
        return ""

    def stamps(self, header: str, values: Sequence[str]) -> None:
        """Nothing."""


_canceller: Canceller = _Nothing()


def install(canceller: Canceller) -> None:
    """Have this process's worker cancel jobs by ``canceller`` where Celery would revoke their messages."""
    global _canceller  # noqa: PLW0603 - as Celery keeps its commands and its revoked ids
    _canceller = canceller
    command: Callable[..., Callable[[Callable[..., Any]], Any]] = control.control_command
    command(name="revoke", variadic="task_id", signature="[id1 [id2 [... [idN]]]]")(revoke)
    command(name="terminate", variadic="task_id", args=[("signal", str)], signature="<signal> [id1 [id2 [... [idN]]]]")(
        terminate
    )
    command(
        name="revoke_by_stamped_headers",
        variadic="headers",
        signature="[key1=value1 [key2=value2 [... [keyN=valueN]]]]",
    )(revoke_by_stamped_headers)


# --- Celery's commands, by its names and with its parameters ----------------------------------------------------------


def revoke(panel: object, task_id: object, terminate: object = False, **_: object) -> dict[str, str]:  # noqa: ARG001
    """Cancel jobs by their ids. A reply means that the ledger has taken it."""
    job_ids = list(dict.fromkeys(_texts(task_id)))
    job_ids = [one for one in job_ids if envelope.wrong_id(one) is None]
    if terminate and job_ids:
        log.warning(_NOT_KILLED, ", ".join(map(shown_id, job_ids)))
    return _reply({job_id: _cancel(job_id) for job_id in job_ids})


def terminate(panel: object, signal: object, task_id: object, **_: object) -> dict[str, str]:  # noqa: ARG001
    """As `revoke`: nothing is killed."""
    return revoke(panel, task_id, terminate=True)


def revoke_by_stamped_headers(
    panel: object,  # noqa: ARG001
    headers: object,
    terminate: object = False,  # noqa: ARG001
    **_: object,
) -> dict[str, str]:
    """Cancel the jobs that bear a stamp: those in this worker now, and any whose message comes later."""
    wanted = dict(_stamps(headers))
    try:
        for header, values in wanted.items():
            _canceller.stamps(header, values)
    except redis.RedisError as error:
        return {"error": _away(error)}
    held = [one for one in list(state.requests.values()) if set(stamps_of(one)) & set(_pairs(wanted))]
    return _reply({one.id: _cancel(one.id) for one in held})


def _texts(value: object) -> Sequence[str]:
    many = value if isinstance(value, list | tuple | set) else [value]
    return [one for one in many if isinstance(one, str)]


def _stamps(headers: object) -> Iterator[tuple[str, list[str]]]:
    if isinstance(headers, list | tuple):
        headers = dict(text.partition("=")[::2] for text in _texts(headers))
    for header, values in headers.items() if isinstance(headers, Mapping) else ():
        if isinstance(header, str) and (texts := _plain(values)):
            yield header, texts


def _pairs(stamps: Mapping[str, object]) -> list[tuple[str, str]]:
    return [(header, text) for header, values in stamps.items() for text in _plain(values)]


def _plain(values: object) -> list[str]:
    """Stamps as texts: a stamp is a text or a number, or a list of such."""
    many = values if isinstance(values, list | tuple | set) else [values]
    return [str(one) for one in many if isinstance(one, str | int | float)]


def stamps_of(request: Any) -> list[tuple[str, str]]:
    """The stamps that a message bears, as pairs of header and value. ``request`` is Celery's, of a worker or a task."""
    headers, stamps = getattr(request, "stamped_headers", None), getattr(request, "stamps", None)
    if not isinstance(headers, list | tuple) or not isinstance(stamps, Mapping):
        return []
    return _pairs({header: stamps.get(header) for header in headers if isinstance(header, str)})


def _cancel(job_id: str) -> str:
    """What became of it. Where the ledger does not answer, this worker does it when it sees the job's message."""
    try:
        told = _TOLD.get(_canceller.job(job_id), _OVER)
    except redis.RedisError as error:
        state.revoked.add(job_id)
        return _away(error)
    log.info("Revoked job %s: %s", shown_id(job_id), told, extra={"job_id": job_id})
    return told


def told(was: str) -> str:
    """What is said of a job that was cancelled in the state ``was`` (`Canceller.job`)."""
    return _TOLD.get(was, _OVER)


def _away(error: redis.RedisError) -> str:
    log.error("The ledger did not take a revoke (%s); send it again", type(error).__name__)
    return f"the ledger did not take it ({type(error).__name__}); send it again"


def _reply(told: Mapping[str, str]) -> dict[str, str]:
    text = "; ".join(f"{shown_id(job_id)}: {what}" for job_id, what in told.items()) or "no job of this worker"
    return {"error" if any("send it again" in what for what in told.values()) else "ok": text}


# --- an id that came another way ------------------------------------------------------------------------------------


def heed(request: Request) -> bool:
    """Cancel the job of a message that Celery would drop as revoked or expired; True if the message was given back.

    Any other message goes on to the ledger, which ends the job.
    """
    expired = _is_expired(request)
    if not expired and request.id not in state.revoked:
        return False
    try:
        was = _canceller.job(request.id, unless_taken=expired)
    except redis.RedisError as error:
        log.warning("The ledger did not take a revoke (%s); the message is given back", type(error).__name__)
        task_ready(request)
        request.reject(requeue=True)
        time.sleep(PAUSE_S)
        return True
    state.revoked.discard(request.id)
    why = "expired" if expired else "was revoked"
    log.info("Job %s %s: %s", shown_id(request.id), why, _TOLD.get(was, _OVER), extra={"job_id": request.id})
    return False


def _is_expired(request: Request) -> bool:
    expires = cast(datetime | None, request.expires)
    return expires is not None and datetime.now(UTC if expires.tzinfo else None) > expires
