"""How dead letters are read on a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from producer.dead import at
from producer.terminal import Column, Listing, console, plain
from worker.ledger import DeadLetter, Note


def dead_table(letters: Iterable[DeadLetter]) -> Listing:
    table = Listing(
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
            str(letter.deaths),
        )
    return table


def show_letter(document: Mapping[str, Any], trail: Iterable[Note]) -> None:
    """All that is known of one, a fact per line, then what was decided about it."""
    # What else an error says stands in fields of its own.
    shown = {**document, "about": _about(document["about"]), "error": document["error"].get("details") or None}
    facts = {name: _in_words(value) for name, value in shown.items() if name not in ("operation", "trail")}
    width = max(map(len, facts))
    for name, fact in facts.items():
        if fact:
            console.print(plain(f"{name.replace('_', ' '):<{width}}  ", "bold") + plain(fact))
    table = Listing("when (UTC)", "decision", Column("what", "text"))
    for note in trail:
        table.add_row(at(note.at_ms), note.event, _in_words(note.details))
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
