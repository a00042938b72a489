"""``pacs server``: taking a server out of service, and back."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from courier.ledger.suspensions import Suspension
from producer.cli.confirm import history
from producer.cli.door import DONE, as_json_option, plain_failures
from producer.client import Courier
from producer.errors import InvalidRequest
from producer.server_orders import ServerChange
from producer.terminal import console, print_json

_FROM_NOW = re.compile(r"(\d{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class Until(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """``2026-03-01T12:00+01:00`` (UTC unless it says otherwise), or how long from now: ``90m``, ``12h``, ``2d``."""

    name = "until"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        now = datetime.now(UTC)
        try:
            span = _FROM_NOW.fullmatch(value)
            moment = now + timedelta(**{_UNITS[span[2]]: int(span[1])}) if span else datetime.fromisoformat(value)
        except (ValueError, OverflowError):
            self.fail(
                f"{value!r} is neither a time, as 2026-03-01T12:00+01:00, nor how long from now, as 12h.", param, ctx
            )
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        if moment <= now:
            self.fail(f"{value!r} is over already; give a time in the future.", param, ctx)
        return moment


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


@server.command()
@click.argument("name")
@click.option(
    "--until",
    type=Until(),
    metavar="TIME",
    help="When it ends by itself: a time (UTC unless it says otherwise), or how long from now: 90m, 12h, 2d.",
)
@click.option("--end", is_flag=True, help="End the maintenance now.")
@history
@as_json_option
@plain_failures
def maintenance(name: str, until: datetime | None, end: bool, as_json: bool, **who: Any) -> int:
    """Leave server NAME alone while work on the other servers goes on.

    Uploads go to the others, and their results say that NAME was not asked. Images of a study that is known to be on
    NAME wait. What is deleted meanwhile is deleted on NAME when the maintenance has ended.
    """
    if end and (until is not None or any(who.values())):
        raise InvalidRequest("--end ends the maintenance now; leave out the other options.")
    with Courier() as courier:
        if end:
            change = courier.servers.end_maintenance(name)
            said = f"{name} is in service again." if change.changed else f"{name} was not in maintenance."
            said += f" {_capital(str(change.audit))}." if change.audit else ""
        else:
            change = courier.servers.maintenance(name, until=until, **who)
            said = f"{change.suspension}."
    return _said(change, said, as_json=as_json)


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
        "audit": change.audit.as_json() if change.audit else None,
    }


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _told(suspension: Suspension | None) -> dict[str, Any] | None:
    return None if suspension is None else suspension.as_json()
