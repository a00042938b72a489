"""How it looks on a terminal what a delete came to, or would come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

_STYLES = {
    "deleted": "green",
    "hidden": "green",
    "not_there": "dim",
    "unavailable": "red",
    "refused": "yellow",
    "would_delete": "bold",
    "would_hide": "bold",
}


def deletion_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """One line per server."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("server", "type", "outcome", "images", "note"):
        table.add_column(heading, overflow="fold", justify="right" if heading == "images" else "left")
    for entry in entries:
        images = "" if entry["images"] is None else str(entry["images"])
        row = (entry["server_name"], entry["server_type"], entry["status"], images, escape(entry["note"]))
        table.add_row(*row, style=_STYLES[entry["status"]])
    return table
