"""One attempt at one job: its lease, its stage, its timings, and the pulse that keeps it alive.

What a job does lives elsewhere; when it is tried again is decided in ``carry.py``.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import redis

from courier.errors import Cancelled
from courier.ledger.jobs import NO_ATTACHMENTS, Attachments, LeaseLost, Ledger, passes, words_of
from courier.redaction import about, job_lines
from courier.telemetry import StepSeen, watching
from courier.waits import OTHER_JOB, SERVER_UNKNOWN, WORKER_SHUTDOWN, Meanwhile, WaitReason

log = logging.getLogger(__name__)

#: How soon a job is tried by another worker that knows more servers.
HAND_OVER_S = 1.0
SHUT_DOWN = "the worker was shut down before the job had ended"


class NotYet(Exception):
    """Another job has to end first, ``owner`` unless there is another ``code``. Waiting for it is no failed attempt.

    Waits in a row get longer, unless they are ``steady``: then it is known when to look again.
    """

    def __init__(
        self, message: str, *, delay_s: float, steady: bool = False, code: str = OTHER_JOB, owner: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.delay_s = delay_s
        self.steady = steady
        self.reason = WaitReason(code, message, subject=owner)


class ServerUnknown(NotYet):
    """A worker that knows the server ``name`` has to do the job: this worker's settings lack it, another's do not."""

    def __init__(self, name: str) -> None:
        message = f"waits for a worker that knows server {name}"
        super().__init__(message, delay_s=HAND_OVER_S, steady=True, code=SERVER_UNKNOWN)
        self.reason = replace(self.reason, server_name=name)


class Lookable(Protocol):
    """What the heartbeat of a job looks at now and then."""

    def look(self) -> None: ...


@dataclass
class Run:
    """An attempt under way. ``memo`` is what an earlier attempt wrote down before its push, if it came so far.

    A job that is a piece of another one is not ``shown`` to whoever looks for results.
    """

    job_id: str
    fence: int
    attempt: int
    last: bool
    ledger: Ledger
    cancelled: bool = False  # before this attempt began
    task: str = ""
    memo: dict[str, Any] | None = None
    clock: Callable[[], float] = time.perf_counter
    stage: str = "claimed"
    timings_ms: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    lost: bool = False
    shown: bool = True
    #: Image, study and series that an earlier attempt found in the hands of another job.
    wants: tuple[str, ...] = ()
    #: What it waits for without giving up its slot.
    meanwhile: Meanwhile = field(default_factory=Meanwhile)
    #: Other jobs that hold what this one needs, as it found them.
    owners: dict[str, None] = field(default_factory=dict)
    #: What this attempt wrote down last, whether or not the ledger took it.
    noted: Mapping[str, Any] | None = None
    #: Requests under way at whose files a server may hang.
    sends: list[Lookable] = field(default_factory=list)
    #: What the ledger keeps of the job's messages.
    attachments: Attachments = NO_ATTACHMENTS

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time what happens inside and show it as the job's stage."""
        self.stage, begun = name, self.clock()
        about(stage=name)
        try:
            with watching(StepSeen(self.task, name)):
                yield
        finally:
            elapsed_ms = (self.clock() - begun) * 1000
            self.timings_ms[name] = round(self.timings_ms.get(name, 0.0) + elapsed_ms, 1)

    def intend(self, memo: Mapping[str, Any], *, decision: Mapping[str, Any] | None = None) -> None:
        """Write down what is about to happen, as the last moment at which a cancellation counts."""
        if not self.note(memo, decision=decision):
            raise Cancelled("The job was cancelled before anything was pushed.")

    def note(self, memo: Mapping[str, Any], *, decision: Mapping[str, Any] | None = None) -> bool:
        """Write down what the next attempt has to know; False if the job was cancelled, and the memo is not written."""
        self.noted = memo
        return self.ledger.intend(self.job_id, self.fence, memo, decision=decision)

    def is_free(self, owner: str | None) -> bool:
        """Whether no other job holds something; ``owner``, if one does, is what this job waits for."""
        if owner is not None:
            self.owners[owner] = None
        return owner is None

    def check_ours(self) -> None:
        """`LeaseLost` if another attempt has taken the job over, as far as its heartbeat has noticed."""
        if self.lost:
            raise LeaseLost


Publish = Callable[[str, dict[str, Any]], None]


