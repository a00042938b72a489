"""What a DICOM file says of itself: its UIDs, read from the header alone.

Nothing here opens a socket; pixels are never read, only the lengths that say whether they are all there. The
walk over the elements is our own and not pydicom's because it has to skip undefined lengths without recursion,
warnings or datasets in memory, and because pydicom reads over an end that comes too early.
"""

from __future__ import annotations

import io
import re
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from struct import Struct
from typing import BinaryIO, NamedTuple

from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    JPIPHTJ2KReferencedDeflate,
    MediaStorageDirectoryStorage,
)
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, VR

from worker.errors import InvalidUid, MissingUid, NotDicom

_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_SEQUENCE_END_BYTES = b"\xfe\xff\xdd\xe0\0\0\0\0"  # encapsulated pixel data are always little endian
_PIXEL_DATA = frozenset((0x7FE00008, 0x7FE00009, 0x7FE00010))
_MEDIA_STORAGE_SOP_CLASS_UID, _TRANSFER_SYNTAX_UID = 0x00020002, 0x00020010
_SOP_CLASS_UID, _SOP_INSTANCE_UID = 0x00080016, 0x00080018
_STUDY_INSTANCE_UID, _SERIES_INSTANCE_UID = 0x0020000D, 0x0020000E
_DATASET_UIDS = (_STUDY_INSTANCE_UID, _SERIES_INSTANCE_UID, _SOP_INSTANCE_UID, _SOP_CLASS_UID)
_WANTED = _PIXEL_DATA | frozenset(_DATASET_UIDS)
_META_UIDS = (_MEDIA_STORAGE_SOP_CLASS_UID, _TRANSFER_SYNTAX_UID)
_NAMES = {
    _MEDIA_STORAGE_SOP_CLASS_UID: "Media Storage SOP Class UID (0002,0002)",
    _STUDY_INSTANCE_UID: "Study Instance UID (0020,000D)",
    _SERIES_INSTANCE_UID: "Series Instance UID (0020,000E)",
    _SOP_INSTANCE_UID: "SOP Instance UID (0008,0018)",
    _SOP_CLASS_UID: "SOP Class UID (0008,0016)",
    _TRANSFER_SYNTAX_UID: "Transfer Syntax UID (0002,0010)",
}
_JPIP_REFERENCED_DEFLATE = "1.2.840.10008.1.2.4.95"
_DEFLATED = frozenset((DeflatedExplicitVRLittleEndian, _JPIP_REFERENCED_DEFLATE, JPIPHTJ2KReferencedDeflate))
_LONG_VRS = frozenset(vr.encode("ascii") for vr in EXPLICIT_VR_LENGTH_32)
_SHORT_VRS = frozenset(vr.encode("ascii") for vr in VR if len(vr) == 2 and vr not in EXPLICIT_VR_LENGTH_32)
_IS_VR = re.compile(rb"[A-Z]{2}").fullmatch
_IS_UID = re.compile(r"[0-9]+(\.[0-9]+)*").fullmatch
_EXPLICIT = {True: Struct("<HH2sH"), False: Struct(">HH2sH")}
_IMPLICIT = {True: Struct("<HHL"), False: Struct(">HHL")}
_LONG_LENGTH = {True: Struct("<L"), False: Struct(">L")}

_WINDOW_BYTES = 4_096
#: Preamble, mark and the first elements: without so many bytes nothing can be said of a file that goes on.
_LEAST_BYTES = 256
_MAX_UID_VALUE_BYTES = 1_024
_DEFLATED_BYTES = 65_536
#: How many pieces of that size are inflated to find the UIDs: first few, then more, 8 MiB at most.
_PIECES_TO_READ = (1, 127)
#: How many more are inflated and thrown away to see that there is an end: 64 MiB, a tenth of a second.
_PIECES_TO_THE_END = 1_024
#: Beyond this many elements and items (about a third of a second) the check for completeness is given up.
_MAX_STEPS = 200_000
_NOT_DICOM_BUT = (
    (b"<!doctype html", "an HTML page, perhaps a login or error page"),
    (b"<html", "an HTML page, perhaps a login or error page"),
    (b"<?xml", "an XML document, perhaps an error message"),
    (b"{", "a JSON document, perhaps an error message"),
    (b"pk\x03\x04", "a ZIP archive: upload the files in it one by one"),
    (b"\x1f\x8b", "a gzip file: unpack it first"),
    (b"%pdf", "a PDF document"),
    (b"\xff\xd8\xff", "a plain JPEG picture"),
    (b"\x89png", "a plain PNG picture"),
)


