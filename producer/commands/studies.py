"""``pacs studies``."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import click

from producer.commands.door import DONE, UNAVAILABLE, as_json_option, conditions, mode_option, plain_failures
from producer.commands.session import Session
from producer.errors import CourierError
from producer.inputs import counted
from producer.show_studies import json_document, left_out, studies_table, write_csv
from producer.studies import StudyList, walk
from producer.terminal import Terminal, console, errors_console, print_json, write_out

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
    """List the studies of all servers, each once. Exit status 3: a server did not answer, its studies are missing."""
    form: Form = "json" if as_json else "csv" if as_csv else "table"
    with Session() as courier, StudyList() as listed:
        # Also of a short list every server is asked, and each that sorts gives as many as are wanted in all.
        wish: dict[str, Any] = {
            "limit": min(max(2 * limit, SHORT), PAGE) if limit else PAGE,
            "newest_first": bool(limit),
        }
        pages = walk(courier, mode=mode, filters=conditions(filters, called="filter"), timeout_s=timeout_s, **wish)
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
        whole = listed.cursor is None and (limit is None or len(listed) <= limit)
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
    missing = [server for server in servers if server["status"] == "unavailable"]
    for server in servers:
        line = (
            f"{server['server_name']}: {counted(server['count'], 'study', 'studies')}, {_end(server)}{left_out(server)}"
        )
        errors_console.print(line, style="red" if server in missing else "dim")
    return UNAVAILABLE if missing else DONE
