"""How a list of studies is written: as a table, as one JSON document, as CSV; always as it is read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

from producer.terminal import Column, Listing, console, csv_rows, json_text, linked

Entry = Mapping[str, Any]

#: So many lines are held at a time, to be laid out together.
_ROWS = 500
COLUMNS = (
    "study_uid",
    "study_date",
    "study_time",
    "patient_id",
    "patient_name",
    "accession_number",
    "study_description",
    "modalities",
    "servers",
    "images",
    "viewer_url",
)


def studies_table(entries: Iterable[Entry]) -> None:
    """One line per study; a split one stands out."""
    table = Listing(
        Column("date", least=8),
        Column("patient", least=10),
        Column("modalities", least=10),
        Column("description", "text", least=20),
        Column("study", "id", least=64),
        Column("server: images", least=20),
    )
    remaining = iter(entries)
    while rows := list(itertools.islice(remaining, _ROWS)):
        for entry in rows:
            modalities = ",".join(entry["modalities"])
            texts = (entry["study_date"], entry["patient_id"], modalities, entry["study_description"])
            study = linked(entry["study_uid"], entry["servers"][0]["viewer_url"])
            style = "yellow" if len(entry["servers"]) > 1 else ""
            table.add_row(*(text or "" for text in texts), study, _where(entry), style=style)
        console.print(table)
        table.go_on()


def _where(entry: Entry) -> str:
    return ", ".join(f"{place['server_name']}: {_images(place)}" for place in entry["servers"])


def _images(place: Entry) -> str:
    return "?" if place["images"] is None else str(place["images"])


def left_out(server: Entry) -> str:
    """What a server sent although it does not match the filters, and whether it may have more than it lists."""
    dropped = server.get("dropped", 0)
    cut = "; it ignores offset, so it may have more than it lists" if server.get("may_be_cut") else ""
    if not dropped:
        return cut
    lacking = " and ".join(server.get("lacking", ()))
    why = f" (no study there came with {lacking})" if lacking else ""
    rows = "1 more row that it sent does" if dropped == 1 else f"{dropped:,} more rows that it sent do"
    return f"; {rows} not match the filters; left out{why}{cut}"


def write_csv(entries: Iterable[Entry], out: TextIO) -> None:
    """One line per study; servers, images and links of a split study are separated by blanks, in one order."""
    write_row = csv_rows(out)
    write_row(COLUMNS)
    for entry in entries:
        places = entry["servers"]
        joined = {
            "modalities": " ".join(entry["modalities"]),
            "servers": " ".join(place["server_name"] for place in places),
            "images": " ".join(_images(place) for place in places),
            "viewer_url": " ".join(place["viewer_url"] for place in places),
        }
        write_row([joined.get(name, entry.get(name)) for name in COLUMNS])


def json_document(head: Mapping[str, Any], entries: Iterable[Entry]) -> Iterator[str]:
    """One JSON object in pieces: ``head`` and, as its last field, the studies."""
    yield json_text(head)[:-1] + ', "studies": ['
    for number, entry in enumerate(entries):
        yield (",\n" if number else "\n") + json_text(entry)
    yield "]}\n"
