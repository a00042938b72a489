"""``pacs delete-all`` and ``pacs batch …``."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from producer.batches import BatchDesk
from producer.commands.deletions import servers_option
from producer.commands.door import DONE, FAILED, as_json_option, ended, plain_failures, timeout_option
from producer.courier import Courier, Handle
from producer.errors import ConfirmationRequired
from producer.show import console
from producer.show_batches import batches_table, counts_table, failures_table, watch
from worker.batches import Batch

CONFIRMATION = "delete all studies"
_COLUMNS = ("number", "server_name", "study_uid", "status", "code", "message")

batch_argument = click.argument("batch_id")


@click.command("delete-all")
@servers_option
@click.option("--confirm", metavar="SENTENCE", help=f'Has to be "{CONFIRMATION}". On a terminal you are asked for it.')
@click.option("--keep", is_flag=True, help="Only hide them, so that they can be had back, where a server can do that.")
@click.option("--dry-run", is_flag=True, help="Count what would be deleted, and leave it.")
@click.option("--no-wait", is_flag=True, help="Print the batch's id and leave.")
@timeout_option
@as_json_option
@plain_failures
def delete_all(servers: Sequence[str], confirm: str | None, keep: bool, dry_run: bool, **how: Any) -> int:
    """Delete EVERY study on every server, or on those named, as a batch."""
    named, quiet = servers or None, how["as_json"]
    with Courier() as courier:
        if confirm is None and not dry_run:
            confirm = _asked_for(courier, named, how["timeout_s"]) if sys.stdin.isatty() and not quiet else ""
        if not dry_run and confirm != CONFIRMATION:
            raise ConfirmationRequired(f'Nothing was deleted: add --confirm "{CONFIRMATION}".')
        handle = courier.delete_all(confirm or "", servers=named, permanent=not keep, dry_run=dry_run)
        if how["no_wait"]:
            click.echo(json.dumps({"batch_id": handle.id}) if quiet else handle.id)
            return DONE
        return _waited_for(courier, handle, timeout_s=how["timeout_s"], as_json=quiet)


def _asked_for(courier: Courier, servers: Sequence[str] | None, timeout_s: float | None) -> str:
    """Show what would be deleted, then have the sentence typed."""
    _waited_for(courier, courier.delete_all(servers=servers, dry_run=True), timeout_s=timeout_s, as_json=False)
    return str(click.prompt(f'All these studies will be deleted. Type "{CONFIRMATION}" to go on', default=""))


def _waited_for(courier: Courier, handle: Handle, *, timeout_s: float | None, as_json: bool) -> int:
    watch(courier.batch, handle, timeout_s=timeout_s, quiet=as_json)
    payload = ended(courier, handle, timeout_s=0 if timeout_s is not None else None, as_json=as_json)
    if not as_json:
        console.print(counts_table(payload["servers"]))
        if payload["failures"]:
            console.print(failures_table(payload["failures"]))
        for warning in payload["warnings"]:
            console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)
        if payload["failures_total"] > len(payload["failures"]):
            console.print(f"All {payload['failures_total']} failures: pacs batch report {handle.id}", highlight=False)
    return FAILED if payload["failures_total"] else DONE


@click.group()
def batch() -> None:
    """Look after batches: how far they are, pausing, resuming, cancelling, reports."""


@batch.command("list")
@as_json_option
@plain_failures
def list_batches(as_json: bool) -> int:
    """All batches, the latest first."""
    with Courier() as courier:
        batches = courier.batch.list()
    if as_json:
        click.echo(json.dumps([one.as_json() for one in batches]))
    else:
        console.print(batches_table(batches))
    return DONE


@batch.command("watch")
@batch_argument
@timeout_option
@as_json_option
@plain_failures
def watch_batch(batch_id: str, timeout_s: float | None, as_json: bool) -> int:
    """Show a batch until it is over. Exit status 1: something failed, or it was cancelled."""
    with Courier() as courier:
        courier.batch.get(batch_id)
        return _waited_for(courier, courier.handle(batch_id), timeout_s=timeout_s, as_json=as_json)


@batch.command()
@batch_argument
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated values with a line of headings.")
@as_json_option
@plain_failures
def report(batch_id: str, as_csv: bool, as_json: bool) -> int:
    """What became of each item."""
    with Courier() as courier:
        rows = courier.batch.report(batch_id)
        if as_json:
            _print_array(rows)
        else:
            writer = csv.writer(sys.stdout, lineterminator="\n", delimiter="," if as_csv else "\t")
            writer.writerow(_COLUMNS)
            writer.writerows([row[name] for name in _COLUMNS] for row in rows)
    return DONE


def _print_array(rows: Any) -> None:
    """One JSON document, row by row: a report can be long."""
    separator = "["
    for row in rows:
        click.echo(f"{separator}{json.dumps(row)}", nl=False)
        separator = ",\n"
    click.echo("[]" if separator == "[" else "]")


def _add(name: str, act: Callable[[BatchDesk, str], Batch], sentence: str) -> None:
    @batch.command(name, help=sentence)
    @batch_argument
    @as_json_option
    @plain_failures
    def command(batch_id: str, as_json: bool) -> int:
        with Courier() as courier:
            found = act(courier.batch, batch_id)
        if as_json:
            click.echo(json.dumps(found.as_json()))
        else:
            console.print(batches_table([found]))
            console.print(counts_table(found.as_json()["servers"]))
        return DONE


_add("show", BatchDesk.get, "How far a batch is.")
_add("pause", BatchDesk.pause, "Begin nothing new of a batch until it is resumed; what is under way ends.")
_add("resume", BatchDesk.resume, "Go on with a paused batch.")
_add("cancel", BatchDesk.cancel, "End a batch; what was done stays done.")
