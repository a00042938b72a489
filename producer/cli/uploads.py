"""``pacs upload`` and ``pacs result``."""

from __future__ import annotations

import click

from courier.redaction import redact_url
from producer.cli.door import DONE, as_json_option, entry, plain_failures, timeout_option, worst
from producer.cli.session import Interrupted, Session, job_goes_on
from producer.cli.tables import follow, upload_row, upload_table
from producer.errors import InvalidRequest
from producer.handle import Handle, Report
from producer.inputs import BadRow, InputRow, rows_of_file
from producer.terminal import console, print_json


@click.command()
@click.argument("urls", nargs=-1, required=True, metavar="URL [URL…|-]")
@click.option("--server", help="Ask for this server instead of the routing policy's choice.")
@timeout_option
@click.option("--no-wait", is_flag=True, help="Print the jobs' ids and leave.")
@click.option("--no-metadata", is_flag=True, help="Leave the DICOM metadata out of the results.")
@as_json_option
@plain_failures
def upload(
    urls: tuple[str, ...], server: str | None, timeout_s: float | None, no_wait: bool, no_metadata: bool, as_json: bool
) -> int:
    """Fetch the image at each URL and put it where its study belongs. "-" reads URLs from standard input."""
    with Session() as courier:
        metadata = False if no_metadata else None
        wanted = _expanded(urls)
        courier.expects = len(wanted)
        jobs = {courier.upload(url, server=server, metadata=metadata): url for url in wanted}
        if no_wait:
            _print_ids(list(jobs), as_json=as_json)
            return DONE
        reports = follow(courier, jobs, timeout_s=timeout_s, quiet=as_json)
    if as_json:
        print_json([entry(handle, reports[handle.id], source=redact_url(url)) for handle, url in jobs.items()])
    else:
        rows = [upload_row(url, handle.id, reports[handle.id]) for handle, url in jobs.items()]
        upload_table(rows)
    return worst(list(reports.values()))


@click.command()
@click.argument("job_id")
@click.option("--timeout", "timeout_s", type=float, help="Wait so many seconds for the job to end.")
@as_json_option
@plain_failures
def result(job_id: str, timeout_s: float | None, as_json: bool) -> int:
    """Show what became of a job."""
    with Session() as courier:
        handle = courier.must_know(job_id)
        try:
            report = follow(courier, {handle: job_id}, timeout_s=timeout_s or 0, quiet=as_json)[handle.id]
        except KeyboardInterrupt:
            raise Interrupted(f"Interrupted. {job_goes_on(job_id)}") from None
        about = _about(courier, report, job_id)
    document = entry(handle, report, **about)
    if as_json:
        print_json(document)
        return worst([report])
    console.print(f"{about['task']}: {report.status}" if "task" in about else report.status)
    if about.get("task") == "pacs.upload" or report.result is None:
        upload_table([upload_row(about.get("source", ""), job_id, report)])
    if report.over:
        print_json(document, indent=2)
    return worst([report])


def _about(courier: Session, report: Report, job_id: str) -> dict[str, str]:
    """The task of a job and, of an upload that is over, its URL, as far as they are known."""
    record = courier.ledger.read_record(job_id) if courier.ledger else {}
    operation = report.result.get("operation") if report.result else ""
    ended = report.result or (report.error.details if report.error else {})
    known = {"task": record.get("task") or (operation and f"pacs.{operation}"), "source": ended.get("source")}
    return {name: value for name, value in known.items() if isinstance(value, str) and value}


def _expanded(urls: tuple[str, ...]) -> list[str]:
    """The URLs with "-" replaced by the lines of standard input."""
    lines = [_url(row) for row in rows_of_file("-")] if "-" in urls else []
    expanded = [one for url in urls for one in (lines if url == "-" else [url]) if one]
    if not expanded:
        raise InvalidRequest("No URL was given on standard input." if "-" in urls else "No URL was given; it is empty.")
    return expanded


def _url(row: InputRow | BadRow) -> str:
    if isinstance(row, BadRow):
        raise InvalidRequest(f"Standard input, {row.place}: {row.why}. Nothing was begun.")
    return row.text


def _print_ids(handles: list[Handle], *, as_json: bool) -> None:
    ids = [handle.id for handle in handles]
    if as_json:
        print_json(ids)
    else:
        console.print("\n".join(ids))
