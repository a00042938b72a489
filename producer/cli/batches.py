"""``pacs batch …`` for batches that are there: how far they are, steering them, their plan and their report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

from courier.batches.store import DONE_AGAIN, TROUBLE, Batch, Pass
from producer.batches import BatchClient, ContinueCommand
from producer.cli.batch_tables import (
    PlanSummary,
    batches_table,
    counts_table,
    end_line,
    failures_table,
    has_ended,
    history_lines,
    json_array,
    json_lines,
    known_statuses,
    order_line,
    plan_sentence,
    plan_table,
    reach_table,
    watch,
    write_csv,
)
from producer.cli.door import DONE, FAILED, as_json_option, complain, entry, plain_failures, timeout_option
from producer.cli.no_worker import said_if_no_worker_answers
from producer.cli.session import Interrupted, batch_goes_on
from producer.client import Courier
from producer.errors import Cancelled, StillRunning
from producer.handle import Handle, Report
from producer.plans import PlanHeader, PlanLine, write
from producer.repairs import new_file
from producer.terminal import console, drop_output, print_json, write_out

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


#: The passes that a command's exit status speaks of. What a batch has not done is no failure of its undo.
DONE_IN: Final[Sequence[Pass]] = ("apply", "verify")
VERIFIED_IN: Final[Sequence[Pass]] = ("verify",)
UNDONE_IN: Final[Sequence[Pass]] = ("undo",)


def seen_through(
    courier: Courier, handle: Handle, *, timeout_s: float | None, as_json: bool, passes: Sequence[Pass] = DONE_IN
) -> int:
    """Show a batch until the job that sees it through is over, then what it came to in ``passes``.

    Raises
    ------
    CourierError, StillRunning
        It ended otherwise, or not in time; with ``as_json`` that has been printed too.
    """
    followed(courier, handle, timeout_s=timeout_s, as_json=as_json)
    report = handle.report()
    if as_json:
        print_json(entry(handle, report))
    if report.result is None or report.error is not None:
        if isinstance(report.error, Cancelled) and not as_json:
            _show_counts(courier.batch.get(handle.batch_id))
        raise report.error or still_running(handle, timeout_s)
    payload = report.result
    if not as_json:
        _show_end(courier.batch.get(handle.batch_id), payload, passes)
    return FAILED if _in_trouble(payload, passes) else DONE


def followed(
    courier: Courier,
    handle: Handle,
    *,
    timeout_s: float | None,
    as_json: bool,
    over: Callable[[Report], bool] = lambda report: report.over,
) -> None:
    """The live line, which may be left by Ctrl-C: `Session` says what goes on."""
    with said_if_no_worker_answers(courier):
        watch(courier.batch, handle, timeout_s=timeout_s, quiet=as_json, over=over)


def still_running(handle: Handle, timeout_s: float | None) -> StillRunning:
    return StillRunning(
        f"The batch has not ended within {timeout_s:g} s; it goes on: pacs batch watch {handle.batch_id}"
    )


def _in_trouble(payload: Mapping[str, Any], passes: Sequence[Pass]) -> int:
    """The items that are not as they should be, as far as ``passes`` have seen.

    A look at what was done (and at nothing else) has not shown what nobody can say either.
    """
    wanting = {*TROUBLE, *(["unverified"] if passes == VERIFIED_IN else [])}
    found = (payload["passes"].get(which, {}).get("totals", {}) for which in passes)
    return sum(n for totals in found for status, n in totals.items() if status in wanting)


def _show_end(batch: Batch, payload: Mapping[str, Any], passes: Sequence[Pass]) -> None:
    _show_counts(batch)
    console.print(end_line(batch))
    total, told = _in_trouble(payload, passes), [one for one in payload["failures"] if one["pass"] in passes]
    if told:
        console.print(failures_table(told))
    if total > len(told):
        console.print(f"All {total:,} of them: pacs batch report {batch.id}")
    missing = batch.kind in DONE_AGAIN and batch.of("verify").totals.get("missing")
    if missing or batch.of("apply").totals.get("failed"):
        what = "is missing" if missing else "failed"
        console.print(f"What {what} can be tried again: pacs batch retry {batch.id}")
    console.print(f"batch {batch.id}")


def _show_counts(batch: Batch) -> None:
    table = counts_table(batch)
    if table.row_count:
        console.print(table)
    for warning in batch.warnings:
        console.print(f"warning: {warning}", style="yellow")


# --- what there is ----------------------------------------------------------------------------------------------


@batch.command("list")
@as_json_option
@plain_failures
def list_batches(as_json: bool) -> int:
    """All batches, the latest first."""
    with Courier() as courier:
        batches = courier.batch.list()
    if as_json:
        print_json([one.as_json() for one in batches])
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
        handle = courier.handle(found.coordinator or batch_id, batch_id=batch_id)

        def over(_: Report) -> bool:
            return courier.batch.is_over(courier.batch.get(batch_id))

        try:
            followed(courier, handle, timeout_s=timeout_s, as_json=as_json, over=over)
        except KeyboardInterrupt:
            raise Interrupted(f"You have left. {batch_goes_on(batch_id)}") from None
        found = courier.batch.get(batch_id)
        if not courier.batch.is_over(found):
            if as_json:
                print_json(entry(handle, handle.report()))
            raise still_running(handle, timeout_s)
        return _ended(courier, found, as_json=as_json)


def _ended(courier: Courier, found: Batch, *, as_json: bool) -> int:
    """What a batch has come to by itself: jobs that wanted something else of it since have not changed that."""
    payload = courier.batch.ending(found)
    passes = UNDONE_IN if found.state == "undone" else DONE_IN
    refused = courier.handle(found.id).report().error if found.state == "cancelled" else None
    if isinstance(refused, Cancelled):
        refused = None
    if as_json:
        why = {"error": refused.payload} if refused is not None else {}
        print_json({**payload, **why})
    else:
        _show_end(found, payload, passes)
    if refused is not None:
        raise refused
    return FAILED if found.state == "cancelled" or _in_trouble(payload, passes) else DONE


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
        return print_plan(header, lines, plan_path, as_json=as_json)


def print_plan(header: PlanHeader, lines: Iterator[PlanLine], path: Path | None, *, as_json: bool) -> int:
    """What a plan comes to, on standard output."""
    summary = summarize_plan(header, lines, path)
    if as_json:
        print_json({"batch_id": header.batch_id, "kind": header.kind, **plan_json(summary, path)})
    else:
        show_summary(summary, path)
    return DONE


def summarize_plan(header: PlanHeader, lines: Iterator[PlanLine], path: Path | None) -> PlanSummary:
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
    console.print(plan_sentence(summary))
    if path is not None:
        console.print(f"{path}: the plan. pacs batch apply {path} does it.")


def print_reach(courier: Courier, found: Batch, command: ContinueCommand, *, as_json: bool) -> int:
    """Which items ``retry`` or ``undo`` would be about, on standard output."""
    reach = courier.batch.reach(found, command)
    if as_json:
        groups = [{"server_name": name or None, "status": status, "items": n} for (name, status), n in reach.items()]
        told = {"batch_id": found.id, "kind": found.kind, "state": found.state, "items": sum(reach.values())}
        print_json({**told, "groups": groups})
        return DONE
    console.print(reach_table(reach))
    console.print(f"{command} would be about {sum(reach.values()):,} of {found.items:,} items.")
    return DONE


@batch.command()
@batch_argument
@click.option("--csv", "as_csv", is_flag=True, help="Comma-separated values with a line of headings.")
@click.option("--jsonl", is_flag=True, help="A JSON object per line.")
@click.option(
    "--status", "statuses", multiple=True, help="Only items that ended so in any pass, e.g. failed; repeatable."
)
@as_json_option
@plain_failures
def report(batch_id: str, as_csv: bool, jsonl: bool, statuses: tuple[str, ...], as_json: bool) -> int:
    """What became of each item, however many there are."""
    wanted = known_statuses(statuses)
    with Courier() as courier:
        courier.batch.get(batch_id)
        rows = courier.batch.report(batch_id)
        if wanted:
            rows = (row for row in rows if has_ended(row, wanted))
        with _until_nobody_reads():
            if jsonl or as_json:
                for piece in json_lines(rows) if jsonl else json_array(rows):
                    write_out(piece)
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
        drop_output()


def _in_vain(name: str, before: Batch, found: Batch) -> bool:
    """Whether a batch is not what ``name`` was to make of it; one that was so before is."""
    if name == "resume":  # it may have come to its end since
        return before.over
    return found.state != {"pause": "paused", "cancel": "cancelled"}.get(name, found.state)


def _add(name: str, act: Callable[[BatchClient, str], Batch], sentence: str) -> None:
    @batch.command(name, help=sentence)
    @batch_argument
    @as_json_option
    @plain_failures
    def command(batch_id: str, as_json: bool) -> int:
        with Courier() as courier:
            before = courier.batch.get(batch_id)
            found = act(courier.batch, batch_id)
            told = courier.batch.published(found)
        if as_json:
            print_json(told)
        else:
            console.print(batches_table([found]))
            for line in filter(None, (order_line(found), *history_lines(told))):
                console.print(line, style="dim")
            _show_counts(found)
        if _in_vain(name, before, found):
            complain(f"The batch is {found.state}; there is nothing to {name}.")
            return FAILED
        return DONE


_add("show", BatchClient.get, "How far a batch is.")
_add("pause", BatchClient.pause, "Begin nothing new of a batch until it is resumed.")
_add("resume", BatchClient.resume, "Go on with a paused batch.")
_add("cancel", BatchClient.cancel, "End a batch; what was done stays done.")
