"""``pacs trace``."""

from __future__ import annotations

import click

from producer.commands.door import DONE, UNAVAILABLE, as_json_option, ended, plain_failures, timeout_option
from producer.commands.session import Session
from producer.show_trace import show_trace


@click.command()
@click.argument("uid")
@timeout_option
@as_json_option
@plain_failures
def trace(uid: str, timeout_s: float | None, as_json: bool) -> int:
    """Say why the image, series or study that bears UID is where it is. Exit status 3: a server did not answer."""
    with Session() as courier:
        payload = ended(courier, courier.trace(uid), timeout_s=timeout_s, as_json=as_json)
    if not as_json:
        show_trace(payload)
    return UNAVAILABLE if any(entry["status"] == "unavailable" for entry in payload["servers"]) else DONE
