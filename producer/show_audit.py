"""How an audit is written: as a table, as one JSON document, as CSV; always entry by entry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from producer.terminal import Column, Listing, csv_rows, json_text, linked

Entry = Mapping[str, Any]

COLUMNS = ("study_uid", "overlap", "images", "keep", "servers", "images_on", "only_on", "viewer_url")
_STYLES = {"equal": "", "partial": "yellow", "none": "red"}


def audit_table() -> Listing:
    """One line per split study, which `add_entries` adds."""
    return Listing(
        Column("study", "id", least=64),
        Column("same images", least=11),
        Column("images", right=True, least=6),
        Column("server: images", least=24),
        Column("only on", least=20),
    )


def add_entries(table: Listing, entries: Iterable[Entry]) -> None:
    for entry in entries:
        study = linked(entry["study_uid"], entry["servers"][0]["viewer_url"])
        where = ", ".join(f"{place['server_name']}: {place['images']}" for place in entry["servers"])
        cells = (study, entry["overlap"], str(entry["images"]), where, _only_on(entry))
        table.add_row(*cells, style=_STYLES[entry["overlap"]])


def _only_on(entry: Entry) -> str:
    return ", ".join(f"{'+'.join(group['servers'])}: {group['images']}" for group in entry["only_on"])


def write_csv(pages: Iterable[Sequence[Entry]], out: TextIO) -> None:
    """One line per split study; what is said of its servers is separated by blanks, in one order."""
    write_row = csv_rows(out)
    write_row(COLUMNS)
    for entries in pages:
        for entry in entries:
            row = _row(entry)
            write_row([row[name] for name in COLUMNS])


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
    yield json_text(head)[:-1] + ', "entries": ['
    separator = "\n"
    for entries in pages:
        for entry in entries:
            yield separator + json_text(entry)
            separator = ",\n"
    yield "]}\n"
