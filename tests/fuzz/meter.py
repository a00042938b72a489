"""One case through one target: what comes out, how long it takes, what memory it needs. Knows no target."""

from __future__ import annotations

import signal
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from hypothesis.strategies import SearchStrategy

from courier.errors import CourierError

LIMIT_S = 1.0
#: Memory may be so many times the input.
FACTOR = 10
#: What any case may take beyond it: an exception with its frames, a pydantic error, the window of a reader.
ALLOWANCE_BYTES = 256 * 1024
#: A case that is not back after so much processor time is interrupted; the meter of memory slows it down fivefold.
INTERRUPT_S = 5.0

Act = Callable[[Any], Any]


class BrokenProperty(AssertionError):
    """A property that does not hold; the text says which."""


class _CaseHangs(BaseException):
    """Raised into a case that does not come back; not an Exception, so that no handler in the code eats it."""


@dataclass(frozen=True)
class FuzzTarget:
    """Something that reads what others wrote.

    ``prepare`` turns the case into what each of ``acts`` reads, which are measured one by one, as a job meets them.
    ``check`` holds each result, or error, against what else is known of the case.
    """

    name: str
    seeds: Callable[[], list[bytes]]
    shaped: SearchStrategy[bytes]
    prepare: Callable[[bytes], Any]
    acts: Sequence[Act]
    check: Callable[[Any, Any], None]
    factor: int = FACTOR
    allowance_bytes: Callable[[bytes], int] = lambda _: ALLOWANCE_BYTES


@dataclass
class FuzzTally:
    """The worst of the cases so far; ``refused`` counts those that no act took.

    ``ratio`` is peak memory less the allowance, over the input's length.
    """

    cases: int = 0
    refused: int = 0
    worst_s: float = 0.0
    worst_ratio: float = 0.0
    worst_bytes: int = 0


def run_case(target: FuzzTarget, case: bytes, tally: FuzzTally) -> None:
    """Hold every property against one case; `Finding` is the first that does not hold."""
    prepared = target.prepare(case)
    refused = 0
    for act in target.acts:
        result, seconds, peak_bytes = _measured(act, prepared)
        for _ in range(3):  # the meter of memory slows things down, and so does a neighbour on the same processor
            if seconds > LIMIT_S:
                seconds = min(seconds, _seconds(act, prepared))
        if seconds > LIMIT_S:
            raise BrokenProperty(f"takes {seconds:.1f} s of processor time")
        allowance_bytes = target.allowance_bytes(case)
        allowed_bytes = target.factor * len(case) + allowance_bytes
        for _ in range(3):  # another thread of this process allocates too, such as the one that talks to pytest-xdist
            if peak_bytes > allowed_bytes:
                peak_bytes = min(peak_bytes, _measured(act, prepared)[2])
        if peak_bytes > allowed_bytes:
            raise BrokenProperty(
                f"takes {peak_bytes:,} bytes for an input of {len(case):,}; {allowed_bytes:,} are allowed"
            )
        if isinstance(result, CourierError):
            _check_error(result)
            refused += 1
        target.check(prepared, result)
        tally.worst_s = max(tally.worst_s, seconds)
        tally.worst_bytes = max(tally.worst_bytes, peak_bytes)
        tally.worst_ratio = max(tally.worst_ratio, (peak_bytes - allowance_bytes) / max(len(case), 1))
    tally.cases += 1
    tally.refused += refused == len(target.acts)


def warm_up(target: FuzzTarget) -> None:
    """Have everything loaded that is loaded once, such as the tables of international host names."""
    for seed in target.seeds():
        with suppress(BrokenProperty):  # it comes again, measured
            prepared = target.prepare(seed)
            for act in target.acts:
                _outcome(act, prepared)


def _check_error(error: CourierError) -> None:
    text = str(error)
    if not error.code:
        raise BrokenProperty(f"raises an error without a code: {error!r}")
    if len(text) > 2_000:
        raise BrokenProperty(f"raises an error of {len(text):,} characters")
    if not text.isprintable() or not encodes(text):
        raise BrokenProperty(f"raises an error that cannot be logged as it is: {text!r}")


def encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _measured(act: Act, prepared: Any) -> tuple[Any, float, int]:
    tracemalloc.start()
    try:
        begun_s = time.thread_time()
        result = _outcome(act, prepared)
        return result, time.thread_time() - begun_s, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _seconds(act: Act, prepared: Any) -> float:
    begun_s = time.thread_time()
    _outcome(act, prepared)
    return time.thread_time() - begun_s


def _outcome(act: Act, prepared: Any) -> Any:
    """What came out: a result, or one of our own errors. Anything else is a finding."""
    try:
        with _interrupted():
            return act(prepared)
    except CourierError as error:
        return error
    except BrokenProperty:
        raise
    except _CaseHangs:
        raise BrokenProperty(f"is not back after {INTERRUPT_S:g} s of processor time") from None
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise BrokenProperty(
            f"crashes with {type(error).__name__} in {where.name} ({where.filename}:{where.lineno})"
        ) from error


@contextmanager
def _interrupted() -> Iterator[None]:
    """Counts processor time: the timer of wall time is pytest-timeout's."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise _CaseHangs

    before = signal.signal(signal.SIGVTALRM, interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, INTERRUPT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
