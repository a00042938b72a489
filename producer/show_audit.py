"""How an audit is written: as a table, as one JSON document, as CSV; always entry by entry."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from rich.table import Table

Entry = Mapping[str, Any]

COLUMNS = ("study_uid", "overlap", "images", "keep", "servers", "images_on", "only_on", "viewer_url")
_STYLES = {"equal": "", "partial": "yellow", "none": "red"}


def audit_table(entries: Iterable[Entry], *, header: bool = True) -> Table:
    """One line per split study."""
    table = Table(box=None, header_style="bold", pad_edge=False, show_header=header)
    for heading, width in (("study", 30), ("same images", 11), ("images", 6), ("server: images", 24), ("only on", 20)):
        table.add_column(heading, min_width=width, overflow="fold", justify="right" if width == 6 else "left")
    for entry in entries:
        link = entry["servers"][0]["viewer_url"]
        study = f"[link={link}]{entry['study_uid']}[/link]" if link else entry["study_uid"]
        where = ", ".join(f"{place['server_name']}: {place['images']}" for place in entry["servers"])
        cells = (study, entry["overlap"], str(entry["images"]), where, _only_on(entry))
        table.add_row(*cells, style=_STYLES[entry["overlap"]])
    return table


def _only_on(entry: Entry) -> str:
    return ", ".join(f"{'+'.join(group['servers'])}: {group['images']}" for group in entry["only_on"])


def write_csv(pages: Iterable[Sequence[Entry]], out: TextIO) -> None:
    """One line per split study; what is said of its servers is separated by blanks, in one order."""
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for entries in pages:
        writer.writerows([_row(entry)[name] for name in COLUMNS] for entry in entries)


def _row(entry: Entry) -> dict[str, Any]:
    places = entry["servers"]
    return {
        **entry,
        "servers": " ".join(place["server_name"] for place in places),
        "images_on": " ".join(str(place["images"]) for place in places),
        "only_on": " ".join(f"{'+'.join(group['servers'])}={group['images']}" for group in entry["only_on"]),
        "viewer_url": " ".join(place["viewer_url"] for place in places),
    }


def json_document(head: Mapping[str, Any], pages: Iterable[Sequence[Entry]]) -> Iterator[str]:
    """One JSON object in pieces: ``head`` and, as its last field, the entries."""
    yield json.dumps(head, ensure_ascii=False)[:-1] + ', "entries": ['
    separator = "\n"
    for entries in pages:
        for entry in entries:
            yield separator + json.dumps(entry, ensure_ascii=False)
            separator = ",\n"
    yield "]}\n"
