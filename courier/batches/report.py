"""The report of a batch as a table: one row per item, for `pacs batch report` and for the page of batches.

How a table is written (CSV, tabs, a terminal) is elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

#: What an item of any kind may have come to.
REPORT_COLUMNS: Final = (
    "number", "item", "server_name", "status", "code", "message", "size_bytes",
    "study_uid", "series_uid", "image_uid", "sha256", "verify", "undo",
)  # fmt: skip


def report_cells(row: Mapping[str, Any]) -> list[Any]:
    """The cells of an item's row (`courier.batches.store.Row.as_json`), in the order of `REPORT_COLUMNS`."""
    told = {**(row.get("result") or {}), **row, "message": _message(row)}
    cells = [told.get(name) for name in REPORT_COLUMNS[:-2]]
    return [*cells, *((row.get(which) or {}).get("status") for which in REPORT_COLUMNS[-2:])]


def _message(row: Mapping[str, Any]) -> str | None:
    """Why an item ended so, and what became of it on the servers that its ``server_name`` does not name."""
    places = [place for one in (row, row.get("verify"), row.get("undo")) for place in (one or {}).get("servers", ())]
    others = {
        f"{one['server_name']}: {one['status']}": None for one in places if one["server_name"] != row["server_name"]
    }
    return "; ".join(filter(None, (row.get("message"), *others))) or row.get("message")
