"""DICOM files as the sandbox reads them: the header, and DICOM JSON (PS3.18 F) made from the raw values.

No HTTP, no store, no vendor's rule. Values are turned into JSON here rather than by pydicom because a server has to
answer for files whose values are wrong, and because this is most of the cost of a store.
"""

from __future__ import annotations

import base64
import io
import math
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.tag import BaseTag

TEXT_VRS = frozenset(
    ("AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT")
)
BULK_VRS = frozenset(("OB", "OD", "OF", "OL", "OV", "OW", "UN"))
_CHARSET_VRS = frozenset(("LO", "LT", "PN", "SH", "ST", "UC", "UT"))
_SINGLE_VRS = frozenset(("LT", "ST", "UR", "UT"))
_DELIMITERS = {ord(character) for character in "\\^="}
_BINARY = {"FL": "f", "FD": "d", "SL": "i", "SS": "h", "SV": "q", "UL": "I", "US": "H", "UV": "Q"}
_PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
#: A value longer than this stays on disk until somebody asks for it.
_DEFER_BYTES = 1 << 20
#: Padding and signatures after the pixels are shorter than this.
_MAY_FOLLOW_BYTES = 1 << 16
UNDEFINED = 0xFFFFFFFF
DEFLATED = "1.2.840.10008.1.2.1.99"


class NotDicomFile(Exception):
    """The bytes are not a complete DICOM file (PS3.10)."""


Element = RawDataElement | DataElement


@dataclass(frozen=True)
class Header:
    """A file's attributes up to its pixels. ``pixels_at`` is where the pixel element's tag starts, None without one."""

    dataset: FileDataset
    elements: dict[int, Element]
    transfer_syntax_uid: str
    encodings: list[str]
    pixels_at: int | None

    @property
    def implicit_vr(self) -> bool:
        return bool(self.dataset.original_encoding[0])

    @property
    def big_endian(self) -> bool:
        return not self.dataset.original_encoding[1]

    def vr(self, tag: int) -> str | None:
        """The VR of an element as it stands in the file, or None if it is absent."""
        element = self.elements.get(tag)
        return None if element is None else _vr(element)

    def value(self, tag: int) -> bytes:
        """The bytes of an element; none if it is absent, empty or too long to be held."""
        element = self.elements.get(tag)
        return element.value or b"" if isinstance(element, RawDataElement) else b""

    def text(self, tag: int) -> str | None:
        """All values of a text element as written (backslashes kept, nothing stripped), or None if it is absent."""
        vr = self.vr(tag)
        return None if vr is None else _decoded(self.value(tag), vr, self.encodings)


def parse(file: BinaryIO, **options: Any) -> FileDataset:
    """What pydicom's reader makes of a file up to its pixels. Raises `NotDicomFile`."""
    try:
        return pydicom.dcmread(file, stop_before_pixels=True, **options)
    except Exception as error:  # pydicom raises whatever its parsing runs into
        raise NotDicomFile(f"{type(error).__name__}: {error}") from error


def read_header(source: Path | bytes) -> Header:
    """Read a file's header; pixels are not read, only that they are all there. Raises `NotDicomFile`."""
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        dataset = parse(file, defer_size=_DEFER_BYTES)
        position = file.tell()
        if not len(dataset):
            raise NotDicomFile("there is no dataset")
        syntax = str(dataset.file_meta.get("TransferSyntaxUID", ""))
        if not syntax:
            raise NotDicomFile("the transfer syntax is missing")
        pixels_at = None if syntax == DEFLATED else _pixels(file, position, dataset)
    held = _elements(dataset)
    return Header(dataset, held, syntax, _encodings(held), pixels_at)


def _elements(dataset: Dataset) -> dict[int, Element]:
    """The elements as pydicom holds them: nothing is converted, nothing that was deferred is read."""
    return {int(element.tag): element for element in dataset.values()}


def _vr(element: Element) -> str:
    return element.VR or _dictionary_vr(element.tag)


