"""``pacs status``, ``pacs storage`` and ``pacs database``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

import click
from rich.filesize import decimal
from rich.live import Live

from producer.cli.door import DONE, UNAVAILABLE, as_json_option, ended, plain_failures
from producer.cli.session import Session
from producer.client import Courier
from producer.errors import InvalidRequest
from producer.handle import Handle
from producer.terminal import Column, ListingTable, console, plain

#: A worker answers such a question within about twenty seconds; later means that none is listening.
WAIT_S = 30.0

servers_option = click.option("--server", "servers", multiple=True, help="Only this server; may be repeated.")
timeout_option = click.option(
    "--timeout", "timeout_s", type=float, default=WAIT_S, show_default=True, help="Wait so many seconds for a worker."
)


@click.command()
@servers_option
@click.option("--watch", "every_s", is_flag=False, flag_value=5.0, type=float, help="Ask again every so many seconds.")
@timeout_option
@as_json_option
@plain_failures
def status(servers: Sequence[str], every_s: float | None, timeout_s: float, as_json: bool) -> int:
    """Say who answers, and how fast. Exit status 3: at least one server cannot be used."""
    if every_s is None:
        return _once(lambda courier: courier.status(servers or None), status_table, timeout_s, as_json=as_json)
    if as_json or every_s <= 0:
        raise InvalidRequest("--watch takes a number of seconds above 0 and prints no JSON.")
    with Session() as courier, _screen() as show, suppress(KeyboardInterrupt):
        while True:
            payload = courier.status(servers or None).result(timeout_s=timeout_s)
            show(status_table(payload["servers"]))
            time.sleep(every_s)
    return DONE


@contextmanager
def _screen() -> Iterator[Callable[[ListingTable], None]]:
    """What to do with each answer: draw it over the last one, or write it below, with its time, where none is seen."""
    if console.columns is not None:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda table: live.update(table, refresh=True)
        return

    def write(table: ListingTable) -> None:
        console.print(datetime.now().astimezone().isoformat(timespec="seconds"))
        console.print(table)

    yield write


@click.command()
@servers_option
@timeout_option
@as_json_option
@plain_failures
def storage(servers: Sequence[str], timeout_s: float, as_json: bool) -> int:
    """Say how much room each server has, as far as it tells."""
    return _once(lambda courier: courier.storage(servers or None), storage_table, timeout_s, as_json=as_json)


@click.command()
@servers_option
@timeout_option
@as_json_option
@plain_failures
def database(servers: Sequence[str], timeout_s: float, as_json: bool) -> int:
    """Say whether each server's database works. Exit status 3: at least one does not."""
    return _once(lambda courier: courier.database(servers or None), database_table, timeout_s, as_json=as_json)


def _once(
    ask: Callable[[Courier], Handle], table: Callable[[Sequence[Any]], ListingTable], timeout_s: float, *, as_json: bool
) -> int:
    with Session() as courier:
        payload = ended(courier, ask(courier), timeout_s=timeout_s, as_json=as_json)
    if not as_json:
        console.print(table(payload["servers"]))
    return DONE if all(entry["status"] == "up" for entry in payload["servers"]) else UNAVAILABLE


Entry = Mapping[str, Any]

_NUMBERS = ("ms", "total", "free", "used")
_STYLES = {"up": "green", "degraded": "yellow", "not responding": "bold red"}


def status_table(entries: Sequence[Entry]) -> ListingTable:
    return _table(
        entries,
        {
            "ready": lambda entry: {True: "yes", False: "no"}.get(entry["ready"], "unknown"),
            "ms": _latency,
            "product": lambda entry: entry["product"],
            "version": lambda entry: entry["version"],
        },
    )


def storage_table(entries: Sequence[Entry]) -> ListingTable:
    columns = {name: _size(f"{name}_bytes") for name in ("total", "free", "used")}
    return _table(entries, columns)


def database_table(entries: Sequence[Entry]) -> ListingTable:
    return _table(entries, {"database": lambda entry: entry["database"], "ms": _latency})


def _note(entry: Entry) -> str:
    """What an operator has ordered for the server, then its error, or what it says of itself."""
    if not entry["error"]:
        return " ".join([entry["note"], *entry.get("warnings", ())])
    ordered = [entry["note"]] if entry.get("suspension") else []
    return "; ".join([*ordered, entry["error"]["message"]])


def _latency(entry: Entry) -> str:
    return f"{entry['latency_ms']:.0f}"


def _size(field: str) -> Callable[[Entry], str]:
    return lambda entry: entry[field] if entry[field] == "unknown" else decimal(entry[field])


def _table(entries: Sequence[Entry], columns: Mapping[str, Callable[[Entry], str]]) -> ListingTable:
    numbers = (Column(name, right=name in _NUMBERS) for name in columns)
    table = ListingTable("server", "type", "status", *numbers, Column("note", "text"))
    for entry in entries:
        status = entry["status"]
        note = _note(entry)
        shown = "server not responding" if status == "not responding" else status
        cells = (column(entry) for column in columns.values())
        table.add_row(entry["server_name"], entry["server_type"], plain(shown, _STYLES[status]), *cells, note)
    return table
