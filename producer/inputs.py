"""What a batch is to be about, as people have it: a file of URLs or UIDs, standard input, a few words of a command.

Rows are read one by one, judged, and put aside in temporary files that vanish by themselves; memory stays flat however
many there are. Nothing of a row's text is ever quoted: a wrong column may hold patients.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, BinaryIO, Self

from courier.messages import check_uid
from courier.redaction import printable, redact_url
from courier.urls import ENCODED, NOT_IN_URL, bare
from producer.errors import InvalidRequest, InvalidUid

#: A longer line is no row of anything.
MAX_LINE_BYTES = 65_536
#: So many bad rows are kept for the report; the others are counted.
BAD_SHOWN = 20
_DELIMITERS = (",", ";", "\t", "|")
_LISTED_SCHEMES = ("s3", "az", "file", f"s3{ENCODED}", f"az{ENCODED}")
_SCHEMES = ("http", "https", *_LISTED_SCHEMES)
_URL = re.compile(rf"(?i:(?P<zip>zip\+)?(?P<scheme>{'|'.join(map(re.escape, _SCHEMES))})):")
_MAX_URL = 8192
#: The first line that Excel reads, and writes, to say what separates columns.
_SEPARATOR = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
_MAY_BE_ITEM = re.compile(rf"[\s\"]*(?:{_URL.pattern}|\d+(?:\.\d+){{2,}}[\s\"]*$)").match

#: The item of a row's text; `InvalidRow` says why there is none.
ParseItem = Callable[[str], str]


class InvalidRow(ValueError):
    """A row that is no item, in half a sentence."""


@dataclass(frozen=True)
class InputRow:
    """Where a row stands, and its text."""

    place: str
    text: str


@dataclass(frozen=True)
class BadRow:
    place: str
    why: str


def study_uid(text: str) -> str:
    """The study UID that ``text`` is."""
    try:
        return check_uid(text)
    except InvalidUid:
        raise InvalidRow("no UID: at most 64 digits and dots") from None


def image_url(text: str) -> str:
    """The URL of one image that ``text`` is, as far as that can be seen."""
    match = _URL.match(text)
    if match is None:
        raise InvalidRow(f"no URL: it has to begin with {', '.join(f'{scheme}:' for scheme in _SCHEMES)}")
    if len(text) > _MAX_URL:
        raise InvalidRow(f"longer than {_MAX_URL} characters")
    if NOT_IN_URL.search(text):
        raise InvalidRow("no URL: it has control characters in it")
    if match["zip"]:
        if "!/" not in text:
            raise InvalidRow("a whole archive; name it in the command itself, and its entries are found")
    elif is_source(text):
        raise InvalidRow("a prefix, a folder or an archive; name it in the command itself, and what it holds is found")
    return text


def is_source(text: str) -> bool:
    """Whether ``text`` names many images that a worker has to list: a prefix, a folder or an archive."""
    match = _URL.match(text)
    if match is None:
        return False
    if match["zip"]:
        return "!/" not in text
    lists = match["scheme"].lower() in _LISTED_SCHEMES
    return (lists and text.endswith("/")) or bare(text).lower().endswith(".zip")


# --- rows -------------------------------------------------------------------------------------------------------


def rows_of_file(name: str, *, column: str | None = None) -> Iterator[InputRow | BadRow]:
    """The rows of a file, or of standard input where ``name`` is ``-``.

    Without ``column`` a row is a line; empty ones and those that begin with # are left out. With it the file is CSV
    with a line of headings (separated by comma, semicolon, tab, bar, or what a first line such as ``sep=;`` names), or
    JSON Lines, whose field is meant.

    Raises
    ------
    InvalidRequest
        It cannot be read, or has no such column.
    """
    shown = shown_name(name)
    with _opened(name) as file:
        if column is None and name.lower().endswith((".csv", ".tsv", ".jsonl", ".ndjson")):
            raise InvalidRequest(f"{shown} has columns; say which one is meant with --column NAME.")
        yield from rows_of_stream(file, shown, column=column)


def rows_of_stream(file: BinaryIO, shown: str, *, column: str | None) -> Iterator[InputRow | BadRow]:
    """The same of a file that is open and called ``shown``."""
    lines = _Lines(file, shown)
    first = lines.peek()
    if column is None:
        yield from _plain(lines)
    elif first.lstrip()[:1] == "{":
        yield from _json_lines(lines, column)
    elif separator := _SEPARATOR.fullmatch(first):
        lines.drop()
        yield from _csv(lines, column, lines.peek(), separator[1])
    else:
        yield from _csv(lines, column, first)


def shown_name(name: str) -> str:
    return "standard input" if name == "-" else Path(name).name


def check_standard_input() -> None:
    """Refuse to read from it if it is closed, as by ``<&-``."""
    if sys.stdin is None:
        raise InvalidRequest("Standard input is closed, so there is nothing to read from it.")


@contextmanager
def _opened(name: str) -> Iterator[BinaryIO]:
    if name == "-":
        check_standard_input()
        yield sys.stdin.buffer
        return
    try:
        file = open(name, "rb")  # noqa: SIM115 - closed below; errors of reading are not those of opening
    except OSError as error:
        raise InvalidRequest(f"{name} cannot be read: {error.strerror}.") from None
    with file:
        try:
            yield file
        except OSError as error:
            raise InvalidRequest(f"{name} cannot be read to its end: {error.strerror}.") from None


class _Lines:
    """A file's lines as text, none of them longer than memory; ``number`` is the last one's.

    ``taken`` are those since it was set to an empty list. A line ends at LF, at CR LF or at CR alone. UTF-16, which
    Excel writes as "Unicode text", and PowerShell, is read as well as UTF-8.
    """

    def __init__(self, file: BinaryIO, shown: str) -> None:
        self._read = _texts(file)
        self._ahead: list[str] = []
        self.shown = shown
        self.number = 0
        self.taken: list[str] | None = None

    @property
    def place(self) -> str:
        return f"line {self.number}"

    def peek(self) -> str:
        """The first line that is not empty, which will come again."""
        for line in self._read:
            self._ahead.append(line)
            if line.strip():
                return line
        return ""

    def drop(self) -> None:
        """Leave out what `peek` has seen."""
        self.number += len(self._ahead)
        self._ahead.clear()

    def __iter__(self) -> Iterator[str]:
        while line := self._ahead.pop(0) if self._ahead else next(self._read, ""):
            self.number += 1
            if self.taken is not None:
                self.taken.append(line)
            yield line


def _texts(file: BinaryIO) -> Iterator[str]:
    """The lines of ``file`` with an LF at the end; `_TOO_LONG` stands for one that is longer than a line may be."""
    head = b""
    while len(head) < _HEAD_BYTES and (more := file.read(_HEAD_BYTES - len(head))):
        head += more
    decoder = _decoder(head)
    pending, is_too_long, data = "", False, head
    while data:
        *lines, pending = (pending + decoder.decode(data)).split("\n")
        for line in lines:
            yield _TOO_LONG if is_too_long or len(line) >= MAX_LINE_BYTES else f"{line.removeprefix(_BOM)}\n"
            is_too_long = False
        is_too_long = is_too_long or len(pending) >= MAX_LINE_BYTES
        pending = "" if is_too_long else pending
        data = _some(file)
    last = pending + _end(decoder)
    if is_too_long or last:
        yield _TOO_LONG if is_too_long else last.removeprefix(_BOM)


def _end(decoder: io.IncrementalNewlineDecoder) -> str:
    """What is left; half a character is told as `_fault` knows it."""
    try:
        return decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return _HALF


def _some(file: BinaryIO) -> bytes:
    """What there is: from a pipe, as it comes."""
    data: bytes = file.read1(_BLOCK_BYTES) if hasattr(file, "read1") else file.read(_BLOCK_BYTES)
    return data


def _decoder(head: bytes) -> io.IncrementalNewlineDecoder:
    """For a file that begins so. Of UTF-16 without its mark every second byte of a URL, or of a number, is zero."""
    encoding = "utf-8"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif _are_mostly_zero(head[::2]):
        encoding = "utf-16-be"
    elif _are_mostly_zero(head[1::2]):
        encoding = "utf-16-le"
    errors = "surrogateescape" if encoding == "utf-8" else "surrogatepass"
    return io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(errors), translate=True)


def _are_mostly_zero(data: bytes) -> bool:
    return data.count(0) * 2 > len(data)


#: Small, for each empty line of a block is an object.
_BLOCK_BYTES = 4096
_HEAD_BYTES = 64
_BOM = "\ufeff"
_HALF = "\ud800"
#: As ``surrogateescape`` has a byte that is not UTF-8; and what is left of a pair of UTF-16.
_HAS_BYTE = re.compile("[\udc80-\udcff]").search
_HAS_HALF = re.compile("[\ud800-\udc7f\udd00-\udfff]").search
#: Stands for a line that was too long. It begins with what no text has.
_TOO_LONG = "\ufffe too long\n"


def _fault(line: str) -> str:
    """What is wrong with a line, whatever it was to say."""
    if line.isascii():
        return ""
    if line.startswith(_TOO_LONG[0]):
        return f"longer than {MAX_LINE_BYTES} bytes"
    if _HAS_HALF(line):
        return "half a character"
    return "not UTF-8" if _HAS_BYTE(line) else ""


def _plain(lines: _Lines) -> Iterator[InputRow | BadRow]:
    for line in lines:
        fault = _fault(line)
        text = line.strip()
        if fault:
            yield BadRow(lines.place, fault)
        elif text and not text.startswith("#"):
            yield InputRow(lines.place, text)


def _json_lines(lines: _Lines, column: str) -> Iterator[InputRow | BadRow]:
    for line in lines:
        if not line.strip():
            continue
        try:
            document: Any = None if _fault(line) else json.loads(line)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            yield BadRow(lines.place, _fault(line) or "no JSON object")
        elif not isinstance(document.get(column), str):
            yield BadRow(lines.place, f"without a text called {column}")
        elif fault := _fault(document[column]):
            yield BadRow(lines.place, fault)
        else:
            yield InputRow(lines.place, document[column].strip())


def _csv(lines: _Lines, column: str, heading: str, separator: str = "") -> Iterator[InputRow | BadRow]:
    """``separator``: what separates columns, if the file has said so."""
    delimiters = separator or _DELIMITERS
    delimiter = next((one for one in delimiters if column in _cells(heading, one)), None)
    if delimiter is None:
        count = max(len(_cells(heading, one)) for one in delimiters)
        raise InvalidRequest(
            f"{lines.shown} has no column called {column}: its first line has to name the columns, "
            f"and has {counted(count, 'other', 'others') if heading.strip() else 'none'}."
        )
    at = _cells(heading, delimiter).index(column)
    reader = csv.reader(lines, delimiter=delimiter)
    begun = False
    while True:
        place, before = f"line {lines.number + 1}", lines.number
        taken: list[str] = []
        lines.taken = taken
        try:
            cells = next(reader, None)
        except csv.Error:
            _check_whole(lines, before, whole=False)
            yield BadRow(place, "not CSV")
            continue
        if cells is None:
            return
        _check_whole(lines, before, whole=_is_one_row(taken, cells, at, delimiter))
        if not begun:
            begun = bool(cells)
        elif any(cells):
            fault = _fault(cells[0]) if len(cells) == 1 else ""
            yield _cell(cells, at, column, place) if not fault else BadRow(place, fault)


def _is_one_row(lines: Sequence[str], cells: Sequence[str], at: int, delimiter: str) -> bool:
    """Whether no further row is within the cells of one: a quote that nobody closes takes in all up to the next one.

    An item is one line. What another column says in several lines is no row if nothing in it separates columns, or if
    its quotes are closed as they have to be and no part of it could be an item.
    """
    long = [(place, cell) for place, cell in enumerate(cells) if "\n" in cell.strip()]
    if any(place == at for place, _ in long):
        return False
    columns = [part for _, cell in long if delimiter in cell for part in re.split(rf"[\n{re.escape(delimiter)}]", cell)]
    return not columns or (_are_quotes_closed(lines, delimiter) and not any(map(_MAY_BE_ITEM, columns)))


def _are_quotes_closed(lines: Sequence[str], delimiter: str) -> bool:
    try:
        return len(list(csv.reader(lines, delimiter=delimiter, strict=True))) == 1
    except csv.Error:
        return False


def _check_whole(lines: _Lines, before: int, *, whole: bool) -> None:
    """Refuse a file whose rows have run into one another: not even who leaves bad rows out wants to lose good ones.

    ``before`` is the last line before those that were read as one row.
    """
    swallowed = lines.number - before - 1
    if swallowed and not whole:
        raise InvalidRequest(
            f"{lines.shown}, line {before + 1}: a quote is opened there and not closed, which takes in "
            f"{counted(swallowed, 'further line', 'further lines')}, up to line {lines.number}. Nothing was begun: "
            "close the quote, or take it out; an item is one line, and so is whatever has a separator in it."
        )


def _cell(cells: list[str], at: int, column: str, place: str) -> InputRow | BadRow:
    if at >= len(cells) or not cells[at].strip():
        return BadRow(place, f"without a text in the column {column}")
    fault = _fault(cells[at])
    return BadRow(place, fault) if fault else InputRow(place, cells[at].strip())


def _cells(heading: str, delimiter: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([heading], delimiter=delimiter), [])]
    except csv.Error:
        return []


def rows_of_words(
    words: Iterable[str | Path], parse_item: ParseItem, *, column: str | None = None
) -> Iterator[InputRow | BadRow]:
    """The rows of what a command was given: items themselves, files, and ``-`` for standard input, in any order.

    Raises
    ------
    InvalidRequest
        A word is neither an item nor a file that is there.
    """
    named = list(words)
    for number, word in enumerate(named, start=1):
        if isinstance(word, str) and word != "-" and _fits(word, parse_item):
            yield InputRow(f"argument {number}", word)
            continue
        if word != "-" and not Path(word).exists():
            raise InvalidRequest(
                f"{printable(redact_url(str(word)), limit=200)} is no file, and {_said_of(word, parse_item)}."
            )
        if Path(word).is_dir():
            raise InvalidRequest(f"{word} is a folder; one whose images workers can reach is written file:///folder/.")
        for row in rows_of_file(str(word), column=column):
            shown = row.place if len(named) == 1 else f"{shown_name(str(word))}, {row.place}"
            yield replace(row, place=shown)


def _fits(text: str, parse_item: ParseItem) -> bool:
    return not _said_of(text, parse_item)


def _said_of(text: str | Path, parse_item: ParseItem) -> str:
    try:
        parse_item(str(text))
    except InvalidRow as invalid:
        return str(invalid)
    return ""


# --- items ------------------------------------------------------------------------------------------------------


@dataclass
class Items:
    """The items of rows, in their order, in a file of their own; iterating reads them again.

    ``bad`` are the first bad rows, ``bad_total`` counts them. An item that comes twice is in here twice: each is
    planned once, and the planner counts the others.
    """

    count: int = 0
    bad_total: int = 0
    bad: list[BadRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._texts: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n")  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._texts.close()

    def __iter__(self) -> Iterator[str]:
        self._texts.seek(0)
        for line in self._texts:
            yield line[:-1]

    def add(self, rows: Iterable[InputRow | BadRow], parse_item: ParseItem) -> None:
        """Take rows in; what is bad is counted and does not stop it."""
        for row in rows:
            if isinstance(row, BadRow):
                self._refuse(row)
                continue
            try:
                self._texts.write(f"{parse_item(row.text)}\n")
                self.count += 1
            except InvalidRow as invalid:
                self._refuse(BadRow(row.place, str(invalid)))
        self._texts.flush()

    def check(self, *, skip_bad: bool) -> None:
        """Refuse to go on with bad rows, unless they may be skipped, and with no item at all.

        Raises
        ------
        InvalidRequest
            The sentence names the first bad rows; ``details`` have them too.
        """
        if self.bad_total and not skip_bad:
            told = f"{self.describe_bad()}\nNothing was begun: correct them, or leave them out with --skip-bad."
            bad = [vars(one) for one in self.bad]
            raise InvalidRequest(told, details={"bad_rows": bad, "bad_total": self.bad_total})
        if not self.count:
            left = f"; {self.bad_total} bad rows were left out" if self.bad_total else ""
            raise InvalidRequest(f"There is nothing to do: no item was given{left}.")

    def describe_bad(self) -> str:
        """The bad rows as people are told of them: the first with their places, then how many more."""
        lines = "".join(f"\n  {one.place}: {one.why}" for one in self.bad)
        more = self.bad_total - len(self.bad)
        rest = f"\n  and {more} more" if more else ""
        return f"{counted(self.bad_total, 'row is', 'rows are')} bad:{lines}{rest}"

    def _refuse(self, row: BadRow) -> None:
        self.bad_total += 1
        if len(self.bad) < BAD_SHOWN:
            self.bad.append(row)


def counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"
