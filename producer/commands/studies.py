"""``pacs studies``."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Literal

import click

from producer.commands.door import DONE, UNAVAILABLE, as_json_option, conditions, mode_option, plain_failures
from producer.commands.session import Session
from producer.errors import CourierError
from producer.show_studies import json_document, left_out, studies_table, write_csv
from producer.studies import StudyList, walk
from producer.terminal import errors_console, print_json, write_out

#: Studies per page while all are listed.
PAGE = 1000
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
    """List the studies of all servers, each once. Exit status 3: a server did not answer, its studies are missing."""
    form: Form = "json" if as_json else "csv" if as_csv else "table"
    with Session() as courier, StudyList() as listed:
        page = min(limit or PAGE, PAGE)
        pages = walk(courier, mode=mode, filters=conditions(filters, called="filter"), limit=page, timeout_s=timeout_s)
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
    servers = listed.servers()
    entries = itertools.islice(listed, limit)
    if form == "json":
        whole = listed.cursor is None and (limit is None or len(listed) <= limit)
        head = {"operation": "list_studies", "mode": mode, "complete": whole, "servers": servers}
        for piece in json_document(head, entries):
            write_out(piece)
    elif form == "csv":
        write_csv(entries, sys.stdout)
    else:
        studies_table(entries)
    missing = [server for server in servers if server["status"] == "unavailable"]
    for server in servers:
        end = server["error"]["message"] if server["error"] else "all" if server["status"] == "complete" else "and more"
        line = f"{server['server_name']}: {server['count']} studies, {end}{left_out(server)}"
        errors_console.print(line, style="red" if server in missing else "dim")
    return UNAVAILABLE if missing else DONE
