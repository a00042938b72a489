"""``pacs dead``: what has to be looked at by a person, and what becomes of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from courier.ledger.jobs import DeadLetter, Event
from courier.messages import MAY_DELETE
from producer.cli.confirm import ask, may_ask, require_confirmation, yes_option
from producer.cli.door import DONE, FAILED, Command, as_json_option, plain_failures
from producer.client import Courier
from producer.dead_letters import DeadLetterClient, at, letter_json
from producer.terminal import Column, ListingTable, console, plain, print_json

#: So many are shown before it is asked.
SHOWN = 20
_AGO = re.compile(r"(\d{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class Moment(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """``2026-03-01``, ``2026-03-01T12:00`` (UTC unless it says otherwise), or how long ago: ``12h``, ``7d``."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            if ago := _AGO.fullmatch(value):
                return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
            moment = datetime.fromisoformat(value)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is neither a date, as 2026-03-01T12:00, nor how long ago, as 12h.", param, ctx)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Choice:
    """Which dead letters are meant: by id, or by why and when."""

    job_ids: Sequence[str]
    code: str | None
    since: datetime | None
    before: datetime | None
    all: bool

    def __post_init__(self) -> None:
        filters = bool(self.code or self.since or self.before)
        if bool(self.job_ids) + filters + self.all != 1:
            raise click.UsageError("Name dead letters by their ids, or by --code, --since and --before, or say --all.")

    def letters(self, client: DeadLetterClient) -> Iterator[DeadLetter]:
        """Those that there are; an id that is none raises `NotFound`."""
        if self.job_ids:
            return (client.get(job_id) for job_id in dict.fromkeys(self.job_ids))
        return client.list(code=self.code, since=self.since, before=self.before)


def filters(command: Command) -> Command:
    """The options that choose dead letters by why and when."""
    command = click.option("--before", type=Moment(), help="Only those that died before.")(command)
    command = click.option("--since", type=Moment(), help="Only those that died since: a date (UTC), or 12h, 7d.")(
        command
    )
    return click.option("--code", help="Only those of this code, e.g. pacs_unavailable.")(command)


def steering(command: Command) -> Command:
    """What replay and purge have in common."""
    for option in (
        as_json_option,
        yes_option,
        click.option("--dry-run", is_flag=True, help="Say which, and leave them."),
        click.option("--all", "everything", is_flag=True, help="All dead letters."),
    ):
        command = option(command)
    return click.argument("job_ids", metavar="[ID]…", nargs=-1)(filters(command))


@click.group()
def dead() -> None:
    """Dead letters: jobs that were tried as often as they may be, or that a person has to look at."""


@dead.command("list")
@filters
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="The latest so many.")
@as_json_option
@plain_failures
def list_(code: str | None, since: datetime | None, before: datetime | None, limit: int, as_json: bool) -> int:
    """What died, what it was about, why, and how often it was tried. The latest first."""
    with Courier() as courier:
        found = list(courier.dead.list(code=code, since=since, before=before, limit=limit))
    if as_json:
        _print({"operation": "dead_list", "letters": [letter_json(letter) for letter in found]})
    elif found:
        console.print(dead_table(found))
    else:
        chosen = code or since or before
        console.print("No dead letter matches." if chosen else "There are no dead letters.")
    return DONE


@dead.command()
@click.argument("job_id", metavar="ID")
@as_json_option
@plain_failures
def show(job_id: str, as_json: bool) -> int:
    """All that is known of one dead letter, with what was decided about it."""
    with Courier() as courier:
        letter, events = courier.dead.get(job_id), courier.dead.history(job_id)
    document = {
        "operation": "dead_show",
        **letter_json(letter),
        "error": letter.error,
        "begun": letter.begun,
        "uids": letter.uids,
        "trail": [{"at": at(event.at_ms), "event": event.event, "details": event.details} for event in events],
    }
    if as_json:
        _print(document)
    else:
        show_letter(document, events)
    return DONE


@dead.command()
@steering
@plain_failures
def replay(**order: Any) -> int:
    """Queue dead letters again, under their ids. Each ends like any job: pacs result ID."""
    return _steer(_choice(order), "replay", DeadLetterClient.replay, **order)


@dead.command()
@steering
@plain_failures
def purge(**order: Any) -> int:
    """Drop dead letters for good; they cannot be replayed. What was decided about their images stays known."""
    return _steer(_choice(order), "purge", DeadLetterClient.purge, **order)


def _choice(order: dict[str, Any]) -> Choice:
    return Choice(*(order.pop(name) for name in ("job_ids", "code", "since", "before", "everything")))


