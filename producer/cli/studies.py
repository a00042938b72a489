"""``pacs studies``."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TextIO

import click

from producer.cli.door import DONE, UNAVAILABLE, as_json_option, conditions, mode_option, plain_failures
from producer.cli.session import Session
from producer.errors import CourierError
from producer.inputs import counted
from producer.studies import StudyList, walk
from producer.terminal import (
    Column,
    ListingTable,
    Terminal,
    console,
    csv_rows,
    errors_console,
    json_text,
    linked,
    print_json,
    write_out,
)

#: Studies per page while all are listed, and at least in a page of a short list.
PAGE, SHORT = 1000, 100
Form = Literal["table", "json", "csv"]


@click.command()
@click.option("--filter", "filters", multiple=True, metavar="KEY=VALUE", help="A DICOM keyword; may be repeated.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many studies.")
@click.option("--csv", "as_csv", is_flag=True, help="CSV on standard output, nothing else.")
@mode_option(default="both")
@click.option("--timeout", "timeout_s", type=float, help="Wait so many seconds for each page.")
@as_json_option
@plain_failures
def studies(
    filters: Sequence[str], limit: int | None, as_csv: bool, mode: str, timeout_s: float | None, as_json: bool
) -> int:
    """List the studies of all servers, each once.

    Exit status 3: a server did not answer, or is in maintenance and was not asked; its studies are missing.
    """
    form: Form = "json" if as_json else "csv" if as_csv else "table"
    with Session() as courier, StudyList() as listed:
        # Also of a short list every server is asked, and each that sorts gives as many as are wanted in all.
        order: dict[str, Any] = {
            "limit": min(max(2 * limit, SHORT), PAGE) if limit else PAGE,
            "newest_first": bool(limit),
        }
        pages = walk(courier, mode=mode, filters=conditions(filters, called="filter"), timeout_s=timeout_s, **order)
        with errors_console.busy() as progress:
            try:
                for count in listed.extend(pages, at_most=limit):
                    progress(f"{count} studies")
            except CourierError as error:
                if as_json:
                    print_json({"status": "failed", "error": error.payload})
                raise
        return _show(listed, mode, limit, form)


def _show(listed: StudyList, mode: str, limit: int | None, form: Form) -> int:
    servers = _shown_servers(listed, limit)
    entries = itertools.islice(listed, limit)
    if form == "json":
        asked = all(server["status"] != "not_asked" for server in servers)
        whole = listed.cursor is None and asked and (limit is None or len(listed) <= limit)
        order = "server" if listed.in_server_order else "newest_first"
        head = {"operation": "list_studies", "mode": mode, "complete": whole, "order": order, "servers": servers}
        for piece in json_document(head, entries):
            write_out(piece)
        _say_order(listed, errors_console)
    elif form == "csv":
        write_csv(entries, sys.stdout)
        _say_order(listed, errors_console)
    else:
        _say_order(listed, console)
        studies_table(entries)
    return _say_servers(servers)


def _say_order(listed: StudyList, where: Terminal) -> None:
    """The heading of a list that is not sorted: with a limit there may be newer studies than those that are shown."""
    if listed.in_server_order:
        more = (one for one in listed.servers() if one["status"] == "more" and not one.get("newest_first"))
        names = " and ".join(one["server_name"] for one in more)
        where.print(f"in server order; newer studies may be missing, because {names} cannot sort", style="bold")


def _shown_servers(listed: StudyList, limit: int | None) -> list[dict[str, Any]]:
    """The servers with what is shown of their lists, which ``limit`` may cut."""
    servers = listed.servers()
    if limit is None or len(listed) <= limit:
        return servers
    shown = Counter(place["server_name"] for entry in itertools.islice(listed, limit) for place in entry["servers"])
    return [_cut(server, shown[server["server_name"]]) for server in servers]


def _cut(server: dict[str, Any], shown: int) -> dict[str, Any]:
    is_cut = server["status"] == "complete" and shown < server["count"]
    return {**server, "count": shown, "status": "more" if is_cut else server["status"]}


def _end(server: dict[str, Any]) -> str:
    """Whether these are all; a server that ignores offset has ended its list, and may have more."""
    if server["error"]:
        return str(server["error"]["message"])
    if server["status"] != "complete":
        return "and more"
    return "as far as it lists" if server.get("may_be_cut") else "all"


def _say_servers(servers: Sequence[dict[str, Any]]) -> int:
    missing = [server for server in servers if server["status"] in ("unavailable", "not_asked")]
    for server in servers:
        line = (
            f"{server['server_name']}: {counted(server['count'], 'study', 'studies')}, {_end(server)}{left_out(server)}"
        )
        errors_console.print(line, style="red" if server in missing else "dim")
    if missing:
        names = " and ".join(server["server_name"] for server in missing)
        errors_console.print(f"The list is incomplete: the studies of {names} are missing.", style="red")
    return UNAVAILABLE if missing else DONE


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
    table = ListingTable(
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
