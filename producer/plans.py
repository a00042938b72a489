"""The plan of a batch as a file: for a person to read, to keep, and to have applied as it stands.

JSON Lines: a header that says what is to be done, a line per item, and a last line with the totals and a digest of all
lines before it. A plan that was edited, cut or put together from several is refused before anything is done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from courier.redaction import printable, redact_url
from producer.errors import InvalidRequest
from producer.inputs import InvalidRow, ParseItem

MANIFEST, VERSION = "pacs-courier/plan", 1
_VERSION_WITH_BACKUP = 2
MAX_LINE_BYTES = 65_536
_MADE = "make a new plan with --dry-run --plan FILE"


class PlanLine(BaseModel):
    """What is to be done with one item. ``server``: at which, if that is known; ``why``: why it is skipped."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    item: str = Field(min_length=1, max_length=8192)
    server: str | None = None
    size_bytes: int | None = Field(default=None, ge=0)
    do: Literal["apply", "skip"] = "apply"
    why: str = ""


class PlanHeader(BaseModel):
    """What the plan is for. ``order`` is what was asked for, in the words of `pacs.batch.KIND`'s message."""

    model_config = ConfigDict(frozen=True, extra="allow")  # what is more, `producer.orders` may refuse

    manifest: Literal["pacs-courier/plan"] = "pacs-courier/plan"
    version: int = VERSION
    kind: str = Field(min_length=1, max_length=40)
    name: str = ""
    batch_id: str = ""
    created: str = ""
    order: dict[str, Any] = {}


@dataclass
class Totals:
    """What a plan comes to."""

    items: int = 0
    bytes: int = 0
    counts: dict[str, int] = field(default_factory=lambda: {"apply": 0, "skip": 0})

    def add(self, line: PlanLine) -> None:
        self.items += 1
        self.counts[line.do] += 1
        if line.do == "apply":
            self.bytes += line.size_bytes or 0


def version_of(order: object) -> int:
    """The version of a plan. Version 0.1 refuses 2: it would overlook ``backup``, and delete without one."""
    return _VERSION_WITH_BACKUP if isinstance(order, Mapping) and "backup" in order else VERSION


def write(header: PlanHeader, lines: Iterable[PlanLine], out: TextIO) -> Totals:
    """Write a plan as its lines come."""
    digest, totals = hashlib.sha256(), Totals()

    def put(document: Mapping[str, Any]) -> None:
        # Half of a surrogate pair, which no file takes, becomes the escape that JSON has for it.
        line = f"{json.dumps(document, ensure_ascii=False)}\n".encode(errors="backslashreplace")
        digest.update(line)
        out.write(line.decode())

    put({**header.model_dump(), "created": header.created or datetime.now(UTC).isoformat(timespec="seconds")})
    for line in lines:
        put(line.model_dump())
        totals.add(line)
    put({"end": True, **vars(totals), "sha256": digest.hexdigest()})
    return totals


class PlanFile:
    """A plan that was found whole. Iterating reads its lines anew, one by one, and ends in an error if it has changed.

    Parameters
    ----------
    judged
        What an item of a plan of that kind has to be; `InvalidRequest` if there is no such kind.
    """

    def __init__(self, path: Path, parser_of: Callable[[str], ParseItem] = lambda _: _anything) -> None:
        """Read it to its end.

        Raises
        ------
        InvalidRequest
            It is no plan, or not the one that was written; the sentence names the line where that can be said.
        """
        self.path = path
        self.totals = Totals()
        with self._opened() as file:
            self.header = self._header(file)
            self._check(file, parser_of(self.header.kind))

    def __iter__(self) -> Iterator[PlanLine]:
        digest = hashlib.sha256()
        with self._opened() as file:
            for number, line in enumerate(_lines(file, self.path)):
                if number > self.totals.items:
                    break
                digest.update(line)
                if number:
                    yield PlanLine.model_construct(**_document(line))
        if digest.digest() != self._digest.digest():
            raise InvalidRequest(f"{self.path} has changed while it was read; nothing was begun.")

    def _opened(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise InvalidRequest(f"{self.path} cannot be read: {error.strerror}.") from None

    def _header(self, file: BinaryIO) -> PlanHeader:
        first = next(_lines(file, self.path), b"")
        document = _document(first)
        manifest = document.get("manifest")
        if manifest != MANIFEST:
            what = "a repair plan of pacs audit" if manifest == "pacs-courier/repair" else "something else"
            raise InvalidRequest(f"{self.path} is no plan of a batch but {what}; {_MADE}.")
        if document.get("version") not in (VERSION, version_of(document.get("order"))):
            raise InvalidRequest(f"{self.path} is a plan of version {document.get('version')!r}; {_MADE}.")
        try:
            header = PlanHeader.model_validate(document)
        except ValidationError as error:
            raise self._refusal(1, _first(error)) from None
        self._digest = hashlib.sha256(first)
        return header

    def _check(self, file: BinaryIO, parse_item: ParseItem) -> None:
        number = 1
        for number, line in enumerate(_lines(file, self.path, after=1), start=2):
            document = _document(line)
            if "end" in document:
                self._check_end(document, number, rest=file.readline(1))
                return
            try:
                read = PlanLine.model_validate(document)
                parse_item(read.item)
            except ValidationError as error:
                raise self._refusal(number, _first(error)) from None
            except InvalidRow as invalid:
                raise self._refusal(number, f"its item is {invalid}") from None
            self.totals.add(read)
            self._digest.update(line)
        raise InvalidRequest(
            f"{self.path} ends after line {number} without its totals: it was cut, or never finished; {_MADE}."
        )

    def _check_end(self, end: Mapping[str, Any], number: int, *, rest: bytes) -> None:
        if rest:
            raise self._refusal(number + 1, "there is more after the totals: several plans in one file, or one edited")
        if end.get("items") != self.totals.items:
            what = f"the totals speak of {end.get('items')} items and there are {self.totals.items}"
            raise self._refusal(number, f"{what}: lines were added or taken out")
        same = end.get("bytes") == self.totals.bytes and end.get("counts") == self.totals.counts
        if not same or end.get("sha256") != self._digest.hexdigest():
            raise InvalidRequest(
                f"{self.path} is not as it was written: a line was changed, and the digest in line {number} tells; "
                f"{_MADE}, or give the items that are meant as a file of their own."
            )

    def _refusal(self, number: int, why: str) -> InvalidRequest:
        return InvalidRequest(f"{self.path}, line {number}: {why}; {_MADE}.")


def _anything(text: str) -> str:
    return text


def _lines(file: BinaryIO, path: Path, *, after: int = 0) -> Iterator[bytes]:
    number = after
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES:
            raise InvalidRequest(f"{path}, line {number}: longer than any line of a plan; {_MADE}.")
        yield line


def _document(line: bytes) -> dict[str, Any]:
    """The object on a line; empty if there is none, which is then found out by what it lacks."""
    try:
        document: Any = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _first(error: ValidationError) -> str:
    """What is wrong, without quoting what is there."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = printable(".".join(redact_url(str(part)) for part in first["loc"]), limit=100)
    return f"{where}: {printable(first['msg'], limit=300)}" if where else "no line of a plan"