@dataclass(frozen=True)
class Instance:
    """The identity of one SOP instance. ``has_preamble`` is False for a file that starts at its meta group."""

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    has_preamble: bool = True


def identify(stream: BinaryIO) -> Instance:
    """Read the identity of the DICOM file in ``stream`` (PS3.10), which is left at byte 0.

    Raises
    ------
    NotDicom
        Not a DICOM file, or cut short.
    MissingUid
        A Study, Series or SOP Instance UID, the SOP Class UID or the Transfer Syntax UID is absent or empty.
    InvalidUid
        One of them is not digits and dots, or longer than 64 characters (PS3.5 9.1).
    """
    try:
        return _identify(stream)
    except _CutShort as cut:
        raise NotDicom(f"The file is cut short: {cut}. Fetch or export it again.") from None
    finally:
        stream.seek(0)


def identify_prefix(prefix: bytes) -> Instance | None:
    """The identity that the first bytes of a DICOM file tell; None if it takes more of them. Errors as `identify`."""
    if len(prefix) < _LEAST_BYTES:
        return None
    try:
        return _identify(io.BytesIO(prefix), whole=False)
    except (_CutShort, _PastPrefix):
        return None
    except MissingUid:
        return None  # it may stand further on


class _CutShort(Exception):
    """The bytes end before the structure does."""


class _PastPrefix(Exception):
    """The structure goes on beyond the part that was inflated."""


class _GivenUp(Exception):
    """The structure is too odd or too long to be followed to its end, which is the PACS's to judge."""


class _Element(NamedTuple):
    """Where one element (or item) is: its header from ``start``, ``length`` bytes from ``value``."""

    tag: int
    vr: bytes
    start: int
    value: int
    length: int


class _Coding(NamedTuple):
    little_endian: bool
    explicit: bool


