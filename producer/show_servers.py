"""How it looks on a terminal how the servers are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

Entry = Mapping[str, Any]

_NUMBERS = ("ms", "total", "free", "used")
_STYLES = {"up": "green", "degraded": "yellow", "not responding": "bold red"}


def status_table(entries: Sequence[Entry]) -> Table:
    return _table(
        entries,
        {
            "ready": lambda entry: {True: "yes", False: "no"}.get(entry["ready"], "unknown"),
            "ms": _latency,
            "product": lambda entry: entry["product"],
            "version": lambda entry: entry["version"],
        },
    )


def storage_table(entries: Sequence[Entry]) -> Table:
    columns = {name: _size(f"{name}_bytes") for name in ("total", "free", "used")}
    return _table(entries, columns)


def database_table(entries: Sequence[Entry]) -> Table:
    return _table(entries, {"database": lambda entry: entry["database"], "ms": _latency})


def _latency(entry: Entry) -> str:
    return f"{entry['latency_ms']:.0f}"


def _size(field: str) -> Callable[[Entry], str]:
    return lambda entry: entry[field] if entry[field] == "unknown" else decimal(entry[field])


def _table(entries: Sequence[Entry], columns: Mapping[str, Callable[[Entry], str]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("server", "type", "status", *columns, "note"):
        table.add_column(heading, overflow="fold", justify="right" if heading in _NUMBERS else "left")
    for entry in entries:
        status = entry["status"]
        note = entry["error"]["message"] if entry["error"] else entry["note"]
        shown = "server not responding" if status == "not responding" else status
        cells = (column(entry) for column in columns.values())
        colour = _STYLES[status]
        row = (entry["server_name"], entry["server_type"], f"[{colour}]{shown}[/{colour}]", *cells, escape(note))
        table.add_row(*row)
    return table