def _pixels(file: BinaryIO, position: int, dataset: FileDataset) -> int | None:
    """Where the pixel element starts; its length is checked against the file's."""
    file.seek(position)
    head = file.read(12)
    size_bytes = file.seek(0, io.SEEK_END)
    order = "<" if dataset.original_encoding[1] else ">"
    group, element = struct.unpack(f"{order}HH", head[:4]) if len(head) >= 8 else (0, 0)
    if group << 16 | element not in _PIXELS:
        _check_last(dataset, position, size_bytes)
        return None
    if dataset.original_encoding[0]:
        length, start = struct.unpack(f"{order}L", head[4:8])[0], position + 8
    elif len(head) == 12:
        length, start = struct.unpack(f"{order}L", head[8:12])[0], position + 12
    else:
        raise NotDicomFile("the file ends within its pixel data")
    if start + length > size_bytes if length != UNDEFINED else not _has_delimiter(file, start, order):
        raise NotDicomFile("the file ends within its pixel data")
    return position


def _has_delimiter(file: BinaryIO, start: int, order: str) -> bool:
    """Whether the fragments are closed, near the end of the file (little may follow them)."""
    file.seek(max(start, file.seek(0, io.SEEK_END) - _MAY_FOLLOW_BYTES))
    return struct.pack(f"{order}HHL", 0xFFFE, 0xE0DD, 0) in file.read()


def _check_last(dataset: FileDataset, position: int, size_bytes: int) -> None:
    """Without pixels the file has to end where its last element does."""
    if position > size_bytes:
        raise NotDicomFile("the file ends within an element")
    last = max(dataset.values(), key=lambda element: int(element.tag))
    if not isinstance(last, RawDataElement) or last.value is None or last.length == UNDEFINED:
        return
    after = size_bytes - last.value_tell - last.length
    if after < 0 or 0 < after < 8:
        raise NotDicomFile("the file ends within an element")


def _encodings(held: Mapping[int, Element]) -> list[str]:
    value = getattr(held.get(0x00080005), "value", None)
    if not value:
        return ["iso8859"]
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    try:
        names = [name.strip() for name in (text.split("\\") if isinstance(text, str) else text)]
        return list(convert_encodings(names))
    except (LookupError, ValueError):
        return ["iso8859"]


def _dictionary_vr(tag: BaseTag) -> str:
    try:
        return dictionary_VR(tag).split(" ")[0]
    except KeyError:
        return "LO" if tag.is_private_creator else "UN"


def _decoded(value: bytes, vr: str, encodings: list[str]) -> str:
    if vr not in _CHARSET_VRS or (value.isascii() and 0x1B not in value):
        return value.decode("latin-1")
    try:
        return decode_bytes(value, encodings, _DELIMITERS)
    except (LookupError, UnicodeError):
        return value.decode("latin-1")


# -- DICOM JSON -----------------------------------------------------------------------------------------------------

#: Where an element stands: its tag, or tag, item number, tag ... down to the last one.
AttributePath = tuple[int, ...]


@dataclass(frozen=True)
class JsonStyle:
    """How one server writes DICOM JSON.

    ``numbers``: IS, DS, SV and UV as JSON numbers where they parse, else as strings. ``bulk`` is asked for each element
    that is binary, or longer than ``bulk_above_bytes``: it returns a BulkDataURI for a path of tags and item numbers,
    or None to leave the element out; without ``bulk`` binary elements are inlined.
    """

    numbers: bool = True
    bulk: Callable[[AttributePath], str | None] | None = None
    bulk_above_bytes: int | None = None
    bulk_vrs: frozenset[str] = BULK_VRS


def elements(header: Header, tags: Collection[int], style: JsonStyle) -> dict[str, Any]:
    """DICOM JSON of the named top-level attributes that are in the file."""
    writer = _Writer(style)
    found: dict[str, Any] = {}
    for tag in tags:
        element = header.elements.get(tag)
        made = None if element is None else writer.element(header.dataset, element, header.encodings, (tag,))
        if made is not None:
            found[f"{tag:08X}"] = made
    return found


def whole(header: Header, style: JsonStyle, leave_out: Collection[AttributePath] = ()) -> dict[str, Any]:
    """DICOM JSON of everything but group 2 and ``leave_out``; pixels are not in a `Header`."""
    return _Writer(style, leave_out).dataset(header.dataset, header.encodings, ())


