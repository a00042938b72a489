"""How it looks on a terminal how the servers are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.filesize import decimal

from producer.terminal import Column, Listing, plain

Entry = Mapping[str, Any]

_NUMBERS = ("ms", "total", "free", "used")
_STYLES = {"up": "green", "degraded": "yellow", "not responding": "bold red"}


def status_table(entries: Sequence[Entry]) -> Listing:
    return _table(
        entries,
        {
            "ready": lambda entry: {True: "yes", False: "no"}.get(entry["ready"], "unknown"),
            "ms": _latency,
            "product": lambda entry: entry["product"],
            "version": lambda entry: entry["version"],
        },
    )


def storage_table(entries: Sequence[Entry]) -> Listing:
    columns = {name: _size(f"{name}_bytes") for name in ("total", "free", "used")}
    return _table(entries, columns)


def database_table(entries: Sequence[Entry]) -> Listing:
    return _table(entries, {"database": lambda entry: entry["database"], "ms": _latency})


def _latency(entry: Entry) -> str:
    return f"{entry['latency_ms']:.0f}"


def _size(field: str) -> Callable[[Entry], str]:
    return lambda entry: entry[field] if entry[field] == "unknown" else decimal(entry[field])


def _table(entries: Sequence[Entry], columns: Mapping[str, Callable[[Entry], str]]) -> Listing:
    numbers = (Column(name, right=name in _NUMBERS) for name in columns)
    table = Listing("server", "type", "status", *numbers, Column("note", "text"))
    for entry in entries:
        status = entry["status"]
        note = entry["error"]["message"] if entry["error"] else " ".join([entry["note"], *entry.get("warnings", ())])
        shown = "server not responding" if status == "not responding" else status
        cells = (column(entry) for column in columns.values())
        table.add_row(entry["server_name"], entry["server_type"], plain(shown, _STYLES[status]), *cells, note)
    return table