def _steer(
    choice: Choice,
    verb: str,
    act: Callable[[DeadLetterClient, str], bool],
    *,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Do it to each, after asking on a terminal. What somebody else has dealt with meanwhile is told as gone."""
    with Courier() as courier:
        job_ids, first, codes, deletes = _gathered(choice.letters(courier.dead))
        if job_ids and not dry_run and (deletes or verb == "purge"):
            require_confirmation(yes=yes, as_json=as_json)
        asks = may_ask(as_json=as_json) and bool(job_ids) and not (yes or dry_run)
        if asks or (dry_run and not as_json):
            _show(job_ids, first, codes)
        if asks and not ask(f"{verb.capitalize()} {len(job_ids)} dead letters?"):
            console.print("Nothing was done.")
            return FAILED
        done = [] if dry_run else [job_id for job_id in job_ids if act(courier.dead, job_id)]
    gone = [] if dry_run else sorted(set(job_ids) - set(done))
    if as_json:
        document = {"dry_run": dry_run, "chosen": len(job_ids), "codes": codes, "job_ids": job_ids, "gone": gone}
        _print({"operation": f"dead_{verb}", **document})
    elif not dry_run:
        console.print(f"{verb}: {len(done)} of {len(job_ids)} dead letters")
    return FAILED if gone else DONE


def _gathered(letters: Iterator[DeadLetter]) -> tuple[list[str], list[DeadLetter], dict[str, int], bool]:
    """All ids, the first few letters, how many there are of each code, and whether any may delete something."""
    job_ids: dict[str, None] = {}
    first: list[DeadLetter] = []
    codes: Counter[str] = Counter()
    deletes = False
    for letter in letters:
        if letter.job_id in job_ids:  # another has died meanwhile and moved it to the next page
            continue
        job_ids[letter.job_id] = None
        codes[letter.code] += 1
        deletes = deletes or letter.task in MAY_DELETE
        if len(first) < SHOWN:
            first.append(letter)
    return list(job_ids), first, dict(codes), deletes


def _show(job_ids: list[str], first: list[DeadLetter], codes: dict[str, int]) -> None:
    if first:
        console.print(dead_table(first))
    if len(job_ids) > len(first):
        console.print(f"and {len(job_ids) - len(first)} more", style="dim")
    counted = ", ".join(f"{count} {code}" for code, count in codes.items())
    console.print(f"{len(job_ids)} dead letters{': ' if counted else ''}{counted}")


def _print(document: dict[str, Any]) -> None:
    print_json(document)


def dead_table(letters: Iterable[DeadLetter]) -> ListingTable:
    table = ListingTable(
        "died (UTC)",
        Column("job", "id"),
        "task",
        Column("about", "id"),
        "server",
        "code",
        Column("why", "text"),
        Column("attempts", right=True),
        Column("deaths", right=True),
    )
    for letter in letters:
        table.add_row(
            at(letter.died_ms),
            letter.job_id,
            letter.task,
            _about(letter.about),
            letter.error.get("server_name") or "–",
            letter.code,
            letter.message,
            str(letter.attempts),
            str(letter.crash_count),
        )
    return table


def show_letter(document: Mapping[str, Any], events: Iterable[Event]) -> None:
    """All that is known of one, a fact per line, then what was decided about it."""
    # What else an error says stands in fields of its own.
    shown = {**document, "about": _about(document["about"]), "error": document["error"].get("details") or None}
    facts = {name: _in_words(value) for name, value in shown.items() if name not in ("operation", "trail")}
    width = max(map(len, facts))
    for name, fact in facts.items():
        if fact:
            console.print(plain(f"{name.replace('_', ' '):<{width}}  ", "bold") + plain(fact))
    table = ListingTable("when (UTC)", "decision", Column("what", "text"))
    for event in events:
        table.add_row(at(event.at_ms), event.event, _in_words(event.details))
    if table.row_count:
        console.print()
        console.print(table)


def _about(job: str) -> str:
    """What a job was to do, which the ledger has as the beginning of its JSON."""
    try:
        return _in_words(json.loads(job))
    except ValueError:  # a long one is cut
        return job


def _in_words(value: Any) -> str:
    """A value of JSON as people read it."""
    match value:
        case None | "":
            return ""
        case bool():
            return "yes" if value else "no"
        case Mapping():
            told = ((name.replace("_", " "), _in_words(one)) for name, one in value.items())
            return ", ".join(f"{name}: {words}" for name, words in told if words)
        case str():
            return value
        case Sequence():
            return ", ".join(filter(None, map(_in_words, value)))
        case _:
            return str(value)
