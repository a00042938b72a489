"""``pacs cancel``: end jobs before they begin."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import click

from courier.batches.store import Batches
from courier.redaction import shown_id
from producer.cli.door import DONE, FAILED, as_json_option, complain, entry, plain_failures
from producer.client import Courier, reachable
from producer.errors import BrokerUnavailable, Cancelled, InvalidRequest
from producer.handle import Handle, Report
from producer.inputs import BadRow, rows_of_file
from producer.terminal import console, print_json

#: How long it is waited for the end of what was cancelled.
_WAIT_S: Final = 3.0
_POLL_S: Final = 0.1
#: So many ids are asked for in one go; the beginning of an id has to be so long to be looked up.
_PAGE: Final = 500
_LEAST_BEGINNING: Final = 4

Outcome = Literal["cancelled", "begun", "over", "dead", "batch", "unknown"]


@dataclass(frozen=True)
class CancelResult:
    """What became of the order to cancel a job, and the sentence that says so."""

    handle: Handle
    report: Report
    outcome: Outcome
    sentence: str

    @property
    def cancelled(self) -> bool:
        return self.outcome == "cancelled"

    def as_json(self) -> dict[str, Any]:
        told = {"job_id": self.handle.id, "outcome": self.outcome, "cancelled": self.cancelled}
        return {**entry(self.handle, self.report), **told, "message": self.sentence}


@click.command()
@click.argument("job_ids", metavar="JOB_ID… | -", nargs=-1)
@as_json_option
@plain_failures
def cancel(job_ids: Sequence[str], as_json: bool) -> int:
    """Cancel jobs that have not begun to store or to delete. What has begun ends after the request under way.

    "-" reads ids from standard input: one per line, or the lines of pacs jobs --json. A batch is cancelled by pacs
    batch cancel. Exit status 1: one of the jobs has begun, is over, is not known, or belongs to a batch.
    """
    wanted = _wanted(job_ids)
    with Courier() as courier:
        results = [result for some in _pages(wanted) for result in _cancel(courier, some)]
    if as_json:
        documents = [result.as_json() for result in results]
        print_json(documents if len(wanted) > 1 or "-" in job_ids else documents[0])
    for result in results:
        if not result.cancelled:
            complain(result.sentence)
        elif not as_json:
            console.print(result.sentence)
    return DONE if all(result.cancelled for result in results) else FAILED


def _wanted(job_ids: Sequence[str]) -> list[str]:
    """The ids, each once, with "-" replaced by those on standard input."""
    piped = [_id_of(row) for row in rows_of_file("-")] if "-" in job_ids else []
    wanted = [one for job_id in job_ids for one in (piped if job_id == "-" else [job_id]) if one]
    if not wanted:
        raise InvalidRequest(
            "No id was given on standard input."
            if "-" in job_ids
            else "Name the jobs by their ids: pacs jobs has them."
        )
    return list(dict.fromkeys(wanted))


def _id_of(row: Any) -> str:
    """The id that a line of standard input gives: alone, or as ``job_id`` of a JSON object."""
    if isinstance(row, BadRow):
        raise InvalidRequest(f"Standard input, {row.place}: {row.why}. Nothing was cancelled.")
    text: str = row.text
    if not text.startswith("{"):
        return text
    try:
        job_id = json.loads(text).get("job_id")
    except ValueError:
        job_id = None
    if not isinstance(job_id, str):
        raise InvalidRequest(f"Standard input, {row.place}: no JSON object with a job_id. Nothing was cancelled.")
    return job_id


def _pages(job_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for first in range(0, len(job_ids), _PAGE):
        yield job_ids[first : first + _PAGE]


def _cancel(courier: Courier, job_ids: Sequence[str]) -> Iterator[CancelResult]:
    """Ask for the end of all, then wait for it together."""
    if courier.ledger is None:
        raise BrokerUnavailable("Cancelling needs the ledger; give ledger_url.")
    reports = courier.reports(job_ids)
    with reachable():
        batches = Batches(courier.ledger)
        batch_ids = {job_id: batches.batch_of(job_id) for job_id in job_ids}
    asked = {
        job_id: courier.cancel(job_id)
        for job_id in job_ids
        if not batch_ids[job_id] and reports[job_id].status != "unknown"
    }
    reports |= _settled(courier, [job_id for job_id, was_open in asked.items() if was_open])
    for job_id in job_ids:
        handle = courier.handle(job_id)
        if batch_id := batch_ids[job_id]:
            yield CancelResult(handle, reports[job_id], "batch", _of_batch(job_id, batch_id))
        elif reports[job_id].status == "unknown":
            yield CancelResult(handle, reports[job_id], "unknown", _unknown(courier, job_id))
        else:
            yield _result(courier, handle, reports[job_id], was_open=asked[job_id])


def _settled(courier: Courier, job_ids: Iterable[str]) -> dict[str, Report]:
    deadline = time.monotonic() + _WAIT_S
    reports = courier.reports(job_ids)
    while (left := [job_id for job_id, report in reports.items() if not report.over]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        reports |= courier.reports(left)
    return reports


def _result(courier: Courier, handle: Handle, report: Report, *, was_open: bool) -> CancelResult:
    job_id, record = handle.id, _record(courier, handle.id)
    if isinstance(report.error, Cancelled):
        return CancelResult(handle, report, "cancelled", f"Job {job_id} was cancelled. {report.error.message}")
    if record.get("state") == "dead":
        dead = f"Job {job_id} is a dead letter and does nothing: pacs dead purge {job_id} drops it."
        return CancelResult(handle, report, "dead", dead)
    if report.over or not was_open:
        return CancelResult(handle, report, "over", f"Job {job_id} is over: pacs result {job_id}")
    if record.get("memo"):
        goes_on = f"Job {job_id} has begun and goes on until the request under way has ended: pacs result {job_id}"
        return CancelResult(handle, report, "begun", goes_on)
    soon = f"Job {job_id} is cancelled; it ends as soon as a worker sees it, and does nothing before."
    return CancelResult(handle, report, "cancelled", soon)


def _record(courier: Courier, job_id: str) -> Mapping[str, str]:
    with reachable():
        return courier.ledger.read_record(job_id) if courier.ledger else {}


def _of_batch(job_id: str, batch_id: str) -> str:
    what = f"{job_id} is a batch" if job_id == batch_id else f"Job {job_id} is a part of batch {batch_id}"
    return f"{what}; nothing was cancelled. To cancel all of it: pacs batch cancel {batch_id}"


def _unknown(courier: Courier, job_id: str) -> str:
    """That there is no such job, and which open ones begin like it. None of them is cancelled: it may be another's."""
    said = f"No job is called {shown_id(job_id)}, or its outcome has expired; nothing was cancelled."
    if len(job_id) < _LEAST_BEGINNING:
        return said
    with reachable():
        alike = courier.overview.job_ids(job_id, limit=4)
    if not alike:
        return said
    more = " …" if len(alike) > 3 else ""
    return f"{said} An id is given whole; open jobs begin so: {', '.join(alike[:3])}{more}"
