"""What a DICOM image says, element by element, as digests: whether two encodings of it say the same.

Two servers encode one image in different ways: explicit or implicit VR, defined or undefined lengths, deflated or not,
other padding. Here those compare equal, and nothing else does; what cannot be judged compares unequal. Which elements
a product rewrites is said by its dialect. Nothing here opens a socket or holds a value that is longer than a chunk.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from struct import Struct
from typing import IO, BinaryIO, Final, NamedTuple, cast

from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPIPHTJ2KReferencedDeflate,
)
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, VR

from courier.errors import NotDicom
from worker.runtime.scratch import drop, no_room

_UNDEFINED: Final = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_ITEM_BYTES: Final = b"\xfe\xff\x00\xe0"
#: All others, known or not, have 32 (PS3.5 7.1.2).
_VRS_WITH_16_BITS = frozenset(vr.encode("ascii") for vr in VR if len(vr) == 2 and vr not in EXPLICIT_VR_LENGTH_32)
#: Trailing blanks of these mean nothing (PS3.5 6.2); some writers pad them with NUL.
_TEXT_VRS = frozenset(b"AE AS CS DA DS DT IS LO LT PN SH ST TM UC UI UR UT".split())
_BINARY_VRS = frozenset(b"OB OD OF OL OV OW".split())
_EXPLICIT = {True: Struct("<HH2sH"), False: Struct(">HH2sH")}
_IMPLICIT = {True: Struct("<HHL"), False: Struct(">HHL")}
_LONG_LENGTH = {True: Struct("<L"), False: Struct(">L")}
_WINDOW_BYTES: Final = 65_536
_CHUNK_BYTES: Final = 1_048_576
_MAX_DEPTH: Final = 100
_EMPTY: Final = sha256(b"").digest()
#: These three encode the same bytes of a value: little endian, nothing compressed.
_PLAIN = frozenset((ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian))
_DEFLATED = frozenset((DeflatedExplicitVRLittleEndian, "1.2.840.10008.1.2.4.95", JPIPHTJ2KReferencedDeflate))
#: A list of differing elements ends after so many.
MAX_NAMED: Final = 10


@dataclass(frozen=True)
class Rewrites:
    """The elements that a product is documented to rewrite in what it is given, by tag; all others come back equal.

    ``added``: it may give them a value where the image had none, and append items to a sequence among them; what the
    image had there comes back. ``dropped``: it may leave them out. Group 0002 and group lengths (gggg,0000), which say
    nothing of the image but how it is encoded, are never compared. ``changed``: they were seen to come back otherwise,
    by no rule that could be relied on; they are compared, and a sentence may name the product as the likely cause.
    """

    added: frozenset[int] = frozenset()
    dropped: frozenset[int] = frozenset()
    changed: frozenset[int] = frozenset()

    @property
    def tags(self) -> frozenset[int]:
        return self.added | self.dropped

    @property
    def known(self) -> frozenset[int]:
        return self.tags | self.changed


#: One element of the dataset that is judged apart: the digest of its value, then one for each item of a sequence.
_Apart = tuple[bytes, ...]


@dataclass(frozen=True)
class Fingerprint:
    """All elements of one image: one digest over most of them, and each of those apart that a server may rewrite.

    ``encoding`` is the transfer syntax, one for all that encode values alike; ``vrs`` is None where VRs are implicit.
    """

    encoding: str
    elements: bytes
    vrs: bytes | None
    apart: Mapping[int, _Apart]


@dataclass(frozen=True)
class Table:
    """All elements of one image, each by its path (tag, item, tag …): what it takes to name those that differ."""

    encoding: str
    explicit: bool
    leaves: Mapping[bytes, tuple[tuple[bytes, bytes], ...]]
    apart: Mapping[int, _Apart]


def fingerprint(stream: BinaryIO, transfer_syntax_uid: str, *, apart: frozenset[int]) -> Fingerprint:
    """The fingerprint of the DICOM file in ``stream``; elements with the tags ``apart`` are judged one by one.

    Raises
    ------
    NotDicom
        Its elements cannot be followed to their end.
    """
    elements, vrs = sha256(), sha256()
    held = _Held(apart)
    with _opened(stream, transfer_syntax_uid) as dataset:
        for leaf in dataset.leaves():
            if not held.takes(leaf):
                elements.update(len(leaf.path).to_bytes(2, "big") + leaf.path + leaf.digest)
                vrs.update(leaf.vr)
        explicit = dataset.coding.explicit
    return Fingerprint(
        _encoding(transfer_syntax_uid), elements.digest(), vrs.digest() if explicit else None, held.digests()
    )


def table(stream: BinaryIO, transfer_syntax_uid: str, *, apart: frozenset[int]) -> Table:
    """As `fingerprint`, with a digest for each element."""
    held = _Held(apart)
    leaves: dict[bytes, tuple[tuple[bytes, bytes], ...]] = {}
    with _opened(stream, transfer_syntax_uid) as dataset:
        for leaf in dataset.leaves():
            if not held.takes(leaf):
                leaves[leaf.path] = (*leaves.get(leaf.path, ()), (leaf.vr, leaf.digest))
        explicit = dataset.coding.explicit
    return Table(_encoding(transfer_syntax_uid), explicit, leaves, held.digests())


def equal(one: Fingerprint, other: Fingerprint, *, rewrites: tuple[Rewrites, Rewrites]) -> bool:
    """Whether two images have equal elements but for what the server of each is documented to rewrite."""
    if (one.encoding, one.elements) != (other.encoding, other.elements):
        return False
    if one.vrs is not None and other.vrs is not None and one.vrs != other.vrs:
        return False
    return not _differing_apart(one.apart, other.apart, rewrites)


def differing(one: Table, other: Table, *, rewrites: tuple[Rewrites, Rewrites]) -> list[str]:
    """The elements that make two images unequal, each as ``Keyword (gggg,eeee)``, never with a value."""
    names = dict.fromkeys(_name(path) for path in sorted(_differing_paths(one, other, rewrites)))
    if one.encoding != other.encoding:
        names = {"TransferSyntaxUID (0002,0010)": None, **names}
    more = len(names) - MAX_NAMED
    return [*list(names)[:MAX_NAMED], *([f"{more} more"] if more > 0 else [])]


def is_of(product: Rewrites, given: Table, returned: Table, *, rewrites: tuple[Rewrites, Rewrites]) -> bool:
    """Whether the product may have made one image of the other: all that `differing` tells is what it adds or changes.

    The tables have to hold ``product.known`` apart. Such images are unequal all the same.
    """
    paths = _differing_paths(given, returned, rewrites)
    tags = [int.from_bytes(path, "big") for path in paths]
    return (
        bool(paths)
        and given.encoding == returned.encoding
        and all(
            tag in product.changed
            or _may_rewrite(product, tag, given=given.apart.get(tag), returned=returned.apart.get(tag))
            for tag in tags
        )
    )


def _differing_paths(one: Table, other: Table, rewrites: tuple[Rewrites, Rewrites]) -> list[bytes]:
    paths = _differing_apart(one.apart, other.apart, rewrites)
    for path in one.leaves.keys() | other.leaves.keys():
        ours, theirs = one.leaves.get(path), other.leaves.get(path)
        if ours is None or theirs is None or not _alike(ours, theirs, with_vrs=one.explicit and other.explicit):
            paths.append(path)
    return paths


def _alike(ours: Sequence[tuple[bytes, bytes]], theirs: Sequence[tuple[bytes, bytes]], *, with_vrs: bool) -> bool:
    return ours == theirs if with_vrs else [digest for _, digest in ours] == [digest for _, digest in theirs]


def _differing_apart(
    one: Mapping[int, _Apart], other: Mapping[int, _Apart], rewrites: tuple[Rewrites, Rewrites]
) -> list[bytes]:
    return [
        tag.to_bytes(4, "big")
        for tag in one.keys() | other.keys()
        if one.get(tag) != other.get(tag)
        and not _may_rewrite(rewrites[0], tag, given=other.get(tag), returned=one.get(tag))
        and not _may_rewrite(rewrites[1], tag, given=one.get(tag), returned=other.get(tag))
    ]


def _may_rewrite(rewrites: Rewrites, tag: int, *, given: _Apart | None, returned: _Apart | None) -> bool:
    if returned is None:
        return tag in rewrites.dropped
    had_none = given is None or given == (_EMPTY,)
    return tag in rewrites.added and (given is None or had_none or returned[: len(given)] == given)


def _encoding(transfer_syntax_uid: str) -> str:
    return str(ExplicitVRLittleEndian) if transfer_syntax_uid in _PLAIN else transfer_syntax_uid


def _name(path: bytes) -> str:
    """The tags of a path, without the numbers of items."""
    tags = [int.from_bytes(path[at : at + 4], "big") for at in range(0, len(path), 8)]
    return " > ".join(
        f"{keyword_for_tag(tag) or ('private' if tag >> 16 & 1 else 'unknown')} ({tag >> 16:04X},{tag & 0xFFFF:04X})"
        for tag in tags
    )


class _Leaf(NamedTuple):
    """An element, an item or a fragment. ``path``: four bytes for each tag and each number of an item above it."""

    path: bytes
    vr: bytes
    digest: bytes


class _Held:
    """The elements of the dataset that are judged apart."""

    def __init__(self, tags: frozenset[int]) -> None:
        self._tags = frozenset(tag.to_bytes(4, "big") for tag in tags)
        self._found: dict[bytes, dict[bytes, list[bytes]]] = {}

    def takes(self, leaf: _Leaf) -> bool:
        top = leaf.path[:4]
        if top not in self._tags:
            return False
        self._found.setdefault(top, {}).setdefault(leaf.path[4:8], []).extend((leaf.path[8:], leaf.digest))
        return True

    def digests(self) -> dict[int, _Apart]:
        return {
            int.from_bytes(top, "big"): tuple(
                parts[1] if not item and len(parts) == 2 else _over(parts) for item, parts in items.items()
            )
            for top, items in self._found.items()
        }


def _over(parts: Iterable[bytes]) -> bytes:
    digest = sha256()
    for part in parts:
        digest.update(len(part).to_bytes(2, "big") + part)
    return digest.digest()


class _DatasetCoding(NamedTuple):
    little_endian: bool
    explicit: bool


_IMPLICIT_LITTLE: Final = _DatasetCoding(little_endian=True, explicit=False)


class _ElementHeader(NamedTuple):
    tag: int
    vr: bytes
    at: int
    length: int


class _Dataset:
    """The elements of one dataset, read through one small window."""

    def __init__(self, stream: IO[bytes], start: int, *, little_endian: bool = True) -> None:
        self._stream = stream
        self._size = stream.seek(0, 2)
        self._start = start
        self._window, self._window_at = b"", 0
        # What the first element says counts, not the transfer syntax: some writers mix the two up.
        self.coding = _DatasetCoding(little_endian, explicit=_is_vr(self._read(start, 6)[4:]))

    def __enter__(self) -> _Dataset:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to free."""

    def leaves(self) -> Iterator[_Leaf]:
        """Every element in order, then what is in it; group lengths are left out."""
        yield from self._elements(self._start, self._size, self.coding, b"")

    def meta(self) -> int:
        """Where the group of the file meta information ends, if this is where it starts."""
        at = self._start
        while at < self._size:
            header = self._header(at, self.coding)
            if header.tag >> 16 != 2:
                break
            at = header.at + header.length
        return at

    def _read(self, at: int, length: int) -> bytes:
        if at + length > self._size:
            raise _unreadable("an element goes beyond its end")
        offset = at - self._window_at
        if offset < 0 or offset + length > len(self._window):
            self._stream.seek(at)
            self._window, self._window_at, offset = self._stream.read(max(length, _WINDOW_BYTES)), at, 0
        return self._window[offset : offset + length]

    def _header(self, at: int, coding: _DatasetCoding) -> _ElementHeader:
        head = self._read(at, 8)
        group, number, vr, length = _EXPLICIT[coding.little_endian].unpack(head)
        tag = group << 16 | number
        # Items have no VR, and some writers fall back to implicit ones inside of sequences.
        if not coding.explicit or group == 0xFFFE or not _is_vr(vr):
            return _ElementHeader(tag, b"", at + 8, _IMPLICIT[coding.little_endian].unpack(head)[2])
        if vr in _VRS_WITH_16_BITS:
            return _ElementHeader(tag, vr, at + 8, length)
        return _ElementHeader(tag, vr, at + 12, _LONG_LENGTH[coding.little_endian].unpack(self._read(at + 8, 4))[0])

    def _elements(self, at: int, end: int | None, coding: _DatasetCoding, above: bytes) -> Generator[_Leaf, None, int]:
        """Elements up to ``end``, or to the delimiter of their item; returns where they end."""
        last = self._size if end is None else end
        while at < last:
            if last - at < 8 and not above and not self._read(at, last - at).strip(b"\0"):
                return last  # padding behind the last element
            header = self._header(at, coding)
            tag, vr, start, length = header
            if tag == _ITEM_END and end is None:
                return start
            if length == _UNDEFINED or vr in (b"", b"SQ", b"UN"):
                at = yield from self._special(header, last, coding, above + tag.to_bytes(4, "big"))
            else:
                at = start + length
                if not _is_group_length(tag, length):
                    yield _Leaf(above + tag.to_bytes(4, "big"), vr, self._digest(start, length, vr))
            if at > last:
                raise _unreadable("an element goes beyond what it is in")
        if end is None:
            raise _unreadable("an item has no end")
        return at

    def _special(
        self, header: _ElementHeader, last: int, coding: _DatasetCoding, path: bytes
    ) -> Generator[_Leaf, None, int]:
        """An element that holds others, or may, or that does not say what it is."""
        tag, told, start, length = header
        if len(path) > 8 * _MAX_DEPTH or tag >> 16 == 0xFFFE:
            raise _unreadable("its sequences are not nested as they have to be")
        # A writer that knows the element may name the VR that another one has left open (PS3.5 6.2.2).
        vr = told if told not in (b"", b"UN") else _vr_of(tag)
        inside = _IMPLICIT_LITTLE if told == b"UN" else coding
        if length == _UNDEFINED:
            if vr in _BINARY_VRS:
                return (yield from self._fragments(start, path, vr))
            if vr not in (b"SQ", b"UN"):
                raise _unreadable("an element has no length that needs one")
            return (yield from self._sequence(start, None, inside, path, vr))
        if start + length > last:
            raise _unreadable("an element goes beyond what it is in")
        if vr == b"SQ":
            return (yield from self._sequence(start, start + length, inside, path, vr))
        if not _is_group_length(tag, length):
            items = self._items_in(start, length, inside, path, vr) if vr == b"UN" else None
            yield from items if items is not None else (_Leaf(path, vr, self._digest(start, length, vr)),)
        return start + length

    def _items_in(self, start: int, length: int, coding: _DatasetCoding, path: bytes, vr: bytes) -> list[_Leaf] | None:
        """An element whose VR is not known may be a sequence: if it can be read as one, it is one."""
        if length < 8 or self._read(start, 4) != _ITEM_BYTES:
            return None
        try:
            return list(self._sequence(start, start + length, coding, path, vr))
        except NotDicom:
            return None

    def _sequence(
        self, at: int, end: int | None, coding: _DatasetCoding, path: bytes, vr: bytes
    ) -> Generator[_Leaf, None, int]:
        yield _Leaf(path, vr, _EMPTY)
        number = 0
        while end is None or at < end:
            tag, _, at, length = self._header(at, coding)
            if tag == _SEQUENCE_END and end is None:
                return at
            if tag != _ITEM:
                raise _unreadable("a sequence holds something that is no item")
            number += 1
            item = path + number.to_bytes(4, "big")
            yield _Leaf(item, b"", _EMPTY)
            at = yield from self._elements(at, None if length == _UNDEFINED else at + length, coding, item)
        if end is not None and at != end:
            raise _unreadable("an item goes beyond its sequence")
        return at

    def _fragments(self, at: int, path: bytes, vr: bytes) -> Generator[_Leaf, None, int]:
        """Encapsulated pixel data (PS3.5 A.4), which is always little endian."""
        yield _Leaf(path, vr, _EMPTY)
        number = 0
        while True:
            tag, _, at, length = self._header(at, _IMPLICIT_LITTLE)
            if tag == _SEQUENCE_END:
                return at
            if tag != _ITEM or length == _UNDEFINED:
                raise _unreadable("its pixel data are not cut into fragments as they have to be")
            number += 1
            yield _Leaf(path + number.to_bytes(4, "big"), b"", self._digest(at, length, b"OB"))
            at += length

    def _digest(self, at: int, length: int, vr: bytes) -> bytes:
        """Over the value, padded in one way to an even length."""
        if at + length > self._size:
            raise _unreadable("an element goes beyond its end")
        pad = b" " if vr in _TEXT_VRS and vr != b"UI" else b"\0"
        if vr in _TEXT_VRS:
            length = self._stripped(at, length)
        if length <= _WINDOW_BYTES:
            value = self._read(at, length)
            return sha256(value + pad if length % 2 else value).digest()
        digest = sha256()
        self._stream.seek(at)
        for left in range(length, 0, -_CHUNK_BYTES):
            digest.update(self._stream.read(min(left, _CHUNK_BYTES)))
        if length % 2:
            digest.update(pad)
        return digest.digest()

    def _stripped(self, at: int, length: int) -> int:
        """How long a text is without the blanks and NULs behind it."""
        while length:
            part = min(length, _WINDOW_BYTES)
            rest = len(self._read(at + length - part, part).rstrip(b" \0"))
            if rest:
                return length - part + rest
            length -= part
        return 0


