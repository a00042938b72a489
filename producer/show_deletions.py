"""How it looks on a terminal what a delete came to, or would come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from producer.terminal import Column, Listing

_STYLES = {
    "deleted": "green",
    "hidden": "green",
    "not_there": "dim",
    "unavailable": "red",
    "refused": "yellow",
    "would_delete": "bold",
    "would_hide": "bold",
}


def deletion_table(entries: Sequence[Mapping[str, Any]]) -> Listing:
    """One line per server."""
    table = Listing("server", "type", "outcome", Column("images", right=True), Column("note", "text"))
    for entry in entries:
        images = "" if entry["images"] is None else str(entry["images"])
        row = (entry["server_name"], entry["server_type"], entry["status"], images, entry["note"])
        table.add_row(*row, style=_STYLES[entry["status"]])
    return table
