"""``pacs jobs``: which jobs are open, which ended lately, and why."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

import click

from courier.errors import CourierError
from courier.messages import nearest_field
from courier.overview import JOB_STATES, JobList, JobRow, OpenJobs
from courier.queues import QUEUE_OF
from courier.waits import WAIT_CODES
from producer.cli.dead import Moment
from producer.cli.door import DONE, plain_failures
from producer.client import Courier
from producer.terminal import Column, ListingTable, console, errors_console, plain, print_json

_TASKS: Final = [task.removeprefix("pacs.") for task in QUEUE_OF]
#: What ``--kind`` takes: each task without its ``pacs.``, and what several of them begin with.
KINDS: Final = tuple(sorted({*_TASKS, *(task.partition(".")[0] for task in _TASKS)}))
_STYLES: Final = {"running": "green", "waiting": "yellow", "failed": "red", "dead": "bold red", "done": "dim"}

as_json_lines_option = click.option(
    "--json", "as_json", is_flag=True, help="JSON Lines on standard output: a document per line, nothing else."
)


def _kind(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    """The kind as the tasks are called; an unknown one is refused, or nothing would look like "no jobs"."""
    kind = (value or "").removeprefix("pacs.").replace("-", "_")
    if not kind or kind in KINDS:
        return kind
    nearest = nearest_field(kind, KINDS)
    hint = f"did you mean {nearest}?" if nearest else f"the kinds are {', '.join(KINDS)}."
    raise click.BadParameter(f"no job is of the kind {value}; {hint}", ctx, param)


@click.command()
@click.option("--state", "states", multiple=True, type=click.Choice(JOB_STATES), help="Only these; may be repeated.")
@click.option("--server", default="", help="Only jobs that this server has to do with.")
@click.option("--kind", callback=_kind, help="Only these: upload, delete, batch, batch.chunk …")
@click.option("--reason", "--code", "code", default="", help="Only jobs that wait or failed with this code.")
@click.option("--since", type=Moment(), help="Only those enqueued since: a date (UTC), or 12h, 7d.")
@click.option("--before", type=Moment(), help="Only those enqueued before; 10m: older than ten minutes.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="So many at most.")
@as_json_lines_option
@plain_failures
def jobs(limit: int, as_json: bool, **which: Any) -> int:
    """Say which jobs run, wait or are queued, and which ended lately, and why.

    Running jobs come first, then waiting, then queued ones, the oldest of each first; then those that ended, the latest
    first, which get a fifth of the lines at least.
    """
    with Courier() as courier:
        found = courier.jobs(**which, limit=limit)
        doubts = [] if found.rows else _doubts(courier, which["server"], which["code"])
    if as_json:
        for row in found.rows:
            print_json(row.as_json())
    elif found.rows:
        console.print(jobs_table(found))
    filtered = any(which.values())
    if not as_json:
        console.print(summary(found.open_jobs, filtered=filtered))
    for sentence in [*doubts, *_left_out(found, limit, filtered=filtered)]:
        errors_console.print(f"pacs: {sentence}", style="yellow")
    return DONE


def jobs_table(found: JobList) -> ListingTable:
    """A line per job."""
    ids = Column("job", "id")
    table = ListingTable(
        ids, Column("what", "text"), "state", "server", Column("age", right=True), Column("why", "text")
    )
    for row in found.rows:
        state = plain(row.state, _STYLES.get(row.state, ""))
        table.add_row(row.job_id, row.what, state, ", ".join(row.servers), _age(row), _why(row))
    return table


def _why(row: JobRow) -> str:
    if row.state == "queued" or not row.code:
        return ""
    return f"{row.code}: {row.message}" if row.message else row.code


def _age(row: JobRow) -> str:
    """How long it has been open; of one that ended, how long ago."""
    if row.ended_ms is None:
        return duration(row.age_s)
    return f"ended {duration((row.now_ms - row.ended_ms) / 1000)} ago"


def duration(seconds: float) -> str:
    """A length of time in its largest unit."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def summary(open_jobs: OpenJobs, *, filtered: bool = False) -> str:
    """How many jobs are open, in one line, with what they wait for."""
    counts = [f"{open_jobs.count(state):,} {state}" for state in ("running", "waiting", "queued")]
    reasons = [f"{one.jobs:,} {one.code} {one.server_name}".rstrip() for one in open_jobs.waiting[:5]]
    what = "of the open jobs that match: " if filtered else ""
    for_what = f" (waiting: {', '.join(reasons)})" if reasons else ""
    return f"{what}{', '.join(counts)}{for_what}"


def _left_out(found: JobList, limit: int, *, filtered: bool) -> list[str]:
    open_jobs, said = found.open_jobs, []
    shown = sum(row.ended_ms is None for row in found.rows)
    if not open_jobs.complete:
        more = (
            "others may match." if filtered else "--state, --kind, --reason, --server, --since, --before look at more."
        )
        looked_at = f"the {open_jobs.looked_at:,} that are due first were looked at"
        said.append(f"Of {open_jobs.open:,} open jobs {looked_at}; {more}")
    if shown < open_jobs.count():
        said.append(f"{open_jobs.count() - shown:,} more open jobs match; --limit shows more than {limit}.")
    return said


def _doubts(courier: Courier, server: str, code: str) -> list[str]:
    """What may be mistyped where nothing was found."""
    said = []
    if server and server not in (known := _known_servers(courier)):
        said.append(f"No worker and no setting knows a server called {server}; known: {', '.join(known) or 'none'}.")
    codes = sorted(WAIT_CODES | {kind.code for kind in CourierError.subclasses()})
    if code and code not in codes:
        nearest = nearest_field(code, codes)
        said.append(f"No job waits or fails with a code {code}" + (f"; did you mean {nearest}?" if nearest else "."))
    return said


def _known_servers(courier: Courier) -> Collection[str]:
    limits = {server.name: server.max_concurrency for server in courier.settings.servers}
    return [one.name for one in courier.overview.servers(limits)]
