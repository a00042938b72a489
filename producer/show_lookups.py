"""How it looks on a terminal where an object is, and what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from producer.show import console

_STYLES = {"found": "green", "not_there": "dim", "unavailable": "red"}
#: What is shown of an image's metadata; the rest is in ``--json``.
_SHOWN = {
    "00100020": "patient id",
    "00080020": "study date",
    "00080060": "modality",
    "00081030": "study",
    "0008103E": "series",
    "00200013": "number",
    "00080018": "image uid",
}


def found_table(payload: Mapping[str, Any]) -> None:
    """One line per server."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("server", "type", "outcome", "study", "series", "image"):
        table.add_column(heading, overflow="fold")
    for entry in payload["servers"]:
        uids = [entry[name] or "" for name in ("study_uid", "series_uid", "image_uid")]
        status = entry["status"] if not entry["error"] else f"{entry['status']}: {entry['error']['message']}"
        row = (entry["server_name"], entry["server_type"], escape(status), *uids)
        table.add_row(*row, style=_STYLES[entry["status"]])
    console.print(table)
    for entry in payload["servers"]:
        if entry["viewer_url"]:
            console.print(
                f"{entry['server_name']}: {entry['viewer_url']}", highlight=False, markup=False, soft_wrap=True
            )
    for warning in payload["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False)


def metadata_table(payload: Mapping[str, Any]) -> None:
    """A few attributes per image, per server."""
    for entry in payload["servers"]:
        if not entry["metadata"]:
            continue
        name = entry["server_name"]
        table = Table(box=None, header_style="bold", pad_edge=False, title=name, title_justify="left")
        for heading in _SHOWN.values():
            table.add_column(heading, overflow="fold")
        for dataset in entry["metadata"]:
            table.add_row(*(escape(shown_value(dataset.get(tag))) for tag in _SHOWN))
        console.print(table)


def shown_value(element: Any) -> str:
    """The values of an element of DICOM JSON (PS3.18 F) on one line."""
    values = element.get("Value", []) if isinstance(element, Mapping) else []
    texts = [value.get("Alphabetic", "") if isinstance(value, Mapping) else value for value in values]
    return ", ".join(str(text) for text in texts if text is not None)
