"""``pacs delete``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from producer.commands.door import DONE, FAILED, as_json_option, ended, plain_failures, timeout_option
from producer.commands.lookups import level_argument
from producer.courier import Courier
from producer.errors import CourierError
from producer.show import console
from producer.show_deletions import deletion_table
from worker.payloads import Level

servers_option = click.option("--server", "servers", multiple=True, help="Only on this server; may be repeated.")


@dataclass(frozen=True)
class _Wish:
    """What is to be deleted, and how the command was asked to behave."""

    level: Level
    uid: str
    servers: Sequence[str]
    permanent: bool
    timeout_s: float | None
    as_json: bool

    def carry_out(self, courier: Courier, *, dry_run: bool, quiet: bool) -> dict[str, Any]:
        """One job, waited for; its servers' entries are shown, also if it failed."""
        handle = courier.delete(
            self.level, self.uid, servers=self.servers or None, permanent=self.permanent, dry_run=dry_run
        )
        try:
            payload = ended(courier, handle, timeout_s=self.timeout_s, as_json=quiet)
        except CourierError as error:
            if not quiet and "servers" in error.details:
                console.print(deletion_table(error.details["servers"]))
            raise
        if not quiet:
            console.print(deletion_table(payload["servers"]))
        return payload


@click.command()
@level_argument
@click.argument("uid")
@servers_option
@click.option("--keep", is_flag=True, help="Only hide it, so that it can be had back, where a server can do that.")
@click.option("--dry-run", is_flag=True, help="Say what would be deleted, and leave it.")
@click.option("--yes", is_flag=True, help="Do not show it first and ask.")
@timeout_option
@as_json_option
@plain_failures
def delete(level: Level, uid: str, servers: Sequence[str], keep: bool, **how: Any) -> int:
    """Delete the image, series or study that bears UID on every server that has it.

    On a terminal it is shown first, and you are asked.
    """
    wish = _Wish(level, uid, servers, not keep, how["timeout_s"], how["as_json"])
    asks = sys.stdin.isatty() and not (how["yes"] or how["dry_run"] or wish.as_json)
    with Courier() as courier:
        if asks:
            wish.carry_out(courier, dry_run=True, quiet=False)
            if not click.confirm(f"Delete this {level}?"):
                click.echo("Nothing was deleted.")
                return FAILED
        payload = wish.carry_out(courier, dry_run=how["dry_run"], quiet=wish.as_json)
    return FAILED if any(entry["status"] == "refused" for entry in payload["servers"]) else DONE
