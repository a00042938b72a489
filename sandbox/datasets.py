"""DICOM files as the sandbox reads them: the header, and DICOM JSON (PS3.18 F) made from the raw values.

No HTTP, no store, no vendor's rule. Values are turned into JSON here rather than by pydicom because a server has to
answer for files whose values are wrong, and because this is most of the cost of a store.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.tag import BaseTag

TEXT_VRS = frozenset(
    ("AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT")
)
BULK_VRS = frozenset(("OB", "OD", "OF", "OL", "OV", "OW", "UN"))
_CHARSET_VRS = frozenset(("LO", "LT", "PN", "SH", "ST", "UC", "UT"))
_SINGLE_VRS = frozenset(("LT", "ST", "UR", "UT"))
_BINARY = {"FL": "f", "FD": "d", "SL": "i", "SS": "h", "SV": "q", "UL": "I", "US": "H", "UV": "Q"}
_PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
#: A value longer than this stays on disk until somebody asks for it.
_DEFER_BYTES = 1 << 20
DEFLATED = "1.2.840.10008.1.2.1.99"


class NotDicom(Exception):
    """The bytes are not a complete DICOM file (PS3.10)."""


@dataclass(frozen=True)
class Header:
    """A file's attributes up to its pixels. ``pixels_at`` is where the pixel element's tag starts, None without one."""

    dataset: FileDataset
    transfer_syntax_uid: str
    encodings: list[str]
    pixels_at: int | None

    @property
    def implicit_vr(self) -> bool:
        return bool(self.dataset.original_encoding[0])

    @property
    def big_endian(self) -> bool:
        return not self.dataset.original_encoding[1]

    def raw(self, tag: int) -> RawDataElement | None:
        """The element as it stands in the file, or None."""
        element = self.dataset.get_item(tag)
        return element if isinstance(element, RawDataElement) else None

    def vr(self, element: RawDataElement) -> str:
        return element.VR or _dictionary_vr(element.tag)

    def text(self, tag: int) -> str | None:
        """All values of a text element as written (backslashes kept, nothing stripped), or None if it is absent."""
        element = self.raw(tag)
        return None if element is None else _decoded(element.value or b"", self.vr(element), self.encodings)


def read_header(path: Path) -> Header:
    """Read the file's header; pixels are not read, only that they are all there. Raises `NotDicom`."""
    try:
        with path.open("rb") as file:
            dataset = pydicom.dcmread(file, stop_before_pixels=True, defer_size=_DEFER_BYTES)
            position = file.tell()
    except Exception as error:  # pydicom raises whatever its parsing runs into
        raise NotDicom(f"{type(error).__name__}: {error}") from error
    if not len(dataset):
        raise NotDicom("there is no dataset")
    syntax = str(dataset.file_meta.get("TransferSyntaxUID", ""))
    if not syntax:
        raise NotDicom("the transfer syntax is missing")
    pixels_at = None if syntax == DEFLATED else _pixels(path, position, dataset)
    return Header(dataset, syntax, _encodings(dataset), pixels_at)


def _pixels(path: Path, position: int, dataset: FileDataset) -> int | None:
    """Where the pixel element starts; its length is checked against the file's."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        file.seek(position)
        head = file.read(12)
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
        raise NotDicom("the file ends within its pixel data")
    if length != 0xFFFFFFFF and start + length > size_bytes:
        raise NotDicom("the file ends within its pixel data")
    return position


def _check_last(dataset: FileDataset, position: int, size_bytes: int) -> None:
    """Without pixels the file has to end where its last element does."""
    if position > size_bytes:
        raise NotDicom("the file ends within an element")
    last = dataset.get_item(max(dataset.keys()))
    if isinstance(last, RawDataElement) and last.value is not None and last.length != 0xFFFFFFFF:
        if len(last.value) < last.length:
            raise NotDicom("the file ends within an element")


def _encodings(dataset: Dataset) -> list[str]:
    element = dataset.get_item(0x00080005)
    value = getattr(element, "value", None)
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
        return decode_bytes(value, encodings, {"\\", "^", "="})
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
    found: dict[str, Any] = {}
    for tag in tags:
        if tag in header.dataset:
            made = _element(header.dataset, tag, header.encodings, style, (tag,))
            if made is not None:
                found[f"{tag:08X}"] = made
    return found


def whole(header: Header, style: JsonStyle, leave_out: Collection[AttributePath] = ()) -> dict[str, Any]:
    """DICOM JSON of everything but group 2 and ``leave_out``; pixels are not in a `Header`."""
    return _json(header.dataset, header.encodings, style, (), leave_out)


def _json(
    dataset: Dataset,
    encodings: list[str],
    style: JsonStyle,
    path: AttributePath,
    leave_out: Collection[AttributePath] = (),
) -> dict[str, Any]:
    own = _encodings(dataset) if 0x00080005 in dataset else encodings
    found: dict[str, Any] = {}
    for tag in sorted(dataset.keys()):
        here = (*path, int(tag))
        if here in leave_out or tag.element == 0 or tag.group == 2:
            continue
        made = _element(dataset, tag, own, style, here, leave_out)
        if made is not None:
            found[f"{int(tag):08X}"] = made
    return found


def _element(
    dataset: Dataset,
    tag: int,
    encodings: list[str],
    style: JsonStyle,
    path: AttributePath,
    leave_out: Collection[AttributePath] = (),
) -> dict[str, Any] | None:
    element = dataset.get_item(tag)
    vr = (element.VR or _dictionary_vr(element.tag)) if element is not None else "UN"
    if vr == "SQ":
        items = [
            _json(item, encodings, style, (*path, number), leave_out)
            for number, item in enumerate(dataset[tag].value or ())
        ]
        return {"vr": "SQ", "Value": items} if items else {"vr": "SQ"}
    if not isinstance(element, RawDataElement):
        element = _as_raw(dataset, tag)
    length = element.length if element.value is None else len(element.value)
    if style.bulk is not None and (
        vr in style.bulk_vrs or (style.bulk_above_bytes is not None and length > style.bulk_above_bytes)
    ):
        uri = style.bulk(path) if length else None
        return {"vr": vr, "BulkDataURI": uri} if uri else None
    if element.value is None and element.length not in (0, 0xFFFFFFFF):
        element = dataset.get_item(tag) if dataset[tag] is None else _as_raw(dataset, tag)
    return _with_value(vr, element.value or b"", encodings, style, "<" if element.is_little_endian else ">")


def _as_raw(dataset: Dataset, tag: int) -> RawDataElement:
    """An element pydicom has converted already (file meta, deferred values), as raw bytes again."""
    element = dataset[tag]
    value = element.value
    if not isinstance(value, bytes):
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        value = "\\".join("" if item is None else str(item) for item in values).encode("utf-8")
    return RawDataElement(element.tag, element.VR, len(value), value, 0, False, True)


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
    own = _encodings(dataset) if above and 0x00080005 in dataset else encodings
    for tag in list(dataset.keys()):
        element = dataset.get_item(tag)
        if element is None or tag.element == 0:
            continue
        vr = element.VR or _dictionary_vr(element.tag)
        path = (*above, int(tag))
        if vr == "SQ":
            for number, item in enumerate(dataset[tag].value or ()):
                yield from _walk(item, own, (*path, number))
        elif isinstance(element, RawDataElement) and element.value is not None and vr not in BULK_VRS:
            value = element.value
            yield path, vr, value, _decoded(value, vr, own) if vr in TEXT_VRS else ""
