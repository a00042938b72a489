"""One attempt at one job: its lease, its stage, its timings, and the pulse that keeps it alive.

What a job does lives elsewhere; when it is tried again is decided in ``runner.py``.
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
from courier.ledger.jobs import (
    NO_ATTACHMENTS,
    Attachments,
    IntentResult,
    IntentState,
    LeaseLost,
    Ledger,
    PushIntent,
    Receipt,
    StoredCheckpoint,
    passes,
    words_of,
)
from courier.redaction import about, job_lines
from courier.telemetry import StepEvent, observe
from courier.waits import OTHER_JOB, SERVER_UNKNOWN, WORKER_SHUTDOWN, Meanwhile, WaitReason

log = logging.getLogger(__name__)

#: How soon a job is tried by another worker that knows more servers.
HAND_OVER_S = 1.0
CANCELLED = "The job was cancelled before anything was pushed."
SHUT_DOWN = "the worker was shut down before the job had ended"


class Postpone(Exception):
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


class ServerUnknown(Postpone):
    """A worker that knows the server ``name`` has to do the job: this worker's settings lack it, another's do not."""

    def __init__(self, name: str) -> None:
        message = f"waits for a worker that knows server {name}"
        super().__init__(message, delay_s=HAND_OVER_S, steady=True, code=SERVER_UNKNOWN)
        self.reason = replace(self.reason, server_name=name)


class LateCheck(Protocol):
    """What the heartbeat of a job looks at now and then."""

    def note_if_late(self) -> None: ...


@dataclass
class Attempt:
    """An attempt under way. ``checkpoint`` is what an earlier attempt wrote down before its push, if it came so far.

    A job that is a piece of another one is not ``shown`` to whoever looks for results.
    """

    job_id: str
    fence: int
    number: int
    last: bool
    ledger: Ledger
    cancelled: bool = False  # before this attempt began
    task: str = ""
    checkpoint: dict[str, Any] | None = None
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
    sends: list[LateCheck] = field(default_factory=list)
    #: What the ledger keeps of the job's messages.
    attachments: Attachments = NO_ATTACHMENTS
    #: The certificate that signed its order, as far as a worker has verified that.
    sender: str = ""

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time what happens inside and show it as the job's stage."""
        self.stage, begun = name, self.clock()
        about(stage=name)
        try:
            with observe(StepEvent(self.task, name)):
                yield
        finally:
            elapsed_ms = (self.clock() - begun) * 1000
            self.timings_ms[name] = round(self.timings_ms.get(name, 0.0) + elapsed_ms, 1)

    def write_intent(self, checkpoint: Mapping[str, Any], *, decision: Mapping[str, Any] | None = None) -> None:
        """Write down what is about to happen, as the last moment at which a cancellation counts."""
        if not self.note(checkpoint, decision=decision):
            raise Cancelled(CANCELLED)

    def note(self, checkpoint: Mapping[str, Any], *, decision: Mapping[str, Any] | None = None) -> bool:
        """Write down what the next attempt has to know; False if the job was cancelled: nothing is written."""
        self.noted = checkpoint
        return self.ledger.write_intent(self.job_id, self.fence, checkpoint, decision=decision)

    def intend_push(self, intent: PushIntent) -> IntentResult:
        """`write_intent`, unless the server has hung at the file; then it has to be judged first."""
        return self.intended(intent, self.ledger.intend_push(self.job_id, intent))

    def intended(self, intent: PushIntent, result: IntentResult) -> IntentResult:
        """``result``, which the ledger has given for ``intent``; `Cancelled` if the job was."""
        if result.state is IntentState.CANCELLED:
            raise Cancelled(CANCELLED)
        if result.state is IntentState.WRITTEN:
            self.noted = intent.checkpoint
        return result

    def note_stored(
        self,
        sop_instance_uid: str,
        study_instance_uid: str,
        receipt: Receipt,
        *,
        series_instance_uid: str,
        first: Mapping[str, Any],
        other: Mapping[str, Any],
    ) -> bool:
        """Write the receipt and with it what the next attempt has to know, too late to be cancelled: ``first``, if this
        job was the first to store anything of the study that it had claimed, else ``other``. True if it was.
        """
        opened = self.ledger.stored(
            sop_instance_uid,
            study_instance_uid,
            receipt,
            series_instance_uid=series_instance_uid,
            checkpoint=StoredCheckpoint(self.fence, first, other),
        )
        self.noted = first if opened else other
        return opened

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


