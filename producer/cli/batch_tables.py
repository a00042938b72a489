"""How batches look on a terminal: how far they are while they run, plans and counts as tables, reports as lines."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Group
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from courier.batches.progress import Meter, Throughput, of_how_many
from courier.batches.report import REPORT_COLUMNS, report_cells
from courier.batches.store import ACTIVE, PASSES, TROUBLE, Batch, Pass
from courier.redaction import redact_url
from courier.windows import Window
from producer.batches import BatchClient
from producer.errors import InvalidRequest, NotFound
from producer.handle import Handle, Report
from producer.plans import PlanLine
from producer.terminal import Column, Kind, ListingTable, csv_rows, errors_console, json_text, plain

_POLL_S = 0.5
#: How often a line is written where there is no terminal.
LINE_S = 30.0
#: In the order of a table's columns.
_STATUSES = (
    "open", "planned", "stored", "already_there", "copied", "downloaded", "deleted", "hidden", "not_there",
    "skipped", "refused", "failed", "verified", "unverified", "differs", "missing", "undone", "kept",
)  # fmt: skip
#: An item that ended so in a pass has not become what the pass was to make of it.
_IN_VAIN = frozenset({"skipped", *TROUBLE, "unverified", "kept"})
_STYLES = {"done": "green", "undone": "green", "planned": "cyan", "paused": "yellow", "cancelled": "red"}


def said(status: str) -> str:
    return status.replace("_", " ")


def _table(*headings: str, right: Sequence[str] = (), kinds: Mapping[str, Kind] | None = None) -> ListingTable:
    kinds = kinds or {}
    return ListingTable(*(Column(name, kinds.get(name, "word"), right=name in right) for name in headings))


# --- counts -----------------------------------------------------------------------------------------------------


def counts_table(batch: Batch) -> ListingTable:
    """One line per server, with the outcomes that there are, of all passes: done first, then verified, then undone."""
    found = batch.outcomes
    planned = batch.planned if any(batch.planned.get(name) for name in batch.types) else {}
    statuses = sorted({status for counts in found.values() for status in counts}, key=_STATUSES.index)
    names = [name for name in ("", *batch.types) if found.get(name) or planned.get(name)]
    headings = (["planned"] if planned else []) + [said(status) for status in statuses]
    table = _table("server", *headings, right=headings)
    for name in names:
        cells = [_count(planned.get(name))] if planned else []
        cells += [_count(found.get(name, {}).get(status)) for status in statuses]
        table.add_row(name or "–", *cells)
    return table


def _count(count: int | None) -> str:
    return f"{count:,}" if count else ""


def end_line(batch: Batch) -> str:
    """What a batch came to, in one line."""
    which: Pass = "undo" if batch.state == "undone" else "apply"
    state = batch.of(which)
    totals = {status: state.totals.get(status, 0) for status in _STATUSES}
    otherwise = {status: n for status, n in totals.items() if n and status in _IN_VAIN}
    done = state.settled - sum(otherwise.values())
    what = f"undo of {batch.kind}" if which == "undo" else f"{batch.kind} {batch.state}"
    parts = [f"{what}: {done:,} of {of_how_many(batch, which):,} items"]
    parts += [f"{n:,} {said(status)}" for status, n in otherwise.items()]
    if state.bytes:
        parts.append(decimal(state.bytes))
    if state.begun_ms and state.ended_ms:
        elapsed_s = max((state.ended_ms - state.begun_ms) / 1000, 0.001)
        parts.append(f"{timedelta(seconds=round(elapsed_s))}, {state.settled / elapsed_s:,.0f} items/s")
    return ", ".join(parts)


def undo_question(batch: Batch, reach: Mapping[tuple[str, str], int]) -> str:
    """What has to be agreed to before ``batch`` is undone; ``reach`` counts by server what that is about."""
    places: Counter[str] = Counter()
    for (server, _), count in reach.items():
        places[server] += count
    where = ", ".join(
        f"{count:,} on {server}" if server else f"{count:,} elsewhere" for server, count in places.items()
    )
    total = f"{sum(places.values()):,}"
    if batch.kind == "upload":
        return f"Undo the upload? {total} images will be deleted for good: {where or 'none'}."
    if batch.kind == "migrate":
        order = batch.order
        back = f", once {order['from_server']} has them all again" if order.get("delete_source") else ""
        return f"Undo the migration? The copies of {total} studies will be deleted from {order['to_server']}{back}."
    return f"Undo the {batch.kind}? {total} studies will be brought back to the servers that had them."


def servers_table(servers: Sequence[Mapping[str, Any]]) -> ListingTable:
    """What `pacs.delete_all` says of each server, with the columns that hold anything."""
    known = ("planned", "deleted", "hidden", "not_there", "refused", "failed", "remaining")
    columns = [name for name in known if name == "planned" or any(entry.get(name) for entry in servers)]
    table = _table("server", *map(said, columns), right=[said(name) for name in columns])
    for entry in servers:
        table.add_row(
            entry["server_name"], *("" if entry.get(name) is None else f"{entry[name]:,}" for name in columns)
        )
    return table


def failures_table(failures: Sequence[Mapping[str, Any]]) -> ListingTable:
    """The first of what is not as it should be."""
    table = _table("item", "server", "outcome", "why", kinds={"item": "id", "why": "text"})
    for one in failures:
        item = redact_url(one.get("item") or one["study_uid"])  # a screen shows no signature
        why = f"{one['code']}: {one['message']}" if one["code"] else one["message"]
        table.add_row(item, one["server_name"] or "–", said(one["status"]), why, style="yellow")
    return table


def batches_table(batches: Sequence[Batch]) -> ListingTable:
    """One line each, where a terminal of 80 columns is wide enough."""
    named = any(batch.name for batch in batches)
    headings = ("batch", "kind", *(["name"] if named else []), "state", "done", "items", "begun")
    table = _table(*headings, right=("done", "items"), kinds={"batch": "id", "name": "text"})
    for batch in batches:
        state = plain(batch.state, _STYLES.get(batch.state, ""))
        name = [batch.name] if named else []
        table.add_row(batch.id, batch.kind, *name, state, _percent(batch), f"{batch.items:,}", _begun(batch))
    return table


def order_line(batch: Batch) -> str:
    """What was asked for, in the words of the message."""
    history = ("requested_by", "reason")
    untold = ("confirm", "dry_run", "filters", *history, *(["verify"] if batch.order.get("verify") else []))
    told = ((name, value) for name, value in batch.order.items() if name not in untold)
    return ", ".join(f"{name} {redact_url(str(value))}" for name, value in told if value not in (None, False, ""))


def history_lines(told: Mapping[str, Any]) -> Iterator[str]:
    """Who requested a batch and each of its passes, and why (`BatchClient.published`); its order stands once."""
    given: Mapping[str, Any] = {}
    for what, one in (("order", told), *told["passes"].items()):
        said = {name: one[name] for name in ("requested_by", "reason") if one.get(name)}
        if said and said != given:
            given = given or said
            yield f"{what}: " + ", ".join(f"{name.replace('_', ' ')} {text}" for name, text in said.items())


def _percent(batch: Batch) -> str:
    return f"{100 * batch.settled // batch.items} %" if batch.items else ""


def _begun(batch: Batch) -> str:
    """The time of a batch of today, the day of another."""
    begun, today = time.localtime(batch.created_ms / 1000), time.localtime()
    return time.strftime("%H:%M" if begun[:3] == today[:3] else "%Y-%m-%d", begun)


# --- plans ------------------------------------------------------------------------------------------------------


@dataclass
class PlanSummary:
    """What a plan comes to, by what is done, where, and why not; memory grows with the reasons alone."""

    items: int = 0
    bytes: int = 0
    unsized: int = 0
    groups: dict[tuple[str, str, str], tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, lines: Iterable[PlanLine]) -> PlanSummary:
        summary = cls()
        for line in lines:
            summary.add(line)
        return summary

    def add(self, line: PlanLine) -> None:
        key = (line.do, line.server or "", line.why if len(self.groups) < 100 else "")
        count, size = self.groups.get(key, (0, 0))
        self.groups[key] = (count + 1, size + (line.size_bytes or 0))
        self.items += 1
        if line.do == "apply":
            self.bytes += line.size_bytes or 0
            self.unsized += line.size_bytes is None

    @property
    def to_do(self) -> int:
        return sum(count for (do, *_), (count, _) in self.groups.items() if do == "apply")

    def as_json(self) -> dict[str, Any]:
        groups = [
            {"do": do, "server_name": server or None, "why": why, "items": count, "bytes": size}
            for (do, server, why), (count, size) in self.groups.items()
        ]
        return {"items": self.items, "to_do": self.to_do, "bytes": self.bytes, "groups": groups}


def plan_table(summary: PlanSummary) -> ListingTable:
    table = _table("do", "server", "items", "bytes", "why", right=("items", "bytes"), kinds={"why": "text"})
    for (do, server, why), (count, size) in sorted(summary.groups.items()):
        style = "" if do == "apply" else "yellow"
        table.add_row(do, server or "–", f"{count:,}", decimal(size) if size else "", why, style=style)
    return table


def reach_table(reach: Mapping[tuple[str, str], int]) -> ListingTable:
    """By server and outcome, the items that something would be about."""
    table = _table("server", "outcome", "items", right=("items",))
    for (server, status), count in sorted(reach.items()):
        table.add_row(server or "–", said(status), f"{count:,}")
    return table


def plan_sentence(summary: PlanSummary) -> str:
    skipped = summary.items - summary.to_do
    left = f", {skipped:,} are left out" if skipped else ""
    size = f" ({decimal(summary.bytes)})" if summary.bytes and not summary.unsized else ""
    return f"{summary.to_do:,} of {summary.items:,} items to do{size}{left}."


# --- reports ----------------------------------------------------------------------------------------------------


def known_statuses(words: Iterable[str]) -> frozenset[str]:
    """The outcomes that ``words`` name, written as reports or as tables have them.

    Raises
    ------
    InvalidRequest
        There is none of that name.
    """
    wanted = frozenset(word.replace(" ", "_") for word in words)
    if unknown := sorted(wanted - set(_STATUSES)):
        raise InvalidRequest(f"No item ends as {unknown[0]!r}; the outcomes are {', '.join(_STATUSES)}.")
    return wanted


def has_ended(row: Mapping[str, Any], wanted: Collection[str]) -> bool:
    """Whether an item of a report has ended so in any of its passes.

    It is planned until it is applied. Open it is in ``apply`` alone: other passes leave open what is not theirs.
    """
    passed = {"open"} if row["status"] == "open" else {"open", "planned"}
    others = {row[which]["status"] for which in PASSES if which in row} - passed
    return row["status"] in wanted or not others.isdisjoint(wanted)


def write_csv(rows: Iterable[Mapping[str, Any]], out: TextIO, *, delimiter: str = ",") -> None:
    """A line of headings, then a line per item."""
    write_row = csv_rows(out, lineterminator="\n", delimiter=delimiter)
    write_row(REPORT_COLUMNS)
    for row in rows:
        write_row(report_cells(row))


def json_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        yield json_text(row) + "\n"


def json_array(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """One JSON document, row by row: a report can be long."""
    separator = "["
    for row in rows:
        yield f"{separator}{json_text(row)}"
        separator = ",\n"
    yield "[]\n" if separator == "[" else "]\n"


# --- how far it is ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """A batch at one moment, with its pace. ``batch`` is None until its job has begun."""

    batch: Batch | None
    stage: str
    throughput: Throughput
    #: How long the batch's window stays shut.
    opens_in_s: float = 0.0

    @property
    def planned_so_far(self) -> str:
        """How far the listing is, while a worker makes the plan: the stage of its job says so."""
        return self.stage.removeprefix("plan ") if self.stage.startswith("plan ") else ""

    @property
    def of_how_many(self) -> int:
        return of_how_many(self.batch, self.batch.current) if self.batch else 0

    @property
    def settled(self) -> int:
        return min(self.batch.settled, self.of_how_many) if self.batch else 0

    @property
    def state(self) -> str:
        return "queued" if self.batch is None else self.batch.state

    def counts(self) -> str:
        if self.batch is None or not self.batch.frozen:
            return f"{self.planned_so_far} items found" if self.planned_so_far else ""
        which = self.batch.current or "apply"
        totals = self.batch.of(which).totals
        return " · ".join(f"{said(status)} {n:,}" for status, n in totals.items() if status != "planned")

    def speed(self) -> str:
        """Items and bytes a second, and how long it will take."""
        if self.batch is None or self.batch.state not in ACTIVE:
            return ""
        if self.opens_in_s:
            opens = timedelta(seconds=round(self.opens_in_s))
            return f"waits for its window {self.batch.order['window']}, which opens in {opens}"
        if not self.throughput.items_per_s:
            return ""
        parts = [f"{self.throughput.items_per_s:,.{0 if self.throughput.items_per_s >= 10 else 1}f} items/s"]
        if self.throughput.bytes_per_s:
            parts.append(f"{decimal(int(self.throughput.bytes_per_s))}/s")
        if self.throughput.left_s is not None:
            parts.append(f"{timedelta(seconds=round(self.throughput.left_s))} left")
        return " · ".join(parts)

    def done(self) -> str:
        total = self.of_how_many
        return f"{self.settled:,}/{total:,} {100 * self.settled // total:3} %" if total else ""

    def line(self) -> str:
        """All of it in one line."""
        parts = (f"{self.state} {self.done()}".strip(), self.speed(), self.counts())
        return "; ".join(part.replace(" · ", ", ") for part in parts if part)

    def renderable(self) -> Group:
        """A line with a bar, and one or two below it."""
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1, min_width=10)
        grid.add_column(no_wrap=True, justify="right")
        total = self.of_how_many
        bar = ProgressBar(total=total or None, completed=self.settled, pulse=not total)
        grid.add_row(plain(self.state, _STYLES.get(self.state, "bold")), bar, self.done())
        below = [plain(part, "dim") for part in (self.speed(), self.counts()) if part]
        return Group(grid, *below)


def watch(
    client: BatchClient, handle: Handle, *, timeout_s: float | None, quiet: bool, over: Callable[[Report], bool]
) -> None:
    """Show a batch on standard error until it is ``over``, or ``timeout_s`` has passed."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    meter = Meter()
    with _screen(quiet=quiet) as show:
        while True:
            report = handle.report()
            ended = over(report)  # asked before the look, so that the last line shows the end
            show(_read_progress(client, handle, report.stage, meter))
            if ended or (deadline is not None and time.monotonic() >= deadline):
                return
            time.sleep(_POLL_S)


