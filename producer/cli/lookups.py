"""``pacs exists`` and ``pacs metadata``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from courier.messages import Level
from producer.cli.door import DONE, as_json_option, ended, mode_option, plain_failures, timeout_option
from producer.cli.session import Session
from producer.terminal import Column, Kind, ListingTable, console

level_argument = click.argument("level", type=click.Choice(["image", "series", "study"]))
study_option = click.option(
    "--study", "study_uid", metavar="UID", help="Only in this study; some servers find images and series only so."
)


@click.command()
@level_argument
@click.argument("uid")
@click.option("--metadata", "described", is_flag=True, help="Bring the metadata of its images, too.")
@study_option
@mode_option(default="either")
@timeout_option
@as_json_option
@plain_failures
def exists(level: Level, uid: str, described: bool, timeout_s: float | None, as_json: bool, **where: Any) -> int:
    """Say who has the image, series or study that bears UID. Exit status 1: no server has it."""
    with Session() as courier:
        handle = courier.exists(level, uid, metadata=described, **where)
        payload = ended(courier, handle, timeout_s=timeout_s, as_json=as_json)
    if not as_json:
        found_table(payload)
        metadata_table(payload)
    return DONE


@click.command()
@level_argument
@click.argument("uid")
@study_option
@mode_option(default="either")
@timeout_option
@as_json_option
@plain_failures
def metadata(level: Level, uid: str, timeout_s: float | None, as_json: bool, **where: Any) -> int:
    """Show the metadata of every image of what bears UID."""
    with Session() as courier:
        handle = courier.metadata(level, uid, **where)
        payload = ended(courier, handle, timeout_s=timeout_s, as_json=as_json)
    if not as_json:
        found_table(payload)
        metadata_table(payload)
    return DONE


_STYLES = {"found": "green", "not_there": "dim", "unavailable": "red", "not_asked": "yellow"}
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
_KINDS: Mapping[str, Kind] = {"study": "text", "series": "text", "image uid": "id"}


def found_table(payload: Mapping[str, Any]) -> None:
    """One line per server."""
    uid_columns = (Column(name, "id") for name in ("study", "series", "image"))
    table = ListingTable("server", "type", Column("outcome", "text"), *uid_columns)
    for entry in payload["servers"]:
        uids = [entry[name] or "" for name in ("study_uid", "series_uid", "image_uid")]
        status = entry["status"] if not entry["error"] else f"{entry['status']}: {entry['error']['message']}"
        table.add_row(entry["server_name"], entry["server_type"], status, *uids, style=_STYLES[entry["status"]])
    console.print(table)
    for entry in payload["servers"]:
        if entry["viewer_url"]:
            console.print(f"{entry['server_name']}: {entry['viewer_url']}")
    for warning in payload["warnings"]:
        console.print(f"warning: {warning}", style="yellow")


def metadata_table(payload: Mapping[str, Any]) -> None:
    """A few attributes per image, per server."""
    for entry in payload["servers"]:
        if not entry["metadata"]:
            continue
        table = ListingTable(*(Column(heading, _KINDS.get(heading, "word")) for heading in _SHOWN.values()))
        for dataset in entry["metadata"]:
            table.add_row(*(shown_value(dataset.get(tag)) for tag in _SHOWN))
        console.print(entry["server_name"], style="italic")
        console.print(table)


def shown_value(element: Any) -> str:
    """The values of an element of DICOM JSON (PS3.18 F) on one line."""
    values = element.get("Value", []) if isinstance(element, Mapping) else []
    texts = [value.get("Alphabetic", "") if isinstance(value, Mapping) else value for value in values]
    return ", ".join(str(text) for text in texts if text is not None)
