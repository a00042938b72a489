"""What all commands share: exit statuses, one-sentence failures, options that mean the same everywhere."""

from __future__ import annotations

import errno
import functools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import click

from courier.settings import SettingsError
from courier.waits import sentence
from producer.cli.demo import used_if_alone
from producer.cli.session import Interrupted, is_interruption
from producer.cli.tables import follow
from producer.client import Courier
from producer.errors import (
    BrokerUnavailable,
    CourierError,
    InvalidRequest,
    InvalidUid,
    PacsUnavailable,
    StillRunning,
)
from producer.handle import Handle, Report
from producer.terminal import OutputLost, drop_output, errors_console, flush_output, prepare_output, print_json

DONE, FAILED, WRONG_USAGE, UNAVAILABLE, INTERRUPTED = 0, 1, 2, 3, 130

Arguments = ParamSpec("Arguments")
Command = TypeVar("Command", bound=Callable[..., Any])

as_json_option = click.option(
    "--json", "as_json", is_flag=True, help="One JSON document on standard output, nothing else."
)
timeout_option = click.option(
    "--timeout", "timeout_s", type=float, help="Stop waiting after so many seconds; the jobs go on."
)
server_option = click.option("--server", help="Exactly this server.")
mode_option = functools.partial(
    click.option,
    "--mode",
    "--server",
    "mode",
    metavar="MODE",
    show_default=True,
    help="either: in order, the first that has it; both: every server; or the name of one server.",
)


def conditions(pairs: Sequence[str], *, called: str) -> dict[str, str]:
    """The DICOM keywords and values of an option that is given as often as there are conditions.

    A keyword is given once: of two conditions on one of them a server could be asked only for the last, which may
    match far more studies than both together.

    Raises
    ------
    InvalidRequest
        One is not written KEY=VALUE, or a keyword comes twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        keyword, written, value = pair.partition("=")
        if not written:
            raise InvalidRequest(f"A {called} is written KEY=VALUE, such as StudyDate=20260101-20261231.")
        if keyword in found:
            raise InvalidRequest(
                f"{keyword} is given twice; give one {called} for it, which may be a range, "
                "such as StudyDate=20260101-20261231."
            )
        found[keyword] = value
    return found


def exit_status(error: CourierError | None) -> int:
    """0 done, 1 refused or failed, 2 wrong usage, 3 a server is unavailable; 130, interrupted, is no error of a job."""
    if error is None:
        return DONE
    if isinstance(error, InvalidRequest):
        return WRONG_USAGE
    return UNAVAILABLE if isinstance(error, PacsUnavailable) else FAILED


def plain_failures(command: Callable[Arguments, int]) -> Callable[Arguments, None]:
    """Turn what can go wrong around a command into one sentence and an exit status."""

    @functools.wraps(command)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        prepare_output()
        try:
            with _terminated_as_interrupted(), used_if_alone():
                status = command(*args, **kwargs)
            flush_output()
        except (Interrupted, KeyboardInterrupt, click.Abort) as error:
            status = _interrupted(error)
        except (SettingsError, InvalidRequest, InvalidUid) as error:
            complain(error.message if isinstance(error, CourierError) else str(error))
            status = WRONG_USAGE
        except CourierError as error:
            complain(str(error))
            status = exit_status(error)
        except (BrokerUnavailable, StillRunning) as error:
            complain(str(error))
            status = UNAVAILABLE
        except OSError as error:
            status = output_lost(error)
        sys.exit(status)

    return guarded


def output_lost(error: OSError) -> int:
    """The exit status after an error of writing. A reader that left (`pacs … | head`) gets no sentence."""
    if isinstance(error, OutputLost):
        complain(f"Standard output cannot be written: {error.strerror}.")
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        complain(f"A temporary file cannot be written: {error.strerror}. TMPDIR names the folder of temporary files.")
    elif not isinstance(error, BrokenPipeError):
        raise error
    drop_output()
    return FAILED


def _interrupted(error: Interrupted | KeyboardInterrupt | click.Abort) -> int:
    if isinstance(error, click.Abort) and not is_interruption(error):
        complain("The input ended before the question was answered. Nothing was begun.")
        return FAILED
    complain(str(error) if isinstance(error, Interrupted) else "Interrupted.")
    return INTERRUPTED


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, as from ``timeout``, is told like Ctrl-C. Only the main thread may catch signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def complain(sentence: str) -> None:
    """Say why a command ends as it does."""
    errors_console.print(f"pacs: {sentence}", style="red")


def entry(handle: Handle, report: Report, **about: str) -> dict[str, Any]:
    """A job as JSON: its payload, or why there is none, with what is known ``about`` the job."""
    if report.result is not None:
        return dict(report.result)
    entry: dict[str, Any] = {"job_id": handle.id, **about, "status": report.status, "stage": report.stage}
    if report.error is not None:
        entry["error"] = report.error.payload
    elif report.waiting is not None:
        entry["waiting"] = dict(report.waiting)
    return entry


def ended(courier: Courier, handle: Handle, *, timeout_s: float | None, as_json: bool) -> dict[str, Any]:
    """Wait for one job; its payload, which ``--json`` has printed.

    Raises
    ------
    CourierError, StillRunning
        It ended otherwise, or not in time; with ``--json`` that has been printed too.
    """
    report = follow(courier, {handle: handle.id}, timeout_s=timeout_s, quiet=as_json)[handle.id]
    if as_json:
        print_json(entry(handle, report))
    if report.error is not None:
        raise report.error
    if report.result is None:
        waits = f" It is {sentence(report.waiting, now_s=time.time())}." if report.waiting is not None else ""
        raise StillRunning(
            f"Job {handle.id} has not ended within {timeout_s} s; it goes on: pacs result {handle.id}.{waits}"
        )
    return dict(report.result)


def worst(reports: list[Report]) -> int:
    """1 if anything was refused or failed, else 3 if anything is open or a server was unavailable, else 0.

    2 if nothing but wrong requests failed.
    """
    statuses = [exit_status(report.error) if report.over else UNAVAILABLE for report in reports]
    return FAILED if FAILED in statuses else max(statuses, default=DONE)