def _read_progress(client: BatchClient, handle: Handle, stage: str, meter: Meter) -> Look:
    try:
        batch = client.get(handle.batch_id or handle.id)
    except NotFound:
        return Look(None, stage, Throughput())  # its job has not begun yet
    still = Look(batch, stage, Throughput())
    which = batch.current or "apply"
    state = batch.of(which)
    throughput = meter.measure(
        time.monotonic(),
        about=(which, state.round, batch.state),
        settled=state.settled,
        carried_bytes=state.bytes,
        items=still.of_how_many,
    )
    window = batch.order.get("window")
    opens_in_s = Window.read(window).opens_in_s(time.time()) if window else 0.0
    return replace(still, throughput=throughput, opens_in_s=opens_in_s)


@contextmanager
def _screen(*, quiet: bool) -> Iterator[Any]:
    """What to do with a look: draw it over the last one, write a line now and then, or nothing."""
    if quiet:
        yield lambda _: None
    elif errors_console.is_terminal:
        with Live(console=errors_console, transient=True, refresh_per_second=4) as live:
            yield lambda look: live.update(look.renderable())
    else:
        yield _ProgressLines()


class _ProgressLines:
    """A line when the state changes, and one now and then."""

    def __init__(self) -> None:
        self._state = ""
        self._written_s = 0.0

    def __call__(self, look: Look) -> None:
        now = time.monotonic()
        if look.state != self._state or now - self._written_s >= LINE_S:
            self._state, self._written_s = look.state, now
            errors_console.print(look.line())
