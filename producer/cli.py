"""The ``pacs`` command: arguments in, a table or one JSON document out, an exit status for scripts.

What a job does is the workers' affair; how it looks is in ``show.py``.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any, ParamSpec

import click

from producer.courier import Courier, Handle, Report
from producer.errors import BrokerUnavailable, CourierError, InvalidRequest, PacsUnavailable, StillRunning
from producer.show import errors_console, follow, upload_row, upload_table
from worker.settings import SettingsError

DONE, FAILED, WRONG_USAGE, UNAVAILABLE = 0, 1, 2, 3

Arguments = ParamSpec("Arguments")


def exit_status(error: CourierError | None) -> int:
    """0 done, 1 refused or failed, 2 wrong usage, 3 a server is unavailable."""
    if error is None:
        return DONE
    return UNAVAILABLE if isinstance(error, PacsUnavailable) else FAILED


def _plain_failures(command: Callable[Arguments, int]) -> Callable[Arguments, None]:
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
    errors_console.print(f"pacs: {sentence}", style="red", highlight=False, markup=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="pacs-courier")
def main() -> None:
    """Put images into the right PACS, and ask, move and delete what is there.

    Settings come from the file that PACS_CONFIG names and from the environment (docs/settings.md).
    Exit status: 0 done, 1 refused or failed, 2 wrong usage, 3 a server or the broker is unavailable.
    """


@main.command()
@click.argument("urls", nargs=-1, required=True, metavar="URL [URL…|-]")
@click.option("--server", help="Ask for this server instead of the routing policy's choice.")
@click.option("--timeout", "timeout_s", type=float, help="Stop waiting after so many seconds; the jobs go on.")
@click.option("--no-wait", is_flag=True, help="Print the jobs' ids and leave.")
@click.option("--no-metadata", is_flag=True, help="Leave the DICOM metadata out of the results.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output, nothing else.")
@_plain_failures
def upload(
    urls: tuple[str, ...], server: str | None, timeout_s: float | None, no_wait: bool, no_metadata: bool, as_json: bool
) -> int:
    """Fetch the image at each URL and put it where its study belongs. "-" reads URLs from standard input."""
    with Courier() as courier:
        metadata = False if no_metadata else None
        jobs = {courier.upload(url, server=server, metadata=metadata): url for url in _expanded(urls)}
        if no_wait:
            _print_ids(list(jobs), as_json=as_json)
            return DONE
        reports = follow(courier, jobs, timeout_s=timeout_s, quiet=as_json)
    if as_json:
        click.echo(json.dumps([_entry(handle, reports[handle.id]) for handle in jobs], ensure_ascii=False))
    else:
        rows = [upload_row(url, handle.id, reports[handle.id]) for handle, url in jobs.items()]
        upload_table(rows)
    return _worst(list(reports.values()))


@main.command()
@click.argument("job_id")
@click.option("--timeout", "timeout_s", type=float, help="Wait so many seconds for the job to end.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output, nothing else.")
@_plain_failures
def result(job_id: str, timeout_s: float | None, as_json: bool) -> int:
    """Show what became of a job."""
    with Courier() as courier:
        handle = courier.must_know(job_id)
        report = follow(courier, {handle: job_id}, timeout_s=timeout_s or 0, quiet=as_json)[handle.id]
    if as_json:
        click.echo(json.dumps(_entry(handle, report), ensure_ascii=False))
    elif report.result is not None and report.result.get("operation") != "upload":
        click.echo(json.dumps(report.result, ensure_ascii=False, indent=2))
    else:
        source = (report.result or {}).get("source", "")
        upload_table([upload_row(source, handle.id, report)])
    return _worst([report])


def _expanded(urls: tuple[str, ...]) -> list[str]:
    """The URLs with "-" replaced by the lines of standard input."""
    lines = [line.strip() for line in sys.stdin] if "-" in urls else []
    expanded = [one for url in urls for one in (lines if url == "-" else [url]) if one]
    if not expanded:
        raise InvalidRequest("No URL was given on standard input.")
    return expanded


def _print_ids(handles: list[Handle], *, as_json: bool) -> None:
    ids = [handle.id for handle in handles]
    click.echo(json.dumps(ids) if as_json else "\n".join(ids))


def _entry(handle: Handle, report: Report) -> dict[str, Any]:
    """A job as JSON: its payload, or why there is none."""
    if report.result is not None:
        return report.result
    entry: dict[str, Any] = {"job_id": handle.id, "status": report.status, "stage": report.stage}
    if report.error is not None:
        entry["error"] = report.error.payload
    return entry


def _worst(reports: list[Report]) -> int:
    """1 if anything was refused or failed, else 3 if anything is open or a server was unavailable, else 0."""
    statuses = [exit_status(report.error) if report.over else UNAVAILABLE for report in reports]
    return FAILED if FAILED in statuses else max(statuses, default=DONE)
