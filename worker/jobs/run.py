"""One attempt at one job: its lease, its stage, its timings, and the pulse that keeps it alive.

What a job does lives elsewhere; when it is tried again is decided in ``carry.py``.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import redis

from worker.errors import Cancelled
from worker.ledger import Ledger

log = logging.getLogger(__name__)


class NotYet(Exception):
    """Another job has to end first. Waiting for it is no failed attempt."""

    def __init__(self, message: str, *, delay_s: float) -> None:
        super().__init__(message)
        self.message = message
        self.delay_s = delay_s


@dataclass
class Run:
    """An attempt under way. ``memo`` is what an earlier attempt wrote down before its push, if it came so far."""

    job_id: str
    fence: int
    attempt: int
    last: bool
    ledger: Ledger
    memo: dict[str, Any] | None = None
    clock: Callable[[], float] = time.perf_counter
    stage: str = "claimed"
    timings_ms: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    lost: bool = False

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time what happens inside and show it as the job's stage."""
        self.stage, begun = name, self.clock()
        try:
            yield
        finally:
            elapsed_ms = (self.clock() - begun) * 1000
            self.timings_ms[name] = round(self.timings_ms.get(name, 0.0) + elapsed_ms, 1)

    def intend(self, memo: Mapping[str, Any], *, decision: Mapping[str, Any] | None = None) -> None:
        """Write down what is about to happen, as the last moment at which a cancellation counts."""
        if not self.ledger.intend(self.job_id, self.fence, memo, decision=decision):
            raise Cancelled("The job was cancelled before anything was pushed.")


Publish = Callable[[str, dict[str, Any]], None]


class Pulse:
    """One thread per process that renews leases and shows stages while jobs run.

    A stage is shown only when it lasts longer than a beat: quick jobs cost nothing.
    """

    def __init__(self, ledger: Ledger, publish: Publish, *, beat_s: float = 0.25) -> None:
        self._ledger = ledger
        self._publish = publish
        self._beat_s = beat_s
        self._runs: dict[str, tuple[Run, float]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def beating(self, run: Run) -> Iterator[None]:
        """The lease of ``run`` is kept alive inside; after it, nothing more is published for the job."""
        with self._lock:
            self._runs[run.job_id] = (run, time.monotonic())
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="pulse", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                del self._runs[run.job_id]
            with run.lock:  # a beat under way ends before the result is stored, so it cannot overwrite it
                run.lost = True

    def show(self, run: Run, meta: dict[str, Any]) -> None:
        """Show ``meta`` at once, while the job is still ours to speak for."""
        self._publish(run.job_id, meta)

    def _loop(self) -> None:
        shown: dict[str, str] = {}
        renewed: dict[str, float] = {}
        while True:
            time.sleep(self._beat_s)
            with self._lock:
                runs = list(self._runs.values())
            alive = {run.job_id for run, _ in runs}
            shown = {job_id: stage for job_id, stage in shown.items() if job_id in alive}
            renewed = {job_id: at for job_id, at in renewed.items() if job_id in alive}
            for run, begun in runs:
                try:
                    self._beat(run, begun, shown, renewed)
                except redis.RedisError as error:
                    log.warning("The ledger did not take a heartbeat (%s); trying again", type(error).__name__)

    def _beat(self, run: Run, begun: float, shown: dict[str, str], renewed: dict[str, float]) -> None:
        now = time.monotonic()
        if now - renewed.get(run.job_id, begun) >= self._ledger.lease_s / 3:
            renewed[run.job_id] = now
            if not self._ledger.heartbeat(run.job_id, run.fence):
                run.lost = True
        stage = run.stage
        with run.lock:
            if not run.lost and now - begun >= self._beat_s and shown.get(run.job_id) != stage:
                shown[run.job_id] = stage
                self._publish(run.job_id, {"stage": stage, "attempt": run.attempt})
