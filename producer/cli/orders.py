"""What begins something: ``pacs batch upload|delete|download|migrate|apply|retry|verify|undo``, ``pacs delete-all``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from courier.batches.progress import of_how_many
from courier.batches.store import Batch, Pass
from courier.filters import check_filters, check_selecting, check_unambiguous
from producer.batches import check_state
from producer.cli.batch_tables import PlanSummary, failures_table, servers_table, undo_question
from producer.cli.batches import (
    DONE_IN,
    UNDONE_IN,
    VERIFIED_IN,
    batch,
    batch_argument,
    followed,
    plan_json,
    plan_option,
    print_plan,
    print_reach,
    seen_through,
    show_summary,
    still_running,
    summarize_plan,
)
from producer.cli.confirm import (
    agreed,
    ask,
    ask_to_type,
    backup_option,
    backup_place,
    confirm_studies_option,
    hide_option,
    hides,
    history,
    may_ask,
    place,
    require_confirmation,
    warn,
    yes_option,
)
from producer.cli.delete import servers_option
from producer.cli.door import (
    DONE,
    FAILED,
    Command,
    as_json_option,
    conditions,
    ended,
    entry,
    plain_failures,
    timeout_option,
)
from producer.cli.quantities import Bandwidth, RateParam, WindowParam
from producer.cli.session import Session
from producer.client import Courier
from producer.errors import ConfirmationRequired, InvalidRequest
from producer.handle import Handle
from producer.inputs import check_standard_input
from producer.orders import InputSource, Order, of_plan_file
from producer.repairs import check_new
from producer.terminal import console, errors_console, is_asked_on_a_terminal, print_json

CONFIRMATION = "delete all studies"


def ordering(command: Command) -> Command:
    """The options that all orders have in common."""
    for option in reversed(
        (
            click.option("--column", metavar="NAME", help="The files are CSV or JSON Lines, and this column is meant."),
            click.option("--skip-bad", is_flag=True, help="Leave bad rows out instead of refusing them all."),
            click.option("--name", metavar="WORDS", help="What the batch is called in lists."),
            click.option(
                "--concurrency",
                "--width",  # its name in version 0.1
                "concurrency",
                type=click.IntRange(1, 64),
                help="Chunks (of 100 items) at a time, over all workers.",
            ),
            click.option("--rate", type=RateParam(), metavar="N/s", help="At most so many requests a second, as 50/s."),
            click.option("--bandwidth", type=Bandwidth(), metavar="SIZE/s", help="At most so much, as 20MB/s."),
            click.option(
                "--window", type=WindowParam(), metavar="FROM-TO", help='Only then: "20:00-06:00 Europe/Berlin".'
            ),
            click.option("--no-verify", is_flag=True, help="Do not look afterwards whether all is as it should be."),
            click.option("--dry-run", is_flag=True, help="Stop at the plan and show it."),
            plan_option,
            click.option("--no-wait", is_flag=True, help="Print the batch's id and leave."),
            history,
            timeout_option,
            as_json_option,
        )
    ):
        command = option(command)
    return command


def choosing(command: Command) -> Command:
    """Instead of UIDs: studies that match, or all."""
    for option in (
        click.option("--all", "everything", is_flag=True, help="Every study there is."),
        click.option("--query", "queries", multiple=True, metavar="KEY=VALUE", help="Studies that match; repeatable."),
    ):
        command = option(command)
    return command


@dataclass(frozen=True)
class _How:
    """How a command was asked to behave, and what all orders may say."""

    options: dict[str, Any]

    @property
    def fields(self) -> dict[str, Any]:
        options = self.options
        return {
            "name": options["name"],
            "width": options["concurrency"],
            "requests_per_s": options["rate"],
            "bytes_per_s": options["bandwidth"],
            "window": options["window"],
            "verify": False if options["no_verify"] else None,
            "dry_run": True if self.plans_only else None,
            **_history(options),
        }

    @property
    def plans_only(self) -> bool:
        return bool(self.options["dry_run"] or self.options["plan_path"])

    @property
    def quiet(self) -> bool:
        return bool(self.options["as_json"])

    @property
    def timeout_s(self) -> float | None:
        timeout_s: float | None = self.options["timeout_s"]
        return timeout_s

    def input_source(self, words: Sequence[str]) -> InputSource | None:
        if not words:
            return None
        if "-" in words:
            check_standard_input()
        column, skip_bad = self.options["column"], self.options["skip_bad"]
        return InputSource(tuple(words), column=column, skip_bad=skip_bad, notify=_say)

    def ordered(self, courier: Courier, order: Order, input_source: InputSource | None) -> Handle:
        """Order it; on a terminal it is shown how far reading and planning are."""
        with errors_console.busy() as show:
            if input_source is not None and not self.quiet:
                input_source = replace(input_source, step=show)
            return courier.batch.order(order, input_source)


def _confirmed(options: Mapping[str, Any]) -> dict[str, Any]:
    return {**_history(options), "confirm_studies": options.get("confirm_studies")}


def _history(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"requested_by": options["requested_by"], "reason": options["reason"]}


def _say(sentence: str) -> None:
    errors_console.print(sentence, style="yellow")


# --- the four orders --------------------------------------------------------------------------------------------


@batch.command()
@click.argument("sources", nargs=-1, required=True, metavar="URL|FILE|-…")
@click.option("--server", help="Ask for this server instead of the routing policy's choice.")
@ordering
@plain_failures
def upload(sources: Sequence[str], server: str | None, **options: Any) -> int:
    """Put many images where their studies belong.

    Give their URLs, files with a URL per line ("-": standard input), or one of s3://bucket/prefix/,
    az://container/prefix/, file:///folder/ and a ZIP file at any URL, whose images a worker finds.
    """
    how = _How(options)
    return _carried_out(Order("upload", {"server": server, **how.fields}), how.input_source(sources), how)


@batch.command()
@click.argument("studies", nargs=-1, metavar="[UID|FILE|-]…")
@choosing
@servers_option
@backup_option
@click.option("--keep", metavar="PLACE", hidden=True, help="The old name of --backup.")
@click.option("--permanent/--hide", default=True, help="Delete them, or only hide them where a server can.")
@click.option("--confirm", metavar="SENTENCE", help=f'With --all: has to be "{CONFIRMATION}".')
@confirm_studies_option
@yes_option
@ordering
@plain_failures
def delete(studies: Sequence[str], servers: Sequence[str], backup: str | None, **options: Any) -> int:
    """Delete many studies, on every server that has them.

    On a terminal the plan is shown first, and you are asked; elsewhere it needs --yes.
    """
    how = _How(options)
    fields = {"servers": list(servers) or None, "permanent": options["permanent"]}
    fields["confirm_studies"] = options["confirm_studies"]
    fields["backup"] = backup_place(backup, options["keep"])
    fields.update(_chosen(studies, options))
    if options["everything"]:
        fields["confirm"] = _sentence(options, asks=_asks(how))
    order = Order("delete", {**fields, **how.fields})
    told = options["everything"] and options["confirm"]  # the sentence was given with the command: all is said
    return _carried_out(order, how.input_source(studies), how, question=None if told else "Delete these studies?")


@batch.command()
@click.argument("studies", nargs=-1, metavar="[UID|FILE|-]…")
@choosing
@servers_option
@click.option(
    "--to-folder",
    "destination",
    required=True,
    metavar="PLACE",
    help="A folder of the workers' machine, s3://… or az://….",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["zip", "files"]),
    default="zip",
    show_default=True,
    help="One ZIP file or one folder per study.",
)
@ordering
@plain_failures
def download(studies: Sequence[str], servers: Sequence[str], destination: str, form: str, **options: Any) -> int:
    """Bring many studies to a folder or a bucket.

    Each appears there when it is whole.
    """
    how = _How(options)
    fields = {"servers": list(servers) or None, "destination": place(destination), "format": form}
    order = Order("download", {**fields, **_chosen(studies, options), **how.fields})
    return _carried_out(order, how.input_source(studies), how)


@batch.command()
@click.argument("studies", nargs=-1, metavar="[UID|FILE|-]…")
@choosing
@click.option("--from-server", "--from", required=True, metavar="NAME", help="The server that has them.")
@click.option("--to-server", "--to", required=True, metavar="NAME", help="The server that is to have them.")
@click.option(
    "--delete-source", is_flag=True, help="Move: delete each from where it was when it is proven to be there."
)
@click.option(
    "--digests",
    type=click.Choice(["all", "sample", "none"]),
    default="all",
    show_default=True,
    help="Compare all images, one per series, or none. With --delete-source: all.",
)
@confirm_studies_option
@yes_option
@ordering
@plain_failures
def migrate(studies: Sequence[str], from_server: str, to_server: str, delete_source: bool, **options: Any) -> int:
    """Copy many studies from one server to another, or move them."""
    if delete_source and options["digests"] != "all":
        raise click.UsageError("--delete-source compares all images before it deletes any: leave --digests out.")
    how = _How(options)
    fields = {"from_server": from_server, "to_server": to_server, "delete_source": delete_source}
    fields.update(digests=options["digests"], confirm_studies=options["confirm_studies"])
    order = Order("migrate", {**fields, **_chosen(studies, options), **how.fields})
    question = f"Move these studies, and delete them from {from_server}?" if delete_source else None
    return _carried_out(order, how.input_source(studies), how, question=question)


def _chosen(words: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    """What it is about, if not studies by their UIDs."""
    queries: Sequence[str] = options["queries"]
    if sum(map(bool, (words, queries, options["everything"]))) != 1:
        raise click.UsageError("Say which studies: UIDs or a file of them, --query KEY=VALUE, or --all.")
    filters = conditions(queries, called="query")
    if filters:
        check_selecting(filters)
        check_filters(filters)
        check_unambiguous(filters)
    return {"filters": filters or None, "everything": True if options["everything"] else None}


def _sentence(options: dict[str, Any], *, asks: bool) -> str:
    confirm: str | None = options["confirm"]
    if confirm is None and asks:
        confirm = ask_to_type(f'All studies will be planned for deletion. Type "{CONFIRMATION}" to go on')
    if confirm != CONFIRMATION and not _How(options).plans_only:
        raise ConfirmationRequired(f'Nothing was deleted: add --confirm "{CONFIRMATION}".')
    return confirm or ""


def _asks(how: _How) -> bool:
    return may_ask(as_json=how.quiet) and not (how.options.get("yes") or how.plans_only)


def _carried_out(order: Order, input_source: InputSource | None, how: _How, *, question: str | None = None) -> int:
    """Order it, and show it to its end; after a look at the plan, if there is a ``question`` to be asked."""
    _check_plan_file(how)
    if question and not how.plans_only:
        require_confirmation(yes=how.options["yes"], as_json=how.quiet)
    with Session() as courier:
        if question and _asks(how):
            return _plan_then_confirm(courier, order, input_source, how, question)
        handle = how.ordered(courier, order, input_source)
        if how.options["no_wait"]:
            return _left(handle, how)
        if how.plans_only:
            return _planned(courier, handle, how)
        return _seen_through(courier, handle, how.options)


def _check_plan_file(how: _How) -> None:
    """Refuse what would plan a batch and then write no plan."""
    path: Path | None = how.options["plan_path"]
    if path is None:
        return
    if how.options["no_wait"]:
        raise click.UsageError("--plan waits for the plan to write it, and --no-wait does not wait: take one of them.")
    check_new(path)


def _plan_then_confirm(
    courier: Courier, order: Order, input_source: InputSource | None, how: _How, question: str
) -> int:
    handle = how.ordered(courier, Order(order.kind, {**order.fields, "dry_run": True}), input_source)
    status = _planned(courier, handle, how)
    try:
        goes_on = status == DONE and ask(question)
    except click.Abort:
        courier.batch.cancel(handle.batch_id)
        raise
    if not goes_on:
        courier.batch.cancel(handle.batch_id)
        console.print("Nothing was done.")
        return FAILED
    handle = courier.batch.apply(handle.batch_id, **_confirmed(how.options))
    if how.options["no_wait"]:
        return _left(handle, how)
    return _seen_through(courier, handle, how.options)


def _seen_through(
    courier: Courier, handle: Handle, options: Mapping[str, Any], *, passes: Sequence[Pass] = DONE_IN
) -> int:
    """Show a batch to its end; where its number of studies has to be confirmed, have that typed on a terminal."""
    how: dict[str, Any] = {"timeout_s": options["timeout_s"], "as_json": options["as_json"], "passes": passes}
    try:
        return seen_through(courier, handle, **how)
    except ConfirmationRequired as error:
        again = _with_typed_number(courier, error, options)
        return FAILED if again is None else seen_through(courier, again, **how)


def _with_typed_number(courier: Courier, error: ConfirmationRequired, options: Mapping[str, Any]) -> Handle | None:
    """The same command with the number of studies that was typed; None: another one was. The error, if none can be."""
    studies, limit = error.details.get("studies"), error.details.get("max_studies_per_order")
    if studies is None or options.get("yes") or not may_ask(as_json=options["as_json"]):
        raise error
    question = f"This deletes images of {studies} studies; deletions.max_studies_per_order is {limit}."
    if ask_to_type(f"{question} Type the number to go on") != str(studies):
        console.print("Nothing was deleted.")
        return None
    go_on = getattr(courier.batch, error.details["command"])
    again: Handle = go_on(error.details["batch_id"], confirm_studies=studies, **_history(options))
    return again


def _planned(courier: Courier, handle: Handle, how: _How) -> int:
    """Wait for the plan and show it."""
    followed(courier, handle, timeout_s=how.timeout_s, as_json=how.quiet)
    report = handle.report()
    if report.result is None or report.error is not None:
        if how.quiet:
            print_json(entry(handle, report))
        raise report.error or still_running(handle, how.timeout_s)
    header, lines = courier.batch.plan(handle.batch_id)
    path: Path | None = how.options["plan_path"]
    try:
        summary = summarize_plan(header, lines, path)
    except InvalidRequest as error:
        raise InvalidRequest(
            f"{error.message} The batch is planned: pacs batch plan {handle.batch_id} --plan FILE writes its plan."
        ) from error
    if how.quiet:
        print_json({**report.result, **plan_json(summary, path)})
        return DONE
    show_summary(summary, path)
    for warning in courier.batch.get(handle.batch_id).warnings:
        _say(f"warning: {warning}")
    if path is None and how.plans_only:
        console.print(f"pacs batch apply {handle.batch_id} does it.")
    return DONE if summary.to_do or how.plans_only else FAILED


def _left(handle: Handle, how: _How) -> int:
    ids = {"batch_id": handle.batch_id, "job_id": handle.id}
    _print_ids(ids, handle.batch_id, as_json=how.quiet)
    return DONE


def _print_ids(ids: Mapping[str, str], batch_id: str, *, as_json: bool) -> None:
    if as_json:
        print_json(ids)
    else:
        console.print(batch_id)


# --- going on with one that is there ----------------------------------------------------------------------------


def going_on(command: Command) -> Command:
    for option in (
        as_json_option,
        timeout_option,
        history,
        confirm_studies_option,
        click.option("--no-wait", is_flag=True, help="Print the batch's id and leave."),
    ):
        command = option(command)
    return command


dry_run_option = click.option("--dry-run", is_flag=True, help="Show what it would be about, and leave it.")


@batch.command()
@click.argument("plan", metavar="PLAN|ID")
@yes_option
@dry_run_option
@going_on
@plain_failures
def apply(plan: str, yes: bool, dry_run: bool, **options: Any) -> int:
    """Do what was planned, by a batch's ID or a plan file.

    A plan file is what --plan wrote; one that was edited or cut is refused.
    """
    with Session() as courier:
        if Path(plan).exists():
            return _file_applied(courier, Path(plan), yes=yes, dry_run=dry_run, options=options)
        found = courier.batch.get(plan)
        if dry_run:
            check_state(found, "apply")
            return print_plan(*courier.batch.plan(plan), None, as_json=options["as_json"])
        question = _question(found.kind, found.order, found.items)
        if not agreed(question, yes=yes, as_json=options["as_json"]):
            return FAILED
        return _gone_on(courier, courier.batch.apply(plan, **_confirmed(options)), options)


def _file_applied(courier: Courier, path: Path, *, yes: bool, dry_run: bool, options: dict[str, Any]) -> int:
    order, plan_file = of_plan_file(path, notify=warn)
    if dry_run:
        return print_plan(plan_file.header, iter(plan_file), None, as_json=options["as_json"])
    question = _question(order.kind, order.fields, plan_file.totals.counts["apply"])
    if question and not yes and is_asked_on_a_terminal():
        show_summary(PlanSummary.of(plan_file), None)
    if not agreed(question, yes=yes, as_json=options["as_json"]):
        return FAILED
    return _gone_on(courier, courier.batch.apply_file(order, plan_file, **_confirmed(options)), options)


@batch.command()
@batch_argument
@yes_option
@dry_run_option
@going_on
@plain_failures
def retry(batch_id: str, yes: bool, dry_run: bool, **options: Any) -> int:
    """Try again what failed of a batch, was found missing, or was left open.

    What deletes something asks first, as the order of it did.
    """
    with Session() as courier:
        found = courier.batch.get(batch_id)
        if dry_run:
            return print_reach(courier, found, "retry", as_json=options["as_json"])
        question = _question(found.kind, found.order, _to_retry(found))
        if not agreed(question, yes=yes, as_json=options["as_json"]):
            return FAILED
        return _gone_on(courier, courier.batch.retry(batch_id, **_confirmed(options)), options)


@batch.command()
@batch_argument
@yes_option
@going_on
@plain_failures
def verify(batch_id: str, yes: bool, **options: Any) -> int:
    """Look once more whether all that a batch did is so.

    A move deletes from its source what it then finds whole, so it asks first.
    """
    with Session() as courier:
        found = courier.batch.get(batch_id)
        moves = found.order.get("delete_source", False)
        question = _question(found.kind, found.order, of_how_many(found, "verify"), verb="Verify") if moves else None
        if not agreed(question, yes=yes, as_json=options["as_json"]):
            return FAILED
        return _gone_on(courier, courier.batch.verify(batch_id, **_confirmed(options)), options, passes=VERIFIED_IN)


@batch.command()
@batch_argument
@yes_option
@dry_run_option
@going_on
@plain_failures
def undo(batch_id: str, yes: bool, dry_run: bool, **options: Any) -> int:
    """Take back what a batch did, as far as that can be done."""
    with Session() as courier:
        found = courier.batch.get(batch_id)
        if dry_run:
            return print_reach(courier, found, "undo", as_json=options["as_json"])
        require_confirmation(yes=yes, as_json=options["as_json"])
        question = None if yes else undo_question(found, courier.batch.reach(found, "undo"))
        if not agreed(question, yes=yes, as_json=options["as_json"]):
            return FAILED
        return _gone_on(courier, courier.batch.undo(batch_id, **_confirmed(options)), options, passes=UNDONE_IN)


def _to_retry(found: Batch) -> int:
    applied = found.of("apply")
    return applied.totals.get("failed", 0) + found.items - applied.settled


def _question(kind: str, order: Mapping[str, Any], items: int, *, verb: str = "Move") -> str | None:
    """What has to be asked before it is done; None for what takes nothing away."""
    if kind == "delete":
        return f"Delete {items:,} items?"
    if order.get("delete_source"):
        return f"{verb} {items:,} items, and delete them from {order['from_server']} where they are proven to be moved?"
    return None


def _gone_on(courier: Courier, handle: Handle, options: dict[str, Any], *, passes: Sequence[Pass] = DONE_IN) -> int:
    if options["no_wait"]:
        return _left(handle, _How(options))
    return _seen_through(courier, handle, options, passes=passes)


# --- delete-all -------------------------------------------------------------------------------------------------


@click.command("delete-all")
@servers_option
@click.option("--confirm", metavar="SENTENCE", help=f'Has to be "{CONFIRMATION}". On a terminal you are asked for it.')
@hide_option
@backup_option
@click.option("--keep", is_flag=True, hidden=True, help="The old name of --hide.")
@click.option("--dry-run", is_flag=True, help="Count what would be deleted, and leave it.")
@confirm_studies_option
@click.option("--yes", is_flag=True, help="Do not ask; --confirm is needed all the same.")
@history
@click.option("--no-wait", is_flag=True, help="Print the batch's id and leave.")
@timeout_option
@as_json_option
@plain_failures
def delete_all(servers: Sequence[str], confirm: str | None, dry_run: bool, **how: Any) -> int:
    """Delete EVERY study on every server, or on those named, as a batch."""
    named, quiet = servers or None, how["as_json"]
    permanent = not hides(hide=how["hide"], keep=how["keep"])
    with Session() as courier:
        if confirm is None and not (dry_run or how["yes"]) and may_ask(as_json=quiet):
            confirm = _ask_for_sentence(courier, named, how["timeout_s"])
        if not dry_run and confirm != CONFIRMATION:
            raise ConfirmationRequired(f'Nothing was deleted: add --confirm "{CONFIRMATION}".')
        handle = courier.delete_all(
            confirm or "",
            servers=named,
            permanent=permanent,
            backup=place(how["backup"]),
            dry_run=dry_run,
            **_confirmed(how),
        )
        if how["no_wait"]:
            _print_ids({"batch_id": handle.id}, handle.id, as_json=quiet)
            return DONE
        try:
            return _all_deleted(courier, handle, timeout_s=how["timeout_s"], as_json=quiet)
        except ConfirmationRequired as error:
            again = _with_typed_number(courier, error, how)
            return FAILED if again is None else _seen_through(courier, again, how)


def _ask_for_sentence(courier: Courier, servers: Sequence[str] | None, timeout_s: float | None) -> str:
    """Show what would be deleted, then have the sentence typed."""
    _all_deleted(courier, courier.delete_all(servers=servers, dry_run=True), timeout_s=timeout_s, as_json=False)
    return ask_to_type(f'All these studies will be deleted. Type "{CONFIRMATION}" to go on')


def _all_deleted(courier: Courier, handle: Handle, *, timeout_s: float | None, as_json: bool) -> int:
    followed(courier, handle, timeout_s=timeout_s, as_json=as_json)
    payload = ended(courier, handle, timeout_s=0 if timeout_s is not None else None, as_json=as_json)
    if not as_json:
        console.print(servers_table(payload["servers"]))
        if payload["failures"]:
            console.print(failures_table(payload["failures"]))
        for warning in payload["warnings"]:
            _say(f"warning: {warning}")
        if payload["failures_total"] > len(payload["failures"]):
            console.print(f"All {payload['failures_total']} failures: pacs batch report {handle.id}")
    return FAILED if payload["failures_total"] else DONE
