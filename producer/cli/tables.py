"""How jobs look on a terminal: progress while they run, a table when they are over."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from courier.redaction import printable, redact_url
from courier.waits import sentence
from producer.client import Courier
from producer.handle import Handle, Report
from producer.terminal import Column, ListingTable, console, errors_console, linked


@dataclass(frozen=True)
class UploadRow:
    """One line of the table. ``why`` is the route's reason, or the code of the refusal and its sentence."""

    file: str
    study: str
    server: str
    why: str
    link: str
    elapsed_ms: float | None
    stored: bool
    #: Of a job that waits: why, on a line of its own, so that ids in it stay whole.
    waits: str = ""


def follow(courier: Courier, jobs: Mapping[Handle, str], *, timeout_s: float | None, quiet: bool) -> dict[str, Report]:
    """Wait for jobs with a live line on standard error; the last report of each, also of those still running."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    last = {handle.id: Report("queued", "queued") for handle in jobs}
    stages, over = (
        Counter(_label(report) for report in last.values()),
        0,
    )  # kept up to date: a sum each time takes hours
    hidden = quiet or not errors_console.is_terminal
    with Progress(*columns, console=errors_console, transient=True, disable=hidden) as progress:
        line = progress.add_task("queued", total=len(jobs))
        for handle, report in courier.watch(jobs, timeout_s=timeout_s):
            before, last[handle.id] = last[handle.id], report
            over += int(report.over) - int(before.over)
            _count(stages, before, -1)
            _count(stages, report, 1)
            progress.update(line, completed=over, description=printable(_stages(stages)))
    return last


def _count(stages: Counter[str], report: Report, by: int) -> None:
    """Of jobs that are open; a stage that none is at any more is left out, or each line would go through all."""
    if not report.over:
        stages[label := _label(report)] += by
        if not stages[label]:
            del stages[label]


def _label(report: Report) -> str:
    return f"{report.stage} ({report.waits_for})" if report.waits_for else report.stage


def _stages(open_jobs: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {stage}" for stage, count in open_jobs.items() if count) or "done"


def upload_row(url: str, job_id: str, report: Report) -> UploadRow:
    file = redact_url(url).rstrip("/").rpartition("/")[2] or job_id
    if report.result is not None:
        payload = report.result
        return UploadRow(
            file=file,
            study=payload["study_uid"],
            server=payload["server_name"],
            why=f"{payload['status']}: {payload['route']['reason']}",
            link=payload["viewer_url"],
            elapsed_ms=sum(payload["timings_ms"].values()),
            stored=True,
        )
    if report.error is not None:
        details = report.error.details
        why = f"{report.error.payload['code']}: {report.error.message}"
        server = report.error.server_name or ""
        return UploadRow(file, details.get("study_uid", ""), server, why, details.get("viewer_url", ""), None, False)
    stage = report.status if report.status == report.stage else f"{report.status} ({report.stage})"
    waits = sentence(report.waiting, now_s=time.time()) if report.waiting is not None else ""
    return UploadRow(file, "", "", f"{stage}; pacs result {job_id}", "", None, False, waits)


def upload_table(rows: list[UploadRow]) -> None:
    """Print the jobs, one line each."""
    table = ListingTable("file", Column("study", "id"), "server", Column("outcome", "text"), Column("ms", right=True))
    for row in rows:
        elapsed = "" if row.elapsed_ms is None else f"{row.elapsed_ms:.0f}"
        table.add_row(
            row.file, linked(row.study, row.link), row.server, row.why, elapsed, style="" if row.stored else "yellow"
        )
    console.print(table)
    for row in rows:
        if row.stored and row.link:
            console.print(f"{row.file}: {row.link}", style="dim")
        if row.waits:
            console.print(f"{row.file}: {row.waits}")
