"""Where jobs, steps and calls to servers can be watched from outside, by whoever was let in; otherwise by nobody.

As with logging, the work says what it does and knows no listener. The listeners are ``worker/observability/metrics.py``
and ``otlp.py``, which this module does not import: without observers nothing is loaded and a step costs less than
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
class JobEvent:
    """One attempt at a job. ``end`` and ``code`` are how it ended, which its door fills in."""

    task: str
    job_id: str
    attempt: int
    end: End = "lost"
    code: str = ""


@dataclass(slots=True)
class StepEvent:
    """One step of a job: ``fetch``, ``push`` …"""

    task: str
    name: str


@dataclass(slots=True)
class CallEvent:
    """One request to a PACS. ``status`` is that of its answer, 0 without one; ``code`` that of the error it became."""

    server_name: str
    server_type: str
    method: str
    status: int = 0
    code: str = ""


@dataclass(slots=True)
class SendEvent:
    """The message of a job on its way to the broker."""

    task: str
    job_id: str


TelemetryEvent = JobEvent | StepEvent | CallEvent | SendEvent


class Observer(Protocol):
    """Who watches. SHALL be safe for threads, SHALL be quick, and SHALL NOT raise; it sees no URL and no patient."""

    def observe(self, seen: TelemetryEvent) -> AbstractContextManager[object]:
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
_observers: tuple[Observer, ...] = ()


def add_observer(observer: Observer) -> None:
    """Let ``observer`` see everything from now on, in this process and those that it forks."""
    global _observers  # noqa: PLW0603 - a process is watched or it is not, as with logging
    _observers = (*_observers, observer)


def remove_observers() -> None:
    global _observers  # noqa: PLW0603
    _observers = ()


def observe(seen: TelemetryEvent) -> AbstractContextManager[object]:
    """Let whoever watches see what happens inside."""
    return _all(seen) if _observers else _NOBODY


@contextmanager
def _all(seen: TelemetryEvent) -> Iterator[None]:
    with ExitStack() as stack:
        for observer in _observers:
            stack.enter_context(observer.observe(seen))
        yield


def count(what: Count, number: int = 1) -> None:
    for observer in _observers:
        observer.count(what, number)


def carrier() -> dict[str, str]:
    """What a message or a request bears so that its receiver can continue here; {} if nobody traces."""
    return {name: value for observer in _observers for name, value in observer.carrier().items()} if _observers else {}


def continued(carrier: Mapping[str, str]) -> AbstractContextManager[object]:
    """Inside, what begins continues what ``carrier`` (W3C ``traceparent``, ``tracestate``) names."""
    return _all_continued(carrier) if _observers and carrier else _NOBODY


@contextmanager
def _all_continued(carrier: Mapping[str, str]) -> Iterator[None]:
    with ExitStack() as stack:
        for observer in _observers:
            stack.enter_context(observer.continued(carrier))
        yield