class Heartbeat:
    """Two threads per process: one renews the leases of running jobs, the other shows their stages.

    They are two because a result back-end that hangs must not cost anybody a lease. A stage is shown only when it
    lasts longer than a beat: quick jobs cost nothing.
    """

    def __init__(self, ledger: Ledger, publish: Publish, *, beat_s: float = 0.25) -> None:
        self._ledger = ledger
        self._publish = publish
        self._beat_s = beat_s
        self._attempts: dict[tuple[str, int], tuple[Attempt, float]] = {}  # an overtaken attempt may still be here
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._owed: list[Callable[[], object]] = []
        self._published: dict[str, float] = {}

    def start(self) -> None:
        """Start both threads, as far as they do not run yet."""
        with self._lock:
            for name, beat in (("pulse", Heartbeat._renew), ("stages", Heartbeat._show_stage))[len(self._threads) :]:
                args = (weakref.ref(self), beat, self._beat_s)
                thread = threading.Thread(target=_beat_on, args=args, name=name, daemon=True)
                thread.start()
                self._threads.append(thread)

    @contextlib.contextmanager
    def keep_alive(self, attempt: Attempt) -> Iterator[None]:
        """The lease of ``attempt`` is kept alive inside; after it, nothing more is published for the job."""
        self.start()
        with self._lock:
            self._attempts[_attempt(attempt)] = (attempt, time.monotonic())
        try:
            yield
        finally:
            with self._lock:
                del self._attempts[_attempt(attempt)]
            with attempt.lock:  # a beat under way ends before the result is stored, so it cannot overwrite it
                attempt.lost = True

    def release(self) -> int:
        """Put all running jobs aside for somebody else to take over at once; returns how many. No death is counted."""
        with self._lock:
            attempts = [attempt for attempt, _ in self._attempts.values()]
        for attempt in attempts:
            attempt.lost = True
            with contextlib.suppress(LeaseLost, redis.RedisError):  # else whoever waits for the lease takes it over
                self._ledger.park(
                    attempt.job_id, attempt.fence, delay_s=0, code=WORKER_SHUTDOWN, message=SHUT_DOWN, wait="steady"
                )
            log.warning("Job %s is left to another worker: %s", attempt.job_id, SHUT_DOWN)
        return len(attempts)

    def owe(self, give: Callable[[], object]) -> None:
        """Call ``give``, which hands a job back to the ledger, as soon as Redis is there again."""
        with self._lock:
            self._owed.append(give)

    def published(self, job_id: str) -> None:
        """The outcome of the job is where its client looks for it. The ledger hears so with the next beat, together
        with those of other jobs; of a worker that is killed before, another one brings the outcome there once more.
        """
        with self._lock:
            self._published[job_id] = time.monotonic()

    def note_published(self) -> None:
        """Let the ledger know now whose outcomes have been `published`."""
        with self._lock:
            published, self._published = self._published, {}
        if not published:
            return
        now = time.monotonic()
        try:
            self._ledger.published_before({job_id: now - at for job_id, at in published.items()})
        except redis.RedisError as error:
            if passes(error):
                with self._lock:
                    self._published = published | self._published
            log.warning("The ledger did not note whose outcomes are published: %s", type(error).__name__)

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

    def show(self, attempt: Attempt, meta: dict[str, Any]) -> None:
        """Show ``meta`` at once, if the job is still ours to speak for: nothing may cover a later attempt's result."""
        with attempt.lock:
            self._publish_ours(attempt, meta)

    def _publish_ours(self, attempt: Attempt, meta: dict[str, Any]) -> None:
        if not attempt.lost and self._ledger.heartbeat(attempt.job_id, attempt.fence):
            self._publish(attempt.job_id, meta)

    def round(self, beat: Beat, done: ByAttempt) -> ByAttempt:
        """One beat for each running job; what was ``done`` for it before goes with it."""
        if beat is Heartbeat._renew:
            self.note_published()
            self._pay()
        with self._lock:
            attempts = list(self._attempts.values())
            done = {attempt: what for attempt, what in done.items() if attempt in self._attempts}
        for this_attempt, begun in attempts:
            with job_lines(this_attempt.job_id):
                try:
                    beat(self, this_attempt, begun, done)
                except Exception as error:  # noqa: BLE001 - without this thread every job would lose its lease
                    log.warning("A beat failed (%s); trying again", type(error).__name__)
        return done

    def _renew(self, attempt: Attempt, begun: float, renewed: dict[tuple[str, int], Any]) -> None:
        for send in list(attempt.sends):
            send.note_if_late()
        now = time.monotonic()
        if now - renewed.get(_attempt(attempt), begun) >= self._ledger.lease_s / 3:
            if not self._ledger.heartbeat(attempt.job_id, attempt.fence):
                attempt.lost = True
            renewed[_attempt(attempt)] = now

    def _show_stage(self, attempt: Attempt, begun: float, shown: dict[tuple[str, int], Any]) -> None:
        waits = attempt.meanwhile.now()
        what = attempt.stage if waits is None else waits
        if attempt.shown and time.monotonic() - begun >= self._beat_s and shown.get(_attempt(attempt)) != what:
            shown[_attempt(attempt)] = what
            why = waits[0].as_json(since_ms=waits[1], next_ms=None) if waits else {}
            meta = {"stage": "waiting" if waits else attempt.stage, "attempt": attempt.number, **why}
            with attempt.lock:
                if attempt.shown:
                    self._publish_ours(attempt, meta)


#: By attempt: when it was renewed, or which stage was shown.
ByAttempt = dict[tuple[str, int], Any]
Beat = Callable[[Heartbeat, Attempt, float, ByAttempt], None]


def _beat_on(heartbeat: weakref.ref[Heartbeat], beat: Beat, beat_s: float) -> None:
    """As long as somebody has the pulse."""
    done: ByAttempt = {}
    while True:
        time.sleep(beat_s)
        there = heartbeat()
        if there is None:
            return
        done = there.round(beat, done)
        del there


def _attempt(attempt: Attempt) -> tuple[str, int]:
    return attempt.job_id, attempt.fence
