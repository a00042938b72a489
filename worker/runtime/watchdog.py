"""Does this worker get anywhere: judged by what it did, never by whether it answers; if not, its process ends.

A worker that has stopped working without dying looks well from outside: it answers pings, and its queue grows. The
thread here looks at it every few seconds and ends the process, so that whoever supervises it starts another; the
jobs it held come back by their leases. How Celery is looked at is said in ``consumer.py``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

#: What a supervisor sees of a worker that ended itself (EX_SOFTWARE).
EXIT_STATUS: Final = 70
#: Without a watchdog, a worker is called unwell after this.
UNWELL_S: Final = 120.0
#: Threads that go on turning in a worker whose slots all hang, besides those that answer a scrape. Whoever adds one
#: names it here.
BACKGROUND: Final = ("MainThread", "watchdog", "sweeper", "pulse", "stages", "guard", "metrics", "Otel")


@dataclass(frozen=True)
class Signs:
    """One look at a worker.

    ``turns`` and ``taken`` count the turns of its loop (None: it has none to be watched) and the messages it took,
    ``worked`` how often its slots' threads woke (None: nobody counts it here). ``waiting`` are the messages in the
    queues it is to consume; None says that the broker did not answer.
    """

    turns: int | None
    taken: int
    worked: int | None
    slots: int
    busy: int
    waiting: int | None
    stopping: bool = False


@dataclass(frozen=True)
class Complaint:
    """What a worker should have done and did not for ``lasting_s``; ``fatal`` when that was long enough."""

    what: str
    lasting_s: float
    fatal: bool

    def __str__(self) -> str:
        return f"{self.what} for {self.lasting_s:.0f} s"


@dataclass
class Progress:
    """What has been amiss since when. Between two looks at most ``gap_s``, or nothing is held against the worker."""

    limit_s: float
    hung_s: float
    gap_s: float
    _since: dict[str, float] = field(default_factory=dict)
    _before: tuple[float, Signs] | None = None

    def find_complaint(self, signs: Signs, *, now_s: float) -> Complaint | None:
        """The complaint that has lasted longest, measured by its own limit; None if all is well or nobody can tell."""
        excused = signs.stopping or signs.waiting is None
        before, self._before = self._before, None if excused else (now_s, signs)
        if before is None or excused or now_s - before[0] > self.gap_s:
            self._since.clear()
            return None
        limits = missing(before[1], signs)
        self._since = {what: self._since.get(what, before[0]) for what in limits}
        complaints = [
            Complaint(what, now_s - since, now_s - since >= (self.hung_s if limits[what] else self.limit_s))
            for what, since in self._since.items()
        ]
        return max(complaints, key=lambda complaint: (complaint.fatal, complaint.lasting_s), default=None)


def missing(before: Signs, now: Signs) -> dict[str, bool]:
    """What was not done between two looks, and whether a job may have to wait for a server that long."""
    found = {}
    if now.turns is not None and now.turns == before.turns:
        found["its loop has not turned"] = False
    if now.taken == before.taken:
        if now.waiting and now.busy < now.slots:
            found["it has taken no message, although some wait and it has free slots"] = False
        if now.busy >= now.slots and now.worked is not None and now.worked == before.worked:
            found["none of its slots has done anything"] = True
    return found


def times_woken() -> int | None:
    """How often the threads that carry jobs have been given a processor; None where the system does not say (Linux)."""
    woken = 0
    for thread in threading.enumerate():
        if not (thread.name.startswith(BACKGROUND) or thread.name.endswith("(process_request_thread)")):
            with contextlib.suppress(OSError):  # it has just ended
                status = Path(f"/proc/self/task/{thread.native_id}/status").read_text(encoding="ascii")
                woken += sum(int(line.split()[1]) for line in status.splitlines() if "voluntary_ctxt_switches" in line)
    return woken or None


@dataclass(frozen=True)
class HealthReport:
    """What a look is worth telling others: a file for `worker.runtime.health`, the ledger for ``pacs doctor``."""

    ok: bool
    complaint: str
    every_s: float
    #: Old queues that the worker does not read any more (``queues.py``).
    stopped_queues: tuple[str, ...] = ()

    def as_json(self) -> str:
        report = {"ok": self.ok, "complaint": self.complaint, "every_s": self.every_s, "at": time.time()}
        return json.dumps({**report, "stopped_queues": self.stopped_queues})


class Watchdog:
    """The thread. ``read_signs`` gives the signs, ``publish`` gets every report, ``end`` is how the process ends."""

    def __init__(
        self,
        read_signs: Callable[[], Signs],
        *,
        watchdog_s: float,
        hung_s: float,
        publish: Callable[[HealthReport], None],
        end: Callable[[], None],
    ) -> None:
        limit_s = watchdog_s or UNWELL_S
        self.every_s = min(max(limit_s / 10, 1.5), 10.0)  # a loop that turns does so once a second
        self._deadly = watchdog_s > 0
        self._limit_s = limit_s
        self._progress = Progress(limit_s, hung_s, gap_s=self.every_s + max(limit_s / 2, 5.0))
        self._read_signs, self._publish, self._end = read_signs, publish, end

    def start(self) -> None:
        threading.Thread(target=self._loop, name="watchdog", daemon=True).start()

    def _loop(self) -> None:
        while True:
            try:
                self._once()
            except Exception as error:  # noqa: BLE001 - a watchdog that dies of its own fault watches nobody
                log.warning("The watchdog could not look (%s); trying again", type(error).__name__)
            time.sleep(self.every_s)

    def _once(self) -> None:
        if self._deadly:  # where a library keeps all of Python from running, this thread too, C ends the process
            with contextlib.suppress(RuntimeError):  # that takes a thread, of which the system may have no more
                faulthandler.dump_traceback_later(2 * self._limit_s + 60, exit=True, file=2)
        complaint = self._progress.find_complaint(self._read_signs(), now_s=time.monotonic())
        self._publish(HealthReport(not (complaint and complaint.fatal), str(complaint or ""), self.every_s))
        if complaint and complaint.fatal and self._deadly:
            log.critical(
                "This worker is stuck: %s (at %s). It ends itself with exit status %d, to be started again; "
                "its jobs come back by their leases.",
                complaint,
                _where(),
                EXIT_STATUS,
            )
            self._end()


def _where() -> str:
    """The innermost frames of the main thread, without any value."""
    frames = traceback.extract_stack(sys._current_frames().get(threading.main_thread().ident or 0), limit=None)
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-3:])) or "no frame"


def write(path: Path, report: HealthReport) -> None:
    """Lay the judgement down at ``path``, whole or not at all."""
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(number, "w", encoding="utf-8") as out:
        out.write(report.as_json())
    os.replace(name, path)
