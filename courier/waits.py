"""Why a job waits, since when, and when it is tried next: as programs read it and as one sentence for people.

No Redis here; who waits for what is decided in ``worker/jobs/runner.py`` and kept by ``ledger/jobs.py``.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from courier.results import Waiting

#: A header of messages that are sent for jobs which were sent before: monitors are told that such a job goes on.
WOKEN: Final = "woken"
#: Codes of waits that no error is the cause of (docs/jobs.md).
QUEUED: Final = "queued"
OTHER_JOB: Final = "other_job"
SERVER_BUSY: Final = "server_busy"
SERVER_UNKNOWN: Final = "server_unknown"
SERVER_PAUSED: Final = "server_paused"
SERVER_MAINTENANCE: Final = "server_maintenance"
BATCH_RUNNING: Final = "batch_running"
BATCH_PAUSED: Final = "batch_paused"
BATCH_WINDOW: Final = "batch_window"
BATCH_RATE: Final = "batch_rate"
BATCH_SLOTS: Final = "batch_slots"
WORKER_LOST: Final = "worker_lost"
WORKER_SHUTDOWN: Final = "worker_shutdown"
WORKER_SHORTAGE: Final = "worker_shortage"
CRASH_SUSPECT: Final = "crash_suspect"
REDIS_UNAVAILABLE: Final = "redis_unavailable"
WAIT_CODES: Final = frozenset(
    (
        *(QUEUED, OTHER_JOB, SERVER_BUSY, SERVER_UNKNOWN, BATCH_RUNNING, BATCH_PAUSED, BATCH_WINDOW, BATCH_RATE),
        *(BATCH_SLOTS, WORKER_LOST, WORKER_SHUTDOWN, WORKER_SHORTAGE, CRASH_SUSPECT, REDIS_UNAVAILABLE),
        *(SERVER_PAUSED, SERVER_MAINTENANCE),
    )
)


@dataclass(frozen=True)
class WaitReason:
    """One cause of waiting. ``subject`` tells two waits of one code apart: the other job, or the circuit breaker."""

    code: str
    message: str
    server_name: str = ""
    subject: str = ""

    @property
    def cause(self) -> str:
        """The same for the same cause: as long as it does not change, the job waits since the first time."""
        return f"{self.code} {self.server_name} {self.subject}"

    def as_json(self, *, since_ms: float, next_ms: float | None) -> dict[str, Any]:
        return Waiting(
            code=self.code,
            message=self.message,
            server_name=self.server_name or None,
            since=utc(since_ms),
            next_try=None if next_ms is None else utc(next_ms),
        ).model_dump()


#: Of a job that is in its queue, and of one whose worker is gone.
IN_QUEUE: Final = WaitReason(QUEUED, "the job is in its queue and waits for a free worker")
LOST: Final = WaitReason(WORKER_LOST, "the worker that ran the job is silent; another worker takes the job over")


class Meanwhile:
    """What a running job waits for just now, on any of its threads, and since when by this machine's clock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits: list[tuple[WaitReason, float]] = []

    def now(self) -> tuple[WaitReason, float] | None:
        """The reason that came first, and since when (ms)."""
        with self._lock:
            return self._waits[0] if self._waits else None

    @contextmanager
    def waits(self, reason: WaitReason) -> Iterator[None]:
        entry = (reason, time.time() * 1000)
        with self._lock:
            self._waits.append(entry)
        try:
            yield
        finally:
            with self._lock:
                self._waits.remove(entry)


_meanwhile: ContextVar[Meanwhile | None] = ContextVar("meanwhile", default=None)


@contextmanager
def noted_in(meanwhile: Meanwhile) -> Iterator[None]:
    """What is `waiting_for` something inside is noted there, on the threads that this context is copied to as well."""
    token = _meanwhile.set(meanwhile)
    try:
        yield
    finally:
        _meanwhile.reset(token)


@contextmanager
def waiting_for(reason: WaitReason) -> Iterator[None]:
    """Inside, the job at work here waits without giving up its slot."""
    meanwhile = _meanwhile.get()
    with nullcontext() if meanwhile is None else meanwhile.waits(reason):
        yield


def utc(at_ms: float) -> str:
    """RFC 3339, UTC, milliseconds."""
    return datetime.fromtimestamp(at_ms / 1000, tz=UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def waiting_in(meta: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Why the job of this state's meta waits; None if it does not. Workers of version 0.1 did not say since when."""
    if meta is None or meta.get("stage") != "waiting":
        return None
    return {name: meta.get(name) for name in Waiting.model_fields}


def sentence(waiting: Mapping[str, Any], *, now_s: float | None = None) -> str:
    """Why a job waits, for people. ``now_s`` (Unix time) makes the times local ones; else they stay as they are."""
    whom = f" for {waiting['server_name']}" if waiting.get("server_name") else ""
    since = f" since {_clock(waiting['since'], now_s)}" if waiting.get("since") else ""
    why = str(waiting.get("message") or waiting.get("code") or "no reason is known").rstrip(".")
    return f"waiting{whom}{since}: {why}{_next(waiting.get('next_try'), now_s)}"


def _next(next_try: str | None, now_s: float | None) -> str:
    if next_try is None:
        return ""
    left_s = math.inf if now_s is None else datetime.fromisoformat(next_try).timestamp() - now_s
    if left_s > 600:
        return f"; next try at {_clock(next_try, now_s)}"
    return f"; next try in {math.ceil(left_s)} s" if left_s > 0 else "; next try is due"


def _clock(moment: str, now_s: float | None) -> str:
    """The time of the day, with the date if that is not today's."""
    if now_s is None:
        return moment
    at = datetime.fromisoformat(moment).astimezone()
    today = datetime.fromtimestamp(now_s, tz=at.tzinfo)
    return at.strftime("%H:%M" if at.date() == today.date() else "%Y-%m-%d %H:%M")
