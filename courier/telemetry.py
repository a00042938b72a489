"""Where jobs, steps and calls to servers can be watched from outside, by whoever was let in; otherwise by nobody.

As with logging, the work says what it does and knows no listener. The listeners are ``worker/observability/metrics.py``
and ``otlp.py``, which this module does not import: while nobody watches, nothing is loaded and a step costs less than
a microsecond.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Final, Literal, Protocol

Count = Literal["lease_lost", "old_queue_stopped", "sweep", "sweep_failed", "woken"]
End = Literal["done", "refused", "dead", "parked", "lost"]


@dataclass(slots=True)
class JobSeen:
    """One attempt at a job. ``end`` and ``code`` are how it ended, which its door fills in."""

    task: str
    job_id: str
    attempt: int
    end: End = "lost"
    code: str = ""


@dataclass(slots=True)
class StepSeen:
    """One step of a job: ``fetch``, ``push`` …"""

    task: str
    name: str


@dataclass(slots=True)
class CallSeen:
    """One request to a PACS. ``status`` is that of its answer, 0 without one; ``code`` that of the error it became."""

    server_name: str
    server_type: str
    method: str
    status: int = 0
    code: str = ""


@dataclass(slots=True)
class SendSeen:
    """The message of a job on its way to the broker."""

    task: str
    job_id: str


Seen = JobSeen | StepSeen | CallSeen | SendSeen


class Watcher(Protocol):
    """Who watches. SHALL be safe for threads, SHALL be quick, and SHALL NOT raise; it sees no URL and no patient."""

    def watching(self, seen: Seen) -> AbstractContextManager[object]:
        """Entered when it begins; when it is left, ``seen`` says how it ended."""
        ...

    def count(self, what: Count, number: int) -> None: ...

    def carrier(self) -> dict[str, str]:
        """The headers by which another process continues what is under way here."""
        ...

    def continued(self, carrier: Mapping[str, str]) -> AbstractContextManager[object]:
        """Inside, whatever begins belongs to what ``carrier`` names."""
        ...


_NOBODY: Final = nullcontext()
_watchers: tuple[Watcher, ...] = ()


def watch(watcher: Watcher) -> None:
    """Let ``watcher`` see everything from now on, in this process and those that it forks."""
    global _watchers  # noqa: PLW0603 - a process is watched or it is not, as with logging
    _watchers = (*_watchers, watcher)


def stop_watching() -> None:
    global _watchers  # noqa: PLW0603
    _watchers = ()


def watching(seen: Seen) -> AbstractContextManager[object]:
    """Let whoever watches see what happens inside."""
    return _all(seen) if _watchers else _NOBODY


@contextmanager
def _all(seen: Seen) -> Iterator[None]:
    with ExitStack() as stack:
        for watcher in _watchers:
            stack.enter_context(watcher.watching(seen))
        yield


def count(what: Count, number: int = 1) -> None:
    for watcher in _watchers:
        watcher.count(what, number)


def carrier() -> dict[str, str]:
    """What a message or a request bears so that its receiver can continue here; {} if nobody traces."""
    return {name: value for watcher in _watchers for name, value in watcher.carrier().items()} if _watchers else {}


def continued(carrier: Mapping[str, str]) -> AbstractContextManager[object]:
    """Inside, what begins continues what ``carrier`` (W3C ``traceparent``, ``tracestate``) names."""
    return _all_continued(carrier) if _watchers and carrier else _NOBODY


@contextmanager
def _all_continued(carrier: Mapping[str, str]) -> Iterator[None]:
    with ExitStack() as stack:
        for watcher in _watchers:
            stack.enter_context(watcher.continued(carrier))
        yield
