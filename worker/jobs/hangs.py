"""Files at which a server hangs: it has been sent all of a request, and does not answer within its read time-out.

Such a file would take a slot of its server for the read time-out at every attempt, of every job that has it. So the
ledger counts for each server how often it hung at a file, and after two times the file is not sent again: its job is a
dead letter, its item of a batch has failed, and it takes a person to replay or retry them. A worker that is killed
while it waits for such an answer has noted the hang before. Where a server hangs at one file after the other and
answers nothing between, the fault is the server's, and its circuit breaker does what is to be done.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import redis

from courier.errors import CourierError, PacsUnavailable, Poisoned
from courier.ledger.jobs import Hang, Ledger
from worker.jobs.attempt import Attempt
from worker.jobs.placement import says_it_is_well
from worker.pacs.protocol import Pacs
from worker.pacs.transport import when_sent

log = logging.getLogger(__name__)

#: So often a server hangs at a file before it is not sent again; and so often where it hung at others as well, and
#: answered nothing between, but says that it is well.
HANGS_OF_A_FILE: Final = 2
HANGS_IN_ANY_CASE: Final = 4
#: A request without an answer for so long is noted as a hang, in case that its worker does not live to see the end.
NOTED_AFTER_S: Final = 5.0


@dataclass
class PendingRequest:
    """A request of a job that is under way to ``server``. Safe for threads; the pulse looks at it now and then."""

    ledger: Ledger
    server: str
    after_s: float
    files: Callable[[], Collection[str]]
    is_troubled: bool = False
    sent_s: float | None = None
    is_noted: bool = False
    is_over: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def sent(self) -> None:
        """All of its body has gone out."""
        self.sent_s = time.monotonic()

    def note_if_late(self) -> None:
        """Note that the server hangs, if its answer is late."""
        with self._lock:
            if self.sent_s is None or self.is_over or self.is_noted or time.monotonic() - self.sent_s < self.after_s:
                return
            self.ledger.note_hang(self.server, self.files())
            self.is_noted = True

    def end(self, *, hung: bool, answered: bool) -> None:
        with self._lock:
            self.is_over = True
            if hung and not self.is_noted:
                self.ledger.note_hang(self.server, self.files())
            elif self.is_noted and not hung:
                self.ledger.note_hang(self.server, self.files(), times=-1)
        if answered and (self.is_troubled or self.is_noted):
            self.ledger.note_answer(self.server)


@dataclass
class Hangs:
    """What a job knows of such files, and adds to it. Without a run nothing is known, and nothing noted."""

    attempt: Attempt | None = None
    #: Servers that hung at any file lately.
    _troubled: set[str] = field(default_factory=set)

    def counted(self, pacs: Pacs, files: Collection[str]) -> dict[str, int]:
        """How often the server hung at each of ``files``; those at which it never did are left out."""
        return {file: one.count for file, one in self._known(pacs, files).items()}

    def given_up(self, pacs: Pacs, files: Collection[str], seen: Mapping[str, int] | None = None) -> dict[str, int]:
        """Those of ``files`` that are not to be sent again, each with how often the server hung at it.

        ``seen`` are the counts with which they were given up before: a person wants them to be sent once more.
        """
        found = self._known(pacs, files)
        return {file: one.count for file, one in found.items() if _is_given_up(one, (seen or {}).get(file, 0), pacs)}

    def _known(self, pacs: Pacs, files: Collection[str]) -> dict[str, Hang]:
        if self.attempt is None or not files:
            return {}
        is_troubled, found = self.attempt.ledger.hangs(pacs.server.name, files)
        if is_troubled:
            self.note_troubled(pacs)
        return found

    def note_troubled(self, pacs: Pacs) -> None:
        """The server has hung at some file lately: its next answer is noted."""
        self._troubled.add(pacs.server.name)

    def forget(self, pacs: Pacs, hangs: Mapping[str, int]) -> None:
        """Begin anew to count the hangs at those files."""
        if self.attempt is not None:
            for file, times in hangs.items():
                self.attempt.ledger.note_hang(pacs.server.name, [file], times=-times)

    @contextmanager
    def sending(self, pacs: Pacs, files: Callable[[], Collection[str]]) -> Iterator[None]:
        """A request with ``files`` is sent inside; they are asked for when all of it has gone out, and later."""
        if self.attempt is None:
            yield
            return
        after_s = min(NOTED_AFTER_S, pacs.server.read_timeout_s / 2)
        waiting = PendingRequest(
            self.attempt.ledger, pacs.server.name, after_s, files, pacs.server.name in self._troubled
        )
        self.attempt.sends.append(waiting)
        hung = answered = False
        try:
            with when_sent(waiting.sent):
                yield
            answered = True
        except CourierError as error:
            hung = isinstance(error, PacsUnavailable) and error.hung and error.server_name == pacs.server.name
            raise
        finally:
            self.attempt.sends.remove(waiting)
            try:
                waiting.end(hung=hung, answered=answered)
            except redis.RedisError as error:
                log.warning("Could not note whether %s hangs: %s", pacs.server.name, type(error).__name__)


def _is_given_up(one: Hang, seen: int, pacs: Pacs) -> bool:
    hangs = one.count - min(seen, one.count)
    if hangs < HANGS_OF_A_FILE:
        return False
    return not one.others_hung or (hangs >= HANGS_IN_ANY_CASE and says_it_is_well(pacs))


def poisoned(pacs: Pacs, hangs: int, details: Mapping[str, Any]) -> Poisoned:
    """What becomes of a file that is not sent again."""
    return Poisoned(
        f"{sentence(pacs, hangs)} Look there for the reason, then replay the job or retry the batch.",
        server_name=pacs.server.name,
        server_type=pacs.server.type,
        details={**details, "hangs": hangs},
    )


def sentence(pacs: Pacs, hangs: int) -> str:
    name, limit_s = pacs.server.name, pacs.server.read_timeout_s
    return (
        f"{name} was sent all of this image {hangs} times and gave no answer (within {limit_s:g} s, or until the worker"
        f" ended); it is not sent to {name} again."
    )
