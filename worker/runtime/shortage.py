"""When a worker lacks threads or memory: that is no fault of the job in hand, which another worker may well do.

A message or a job is then given back, and after a few in a row the worker ends. One that is given back while others
succeed is at fault itself. Celery is not named here.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from courier.errors import Poisoned

#: What a supervisor sees of a worker that ended for want of threads or memory (EX_OSERR).
EXIT_STATUS: Final = 71
#: So many messages are given back in a row before the worker ends.
IN_A_ROW: Final = 5
#: A message that was given back so often, while others succeeded, becomes a dead letter.
MAX_RETURNS: Final = 5
#: How long a worker waits after it has given a message back.
PAUSE_S: Final = 1.0
#: What the outcome of an attempt says that ended for want of threads or memory.
STARVED: Final = "the worker gets no thread, memory or file"
#: What a worker says that cannot start all its threads.
NO_START: Final = (
    "This worker gets no more threads, although it has taken no message yet: raise its limits (ulimit -a; pids and"
    " memory of its container) or lower --concurrency. It ends itself with exit status %d."
)

_ERRNOS: Final = frozenset((errno.ENOMEM, errno.EMFILE, errno.ENFILE))


class Escaped(Exception):
    """An error came out of Celery's own code around a job; it is the one argument."""


class NotBegun(Exception):
    """A process has no threads for a job, and has left it alone."""


def is_shortage(error: BaseException) -> bool:
    """Whether ``error``, its cause or an error that it wraps says that this process gets no thread, memory or file."""
    return any(map(_says_so, _all_of(error, set())))


def _all_of(error: BaseException, seen: set[int]) -> Iterator[BaseException]:
    seen.add(id(error))
    yield error
    for other in (error.__cause__, *error.args):  # kombu's `DecodeError` has what it wraps among its arguments
        if isinstance(other, BaseException) and id(other) not in seen:
            yield from _all_of(other, seen)


def _says_so(error: BaseException) -> bool:
    if isinstance(error, RuntimeError):
        return "can't start new thread" in str(error) or "can't allocate" in str(error)
    if isinstance(error, OSError):
        return error.errno in _ERRNOS
    return isinstance(error, MemoryError | NotBegun)


def why(error: BaseException) -> str:
    """What happened, in words that quote nothing: its text may name a URL or a patient."""
    for one in _all_of(error, set()):
        if _says_so(one):
            return f"{STARVED} ({type(one).__name__})"
    return f"the worker itself failed ({type(error.args[0] if isinstance(error, Escaped) else error).__name__})"


def what_to_do(why: str) -> str:
    """What an operator does about it, as the middle of a sentence."""
    if why.startswith(STARVED):
        return "raise the worker's limits (ulimit -a; pids and memory of its container)"
    return "report the fault, which the worker's log names"


def dead_letter(why: str) -> Poisoned:
    """The end of a job that was given back too often while others succeeded."""
    return Poisoned(
        f"It was given back {MAX_RETURNS} times while other jobs were done, because {why}; {what_to_do(why)}, then"
        " replay the job."
    )


def start_threads(pool: ThreadPoolExecutor, count: int) -> None:
    """Start all ``count`` threads of ``pool`` now, which would start them one by one as work comes.

    Raises
    ------
    RuntimeError
        The system gives no more threads.
    """
    started = threading.Event()
    try:
        for _ in range(count):
            pool.submit(started.wait)
    finally:
        started.set()


class Returns:
    """What was given back and what was done in this process. Safe for threads, as far as counts go."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self._others_succeed = False

    def succeeded(self) -> None:
        """A message or a job came to its end."""
        self.in_a_row, self._others_succeed = 0, True

    def given_back(self, count: Callable[[], int] = lambda: 0) -> int:
        """Note one that was given back; returns how often it was while others succeeded, as ``count`` counts it."""
        held_against_it, self._others_succeed = self._others_succeed, False
        self.in_a_row += 1
        return count() if held_against_it else 0
