"""The page Batches: how far each one is, how fast, what became of its items; to pause, resume and cancel it."""

from __future__ import annotations

import csv
import io
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from threading import Lock
from typing import Any, ClassVar, Final

from tornado.web import HTTPError, authenticated

from courier.batches.progress import Meter, Throughput, of_how_many
from courier.batches.report import REPORT_COLUMNS, report_cells
from courier.batches.store import ACTIVE, TROUBLE, Batch, Batches
from courier.ledger.jobs import Ledger
from courier.overview import Overview
from courier.redaction import printable
from courier.windows import Window
from worker.flower.figures import amount, bytes_shown, duration, moment
from worker.flower.ledger_page import LedgerPage
from worker.flower.ledger_reader import LedgerAway

#: So many batches are shown, the latest first; the others are in `pacs batch list`.
SHOWN: Final = 50
#: So many rows of a report are read and sent at a time.
_ROWS: Final = 500
_CAN_PAUSE: Final = ("running", "verifying", "undoing")
_STATE_LOOKS: Final = {
    "done": "text-bg-success",
    "undone": "text-bg-success",
    "paused": "text-bg-warning",
    "cancelled": "text-bg-secondary",
    "planned": "text-bg-info",
}


@dataclass(frozen=True)
class BatchRow:
    """A batch as the page shows it. ``counts`` are the items by server and outcome, all rows alike."""

    id: str
    name: str
    kind: str
    state: str
    look: str
    percent: int
    done: str
    pace: str
    created: str
    columns: tuple[str, ...]
    counts: tuple[tuple[str, tuple[str, ...]], ...]
    troubled: int
    warnings: tuple[str, ...]
    can_pause: bool
    can_resume: bool
    can_cancel: bool

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE


