"""What all commands share: exit statuses, one-sentence failures, options that mean the same everywhere."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import click

from producer.courier import Handle, Report
from producer.errors import BrokerUnavailable, CourierError, InvalidRequest, PacsUnavailable, StillRunning
from producer.show import errors_console
from worker.settings import SettingsError

DONE, FAILED, WRONG_USAGE, UNAVAILABLE = 0, 1, 2, 3

Arguments = ParamSpec("Arguments")
Command = TypeVar("Command", bound=Callable[..., Any])

as_json_option = click.option(
    "--json", "as_json", is_flag=True, help="One JSON document on standard output, nothing else."
)
timeout_option = click.option(
    "--timeout", "timeout_s", type=float, help="Stop waiting after so many seconds; the jobs go on."
)
server_option = click.option("--server", help="Exactly this server.")


def exit_status(error: CourierError | None) -> int:
    """0 done, 1 refused or failed, 2 wrong usage, 3 a server is unavailable."""
    if error is None:
        return DONE
    return UNAVAILABLE if isinstance(error, PacsUnavailable) else FAILED


def plain_failures(command: Callable[Arguments, int]) -> Callable[Arguments, None]:
    """Turn what can go wrong around a command into one sentence and an exit status."""

    @functools.wraps(command)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            status = command(*args, **kwargs)
        except (SettingsError, InvalidRequest) as error:
            _say(error.message if isinstance(error, CourierError) else str(error))
            status = WRONG_USAGE
        except CourierError as error:
            _say(str(error))
            status = exit_status(error)
        except (BrokerUnavailable, StillRunning) as error:
            _say(str(error))
            status = UNAVAILABLE
        sys.exit(status)

    return guarded


def _say(sentence: str) -> None:
    errors_console.print(f"pacs: {sentence}", style="red", highlight=False, markup=False, soft_wrap=True)


def entry(handle: Handle, report: Report) -> dict[str, Any]:
    """A job as JSON: its payload, or why there is none."""
    if report.result is not None:
        return report.result
    entry: dict[str, Any] = {"job_id": handle.id, "status": report.status, "stage": report.stage}
    if report.error is not None:
        entry["error"] = report.error.payload
    return entry


def worst(reports: list[Report]) -> int:
    """1 if anything was refused or failed, else 3 if anything is open or a server was unavailable, else 0."""
    statuses = [exit_status(report.error) if report.over else UNAVAILABLE for report in reports]
    return FAILED if FAILED in statuses else max(statuses, default=DONE)