class _Bytes:
    """Random access to a stream through one small window; ``whole`` is False for a prefix of more."""

    def __init__(self, stream: BinaryIO, *, whole: bool = True) -> None:
        self._stream = stream
        self.size = stream.seek(0, io.SEEK_END)
        self.whole = whole
        self._start, self._window = 0, b""

    def read(self, start: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``start``."""
        self.need(start + length)
        offset = start - self._start
        if offset < 0 or offset + length > len(self._window):
            self._stream.seek(start)
            self._window = self._stream.read(max(length, _WINDOW_BYTES))
            self._start, offset = start, 0
        return self._window[offset : offset + length]

    def window(self, at: int) -> tuple[bytes, int]:
        """The bytes around ``at`` that are at hand, and where they start; empty, if none are."""
        within = self._start <= at < self._start + len(self._window)
        return (self._window, self._start) if within else (b"", at)

    def need(self, end: int) -> None:
        if end > self.size:
            if not self.whole:
                raise _PastPrefix
            raise _CutShort(f"it ends {end - self.size} bytes too early")


class _Walk:
    """One pass over the elements of a dataset, values skipped, sequences of undefined length included.

    With ``wanted`` it may leave out elements with other tags.
    """

    def __init__(
        self, file: _Bytes, start: int, *, little_endian: bool = True, wanted: frozenset[int] | None = None
    ) -> None:
        self._file = file
        self._wanted = wanted
        self._start = start
        self._steps = 0
        # What the first element says counts, not the transfer syntax: some writers mix the two up.
        head = file.read(start, 6) if start + 6 <= file.size else b""
        self.coding = _Coding(little_endian, explicit=bool(_IS_VR(head[4:6])))

    def __iter__(self) -> Iterator[_Element]:
        at = self._start
        while at < self._file.size:
            element = self._header(at, self.coding)
            if element.tag == 0:  # padding behind the last element
                return
            yield element
            at = self._behind_plain(self.end(element))

    def _behind_plain(self, at: int) -> int:
        """Leave out unwanted elements that have nothing special about them, which are nearly all there are.

        Here and not in `_header`, because this is most of the work on an image: no call is made for an element.
        """
        window, start = self._file.window(at)
        if self._wanted is None or not self.coding.explicit or not window:
            return at
        unpack, long_length = _EXPLICIT[self.coding.little_endian].unpack_from, _LONG_LENGTH[self.coding.little_endian]
        wanted, last, size = self._wanted, len(window) - 12, self._file.size
        offset = at - start
        while 0 <= offset <= last and self._steps < _MAX_STEPS:
            group, number, vr, length = unpack(window, offset)
            value = offset + 8
            if vr in _LONG_VRS:
                length = long_length.unpack_from(window, value)[0]
                value += 4
            elif vr not in _SHORT_VRS:
                break
            behind = value + length
            if length == _UNDEFINED or start + behind > size or group in (0, 0xFFFE) or group << 16 | number in wanted:
                break
            offset = behind
            self._steps += 1
        return start + offset

    def end(self, element: _Element) -> int:
        """Where the next element starts; raises `_CutShort` where this one is not all there."""
        if element.length == _UNDEFINED:
            return self._end_of_sequence(element)
        self._file.need(element.value + element.length)
        return element.value + element.length

    def _end_of_sequence(self, sequence: _Element) -> int:
        """Sequences and items of undefined length alternate, so that a counter stands for the stack."""
        at, depth = sequence.value, 1
        # The contents of an UN of undefined length are implicit (PS3.5 6.2.2).
        implicit_from = 1 if sequence.vr == b"UN" else None
        while depth:
            coding = self.coding if implicit_from is None else self.coding._replace(explicit=False)
            element = self._header(at, coding)
            between_items = depth % 2 == 1
            if element.tag == (_SEQUENCE_END if between_items else _ITEM_END):
                at, depth = element.value, depth - 1
                implicit_from = None if implicit_from is not None and depth < implicit_from else implicit_from
            elif between_items != (element.tag == _ITEM) or element.tag in (0, _SEQUENCE_END, _ITEM_END):
                raise _GivenUp
            elif element.length == _UNDEFINED:
                at, depth = element.value, depth + 1
                implicit_from = depth if implicit_from is None and element.vr == b"UN" else implicit_from
            else:
                at = self.end(element)
        return at

    def _header(self, at: int, coding: _Coding) -> _Element:
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise _GivenUp
        if at + 8 > self._file.size and self._file.whole:
            rest = self._file.read(at, self._file.size - at)
            if rest and not rest.strip(b"\0"):
                return _Element(0, b"", at, self._file.size, 0)
        head = self._file.read(at, 8)
        group, number, vr, length = _EXPLICIT[coding.little_endian].unpack(head)
        value = at + 8
        # Items never have a VR, and some writers fall back to implicit inside of sequences.
        if not coding.explicit or group == 0xFFFE or not _IS_VR(vr):
            vr, length = b"", _IMPLICIT[coding.little_endian].unpack(head)[2]
        elif vr in _LONG_VRS:
            length = _LONG_LENGTH[coding.little_endian].unpack(self._file.read(value, 4))[0]
            value += 4
        return _Element(group << 16 | number, vr, at, value, length)


def _identify(stream: BinaryIO, *, whole: bool = True) -> Instance:
    file = _Bytes(stream, whole=whole)
    start = _start_of_meta(file)
    meta, dataset_start = _read_meta(file, start)
    if meta.get(_MEDIA_STORAGE_SOP_CLASS_UID) == MediaStorageDirectoryStorage:
        raise MissingUid("This is a DICOMDIR, a list of files and no image; upload the files that it lists.")
    _check_uids(meta, (_TRANSFER_SYNTAX_UID,))
    transfer_syntax_uid = meta[_TRANSFER_SYNTAX_UID]
    if transfer_syntax_uid in _DEFLATED:
        found = _read_deflated(stream, dataset_start, whole=whole)
    else:
        found = _read_dataset(file, dataset_start, little_endian=transfer_syntax_uid != ExplicitVRBigEndian)
    _check_uids(found, _DATASET_UIDS)
    return Instance(
        study_instance_uid=found[_STUDY_INSTANCE_UID],
        series_instance_uid=found[_SERIES_INSTANCE_UID],
        sop_instance_uid=found[_SOP_INSTANCE_UID],
        sop_class_uid=found[_SOP_CLASS_UID],
        transfer_syntax_uid=transfer_syntax_uid,
        has_preamble=start > 0,
    )


def _start_of_meta(file: _Bytes) -> int:
    """Where the file meta information starts: after the preamble, or at byte 0 without one."""
    if file.size == 0:
        raise NotDicom("The file is empty; check what the source serves.")
    head = file.read(0, min(file.size, 256))
    if head[128:132] == b"DICM":
        return 132
    if head[:2] == b"\x02\x00" and head[4:6] in (b"UL", b"OB", b"UI"):
        return 0
    lowered = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    kind = next((kind for magic, kind in _NOT_DICOM_BUT if lowered.startswith(magic)), None)
    if kind:
        raise NotDicom(f"The file is not DICOM; it looks like {kind}.")
    raise NotDicom("The file is not DICOM: it has neither the DICM mark at byte 128 nor file meta information.")


def _read_meta(file: _Bytes, start: int) -> tuple[dict[int, str], int]:
    """The UIDs of the file meta information (always little endian), and where the dataset starts."""
    found: dict[int, str] = {}
    with suppress(_GivenUp):
        for element in _Walk(file, start):
            if element.tag >> 16 != 2:
                return found, element.start
            if element.tag in _META_UIDS:
                found[element.tag] = _read_uid(file, element)
    return found, file.size


def _read_dataset(file: _Bytes, start: int, *, little_endian: bool) -> dict[int, str]:
    """The UIDs among the elements before the pixel data, which have to be all there."""
    found: dict[int, str] = {}
    with suppress(_GivenUp, _PastPrefix):
        walk = _Walk(file, start, little_endian=little_endian, wanted=_WANTED)
        for element in walk:
            if element.tag in _PIXEL_DATA:
                if not _ends_with_sequence(file, element):
                    walk.end(element)
                break
            if element.tag in _DATASET_UIDS:
                found[element.tag] = _read_uid(file, element)
    return found


def _ends_with_sequence(file: _Bytes, element: _Element) -> bool:
    """Whether the last bytes close the encapsulated pixel data, which saves a walk over the fragments."""
    return element.length == _UNDEFINED and file.whole and file.read(file.size - 8, 8) == _SEQUENCE_END_BYTES


def _read_deflated(stream: BinaryIO, start: int, *, whole: bool) -> dict[int, str]:
    """The same for a deflated dataset, of which a bounded prefix is kept."""
    found: dict[int, str] = {}
    prefix = b""
    pieces = _inflating(stream, start)
    for count in _PIECES_TO_READ:
        got = list(islice(pieces, count))
        prefix += b"".join(got)
        found = _read_dataset(_Bytes(io.BytesIO(prefix), whole=len(got) < count), 0, little_endian=True)
        if len(found) == len(_DATASET_UIDS):
            break
    if whole:
        deque(islice(pieces, _PIECES_TO_THE_END), maxlen=0)
    return found


def _inflating(stream: BinaryIO, start: int) -> Iterator[bytes]:
    """What is deflated from ``start`` on; each piece costs or gives `_DEFLATED_BYTES` at most."""
    stream.seek(start)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    while not inflater.eof:
        data = inflater.unconsumed_tail or stream.read(_DEFLATED_BYTES)
        if not data:
            raise _CutShort("its deflated dataset has no end")
        try:
            yield inflater.decompress(data, _DEFLATED_BYTES)
        except zlib.error:
            raise NotDicom("The file says that its dataset is deflated, but it cannot be inflated.") from None


def _read_uid(file: _Bytes, element: _Element) -> str:
    """The value without its padding, unless it is far too long to be a UID."""
    if element.length > _MAX_UID_VALUE_BYTES:
        raise InvalidUid(f"The {_NAMES[element.tag]} of the file is longer than 64 characters.")
    return file.read(element.value, element.length).rstrip(b"\0 ").decode("latin-1")


def _check_uids(found: dict[int, str], tags: tuple[int, ...]) -> None:
    missing = " and no ".join(_NAMES[tag] for tag in tags if not found.get(tag))
    if missing:
        raise MissingUid(f"The file has no {missing}; a PACS cannot file it. Have it exported again by its system.")
    for tag in tags:
        if len(found[tag]) > 64:
            raise InvalidUid(f"The {_NAMES[tag]} of the file is longer than 64 characters.")
        if not _IS_UID(found[tag]):
            raise InvalidUid(f"The {_NAMES[tag]} of the file is not made of numbers with dots between them.")