class _InflatedDataset(_Dataset):
    """A deflated dataset, inflated into a file of its own."""

    def __exit__(self, *_: object) -> None:
        drop(self._stream)


def _opened(stream: BinaryIO, transfer_syntax_uid: str) -> _Dataset:
    """The dataset of a file, behind its preamble and meta information."""
    stream.seek(0)
    start = 132 if stream.read(132)[128:] == b"DICM" else 0
    start = _Dataset(stream, start).meta()
    if transfer_syntax_uid in _DEFLATED:
        return _InflatedDataset(_inflated(stream, start), 0)
    return _Dataset(stream, start, little_endian=transfer_syntax_uid != ExplicitVRBigEndian)


#: What a deflated dataset may come to: beyond it, it is taken for one that was made to fill disks.
_MAX_INFLATED_BYTES: Final = 4 * 1024**3


def _inflated(stream: BinaryIO, start: int) -> IO[bytes]:
    # Closed by _Inflated, or below if it never gets that far.
    file = tempfile.SpooledTemporaryFile(max_size=8 * _CHUNK_BYTES)  # noqa: SIM115
    try:
        stream.seek(start)
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        while not inflater.eof:
            data = inflater.unconsumed_tail or stream.read(_WINDOW_BYTES)
            if not data or file.tell() > _MAX_INFLATED_BYTES:
                raise _unreadable("its deflated dataset has no end")
            file.write(inflater.decompress(data, _CHUNK_BYTES))
        file.flush()  # or a full disk would only be noticed while the file is read or closed
    except zlib.error:
        drop(file)
        raise _unreadable("it cannot be inflated") from None
    except OSError as error:
        drop(file)
        raise no_room(error) from error
    except BaseException:
        drop(file)
        raise
    return cast(IO[bytes], file)


def _is_group_length(tag: int, length: int) -> bool:
    """Whether the element is the length of a group (PS3.5 7.2), which has four bytes, or zeros that fill up."""
    return tag & 0xFFFF == 0 and length in (0, 4)


def _is_vr(letters: bytes) -> bool:
    return letters.isalpha() and letters.isupper()


@lru_cache(maxsize=16_384)
def _vr_of(tag: int) -> bytes:
    """The VR of the dictionary; UN where it knows none. Where it leaves a choice, none of them is text."""
    if tag >> 16 & 1:
        return b"LO" if 0x10 <= tag & 0xFFFF <= 0xFF else b"UN"
    try:
        vr = dictionary_VR(tag)
    except KeyError:
        return b"UN"
    return b"OW" if " " in vr else vr.encode("ascii")


def _unreadable(why: str) -> NotDicom:
    return NotDicom(f"The image cannot be read to its end: {why}.")
