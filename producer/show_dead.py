"""How dead letters are read on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from producer.dead import at
from producer.show import console
from worker.ledger import DeadLetter, Note


def dead_table(letters: Iterable[DeadLetter]) -> Table:
    table = _table("died (UTC)", "job", "task", "about", "server", "code", "why", "attempts", "deaths")
    for letter in letters:
        table.add_row(
            at(letter.died_ms),
            letter.job_id,
            letter.task,
            escape(letter.about),
            letter.error.get("server_name") or "–",
            escape(letter.code),
            escape(letter.message),
            str(letter.attempts),
            str(letter.deaths),
        )
    return table


def show_letter(document: Mapping[str, Any], trail: Iterable[Note]) -> None:
    """All that is known of one, a fact per line, then what was decided about it."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, value in document.items():
        if name not in ("operation", "trail"):
            facts.add_row(name.replace("_", " "), escape("" if value is None else str(value)))
    console.print(facts)
    table = _table("when (UTC)", "decision", "what")
    for note in trail:
        what = ", ".join(f"{name}: {value}" for name, value in note.details.items())
        table.add_row(at(note.at_ms), note.event, escape(what))
    if table.row_count:
        console.print(table)


def _table(*headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold", justify="right" if heading in ("attempts", "deaths") else "left")
    return table