class Pulse:
    """Two threads per process: one renews the leases of running jobs, the other shows their stages.

    They are two because a result back-end that hangs must not cost anybody a lease. A stage is shown only when it
    lasts longer than a beat: quick jobs cost nothing.
    """

    def __init__(self, ledger: Ledger, publish: Publish, *, beat_s: float = 0.25) -> None:
        self._ledger = ledger
        self._publish = publish
        self._beat_s = beat_s
        self._runs: dict[tuple[str, int], tuple[Run, float]] = {}  # an overtaken attempt may still be here
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._owed: list[Callable[[], object]] = []

    def start(self) -> None:
        """Start both threads, as far as they do not run yet."""
        with self._lock:
            for name, beat in (("pulse", Pulse._renew), ("stages", Pulse._show_stage))[len(self._threads) :]:
                args = (weakref.ref(self), beat, self._beat_s)
                thread = threading.Thread(target=_beat_on, args=args, name=name, daemon=True)
                thread.start()
                self._threads.append(thread)

    @contextlib.contextmanager
    def beating(self, run: Run) -> Iterator[None]:
        """The lease of ``run`` is kept alive inside; after it, nothing more is published for the job."""
        self.start()
        with self._lock:
            self._runs[_attempt(run)] = (run, time.monotonic())
        try:
            yield
        finally:
            with self._lock:
                del self._runs[_attempt(run)]
            with run.lock:  # a beat under way ends before the result is stored, so it cannot overwrite it
                run.lost = True

    def let_go(self) -> int:
        """Put all running jobs aside for somebody else to take over at once; returns how many. No death is counted."""
        with self._lock:
            runs = [run for run, _ in self._runs.values()]
        for run in runs:
            run.lost = True
            with contextlib.suppress(LeaseLost, redis.RedisError):  # else whoever waits for the lease takes it over
                self._ledger.park(
                    run.job_id, run.fence, delay_s=0, code=WORKER_SHUTDOWN, message=SHUT_DOWN, wait="steady"
                )
            log.warning("Job %s is left to another worker: %s", run.job_id, SHUT_DOWN)
        return len(runs)

    def owe(self, give: Callable[[], object]) -> None:
        """Call ``give``, which hands a job back to the ledger, as soon as Redis is there again."""
        with self._lock:
            self._owed.append(give)

    def _pay(self) -> None:
        """Do what is owed, until Redis cannot be reached; what Redis refuses for good is left to the lease."""
        while True:
            with self._lock:
                if not self._owed:
                    return
                give = self._owed.pop(0)
            try:
                give()
            except redis.RedisError as error:
                if passes(error):
                    with self._lock:
                        self._owed.append(give)
                    return
                log.warning("A job cannot be handed back: %s", words_of(error))

    def show(self, run: Run, meta: dict[str, Any]) -> None:
        """Show ``meta`` at once, if the job is still ours to speak for: nothing may cover a later attempt's result."""
        with run.lock:
            if not run.lost and self._ledger.heartbeat(run.job_id, run.fence):
                self._publish(run.job_id, meta)

    def round(self, beat: Beat, done: ByAttempt) -> ByAttempt:
        """One beat for each running job; what was ``done`` for it before goes with it."""
        if beat is Pulse._renew:
            self._pay()
        with self._lock:
            runs = list(self._runs.values())
            done = {attempt: what for attempt, what in done.items() if attempt in self._runs}
        for run, begun in runs:
            with job_lines(run.job_id):
                try:
                    beat(self, run, begun, done)
                except Exception as error:  # noqa: BLE001 - without this thread every job would lose its lease
                    log.warning("A beat failed (%s); trying again", type(error).__name__)
        return done

    def _renew(self, run: Run, begun: float, renewed: dict[tuple[str, int], Any]) -> None:
        for send in list(run.sends):
            send.look()
        now = time.monotonic()
        if now - renewed.get(_attempt(run), begun) >= self._ledger.lease_s / 3:
            if not self._ledger.heartbeat(run.job_id, run.fence):
                run.lost = True
            renewed[_attempt(run)] = now

    def _show_stage(self, run: Run, begun: float, shown: dict[tuple[str, int], Any]) -> None:
        waits = run.meanwhile.now()
        what = run.stage if waits is None else waits
        if run.shown and time.monotonic() - begun >= self._beat_s and shown.get(_attempt(run)) != what:
            shown[_attempt(run)] = what
            why = waits[0].as_json(since_ms=waits[1], next_ms=None) if waits else {}
            self.show(run, {"stage": "waiting" if waits else run.stage, "attempt": run.attempt, **why})


#: By attempt: when it was renewed, or which stage was shown.
ByAttempt = dict[tuple[str, int], Any]
Beat = Callable[[Pulse, Run, float, ByAttempt], None]


def _beat_on(pulse: weakref.ref[Pulse], beat: Beat, beat_s: float) -> None:
    """As long as somebody has the pulse."""
    done: ByAttempt = {}
    while True:
        time.sleep(beat_s)
        there = pulse()
        if there is None:
            return
        done = there.round(beat, done)
        del there


def _attempt(run: Run) -> tuple[str, int]:
    return run.job_id, run.fence
