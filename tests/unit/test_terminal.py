"""What goes to a terminal, a pipe or a file: nothing from outside controls it, and tables lose nothing."""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from producer.terminal import Column, ListingTable, Terminal, csv_rows, json_text, linked, plain

UID = "1.2.826.0.1.3680043.8.498.12406831542731051035295345080039845114"
JOB = "59cda953-15ca-4d1d-9407-4a81a2753caa"
WHY = "not there, as its server says in many words, more than a line has room for"
ODD = "\ud83d[/b]\x1b[31m\x9b\u202e:smile:"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(thing: object, columns: int | None) -> list[str]:
    """The lines that are sent, on a terminal of so many columns or into a pipe."""
    file = io.StringIO() if columns is None else Screen()
    Terminal(file=file, width=columns or 80, color_system=None, legacy_windows=False).print(thing)
    return file.getvalue().removesuffix("\n").split("\n")


def listing() -> ListingTable:
    table = ListingTable(
        "server", Column("study", "id"), Column("why", "text"), Column("job", "id"), Column("n", right=True)
    )
    table.add_row(
        "msdicom", UID, "not there, as its server says in many words, more than a line has room for", JOB, "7"
    )
    table.add_row("dcm4chee-archive-of-the-old-house", "", "there", JOB, "1,000")
    return table


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 100, 150, 200, None])
def test_no_width_costs_an_id_a_digit(columns: int | None) -> None:
    lines = drawn(listing(), columns)
    words = " ".join(lines).split()
    assert words.count(UID) == 1
    assert words.count(JOB) == 2
    assert words.count("dcm4chee-archive-of-the-old-house") == 1
    assert set(WHY.split()) <= set(words)


@pytest.mark.parametrize("columns", [66, 80, 100])
def test_ids_go_to_lines_of_their_own_before_anything_is_wider_than_the_screen(columns: int) -> None:
    lines = drawn(listing(), columns)
    assert lines[0].split() == ["server", "why", "n"]
    assert [line.strip() for line in lines if UID in line] == [f"study  {UID}"]
    assert [line.split() for line in lines if JOB in line] == [["job", JOB]] * 2
    assert max(map(len, lines)) <= max(columns, len(f"  study  {UID}"))
    assert not [line for line in lines if line.endswith(" ")]


def test_on_a_narrow_screen_each_cell_has_a_line() -> None:
    table = ListingTable("server", Column("job", "id"), Column("n", right=True))
    table.add_row("msdicom-of-the-house", JOB, "7")
    table.add_row("dcm4chee", "", "8")
    assert drawn(table, 20) == [
        "server  msdicom-of-the-house",
        f"job     {JOB}",
        "n       7",
        "",
        "server  dcm4chee",
        "n       8",
    ]


@pytest.mark.parametrize("columns", [40, None])
def test_wide_characters_stand_below_each_other(columns: int | None) -> None:
    table = ListingTable("patient", "n", rows=[("山田^太郎", "1"), ("Yamada", "2")])
    assert drawn(table, columns) == ["patient    n", "山田^太郎  1", "Yamada     2"]


@pytest.mark.parametrize("columns", [30, None])
def test_the_parts_of_a_list_stand_below_each_other_under_one_heading(columns: int | None) -> None:
    table = ListingTable(Column("server", least=8), "n", rows=[("a", "1")])
    first = drawn(table, columns)
    table.go_on()
    table.add_row("b", "2")
    assert [*first, *drawn(table, columns)] == ["server    n", "a         1", "b         2"]


@pytest.mark.parametrize("columns", [80, None])
def test_text_is_neither_markup_nor_control(columns: int | None) -> None:
    shown = "\\ud83d[/b]\\x1b[31m\\x9b\\u202e:smile:"
    assert drawn(ODD, columns) == [shown]
    assert drawn(plain(ODD), columns) == [shown]
    assert drawn(linked(ODD, "http://host/\x1b\\"), columns)[0].endswith(shown)
    assert shown in drawn(ListingTable(ODD, rows=[(ODD,)]), columns)[1]
    with Terminal(file=Screen(), width=80).busy(ODD) as progress:
        progress(ODD)


def test_a_sentence_keeps_its_line_breaks_and_a_cell_does_not() -> None:
    assert drawn("one\ntwo", 80) == ["one", "two"]
    assert drawn(ListingTable("a", rows=[("one\ntwo",)]), 80) == ["a", "one\\ntwo"]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_is_equal_and_can_be_written_anywhere(indent: int | None) -> None:
    document = {"name": ODD, "more": ["é", "山\u3000田", "a\nb\x7f", "\U000e0041"]}
    text = json_text(document, indent=indent)
    assert json.loads(text) == document
    assert not [sign for sign in text if sign != "\n" and not sign.isprintable() and sign != "\u3000"]
    assert "é" in text


def test_a_row_of_csv_is_a_line() -> None:
    out = io.StringIO()
    csv_rows(out, lineterminator="\n")(["a\r\nb", 7, None, ODD])
    assert out.getvalue() == "a\\r\\nb,7,,\\ud83d[/b]\\x1b[31m\\x9b\\u202e:smile:\n"


# --- nothing goes past it -----------------------------------------------------------------------------------------

#: Parts of rich that show no text of their own.
HARMLESS = {"rich.filesize", "rich.live", "rich.progress", "rich.progress_bar"}
#: What writes past `producer.terminal`, and `Table`, which cuts.
PAST = {"click.echo", "click.secho", "print", "sys.stdout.write", "sys.stderr.write"}


def _sources() -> Iterator[Path]:
    yield from (path for path in sorted(Path("producer").rglob("*.py")) if path.name != "terminal.py")


@pytest.mark.parametrize("path", list(_sources()), ids=str)
def test_all_output_goes_through_one_module(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    past = {module for module in modules if module.partition(".")[0] == "rich"} - HARMLESS
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)} & PAST
    if path.name == "batch_tables.py":
        past -= {"rich.console", "rich.table"}  # Group and a grid, for the bar alone
    if path.name == "top.py":
        past -= {"rich.console", "rich.text"}  # Group and empty lines between its tables
    assert not past | called
