"""What reaches a terminal, a pipe or a file: text from outside made safe, and tables that lose nothing.

URLs, ids, DICOM text, settings and answers of servers are text from outside. All output of the ``pacs`` command and of
`make run` goes through this module: a ``str`` that is printed on a `Terminal` is never read as markup, control
characters and halves of surrogate pairs come out as escapes, in tables, sentences, JSON and CSV alike.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, TextIO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from courier.redaction import printable

# --- safe text --------------------------------------------------------------------------------------------------


def plain(text: str, style: str = "") -> Text:
    """``text`` as one line that shows what it holds."""
    return Text(printable(text), style)


def linked(text: str, url: str) -> Text:
    """The same, and a terminal that knows links opens ``url`` with it."""
    return Text(printable(text), Style(link=printable(url)) if url else "")


def json_text(document: Any, *, indent: int | None = None) -> str:
    """``document`` as JSON that any output takes: escaped is what is not to reach a terminal, or cannot be encoded."""
    is_utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    text = json.dumps(document, ensure_ascii=not is_utf8, indent=indent)
    if text.isprintable():
        return text
    return "\n".join("".join(map(_json_sign, line)) for line in text.split("\n"))


def _json_sign(sign: str) -> str:
    return sign if sign.isprintable() or printable(sign) == sign else json.dumps(sign)[1:-1]


def csv_rows(out: TextIO, **dialect: Any) -> Callable[[Iterable[Any]], None]:
    """What writes a row of CSV to ``out``; a row is one line."""
    writer = csv.writer(out, **dialect)

    def write(cells: Iterable[Any]) -> None:
        with _writing():
            writer.writerow([printable(cell) if isinstance(cell, str) else cell for cell in cells])

    return write


class OutputLost(OSError):
    """Standard output does not take what is written to it, as on a full disk."""


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise  # the reader has left, which is no fault
    except OSError as error:
        raise OutputLost(error.errno, error.strerror) from error


# --- consoles ---------------------------------------------------------------------------------------------------


class Terminal(Console):
    """A console on which a ``str`` is text and nothing else, and on which no line is wrapped or cut by us.

    A terminal wraps a long line itself: then a double click selects a UID over the edge, and what is copied has no
    line break in it.
    """

    def __init__(self, **how: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **how)

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str("\n".join(map(printable, text.split("\n"))), **how)

    def print(self, *objects: Any, **how: Any) -> None:
        with _writing():
            super().print(*objects, **{"soft_wrap": True, **how})

    @property
    def columns(self) -> int | None:
        """How wide the screen is; None where there is none, as in a pipe, whatever colours are forced into it."""
        return self.width if self.file.isatty() else None

    @contextmanager
    def busy(self, said: str = "") -> Iterator[Callable[[str], None]]:
        """A spinner while something goes on, and what tells it how far that is."""
        with self.status(plain(said)) as status:
            yield lambda said: status.update(plain(said))


console = Terminal()
errors_console = Terminal(stderr=True)


def print_json(document: Any, *, indent: int | None = None) -> None:
    write_out(json_text(document, indent=indent) + "\n")


def write_out(text: str) -> None:
    """Write what `json_text` has made to standard output, if there is one."""
    if sys.stdout is not None:
        with _writing():
            sys.stdout.write(text)


# --- tables -----------------------------------------------------------------------------------------------------

Kind = Literal["word", "text", "id"]
_LEAST_TEXT = 16


@dataclass(frozen=True)
class Column:
    """A column of a `ListingTable`.

    ``text`` may be wrapped between words. An ``id`` gets a line of its own where the table would be too wide. Of a list
    that is written in parts, ``least`` keeps the column as wide in each of them.
    """

    heading: str
    kind: Kind = "word"
    right: bool = False
    least: int = 0


@dataclass(frozen=True)
class _Layout:
    """``widths`` of the columns that stand beside each other, by their place; none: a line per cell."""

    widths: dict[int, int]
    gap: int = 2


class ListingTable:
    """A table that never loses a digit.

    Where it does not fit the screen, long texts are wrapped between words; then ids go to lines of their own below
    their row; then each cell has a line of its own. In a pipe a row is a line, however long.
    """

    def __init__(self, *columns: Column | str, rows: Iterable[Sequence[str | Text]] = ()) -> None:
        self.columns = [Column(one) if isinstance(one, str) else one for one in columns]
        self._rows: list[tuple[list[Text], str]] = []
        self._least = [max(one.least, cell_len(one.heading)) for one in self.columns]
        self._shown: tuple[bool, ...] | None = None
        self._natural: list[int] = []
        for row in rows:
            self.add_row(*row)

    def add_row(self, *cells: str | Text, style: str = "") -> None:
        self._rows.append(([plain(cell) if isinstance(cell, str) else cell for cell in cells], style))

    @property
    def row_count(self) -> int:
        return len(self._rows)

    def go_on(self) -> None:
        """Begin the next part of the same list: without headings, unless it has to be laid out otherwise."""
        self._rows.clear()
        self._least = self._natural or self._least

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = console.columns if isinstance(console, Terminal) else options.max_width
        yield from self.lines(columns, console)

    def lines(self, width: int | None, console: Console) -> Iterator[Text]:
        layout = self._layout(width)
        form = tuple(place in layout.widths for place in range(len(self.columns)))
        if layout.widths and form != self._shown:
            headings = [Text(one.heading, "bold") for one in self.columns]
            yield from self._side_by_side(headings, "", layout, console)
        for number, (cells, style) in enumerate(self._rows):
            if not layout.widths and (number or self._shown is not None):
                yield Text()
            yield from self._side_by_side(cells, style, layout, console)
            yield from self._below(cells, style, layout, width, console)
        self._shown = form

    def _layout(self, width: int | None) -> _Layout:
        self._natural = [
            max([self._least[place], *(cells[place].cell_len for cells, _ in self._rows)])
            for place in range(len(self.columns))
        ]
        everything = list(range(len(self.columns)))
        if width is None:
            return _Layout(dict(enumerate(self._natural)))
        without_ids = [place for place in everything if self.columns[place].kind != "id"]
        for places in (everything, without_ids):
            for gap in (2, 1):
                natural = {place: self._natural[place] for place in places}
                if _total(natural, gap) <= width:
                    return _Layout(natural, gap)
            shrunk = self._shrunk(places, width)
            if shrunk is not None:
                return _Layout(shrunk)
        return _Layout({})

    def _shrunk(self, places: Sequence[int], width: int) -> dict[int, int] | None:
        """Widths with texts wrapped, none of whose words is broken; None: it does not fit even so."""
        least = {place: self._least_width(place) for place in places}
        spare = width - _total(least, 2)
        if spare < 0:
            return None
        wanted = {place: self._natural[place] - least[place] for place in places}
        whole = max(sum(wanted.values()), 1)
        return {place: least[place] + wanted[place] * spare // whole for place in places}

    def _least_width(self, place: int) -> int:
        if self.columns[place].kind != "text":
            return self._natural[place]
        longest = max((_longest_word(cells[place]) for cells, _ in self._rows), default=0)
        return min(self._natural[place], max(_LEAST_TEXT, longest))

    def _side_by_side(self, cells: Sequence[Text], style: str, layout: _Layout, console: Console) -> Iterator[Text]:
        wrapped = [_wrapped(cells[place], width, console) for place, width in layout.widths.items()]
        for parts in zip_longest(*wrapped, fillvalue=Text()):
            line = _line(style)
            for (place, width), part in zip(layout.widths.items(), parts, strict=True):
                blank = " " * (width - part.cell_len)
                line.append(" " * layout.gap if line else "")
                line.append_text(Text.assemble(blank, part) if self.columns[place].right else part + Text(blank))
            line.rstrip()
            yield line

    def _below(
        self, cells: Sequence[Text], style: str, layout: _Layout, width: int | None, console: Console
    ) -> Iterator[Text]:
        """The cells that have lines of their own, with their headings."""
        left = [place for place in range(len(self.columns)) if place not in layout.widths]
        label = max((cell_len(self.columns[place].heading) for place in left), default=0)
        indent = "  " if layout.widths else ""
        for place in left:
            if not cells[place]:
                continue
            room = max((width or 0) - len(indent) - label - 2, _LEAST_TEXT)
            is_text = self.columns[place].kind == "text"
            parts = _wrapped(cells[place], room, console) if is_text else [cells[place]]
            heading = self.columns[place].heading
            for number, part in enumerate(parts):
                line = _line(style)
                line.append(f"{indent}{'' if number else heading:<{label}}  ", style="dim")
                line.append_text(part)
                yield line


def _line(style: str) -> Text:
    return Text(style=style, no_wrap=True, overflow="ignore")


def _wrapped(cell: Text, width: int, console: Console) -> Sequence[Text]:
    """The lines of a cell, none of its words broken."""
    return list(cell.wrap(console, max(width, _longest_word(cell))))


def _longest_word(cell: Text) -> int:
    return max((cell_len(word) for word in cell.plain.split()), default=0)


def _total(widths: dict[int, int], gap: int) -> int:
    return sum(widths.values()) + gap * (len(widths) - 1)


# --- standard streams -------------------------------------------------------------------------------------------


def prepare_output() -> None:
    """Have what an output cannot encode (a Latin-1 terminal, ``LANG=C``) escaped instead of ending the command.

    What is written to a closed standard output (``>&-``) goes nowhere.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def flush_output() -> None:
    """
    Raises
    ------
    OutputLost, BrokenPipeError
        Not all that was written has arrived.
    """
    with _writing():
        if sys.stdout is not None:
            sys.stdout.flush()


def drop_output() -> None:
    """Let all further output go nowhere; else the interpreter complains of the lost one when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def is_asked_on_a_terminal() -> bool:
    """Whether standard input is a terminal; closed (``<&-``) it is none."""
    return sys.stdin is not None and sys.stdin.isatty()
