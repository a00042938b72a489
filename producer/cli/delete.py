"""``pacs delete``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from courier.messages import Level, check_uid
from producer.cli.batches import seen_through
from producer.cli.confirm import (
    ask,
    backup_option,
    hide_option,
    hides,
    history,
    may_ask,
    place,
    require_confirmation,
    yes_option,
)
from producer.cli.door import DONE, FAILED, as_json_option, ended, plain_failures, timeout_option
from producer.cli.lookups import level_argument, study_option
from producer.cli.session import Session
from producer.client import Courier
from producer.errors import CourierError, InvalidRequest
from producer.terminal import Column, ListingTable, console

servers_option = click.option("--server", "servers", multiple=True, help="Only on this server; may be repeated.")


@dataclass(frozen=True)
class _DeletionOrder:
    """What is to be deleted, and how the command was asked to behave."""

    level: Level
    uid: str
    servers: Sequence[str]
    permanent: bool
    backup: str | None
    study_uid: str | None
    requested_by: str | None
    reason: str | None
    timeout_s: float | None
    as_json: bool

    def carry_out(self, courier: Courier, *, dry_run: bool, quiet: bool) -> dict[str, Any]:
        """One job, waited for; its servers' entries are shown, also if it failed."""
        handle = courier.delete(
            self.level,
            self.uid,
            servers=self.servers or None,
            permanent=self.permanent,
            dry_run=dry_run,
            study_uid=self.study_uid,
            requested_by=self.requested_by,
            reason=self.reason,
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

    def back_up_and_delete(self, courier: Courier) -> int:
        """The same as a batch of one study, which can be undone."""
        handle = courier.batch.delete(
            [self.uid],
            servers=self.servers or None,
            permanent=self.permanent,
            backup=self.backup,
            requested_by=self.requested_by,
            reason=self.reason,
        )
        return seen_through(courier, handle, timeout_s=self.timeout_s, as_json=self.as_json)


@click.command()
@level_argument
@click.argument("uid")
@study_option
@servers_option
@hide_option
@backup_option
@click.option("--keep", is_flag=True, hidden=True, help="The old name of --hide.")
@click.option("--dry-run", is_flag=True, help="Say what would be deleted, and leave it.")
@yes_option
@history
@timeout_option
@as_json_option
@plain_failures
def delete(level: Level, uid: str, servers: Sequence[str], backup: str | None, **how: Any) -> int:
    """Delete the image, series or study that bears UID on every server that has it.

    On a terminal it is shown first, and you are asked; elsewhere it needs --yes. With --backup a study is deleted as a
    batch of one, which `pacs batch undo` takes back. Exit status 1: a server refused, or is in maintenance and was not
    asked; a job of its own then deletes there later.
    """
    permanent = not hides(hide=how["hide"], keep=how["keep"])
    more = {name: how[name] for name in ("study_uid", "requested_by", "reason", "timeout_s", "as_json")}
    order = _DeletionOrder(level, uid, servers, permanent, place(backup), **more)
    check_uid(uid)
    if backup is not None and level != "study":
        raise InvalidRequest("--backup keeps copies of whole studies; delete the study, or leave it out.")
    if not how["dry_run"]:
        require_confirmation(yes=how["yes"], as_json=order.as_json)
    with Session() as courier:
        if may_ask(as_json=order.as_json) and not (how["yes"] or how["dry_run"]):
            order.carry_out(courier, dry_run=True, quiet=False)
            if not ask(f"Delete this {level}?"):
                console.print("Nothing was deleted.")
                return FAILED
        if backup is not None and not how["dry_run"]:
            return order.back_up_and_delete(courier)
        payload = order.carry_out(courier, dry_run=how["dry_run"], quiet=order.as_json)
    return FAILED if any(entry["status"] in ("refused", "not_asked") for entry in payload["servers"]) else DONE


_STYLES = {
    "deleted": "green",
    "hidden": "green",
    "not_there": "dim",
    "unavailable": "red",
    "refused": "yellow",
    "would_delete": "bold",
    "would_hide": "bold",
    "not_asked": "yellow",
}


def _note(entry: Mapping[str, Any]) -> str:
    later = entry.get("follow_up_job_id")
    return f"{entry['note']} Job {later} deletes there when that has ended." if later else str(entry["note"])


def deletion_table(entries: Sequence[Mapping[str, Any]]) -> ListingTable:
    """One line per server."""
    table = ListingTable("server", "type", "outcome", Column("images", right=True), Column("note", "text"))
    for entry in entries:
        images = "" if entry["images"] is None else str(entry["images"])
        row = (entry["server_name"], entry["server_type"], entry["status"], images, _note(entry))
        table.add_row(*row, style=_STYLES[entry["status"]])
    return table