class Paces:
    """The pace of each batch that is looked at. Safe for threads; those looked at least recently are forgotten."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._meters: OrderedDict[str, Meter] = OrderedDict()

    def measure(self, batch: Batch) -> Throughput:
        """The pace since earlier looks; at the first look that of the whole pass."""
        which = batch.current or "apply"
        state, items = batch.of(which), of_how_many(batch, which)
        with self._lock:
            meter = self._meters.setdefault(batch.id, Meter())
            self._meters.move_to_end(batch.id)
            while len(self._meters) > 4 * SHOWN:
                self._meters.popitem(last=False)
            return meter.measure(
                self._clock(),
                about=(which, state.round, batch.state),
                settled=state.settled,
                carried_bytes=state.bytes,
                items=items,
            )


class BatchPage(LedgerPage):
    paces: ClassVar[Paces] = Paces()
    tab, template, heading = "batches", "courier_batches.html", "Batches"
    description = "How far each batch is, how fast it goes, and what became of its items."
    notices: ClassVar[Mapping[str, str]] = {
        "paused": "Batch {id} is paused: nothing new begins; what is under way comes to its end.",
        "resumed": "Batch {id} goes on.",
        "cancelled": "Batch {id} is cancelled; what was done stays done.",
        "unchanged": "Batch {id} was not changed: in its state there is nothing to do so.",
        "unknown": "There is no batch {id}.",
    }
    #: What a form may ask for, and the state that a batch is in when that has worked.
    actions: ClassVar[Mapping[str, Callable[[Batches, str], str]]] = {
        "pause": Batches.pause,
        "resume": Batches.resume,
        "cancel": Batches.cancel,
    }

    def question(self) -> Callable[[Ledger], Mapping[str, Any]]:
        return lambda ledger: look_at_batches(ledger, self.paces)

    @authenticated
    async def post(self) -> None:
        """Pause, resume or cancel the batch that the form names."""
        batch_id, action = self.form("batch_id"), self.form("action")
        if action not in self.actions:
            raise HTTPError(400, "A batch can be paused, resumed or cancelled.")
        try:
            said = await self.ask(lambda ledger: steer(ledger, batch_id, action))
        except LedgerAway as away:
            self.say_away(away)
        else:
            self.done(action, batch_id, said)


def steer(ledger: Ledger, batch_id: str, action: str) -> str:
    """Pause, resume or cancel a batch; the word of `BatchPage.notices` for what came of it."""
    batches = Batches(ledger)
    before = batches.get(batch_id)
    if before is None:
        return "unknown"
    state = BatchPage.actions[action](batches, batch_id)
    worked = {"pause": state == "paused", "resume": before.state == "paused", "cancel": state == "cancelled"}
    was_so = before.state == {"pause": "paused", "cancel": "cancelled"}.get(action)
    if not worked[action] or was_so:
        return "unchanged"
    return {"pause": "paused", "resume": "resumed", "cancel": "cancelled"}[action]


def look_at_batches(ledger: Ledger, paces: Paces) -> dict[str, Any]:
    """The values of the page, as the ledger has them now."""
    found = Overview(ledger).batches(limit=SHOWN)
    rows = [batch_row(batch, paces.measure(batch), now_s=time.time()) for batch in found]
    return {"batches": rows, "shown": SHOWN}


def batch_row(batch: Batch, pace: Throughput, *, now_s: float) -> BatchRow:
    """One batch. ``now_s`` is Unix time."""
    which = batch.current or "apply"
    total = of_how_many(batch, which)
    settled = min(batch.settled, total)
    found = {name: counts for name, counts in batch.outcomes.items() if counts}
    columns = tuple(dict.fromkeys(status for counts in found.values() for status in counts))
    return BatchRow(
        id=batch.id,
        name=batch.name,
        kind=batch.kind,
        state=batch.state,
        look=_STATE_LOOKS.get(batch.state, "task-state-started"),
        percent=100 * settled // total if total else 0,
        done=f"{amount(settled)} of {amount(total)} items" if total else "no items yet",
        pace=_pace(batch, pace, total=total, settled=settled, now_s=now_s),
        created=moment(batch.created_ms),
        columns=tuple(status.replace("_", " ") for status in columns),
        counts=tuple(
            (name or "no server", tuple(amount(counts[one]) if counts.get(one) else "" for one in columns))
            for name, counts in found.items()
        ),
        troubled=sum(n for state in batch.passes.values() for status, n in state.totals.items() if status in TROUBLE),
        warnings=tuple(printable(text) for text in batch.warnings),
        can_pause=batch.state in _CAN_PAUSE or (batch.state == "planning" and batch.frozen),
        can_resume=batch.state == "paused",
        can_cancel=batch.state in (*ACTIVE, "planned", "paused"),
    )


def _pace(batch: Batch, pace: Throughput, *, total: int, settled: int, now_s: float) -> str:
    """How fast it goes and how long it will take, as far as that is known."""
    if batch.state not in ACTIVE or not total:
        return ""
    window = batch.order.get("window")
    if window and (opens_in_s := Window.read(window).opens_in_s(now_s)):
        return f"waits for its window {window}, which opens in {duration(opens_in_s)}"
    if not pace.items_per_s:
        pace = _whole_pass(batch, total=total, settled=settled, now_s=now_s)
    if not pace.items_per_s:
        return ""
    parts = [f"{pace.items_per_s:,.{0 if pace.items_per_s >= 10 else 1}f} items/s"]
    if pace.bytes_per_s >= 1:
        parts.append(f"{bytes_shown(pace.bytes_per_s)}/s")
    if pace.left_s is not None:
        parts.append(f"about {duration(pace.left_s)} left")
    return " · ".join(parts)


def _whole_pass(batch: Batch, *, total: int, settled: int, now_s: float) -> Throughput:
    """The pace since the pass began, for a first look."""
    state = batch.of(batch.current or "apply")
    elapsed_s = now_s - state.begun_ms / 1000 if state.begun_ms else 0.0
    if elapsed_s <= 0 or not settled:
        return Throughput()
    per_s = settled / elapsed_s
    return Throughput(per_s, state.bytes / elapsed_s, (total - settled) / per_s)


class BatchReport(LedgerPage):
    """What became of each item, as CSV, however many there are; it is read piece by piece."""

    @authenticated
    async def get(self) -> None:
        batch_id = self.get_query_argument("batch_id", "")
        try:
            batch = await self.ask(lambda ledger: Batches(ledger).get(batch_id))
            if batch is None:
                raise HTTPError(404, f"There is no batch {batch_id}.")
            rows = await self.ask(lambda ledger: report_rows(ledger, batch))
            piece = await self.ask(lambda _: next(rows, ""))
        except LedgerAway as away:
            self.set_status(503)
            self.finish(f"{away}\n")
            return
        self.set_header("Content-Type", "text/csv; charset=utf-8")
        self.set_header("Content-Disposition", f'attachment; filename="batch-{batch.id}.csv"')
        try:
            while piece:
                self.write(piece)
                await self.flush()
                piece = await self.ask(lambda _: next(rows, ""))
        except LedgerAway:
            self.detach().close()  # else half a report would look like a whole one


def report_rows(ledger: Ledger, batch: Batch) -> Iterator[str]:
    """The report in pieces of text: a line of headings, then a line per item."""
    cells = (report_cells(row.as_json(batch.types)) for row in Batches(ledger).rows(batch))
    yield _as_csv([REPORT_COLUMNS])
    while piece := list(islice(cells, _ROWS)):
        yield _as_csv(piece)


def _as_csv(rows: Any) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([printable(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return out.getvalue()
