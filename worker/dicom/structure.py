"""The structure of a DICOM dataset (PS3.5 7), walked element by element while its bytes arrive: is it whole?

No UID's meaning, no file and no server here. The walk is a generator that says from which byte on it wants to read;
values are skipped, so memory stays flat however large an image is. It is our own and not pydicom's because it has to
skip undefined lengths without recursion, warnings or datasets in memory, and because pydicom reads over an end that
comes too early.

What is called cut short is cut short: the bytes end within an element that is beyond doubt one. Where a length leads
past the end in a place that is no credible element, the structure was not understood, and `CannotTell` says so.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Generator
from struct import Struct
from typing import BinaryIO, Literal, NamedTuple, TypeVar

from pydicom.datadict import dictionary_has_tag, keyword_dict, repeater_has_tag
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, VR

_T = TypeVar("_T")
#: Yields from which byte on at least how many bytes are wanted; more are at hand when it is resumed.
Steps = Generator[tuple[int, int], None, _T]

UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_DELIMITING = (b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0")
_PIXEL_DATA, _NUMBER_OF_FRAMES = 0x7FE00010, 0x00280008
_LONG_VRS = frozenset(vr.encode("ascii") for vr in EXPLICIT_VR_LENGTH_32)
_SHORT_VRS = frozenset(vr.encode("ascii") for vr in VR if len(vr) == 2 and vr not in EXPLICIT_VR_LENGTH_32)
_VRS = _LONG_VRS | _SHORT_VRS
_IS_VR = re.compile(rb"[A-Z]{2}").fullmatch
_GROUPS = frozenset(tag >> 16 for tag in keyword_dict.values()) - {0}
#: Where private elements are, as a rule.
_PRIVATE_GROUPS = frozenset(range(0x0009, 0x0100, 2))
_EXPLICIT = {True: Struct("<HH2sH"), False: Struct(">HH2sH")}
_IMPLICIT = {True: Struct("<HHL"), False: Struct(">HHL")}
_LONG_LENGTH = {True: Struct("<L"), False: Struct(">L")}
_HEADER_BYTES = 12
_WINDOW_BYTES = 4_096
#: What stands for the length of an element where there is none is larger than this, as a rule.
_CREDIBLE_BYTES = 64 * 1_048_576
#: So far it is looked behind a value for the next element where the value's length can be read in two ways.
_LOOKED_AHEAD_BYTES = 1_048_576
_NOTHING: frozenset[int] = frozenset()

#: Longer values of wanted elements are noted up to here.
MAX_VALUE_BYTES = 1_024
#: Beyond this many elements and items (some seconds) the walk is given up.
MAX_STEPS = 20_000_000


class CutShort(Exception):
    """The bytes end before the structure does."""


class CannotTell(Exception):
    """The structure is too odd or too long to be followed to its end."""


class ByteWindow:
    """The part of the bytes that is at hand, ``data`` from byte ``start`` on; ``tail`` are the last bytes of all."""

    __slots__ = ("data", "ended", "size", "start", "tail")

    def __init__(self) -> None:
        self.data, self.start = b"", 0
        self.size, self.ended, self.tail = 0, False, b""

    def have(self, at: int, length: int) -> Steps[int]:
        """Wait until ``length`` bytes from ``at`` on are at hand; how many there are, which is fewer at the end only.

        Negative: the bytes end so many before ``at``.
        """
        while True:
            there = self.start + len(self.data) - at
            if self.ended:
                return there if self.data else self.size - at
            if there >= length and at >= self.start:
                return there
            yield at, length

    def read(self, at: int, length: int) -> bytes:
        """Bytes that are at hand, fewer than ``length`` if they end before."""
        return self.data[at - self.start : at - self.start + length]


class Feed:
    """Gives a walk what arrives. Errors of the walk come out of `feed` and `end`."""

    def __init__(self, walk: Callable[[ByteWindow], Steps[None]]) -> None:
        self._window = ByteWindow()
        self._steps = walk(self._window)
        self._wants: int | None = 0
        self._advance()

    def feed(self, chunk: bytes) -> None:
        window = self._window
        before = window.size
        window.size += len(chunk)
        window.tail = chunk[-4:] if len(chunk) >= 4 else (window.tail + chunk)[-4:]
        wants = self._wants
        if wants is None:
            return
        if wants >= window.size:
            window.data = b""
            return
        left = window.data[wants - window.start :] if wants < before else b""
        window.data = left + (chunk[wants - before :] if wants > before else chunk)
        window.start = wants
        self._advance()

    def end(self) -> None:
        """No more comes. `CutShort` if the structure goes on."""
        self._window.ended = True
        if self._wants is not None:
            self._advance()

    def _advance(self) -> None:
        request = next(self._steps, None)
        self._wants = None if request is None else request[0]


def read_through(walk: Callable[[ByteWindow], Steps[None]], stream: BinaryIO) -> None:
    """The same for a file that can be read anywhere: what the walk skips is not read."""
    window = ByteWindow()
    window.size = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, window.size - 4))
    window.tail = stream.read(4)
    for at, length in walk(window):
        window.start, window.data = at, b""
        if at < window.size:
            stream.seek(at)
            window.data = stream.read(max(length, _WINDOW_BYTES))
        window.ended = at + len(window.data) >= window.size


class _Element(NamedTuple):
    """Where one element (or item) is: ``length`` bytes from ``value`` on."""

    tag: int
    vr: bytes
    value: int
    length: int

    @property
    def end(self) -> int:
        return self.value + self.length

    @property
    def group(self) -> int:
        return self.tag >> 16


_NONE = _Element(0, b"", 0, 0)


class _Coding(NamedTuple):
    little_endian: bool
    explicit: bool


_META = _Coding(little_endian=True, explicit=True)


class Walk:
    """One pass over elements, sequences included; ``values`` are those of the ``wanted`` ones that are in no sequence.

    Of an element that comes several times, ``values`` has two that differ, if there are any, in their order.
    """

    def __init__(self, window: ByteWindow, wanted: frozenset[int], *, max_steps: int = MAX_STEPS) -> None:
        self.values: dict[int, list[bytes]] = {}
        self._window = window
        self._wanted = wanted | {_NUMBER_OF_FRAMES}
        self._steps_left = max_steps
        self._fragments = 0
        # The element that was passed last, and the group of the one before it.
        self._last, self._group_before, self._is_doubtful = _NONE, 0, False

    def allow(self, steps: int) -> None:
        """Let the walk take so many elements and items more before it is given up."""
        self._steps_left = min(MAX_STEPS, self._steps_left + steps)

    def meta(self, at: int) -> Steps[int]:
        """The file meta information (PS3.10 7.1) from ``at`` on; where the dataset starts."""
        coding = yield from self._coding_at(at, _META)
        while (yield from self._window.have(at, 2)) >= 2 and self._window.read(at, 2) == b"\x02\x00":
            element = yield from self._header(at, coding)
            if element is None:
                break
            at = yield from self._behind(element, coding)
        return at

    def dataset(self, at: int, transfer_syntax_uid: str) -> Steps[None]:
        """A dataset from ``at`` on, to the end of all bytes.

        Raises
        ------
        CutShort, CannotTell
        """
        little_endian = transfer_syntax_uid != ExplicitVRBigEndian
        explicit = transfer_syntax_uid != ImplicitVRLittleEndian
        coding = yield from self._coding_at(at, _Coding(little_endian, explicit))
        self._last, self._group_before = _NONE, 0
        while True:
            at = self._behind_plain(at, coding, self._wanted)
            element = yield from self._header(at, coding)
            if element is None:
                return
            if element.tag == 0 and element.length == 0:
                at = yield from self._behind_zeros(at)
            elif element.tag == _PIXEL_DATA and element.length == UNDEFINED:
                at = yield from self._behind_pixels(element, coding, transfer_syntax_uid)
            else:
                at = yield from self._behind(element, coding)

    # --- where the next element starts ---------------------------------------------------------------------------

    def _behind(self, element: _Element, coding: _Coding) -> Steps[int]:
        if element.length == UNDEFINED:
            return (yield from self._behind_sequence(element, coding))
        if element.tag in self._wanted:
            length = min(element.length, MAX_VALUE_BYTES + 1)
            if (yield from self._window.have(element.value, length)) >= length:
                self._note(element.tag, self._window.read(element.value, length))
        return element.end

    def _note(self, tag: int, value: bytes) -> None:
        values = self.values.setdefault(tag, [])
        if len(values) < 2 and value.rstrip(b"\0 ") not in (known.rstrip(b"\0 ") for known in values):
            values.append(value)

    def _behind_plain(self, at: int, coding: _Coding, wanted: frozenset[int]) -> int:
        """Leave out elements that have nothing special about them, as far as they are at hand.

        Nearly all are such: this is most of the work on an image, so no call is made for an element.
        """
        return (self._behind_explicit if coding.explicit else self._behind_implicit)(at, coding, wanted)

    def _behind_explicit(self, at: int, coding: _Coding, wanted: frozenset[int]) -> int:
        data, start = self._window.data, self._window.start
        unpack = _EXPLICIT[coding.little_endian].unpack_from
        long_length = _LONG_LENGTH[coding.little_endian].unpack_from
        offset, last = at - start, len(data) - _HEADER_BYTES
        before = here = -1
        steps = 0
        while 0 <= offset <= last:
            group, number, vr, length = unpack(data, offset)
            behind = offset + 8 + length
            if vr in _LONG_VRS:
                length = long_length(data, offset + 8)[0]
                behind = offset + 12 + length
            elif vr not in _SHORT_VRS:
                break
            if length == UNDEFINED or group == 0xFFFE or group << 16 | number in wanted:
                break
            before, here, offset = here, offset, behind
            steps += 1
        self._passed(steps, before, here, coding)
        return start + offset

    def _behind_implicit(self, at: int, coding: _Coding, wanted: frozenset[int]) -> int:
        data, start = self._window.data, self._window.start
        unpack = _IMPLICIT[coding.little_endian].unpack_from
        offset, last = at - start, len(data) - _HEADER_BYTES
        before = here = -1
        steps = 0
        while 0 <= offset <= last:
            group, number, length = unpack(data, offset)
            if length == UNDEFINED or group in (0, 0xFFFE) or data[offset + 4 : offset + 6] in _VRS:
                break
            if group << 16 | number in wanted:
                break
            before, here, offset = here, offset, offset + 8 + length
            steps += 1
        self._passed(steps, before, here, coding)
        return start + offset

    def _passed(self, steps: int, before: int, here: int, coding: _Coding) -> None:
        """Note the element that was left out last, at ``here`` in the window, and the group of the one before it."""
        self._count(steps)
        if here >= 0:
            unpack = _EXPLICIT[coding.little_endian].unpack_from
            self._group_before = unpack(self._window.data, before)[0] if before >= 0 else self._last.group
            group, number, vr, _ = unpack(self._window.data, here)
            length = self._implicit_length(self._window.start + here, coding)
            self._last = _Element(group << 16 | number, vr if coding.explicit else b"", 0, length)
            self._is_doubtful = False

    def _behind_zeros(self, at: int) -> Steps[int]:
        """Where zeros end that fill the bytes behind an element, eight by eight."""
        yield from self._window.have(at, 8)
        zeros = self._window.read(at, len(self._window.data))
        return at + max(8, (len(zeros) - len(zeros.lstrip(b"\0"))) // 8 * 8)

    def _behind_pixels(self, element: _Element, coding: _Coding, transfer_syntax_uid: str) -> Steps[int]:
        """Some writers leave out the delimiter at the very end: then the frames say whether they are all there."""
        self._fragments = 0
        try:
            return (yield from self._behind_sequence(element, coding))
        except CutShort:
            if self._has_all_frames(transfer_syntax_uid):
                raise CannotTell from None
            raise

    def _has_all_frames(self, transfer_syntax_uid: str) -> bool:
        if self._fragments < 0:
            return False
        (told, *_) = self.values.get(_NUMBER_OF_FRAMES, [b"1"])
        text = told.strip(b"\0 ")
        frames, fragments = int(text) if text.isdigit() and len(text) < 12 else 1, self._fragments - 1
        if transfer_syntax_uid == RLELossless:  # PS3.5 A.4.2: one fragment for each frame
            return fragments == frames
        return fragments >= frames and self._window.tail.rstrip(b"\0").endswith(b"\xff\xd9")

    def _behind_sequence(self, sequence: _Element, coding: _Coding) -> Steps[int]:
        """Sequences and items of undefined length alternate, so that a counter stands for the stack."""
        at, depth = sequence.value, 1
        # The contents of an UN of undefined length are implicit (PS3.5 6.2.2).
        implicit = coding._replace(explicit=False)
        implicit_from = 1 if sequence.vr == b"UN" else None
        while depth:
            now = coding if implicit_from is None else implicit
            is_between_items = depth % 2 == 1
            at = self._behind_items(at, now) if is_between_items else self._behind_plain(at, now, _NOTHING)
            element = yield from self._inner_header(at, now)
            if element.tag == (_SEQUENCE_END if is_between_items else _ITEM_END):
                at, depth = element.value, depth - 1
                implicit_from = None if implicit_from is not None and depth < implicit_from else implicit_from
            elif is_between_items != (element.tag == _ITEM) or element.tag in (0, _SEQUENCE_END, _ITEM_END):
                raise CannotTell
            elif element.length == UNDEFINED:
                at, depth = element.value, depth + 1
                implicit_from = depth if implicit_from is None and element.vr == b"UN" else implicit_from
            else:
                at = element.end
                self._fragments += is_between_items
        self._last = sequence
        return at

    def _behind_items(self, at: int, coding: _Coding) -> int:
        """Leave out items whose lengths are told, as far as they are at hand."""
        data, start = self._window.data, self._window.start
        unpack = _IMPLICIT[coding.little_endian].unpack_from
        offset, last, items = at - start, len(data) - 8, 0
        while 0 <= offset <= last:
            group, number, length = unpack(data, offset)
            if group != 0xFFFE or number != 0xE000 or length == UNDEFINED:
                break
            offset += 8 + length
            items += 1
        if items:
            self._count(items)
            self._fragments += items
            self._last, self._is_doubtful = _Element(_ITEM, b"", 0, 0), False
        return start + offset

    def _count(self, steps: int) -> None:
        self._steps_left -= steps
        if self._steps_left < 0:
            raise CannotTell

    # --- one header ----------------------------------------------------------------------------------------------

    def _coding_at(self, at: int, told: _Coding) -> Steps[_Coding]:
        """What the first element says counts, not the transfer syntax: some writers mix the two up."""
        if (yield from self._window.have(at, 8)) < 8:
            return told
        group, number, vr, length = _EXPLICIT[told.little_endian].unpack(self._window.read(at, 8))
        if _IS_VR(vr):
            return told._replace(explicit=True)
        if told.explicit and (yield from self._leads_on(at, 8 + length, told, group << 16 | number)):
            return told
        return told._replace(explicit=False)

    def _inner_header(self, at: int, coding: _Coding) -> Steps[_Element]:
        """As `_header`, where the end of all bytes cannot be."""
        element = yield from self._header(at, coding, is_inside=True)
        if element is None:
            raise CutShort("it ends within a sequence")
        return element

    def _header(self, at: int, coding: _Coding, *, is_inside: bool = False) -> Steps[_Element | None]:
        """The element at ``at``; None where the bytes end there, as they may."""
        self._count(1)
        there = yield from self._window.have(at, _HEADER_BYTES)
        if there < 8:
            self._check_end(at, there, coding, is_inside=is_inside)
            return None
        group, number, vr, length = _EXPLICIT[coding.little_endian].unpack(self._window.read(at, 8))
        tag = group << 16 | number
        value, is_doubtful = at + 8, False
        if group == 0xFFFE:  # items never have a VR
            vr, length = b"", self._implicit_length(at, coding)
            is_doubtful = not is_inside
        elif self._has_long_length(vr, length, coding):
            if there < _HEADER_BYTES:
                raise CutShort("it ends within the header of an element")
            length, value = _LONG_LENGTH[coding.little_endian].unpack(self._window.read(value, 4))[0], value + 4
        elif (yield from self._has_odd_long_length(at, vr, length, coding, tag)):
            length, value = _LONG_LENGTH[coding.little_endian].unpack(self._window.read(value, 4))[0], value + 4
        elif not self._has_short_length(vr, coding):
            is_odd = coding.explicit or vr in _SHORT_VRS
            if not (is_odd and (yield from self._leads_on(at, 8 + length, coding, tag))):
                vr, length = b"", self._implicit_length(at, coding)
                is_doubtful = coding.explicit
        self._group_before, self._last = self._last.group, _Element(tag, vr, value, length)
        self._is_doubtful = is_doubtful
        return self._last

    def _implicit_length(self, at: int, coding: _Coding) -> int:
        length: int = _LONG_LENGTH[coding.little_endian].unpack(self._window.read(at + 4, 4))[0]
        return length

    def _has_long_length(self, vr: bytes, reserved: int, coding: _Coding) -> bool:
        """Whether the length is in 32 bits behind two zero bytes: known VRs, and those to come (PS3.5 7.1.2).

        Among implicit elements, an explicit one of a long VR would have an odd length.
        """
        if vr in _LONG_VRS:
            return coding.explicit or reserved == 0
        return coding.explicit and vr not in _SHORT_VRS and bool(_IS_VR(vr)) and reserved == 0

    def _has_short_length(self, vr: bytes, coding: _Coding) -> bool:
        """Whether the length is in 16 bits. Among implicit elements, a VR such as UI would be an odd length too."""
        return vr in _SHORT_VRS and (coding.explicit or vr[0] % 2 == 1)

    def _has_odd_long_length(self, at: int, vr: bytes, reserved: int, coding: _Coding, tag: int) -> Steps[bool]:
        """Whether a VR that is no pair of letters (blanks, NULs) has a length of 32 bits behind two zero bytes."""
        if not coding.explicit or vr.isalpha() or reserved or len(self._window.read(at, _HEADER_BYTES)) < _HEADER_BYTES:
            return False
        length = _LONG_LENGTH[coding.little_endian].unpack(self._window.read(at + 8, 4))[0]
        return length <= _LOOKED_AHEAD_BYTES and (yield from self._leads_on(at, _HEADER_BYTES + length, coding, tag))

    def _leads_on(self, at: int, distance: int, coding: _Coding, tag: int) -> Steps[bool]:
        """Whether an explicit element, or the end, is ``distance`` behind ``at``: for what can be read in two ways.

        Old toolkits write private VRs such as ``??`` with a length of 16 bits.
        """
        there = (yield from self._window.have(at, distance + 8)) - distance
        if there < 8:
            return there == 0
        head = self._window.read(at + distance, 8)
        if coding.little_endian and head[:4] in _DELIMITING:
            return True
        group, number, vr, _ = _EXPLICIT[coding.little_endian].unpack(head)
        following = group << 16 | number
        return following > tag and (vr in _VRS or (group == tag >> 16 and not vr.isalnum()))

    # --- the end -------------------------------------------------------------------------------------------------

    def _check_end(self, at: int, there: int, coding: _Coding, *, is_inside: bool) -> None:
        """Return if the bytes may end with those ``there`` that are at ``at``."""
        rest = self._window.read(at, max(0, there)).strip(b"\0")
        if there < 0 or rest:
            self._fragments = -1  # the last one is not whole
        if there < 0:
            is_cut, sentence = self._is_credible(), f"it ends {-there} bytes too early"
        elif is_inside:
            is_cut, sentence = not self._is_doubtful, "it ends within a sequence"
        elif rest:
            rest = self._window.read(at, there)
            is_cut, sentence = self._begins_element(rest, coding), "it ends within the header of an element"
        else:
            return
        raise CutShort(sentence) if is_cut else CannotTell

    def _is_credible(self) -> bool:
        """Whether the element that was passed last is one, and not what was taken for one."""
        if self._is_doubtful:
            return False
        tag, vr, _, length = self._last
        if _is_known(tag):
            return True
        is_private = tag >> 16 & 1 == 1
        if vr and _IS_VR(vr):
            return is_private or tag >> 16 in _GROUPS
        return is_private and (tag >> 16 == self._group_before or length < _CREDIBLE_BYTES)

    def _begins_element(self, rest: bytes, coding: _Coding) -> bool:
        """Whether the last bytes can be the beginning of the next element."""
        order: Literal["little", "big"] = "little" if coding.little_endian else "big"
        last = self._last.group
        if len(rest) == 1:
            groups = {one.to_bytes(2, order)[0] for one in _GROUPS | _PRIVATE_GROUPS | {last} if one >= last}
            return rest[0] in groups
        group = int.from_bytes(rest[:2], order)
        if len(rest) >= 4 and not _is_known(group << 16 | int.from_bytes(rest[2:4], order)) and group % 2 == 0:
            return False
        if len(rest) >= 6 and coding.explicit:
            return group >= last and rest[4:6] in _VRS
        return group >= last and (group == last or group in _GROUPS | _PRIVATE_GROUPS)


def _is_known(tag: int) -> bool:
    return tag >> 16 == 0xFFFE or tag & 0xFFFF == 0 or dictionary_has_tag(tag) or repeater_has_tag(tag)
