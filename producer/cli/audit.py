"""``pacs audit``."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, Self, TextIO

import click

from producer.audits import pages, whole
from producer.cli.door import DONE, UNAVAILABLE, as_json_option, conditions, plain_failures
from producer.cli.session import Session
from producer.cli.studies import left_out
from producer.client import Courier
from producer.errors import CourierError, InvalidRequest, PacsUnavailable, StillRunning
from producer.repairs import new_file, repair, write
from producer.terminal import (
    Column,
    ListingTable,
    console,
    csv_rows,
    errors_console,
    json_text,
    linked,
    print_json,
    write_out,
)

Form = Literal["table", "json", "csv"]


@dataclass(frozen=True)
class _AuditOrder:
    """Which servers and studies are meant, and how long a page may take."""

    servers: Sequence[str] | None
    filters: Mapping[str, str]
    maintenance: str | None
    timeout_s: float | None


class _Pages:
    """The pages of a finished audit, kept in an unnamed file: nothing is shown of an audit that did not finish."""

    def __init__(self) -> None:
        self._file: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self.head: dict[str, Any] = {}
        self.not_asked: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, page: Mapping[str, Any]) -> None:
        left = [name for name in page.get("not_asked", ()) if name not in self.not_asked]
        self.not_asked += left
        self.head = {name: page[name] for name in ("operation", "servers", "studies", "split")}
        self.head["not_asked"] = self.not_asked
        self.head["left_out"] = page.get("left_out", 0)
        self._file.write(json.dumps(page["entries"]) + "\n")

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        self._file.seek(0)
        for line in self._file:
            yield json.loads(line)


@click.command()
@click.option("--server", "servers", multiple=True, help="Compare only these; give it twice or more.")
@click.option("--filter", "filters", multiple=True, metavar="KEY=VALUE", help="A DICOM keyword; may be repeated.")
@click.option(
    "--maintenance",
    metavar="NAME",
    help="Only studies that were stored elsewhere while this server was in maintenance, on all servers.",
)
@click.option("--plan", type=click.Path(dir_okay=False, path_type=Path), help="Write a repair plan; changes nothing.")
@click.option("--csv", "as_csv", is_flag=True, help="CSV on standard output, nothing else.")
@click.option("--timeout", "timeout_s", type=float, help="Wait so many seconds for each page.")
@as_json_option
@plain_failures
def audit(servers: Sequence[str], filters: Sequence[str], plan: Path | None, as_csv: bool, **how: Any) -> int:
    """List the studies that are on more than one server, and in how many images their copies differ.

    Images are compared by their UIDs, not by their bytes. Exit status 3: a server did not answer, and without it
    nothing is said; or one is in maintenance, and the audit is incomplete.
    """
    form: Form = "json" if how["as_json"] else "csv" if as_csv else "table"
    order = _AuditOrder(servers or None, conditions(filters, called="filter"), how["maintenance"], how["timeout_s"])
    with Session() as courier, _Pages() as found:
        if order.maintenance is not None:
            check_is_back(courier, order.maintenance)
        try:
            with errors_console.busy("comparing the servers"):
                _collect(courier, order, found, plan)
        except (CourierError, StillRunning) as error:
            if form == "json":
                print_json(_failed(error))
            raise
        _show(found, form)
        return UNAVAILABLE if found.not_asked else DONE


def _collect(courier: Courier, order: _AuditOrder, found: _Pages, plan: Path | None) -> None:
    if plan is None:
        order_of_page = partial(pages, courier, servers=order.servers, filters=order.filters)
        for page in order_of_page(maintenance=order.maintenance, timeout_s=order.timeout_s):
            found.add(page)
        return
    with new_file(plan) as out:
        _collect(courier, order, found, None)
        if found.not_asked:
            left = " and ".join(found.not_asked)
            raise PacsUnavailable(
                f"No plan was written: {left} is in maintenance and was not asked. Audit again when that has ended,"
                " or name the servers to compare."
            )
        names = [server["server_name"] for server in found.head["servers"]]
        totals = write(_repairs(courier, order, found), out, servers=names)
    _say(
        f"{plan}: a plan for {totals['studies']} studies, {totals['copies']} images to copy, "
        f"{totals['deletions']} to delete. Nothing has been changed."
    )


def check_is_back(courier: Courier, name: str) -> None:
    """Refuse to wait for the end of a maintenance: the audit that is to come does that by itself."""
    if (suspension := courier.servers.suspended().get(name)) is not None:
        raise InvalidRequest(f"{suspension}; it is audited when it is back in service.")


def _repairs(courier: Courier, order: _AuditOrder, found: _Pages) -> Iterator[dict[str, Any]]:
    for entries in found:
        for entry in entries:
            named = whole(courier, entry, servers=order.servers, timeout_s=order.timeout_s)
            if named is not None:
                yield repair(named)


def _show(found: _Pages, form: Form) -> None:
    if form == "json":
        for piece in json_document(found.head, found):
            write_out(piece)
    elif form == "csv":
        write_csv(found, sys.stdout)
    else:
        table = audit_table()
        for entries in filter(None, found):
            add_entries(table, entries)
            console.print(table)
            table.go_on()
    head = found.head
    each = ", ".join(f"{server['server_name']}: {server['studies']}{left_out(server)}" for server in head["servers"])
    if found.not_asked:
        sentence = f"The audit is incomplete: {' and '.join(found.not_asked)} is in maintenance and was not asked."
        errors_console.print(sentence, style="red")
    if head["left_out"]:
        sentence = f"{head['left_out']:,} more studies were stored elsewhere than are kept; audit all servers."
        errors_console.print(sentence, style="red")
    _say(f"{head['split']} of {head['studies']} studies are on more than one server ({each}).")


def _say(sentence: str) -> None:
    errors_console.print(sentence, style="dim")


def _failed(error: CourierError | StillRunning) -> dict[str, Any]:
    if isinstance(error, CourierError):
        return {"operation": "audit", "status": "failed", "error": error.payload}
    return {"operation": "audit", "status": "running", "message": str(error)}


Entry = Mapping[str, Any]

COLUMNS = ("study_uid", "overlap", "images", "keep", "servers", "images_on", "only_on", "viewer_url")
_STYLES = {"equal": "", "partial": "yellow", "none": "red"}


def audit_table() -> ListingTable:
    """One line per split study, which `add_entries` adds."""
    return ListingTable(
        Column("study", "id", least=64),
        Column("same images", least=11),
        Column("images", right=True, least=6),
        Column("server: images", least=24),
        Column("only on", least=20),
    )


def add_entries(table: ListingTable, entries: Iterable[Entry]) -> None:
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