@dataclass(frozen=True)
class _Writer:
    style: JsonStyle
    leave_out: Collection[AttributePath] = ()

    def dataset(self, dataset: Dataset, encodings: list[str], path: AttributePath) -> dict[str, Any]:
        held = _elements(dataset)
        own = _encodings(held) if 0x00080005 in held else encodings
        found: dict[str, Any] = {}
        for tag in sorted(held):
            here = (*path, tag)
            if here in self.leave_out or not tag & 0xFFFF or tag >> 16 == 2:
                continue
            made = self.element(dataset, held[tag], own, here)
            if made is not None:
                found[f"{tag:08X}"] = made
        return found

    def element(
        self, dataset: Dataset, element: Element, encodings: list[str], path: AttributePath
    ) -> dict[str, Any] | None:
        vr = _vr(element)
        if vr == "SQ":
            items = [
                self.dataset(item, encodings, (*path, number))
                for number, item in enumerate(dataset[element.tag].value or ())
            ]
            return {"vr": "SQ", "Value": items} if items else {"vr": "SQ"}
        length = element.length if isinstance(element, RawDataElement) else len(str(element.value))
        if self._is_bulk(vr, length):
            uri = self.style.bulk(path) if self.style.bulk is not None and length else None
            return {"vr": vr, "BulkDataURI": uri} if uri else None
        if isinstance(element, RawDataElement) and (element.value is not None or not length):
            order = "<" if element.is_little_endian else ">"
            return _with_value(vr, element.value or b"", encodings, self.style, order)
        return dict(dataset[element.tag].to_json_dict(None, 0))

    def _is_bulk(self, vr: str, length: int) -> bool:
        if self.style.bulk is None:
            return False
        above = self.style.bulk_above_bytes
        return vr in self.style.bulk_vrs or (above is not None and length > above)


def _with_value(vr: str, value: bytes, encodings: list[str], style: JsonStyle, order: str) -> dict[str, Any]:
    if vr in TEXT_VRS:
        values = _texts(vr, _decoded(value, vr, encodings), style)
    elif vr in _BINARY:
        width = struct.calcsize(_BINARY[vr])
        usable = len(value) // width * width
        values = [_number(n) for n in struct.unpack(f"{order}{usable // width}{_BINARY[vr]}", value[:usable])]
    elif vr == "AT":
        halves = struct.unpack(f"{order}{len(value) // 4 * 2}H", value[: len(value) // 4 * 4])
        values = [f"{g:04X}{e:04X}" for g, e in zip(halves[::2], halves[1::2], strict=True)]
    elif value:
        return {"vr": vr, "InlineBinary": base64.b64encode(value).decode()}
    else:
        values = []
    return {"vr": vr, "Value": values} if values else {"vr": vr}


def _texts(vr: str, text: str, style: JsonStyle) -> list[Any]:
    text = text.rstrip(" ") if vr != "UI" else text.removesuffix("\0")
    if not text:
        return []
    parts = [text] if vr in _SINGLE_VRS else text.split("\\")
    return [_text(vr, part.strip(" ") if vr not in _SINGLE_VRS and vr != "UI" else part, style) for part in parts]


def _text(vr: str, text: str, style: JsonStyle) -> Any:
    if not text:
        return None
    if vr == "PN":
        groups = zip(("Alphabetic", "Ideographic", "Phonetic"), text.split("="), strict=False)
        return {name: group for name, group in groups if group}
    if style.numbers and vr in ("IS", "DS"):
        try:
            return int(text) if vr == "IS" else _number(float(text))
        except ValueError:
            return text
    return text


def _number(value: float) -> Any:
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
    return value


def walk(header: Header) -> Iterator[tuple[AttributePath, str, bytes, str]]:
    """(path, VR, raw value, text) of every element but bulk and group 2, those in sequences included.

    Elements of which pydicom keeps no raw bytes (deferred, because they are long) are passed over; text is empty for
    elements that are not text.
    """
    yield from _walk(header.dataset, header.encodings, ())


def _walk(
    dataset: Dataset, encodings: list[str], above: AttributePath
) -> Iterator[tuple[AttributePath, str, bytes, str]]:
    held = _elements(dataset)
    own = _encodings(held) if above and 0x00080005 in held else encodings
    for tag, element in held.items():
        vr = _vr(element)
        path = (*above, tag)
        if vr == "SQ":
            for number, item in enumerate(dataset[tag].value or ()):
                yield from _walk(item, own, (*path, number))
        elif isinstance(element, RawDataElement) and element.value and vr not in BULK_VRS and tag & 0xFFFF:
            yield path, vr, element.value, _decoded(element.value, vr, own) if vr in TEXT_VRS else ""
