"""How a list of studies is written: as a table, as one JSON document, as CSV; always as it is read."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from rich.markup import escape
from rich.table import Table

from producer.show import console

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
    remaining = iter(entries)
    header = True
    while rows := list(itertools.islice(remaining, _ROWS)):
        console.print(_table(rows, header=header))
        header = False


def _table(rows: Sequence[Entry], *, header: bool) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, show_header=header)
    for heading, width in (("date", 8), ("patient", 16), ("modalities", 10), ("description", 20), ("study", 30)):
        table.add_column(heading, min_width=width, overflow="fold")
    table.add_column("server: images", min_width=20, overflow="fold")
    for entry in rows:
        texts = (entry["study_date"], entry["patient_id"], ",".join(entry["modalities"]), entry["study_description"])
        cells = [escape(text or "") for text in texts]
        link = entry["servers"][0]["viewer_url"]
        study = f"[link={link}]{entry['study_uid']}[/link]" if link else entry["study_uid"]
        table.add_row(*cells, study, _where(entry), style="yellow" if len(entry["servers"]) > 1 else "")
    return table


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
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for entry in entries:
        places = entry["servers"]
        joined = {
            "modalities": " ".join(entry["modalities"]),
            "servers": " ".join(place["server_name"] for place in places),
            "images": " ".join(_images(place) for place in places),
            "viewer_url": " ".join(place["viewer_url"] for place in places),
        }
        writer.writerow([joined.get(name, entry.get(name)) for name in COLUMNS])


def json_document(head: Mapping[str, Any], entries: Iterable[Entry]) -> Iterator[str]:
    """One JSON object in pieces: ``head`` and, as its last field, the studies."""
    yield json.dumps(head, ensure_ascii=False)[:-1] + ', "studies": ['
    for number, entry in enumerate(entries):
        yield (",\n" if number else "\n") + json.dumps(entry, ensure_ascii=False)
    yield "]}\n"
