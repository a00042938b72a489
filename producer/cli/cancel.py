"""``pacs cancel``: end a job before it begins."""

from __future__ import annotations

import time
from typing import Any, Final

import click

from producer.cli.door import DONE, FAILED, as_json_option, complain, entry, plain_failures
from producer.client import Courier
from producer.errors import Cancelled
from producer.handle import Handle, Report
from producer.terminal import console, print_json

#: How long it is waited for the end of what was cancelled.
_WAIT_S: Final = 3.0
_POLL_S: Final = 0.1


@click.command()
@click.argument("job_id", metavar="ID")
@as_json_option
@plain_failures
def cancel(job_id: str, as_json: bool) -> int:
    """Cancel a job that has not begun to store or to delete. What has begun ends after the request under way.

    The id of a batch cancels the batch. Exit status 1: the job has begun, or is over.
    """
    with Courier() as courier:
        handle = courier.must_know(job_id)
        asked = handle.cancel()
        report = _settled(handle) if asked else handle.report()
        begun = asked and not report.over and bool(courier.ledger and courier.ledger.read_record(job_id).get("memo"))
    told, cancelled = _cancel_sentence(job_id, report, begun=begun)
    if as_json:
        document: dict[str, Any] = {**entry(handle, report), "job_id": job_id, "cancelled": cancelled}
        print_json(document)
    if not cancelled:
        complain(told)
    elif not as_json:
        console.print(told)
    return DONE if cancelled else FAILED


def _settled(handle: Handle) -> Report:
    deadline = time.monotonic() + _WAIT_S
    report = handle.report()
    while not report.over and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        report = handle.report()
    return report


def _cancel_sentence(job_id: str, report: Report, *, begun: bool) -> tuple[str, bool]:
    """What is said, and whether the job was cancelled."""
    if isinstance(report.error, Cancelled):
        return f"Job {job_id} was cancelled. {report.error.message}", True
    if report.over:
        return f"Job {job_id} is over: pacs result {job_id}", False
    if begun:
        return f"Job {job_id} has begun and goes on until the request under way has ended: pacs result {job_id}", False
    return f"Job {job_id} is cancelled; it ends as soon as a worker sees it, and does nothing before.", True
