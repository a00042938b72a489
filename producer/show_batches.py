"""How batches look on a terminal: how far they are while they run, counts per server when they are over."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from producer.batches import BatchDesk
from producer.courier import Handle
from producer.errors import NotFound
from producer.show import errors_console
from worker.batches import Batch

_POLL_S = 0.5
_COUNTS = ("planned", "deleted", "hidden", "not_there", "refused", "failed", "remaining")


def counts_table(servers: Sequence[Mapping[str, Any]]) -> Table:
    """One line per server, with the columns that hold anything."""
    columns = [name for name in _COUNTS if name == "planned" or any(entry.get(name) for entry in servers)]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("server", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right")
    for entry in servers:
        table.add_row(entry["server_name"], *("" if entry.get(name) is None else str(entry[name]) for name in columns))
    return table


def failures_table(failures: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("server", "study", "outcome", "why"):
        table.add_column(heading, overflow="fold")
    for one in failures:
        why = escape(f"{one['code']}: {one['message']}")
        table.add_row(one["server_name"], one["study_uid"], one["status"], why, style="yellow")
    return table


def batches_table(batches: Iterable[Batch]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("batch", "kind", "state", "settled", "items", "begun"):
        justify: Literal["left", "right"] = "right" if heading in ("settled", "items") else "left"
        table.add_column(heading, overflow="fold", justify=justify, no_wrap=heading != "begun")
    for batch in batches:
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(batch.created_ms / 1000))
        table.add_row(batch.id, batch.kind, batch.state, str(batch.settled), str(batch.items), begun)
    return table


def watch(desk: BatchDesk, handle: Handle, *, timeout_s: float | None, quiet: bool) -> None:
    """Show a batch with a live line on standard error until its job is over or ``timeout_s`` has passed."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    hidden = quiet or not errors_console.is_terminal
    with Progress(*columns, console=errors_console, transient=True, disable=hidden) as progress:
        line = progress.add_task("queued", total=None)
        while not handle.report().over and (deadline is None or time.monotonic() < deadline):
            batch = _known(desk, handle.id)
            if batch is not None:
                total = batch.items or None
                progress.update(line, description=batch.state, completed=batch.settled, total=total)
            time.sleep(_POLL_S)


def _known(desk: BatchDesk, batch_id: str) -> Batch | None:
    try:
        return desk.get(batch_id)
    except NotFound:
        return None  # its job has not begun yet
