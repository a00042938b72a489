"""``pacs server``: taking a server out of service, and back."""

from __future__ import annotations

from typing import Any

import click

from courier.ledger.suspensions import Suspension
from producer.cli.confirm import history
from producer.cli.door import DONE, as_json_option, plain_failures
from producer.client import Courier
from producer.server_orders import ServerChange
from producer.terminal import console, print_json


@click.group()
def server() -> None:
    """Take a server out of service, and back. Every worker obeys within two seconds."""


@server.command()
@click.argument("name")
@history
@as_json_option
@plain_failures
def pause(name: str, requested_by: str | None, reason: str | None, as_json: bool) -> int:
    """Begin nothing new on server NAME until it is resumed. Jobs that need it wait, and none fails for it.

    A new image has to be looked for on every server, so all uploads wait for a server that is paused.
    """
    with Courier() as courier:
        change = courier.servers.pause(name, requested_by=requested_by, reason=reason)
    said = f"{change.suspension}." if change.changed else f"Nothing was changed: {change.suspension}."
    return _said(change, said, as_json=as_json)


@server.command()
@click.argument("name")
@as_json_option
@plain_failures
def resume(name: str, as_json: bool) -> int:
    """Go on with server NAME, which was paused."""
    with Courier() as courier:
        change = courier.servers.resume(name)
    was = f"{name} is in service again; what waited for it goes on." if change.changed else f"{name} was not paused."
    return _said(change, was, as_json=as_json)


def _said(change: ServerChange, sentence: str, *, as_json: bool) -> int:
    if as_json:
        print_json(change_json(change))
    else:
        console.print(sentence)
    return DONE


def change_json(change: ServerChange) -> dict[str, Any]:
    """An order as ``--json`` prints it."""
    return {
        "operation": "server",
        "server_name": change.server,
        "changed": change.changed,
        "suspension": _told(change.suspension),
        "ended": _told(change.before),
    }


def _told(suspension: Suspension | None) -> dict[str, Any] | None:
    return None if suspension is None else suspension.as_json()
