"""Reading a multipart/related answer (PS3.18 8.6.1.2, RFC 2387) as it arrives, part by part.

The splitting is python-multipart's; here stand the order of events and the check that the end was seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from courier.errors import CourierError
from worker.pacs.protocol import Retrieved

#: RFC 2046 5.1.1 allows 70; the parser refuses more than 256.
_MAX_BOUNDARY_BYTES = 256
_IS_LENGTH = re.compile(r"[0-9]{1,15}", re.ASCII).fullmatch


class _PartEnds(Enum):
    """One object for all of them, because a block may hold a part in every dozen of its bytes.

    ``EARLY`` and ``LATE``: it has fewer or more bytes than it has announced.
    """

    HERE = "here"
    EARLY = "early"
    LATE = "late"


@dataclass(frozen=True, slots=True)
class _PartBegins:
    transfer_syntax_uid: str | None


_Event = _PartBegins | _PartEnds | bytes


def read_parts(
    blocks: Iterable[bytes], content_type: str, *, error: Callable[[str], CourierError]
) -> Iterator[Retrieved]:
    """The parts of an answer with the header ``content_type``; what is left of one is skipped for the next.

    A single ``application/dicom`` body counts as one part. ``error`` makes the exception for an answer that
    is neither, that is malformed, that ends before its closing boundary, or of which a part has not the length that
    it announces: it was cut, or the boundary occurs in it.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind == b"application/dicom":
        syntax = options.get(b"transfer-syntax", b"").decode("latin-1")
        yield Retrieved(syntax or None, iter(blocks))
    elif kind == b"multipart/related" and boundary and len(boundary) <= _MAX_BOUNDARY_BYTES:
        events = _Reader(boundary).events(_from_first_delimiter(blocks, b"--" + boundary), error=error)
        for event in events:
            if isinstance(event, _PartBegins):
                yield Retrieved(event.transfer_syntax_uid, _content(events))
    else:
        raise error("It is neither multipart/related nor application/dicom.")


def _from_first_delimiter(blocks: Iterable[bytes], delimiter: bytes) -> Iterator[bytes]:
    """Without the preamble (RFC 2046 5.1.1): where the parser thinks that it ends depends on how the network cut it."""
    left, tail = iter(blocks), b"\n"
    for block in left:
        tail += block
        at = tail.find(b"\n" + delimiter)
        if at >= 0:
            yield tail[at + 1 :]
            yield from left
            return
        tail = tail[-len(delimiter) :]


def _content(events: Iterator[_Event]) -> Iterator[bytes]:
    for event in events:
        if not isinstance(event, bytes):
            return
        yield event


def _transfer_syntax(headers: dict[str, str]) -> str | None:
    _, options = parse_options_header(headers.get("content-type", ""))
    syntax = options.get(b"transfer-syntax", b"").decode("latin-1")
    return None if syntax in ("", "*") else syntax


class _Reader:
    """Turns the parser's callbacks into events; one block's events are held at a time."""

    def __init__(self, boundary: bytes) -> None:
        self._pending: list[_Event] = []
        self._headers: dict[str, str] = {}
        self._name = self._value = b""
        self._announced_bytes: int | None = None
        self._size_bytes = 0
        self._complete = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_header_field": self._on_field,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    def events(self, blocks: Iterable[bytes], *, error: Callable[[str], CourierError]) -> Iterator[_Event]:
        for block in blocks:
            try:
                self._parser.write(block)
            except FormParserError as broken:
                raise error("Its multipart framing is broken.") from broken
            pending, self._pending = self._pending, []
            for event in pending:
                if event is _PartEnds.EARLY or event is _PartEnds.LATE:
                    raise error(f"An image in it ends {event.value}: it is not as long as its Content-Length says.")
                yield event
        if not self._complete:
            raise error("It ends before its closing boundary.")

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._name.decode("latin-1").lower()] = self._value.decode("latin-1")
        self._name = self._value = b""

    def _on_headers_finished(self) -> None:
        self._pending.append(_PartBegins(_transfer_syntax(self._headers)))
        announced = self._headers.get("content-length", "").strip()
        self._announced_bytes = int(announced) if _IS_LENGTH(announced) else None
        self._size_bytes = 0
        self._headers = {}

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._size_bytes += end - start
        self._pending.append(data[start:end])

    def _on_part_end(self) -> None:
        missing = 0 if self._announced_bytes is None else self._announced_bytes - self._size_bytes
        self._pending.append(_PartEnds.EARLY if missing > 0 else _PartEnds.LATE if missing else _PartEnds.HERE)

    def _on_end(self) -> None:
        self._complete = True
