"""``pacs batch …`` for batches that are there: how far they are, steering them, their plan and their report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from producer.batches import BatchDesk
from producer.commands.door import DONE, FAILED, as_json_option, entry, plain_failures, timeout_option
from producer.courier import Courier, Handle
from producer.errors import Cancelled, StillRunning
from producer.plans import PlanHeader, PlanLine, write
from producer.repairs import new_file
from producer.show import console
from producer.show_batches import (
    PlanSummary,
    batches_table,
    counts_table,
    end_line,
    failures_table,
    json_array,
    json_lines,
    order_line,
    plan_sentence,
    plan_table,
    watch,
    write_csv,
)
from worker.batches import Batch

batch_argument = click.argument("batch_id", metavar="ID")
plan_option = click.option(
    "--plan",
    "plan_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the plan to a new file and stop there; `pacs batch apply FILE` does it.",
)


@click.group()
def batch() -> None:
    """Do something to many images or studies at once, and look after it.

    A batch is planned, applied, verified, and can often be undone. It lives in the ledger: workers and this command may
    come and go.
    """


# --- seeing a batch through -------------------------------------------------------------------------------------


def seen_through(courier: Courier, handle: Handle, *, timeout_s: float | None, as_json: bool) -> int:
    """Show a batch until the job that sees it through is over, then what it came to.

    Raises
    ------
    CourierError, StillRunning
        It ended otherwise, or not in time; with ``as_json`` that has been printed too.
    """
    followed(courier, handle, timeout_s=timeout_s, as_json=as_json)
    report = handle.report()
    if as_json:
        click.echo(json.dumps(entry(handle, report), ensure_ascii=False))
    if report.result is None or report.error is not None:
        if isinstance(report.error, Cancelled) and not as_json:
            _show_counts(courier.batch.get(handle.batch_id))
        raise report.error or still_running(handle, timeout_s)
    payload = report.result
    if not as_json:
        _show_end(courier.batch.get(handle.batch_id), payload)
    return FAILED if payload["failures_total"] else DONE


def followed(courier: Courier, handle: Handle, *, timeout_s: float | None, as_json: bool) -> None:
    """The live line, which may be left by Ctrl-C: the batch goes on."""
    try:
        watch(courier.batch, handle, timeout_s=timeout_s, quiet=as_json)
    except KeyboardInterrupt:
        raise StillRunning(
            f"You have left; the batch goes on. Come back with: pacs batch watch {handle.batch_id}"
        ) from None


def still_running(handle: Handle, timeout_s: float | None) -> StillRunning:
    return StillRunning(
        f"The batch has not ended within {timeout_s:g} s; it goes on: pacs batch watch {handle.batch_id}"
    )


def _show_end(batch: Batch, payload: Mapping[str, Any]) -> None:
    _show_counts(batch)
    console.print(end_line(batch), highlight=False, markup=False)
    if payload["failures"]:
        console.print(failures_table(payload["failures"]))
    if payload["failures_total"] > len(payload["failures"]):
        console.print(f"All {payload['failures_total']:,} of them: pacs batch report {batch.id}", highlight=False)
    if batch.of("apply").totals.get("failed"):
        console.print(f"What failed can be tried again: pacs batch retry {batch.id}", highlight=False)


def _show_counts(batch: Batch) -> None:
    table = counts_table(batch)
    if table.row_count:
        console.print(table)
    for warning in batch.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)


# --- what there is ----------------------------------------------------------------------------------------------


@batch.command("list")
@as_json_option
@plain_failures
def list_batches(as_json: bool) -> int:
    """All batches, the latest first."""
    with Courier() as courier:
        batches = courier.batch.list()
    if as_json:
        click.echo(json.dumps([one.as_json() for one in batches]))
    elif batches:
        console.print(batches_table(batches))
    else:
        console.print("There is no batch.")
    return DONE


@batch.command("watch")
@batch_argument
@timeout_option
@as_json_option
@plain_failures
def watch_batch(batch_id: str, timeout_s: float | None, as_json: bool) -> int:
    """Show a batch until it is over; Ctrl-C leaves it running. Exit status 1: something failed, or it was cancelled."""
    with Courier() as courier:
        found = courier.batch.get(batch_id)
        handle = courier.handle(found.conductor or batch_id, batch_id=batch_id)
        return seen_through(courier, handle, timeout_s=timeout_s, as_json=as_json)


@batch.command("plan")
@batch_argument
@click.option("--jsonl", is_flag=True, help="The plan itself on standard output, as a plan file has it.")
@plan_option
@as_json_option
@plain_failures
def show_plan(batch_id: str, jsonl: bool, plan_path: Path | None, as_json: bool) -> int:
    """What a batch would do, or was to do.

    Counts by server, and by what is left out and why.
    """
    with Courier() as courier:
        header, lines = courier.batch.plan(batch_id)
        if jsonl:
            with _until_nobody_reads():
                write(header, lines, sys.stdout)
                sys.stdout.flush()
            return DONE
        summary = told_plan(header, lines, plan_path)
    if as_json:
        click.echo(json.dumps({"batch_id": batch_id, "kind": header.kind, **plan_json(summary, plan_path)}))
    else:
        show_summary(summary, plan_path)
    return DONE


def told_plan(header: PlanHeader, lines: Iterator[PlanLine], path: Path | None) -> PlanSummary:
    """What a plan comes to, written to ``path`` on the way if there is one."""
    summary = PlanSummary()

    def passing() -> Iterator[PlanLine]:
        for line in lines:
            summary.add(line)
            yield line

    if path is None:
        for _ in passing():
            pass
    else:
        with new_file(path) as out:
            write(header, passing(), out)
    return summary


def plan_json(summary: PlanSummary, path: Path | None) -> dict[str, Any]:
    return {"plan": summary.as_json(), "plan_file": None if path is None else str(path)}


def show_summary(summary: PlanSummary, path: Path | None) -> None:
    console.print(plan_table(summary))
    console.print(plan_sentence(summary), highlight=False)
    if path is not None:
        console.print(f"{path}: the plan. pacs batch apply {path} does it.", highlight=False, markup=False)


@batch.command()
@batch_argument
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated values with a line of headings.")
@click.option("--jsonl", is_flag=True, help="A JSON object per line.")
@click.option("--status", "statuses", multiple=True, help="Only items that ended so, e.g. failed; may be repeated.")
@as_json_option
@plain_failures
def report(batch_id: str, as_csv: bool, jsonl: bool, statuses: tuple[str, ...], as_json: bool) -> int:
    """What became of each item, however many there are."""
    with Courier() as courier:
        courier.batch.get(batch_id)
        rows = courier.batch.report(batch_id)
        if statuses:
            rows = (
                row for row in rows if row["status"].replace("_", " ") in {one.replace("_", " ") for one in statuses}
            )
        with _until_nobody_reads():
            if jsonl or as_json:
                for piece in json_lines(rows) if jsonl else json_array(rows):
                    sys.stdout.write(piece)
            else:
                write_csv(rows, sys.stdout, delimiter="," if as_csv else "\t")
            sys.stdout.flush()
    return DONE


@contextmanager
def _until_nobody_reads() -> Iterator[None]:
    """`pacs batch report ID | head` is no failure."""
    try:
        yield
    except BrokenPipeError:
        sys.stderr.close()  # else the interpreter complains about standard output when it ends


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
            if order := order_line(found):
                console.print(order, style="dim", highlight=False, markup=False)
            _show_counts(found)
        return DONE


_add("show", BatchDesk.get, "How far a batch is.")
_add("pause", BatchDesk.pause, "Begin nothing new of a batch until it is resumed.")
_add("resume", BatchDesk.resume, "Go on with a paused batch.")
_add("cancel", BatchDesk.cancel, "End a batch; what was done stays done.")
