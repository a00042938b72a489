"""Whether a file is all there, said while it arrives: by bytes made by hand, and by every file in pydicom's wheel."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import warnings
import zlib
from bisect import bisect
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from pydicom.filereader import data_element_generator

from courier.errors import CourierError, InvalidUid, NotDicom, PacsMisanswered
from worker.dicom.instances import Reading, identify
from worker.jobs.streamed_instance import Incoming, digest_of

EXPLICIT, IMPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
DEFLATED, JPEG, RLE = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.5"
LONG = (b"OB", b"OW", b"SQ", b"UN", b"UT", b"ZZ")
ITEM, ITEM_END, SEQUENCE_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0\0\0\0\0", b"\xfe\xff\xdd\xe0\0\0\0\0"
OPEN = b"\xff\xff\xff\xff"
STUDY, SERIES, IMAGE, CLASS = "1.2.3", "1.2.3.4", "1.2.3.4.5", "1.2.840.10008.5.1.4.1.1.2"

WHEEL = Path(pydicom.__file__).parent / "data"
#: Whole DICOM files whose bytes are DICOM from the 128th on.
FILES = sorted(
    path
    for path in WHEEL.rglob("*")
    if path.is_file()
    and path.read_bytes()[128:132] == b"DICM"
    and "truncated" not in path.name
    and "DICOMDIR" not in path.name
    and path.name != "meta_missing_tsyntax.dcm"
)


def element(tag: int, vr: bytes, value: bytes, *, order: str = "<") -> bytes:
    head = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF) + vr
    if vr in LONG:
        return head + b"\0\0" + struct.pack(order + "L", len(value)) + value
    return head + struct.pack(order + "H", len(value)) + value


def implicit(tag: int, value: bytes) -> bytes:
    return struct.pack("<HHL", tag >> 16, tag & 0xFFFF, len(value)) + value


def opened(tag: int, vr: bytes = b"SQ") -> bytes:
    """The header of an element of undefined length."""
    return struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr + b"\0\0" + OPEN


def item(value: bytes) -> bytes:
    return ITEM + struct.pack("<L", len(value)) + value


def open_item(value: bytes) -> bytes:
    return ITEM + OPEN + value + ITEM_END


def uid(value: str) -> bytes:
    return value.encode() + b"\0" * (len(value) % 2)


ELEMENTS: dict[int, tuple[bytes, bytes]] = {
    0x00080016: (b"UI", uid(CLASS)),
    0x00080018: (b"UI", uid(IMAGE)),
    0x00080060: (b"CS", b"CT"),
    0x00100010: (b"PN", b"Case^Test "),
    0x0020000D: (b"UI", uid(STUDY)),
    0x0020000E: (b"UI", uid(SERIES)),
    0x00280010: (b"US", b"\x04\0"),
    0x00280011: (b"US", b"\x04\0"),
    0x7FE00010: (b"OW", bytes(range(32))),
}


def dataset(*more: tuple[int, bytes], without: tuple[int, ...] = (), order: str = "<") -> bytes:
    """The elements, and ``more`` before the first that has a higher tag."""
    made = [(tag, element(tag, vr, value, order=order)) for tag, (vr, value) in ELEMENTS.items() if tag not in without]
    return b"".join(content for _, content in sorted([*made, *more], key=lambda one: one[0]))


def implicit_dataset(*more: tuple[int, bytes]) -> bytes:
    made = [(tag, implicit(tag, value)) for tag, (_, value) in ELEMENTS.items()]
    return b"".join(content for _, content in sorted([*made, *more], key=lambda one: one[0]))


def file(content: bytes, syntax: str = EXPLICIT) -> bytes:
    return bytes(128) + b"DICM" + element(0x00020010, b"UI", uid(syntax)) + content


def encapsulated(*fragments: bytes, end: bytes = SEQUENCE_END) -> tuple[int, bytes]:
    return 0x7FE00010, opened(0x7FE00010, b"OB") + item(b"") + b"".join(map(item, fragments)) + end


def deflated(content: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return deflate.compress(content) + deflate.flush()


PIXELS = (0x7FE00010,)
COMPRESSED = file(dataset(encapsulated(bytes(100), b"\xff\xd8" + bytes(58)), without=PIXELS), JPEG)
WHOLE = {
    "explicit": file(dataset()),
    "implicit": file(implicit_dataset(), IMPLICIT),
    "big endian": file(dataset(order=">"), BIG_ENDIAN),
    "implicit that is called explicit": file(implicit_dataset()),
    "explicit that is called implicit": file(dataset(), IMPLICIT),
    "deflated": file(deflated(dataset()), DEFLATED),
    "deflated and padded": file(deflated(dataset()) + b"\0", DEFLATED),
    "encapsulated": COMPRESSED,
    "no preamble": file(dataset())[132:],
    "zeros behind": file(dataset()) + bytes(1),
    "many zeros behind": file(dataset()) + bytes(10_000),
    "trailing padding": file(dataset((0xFFFCFFFC, element(0xFFFCFFFC, b"OB", bytes(30))))),
    "UIDs behind the pixels": file(
        dataset(without=(0x00080018, 0x0020000D))
        + element(0x00080018, b"UI", uid(IMAGE))
        + element(0x0020000D, b"UI", uid(STUDY))
    ),
    "implicit sequences": file(
        implicit_dataset(
            (
                0x00081140,
                struct.pack("<HH", 0x0008, 0x1140) + OPEN + open_item(implicit(0x00081155, uid("1.9"))) + SEQUENCE_END,
            ),
            (0x00081199, implicit(0x00081199, item(implicit(0x00081155, uid("1.9"))))),
        ),
        IMPLICIT,
    ),
    "sequences in sequences": file(
        dataset(
            (
                0x00081140,
                opened(0x00081140) + open_item(opened(0x00081199) + open_item(b"") + SEQUENCE_END) + SEQUENCE_END,
            )
        )
    ),
    "UN of undefined length": file(
        dataset((0x00091010, opened(0x00091010, b"UN") + open_item(implicit(0x00100010, b"AA^BBB")) + SEQUENCE_END))
    ),
    "UN with explicit elements": file(
        dataset(
            (0x00091010, opened(0x00091010, b"UN") + open_item(element(0x00100010, b"PN", b"AA^BBB")) + SEQUENCE_END)
        )
    ),
    "implicit elements in a sequence of explicit ones": file(
        dataset((0x00081140, opened(0x00081140) + open_item(implicit(0x00081155, uid("1.9"))) + SEQUENCE_END))
    ),
    "file meta information in the dataset": file(
        element(0x00080005, b"CS", b"ISO_IR 100") + element(0x00020010, b"UI", uid(EXPLICIT)) + dataset()
    ),
    "explicit file meta information in an implicit dataset": file(
        implicit(0x00080005, b"ISO_IR 100")
        + element(0x00020002, b"UI", uid(CLASS))
        + element(0x00020010, b"UI", uid(EXPLICIT))
        + implicit_dataset(),
        IMPLICIT,
    ),
    "command elements": file(
        element(0x00000000, b"UL", b"\x0a\0\0\0") + element(0x00000100, b"US", b"\1\0") + dataset()
    ),
    "group lengths": file(dataset((0x00080000, element(0x00080000, b"UL", bytes(4))))),
    **{
        f"private VR {vr!r}": file(
            dataset(
                (0x00190010, element(0x00190010, b"LO", b"VENDOR 1")), (0x00191001, element(0x00191001, vr, b"ABCD"))
            )
        )
        for vr in (b"??", b"  ", b"\0\0", b"--", b"ZZ", b"\0?")
    },
    **{
        f"private VR {vr!r} with a length of 32 bits": file(
            dataset((0x00091001, struct.pack("<HH", 9, 0x1001) + vr + b"\0\0" + struct.pack("<L", size) + bytes(size)))
        )
        for vr in (b"??", b"  ", b"\0\0", b"--")
        for size in (4, 70_000)
    },
    "file meta information twice": file(element(0x00020010, b"UI", uid(EXPLICIT)) + dataset()),
    "a long sequence": file(
        dataset(
            (
                0x00081140,
                opened(0x00081140)
                + open_item(element(0x00081150, b"UI", uid(CLASS)) + element(0x00081155, b"UI", uid("1.9"))) * 60_000
                + SEQUENCE_END,
            )
        )
    ),
}
#: What is not proven whole, and must not be refused.
ODD = {
    "another program's words behind": file(dataset()) + b"\r\n-- end of file --\r\n",
    "ones behind": file(dataset()) + b"\xff" * 77,
    "no delimiter behind all frames": file(
        dataset(
            (0x00280008, element(0x00280008, b"IS", b"2 ")),
            encapsulated(b"\xff\xd8a\xff\xd9\0", b"\xff\xd8bb\xff\xd9", end=b""),
            without=PIXELS,
        ),
        JPEG,
    ),
    "no delimiter behind all frames of RLE": file(dataset(encapsulated(bytes(70), end=b""), without=PIXELS), RLE),
    "a private VR whose length leads nowhere": file(dataset() + element(0x7FE11001, b"??", b"")[:-2] + b"\x40\x40ab"),
}
CUT = {
    "frames that are missing": file(
        dataset(
            (0x00280008, element(0x00280008, b"IS", b"3 ")),
            encapsulated(b"\xff\xd8a\xff\xd9\0", b"\xff\xd8bb\xff\xd9", end=b""),
            without=PIXELS,
        ),
        JPEG,
    ),
    "a frame without its end": file(dataset(encapsulated(b"\xff\xd8aaaa", end=b""), without=PIXELS), JPEG),
    "a frame of RLE too few": file(
        dataset((0x00280008, element(0x00280008, b"IS", b"2 ")), encapsulated(bytes(70), end=b""), without=PIXELS), RLE
    ),
    "deflated whole, and cut inside": file(deflated(dataset()[:-3]), DEFLATED),
    "deflated without its end": file(deflated(dataset())[:-5], DEFLATED),
    "a private element of a Siemens scanner": file(
        dataset(
            (0x00290010, element(0x00290010, b"LO", b"SIEMENS CSA HEADER")),
            (0x00291010, element(0x00291010, b"OB", bytes(500))),
            without=PIXELS,
        )[:-100]
    ),
}


def reading(content: bytes, step: int) -> Reading:
    made = Reading()
    for at in range(0, len(content), step):
        made.feed(content[at : at + step])
    return made


@pytest.mark.parametrize("step", [1, 7, 4096, 1 << 20])
@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_is_all_there_is_proven_whole_however_it_arrives(name: str, step: int) -> None:
    if len(WHOLE[name]) > 100_000:
        step = max(step, 999)
    read = reading(WHOLE[name], step)
    assert read.end()
    instance = identify(io.BytesIO(WHOLE[name]))
    assert read.instance == instance
    assert (instance.study_instance_uid, instance.series_instance_uid) == (STUDY, SERIES)
    assert (instance.sop_instance_uid, instance.sop_class_uid) == (IMAGE, CLASS)


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", ODD)
def test_what_is_too_odd_to_tell_is_neither_refused_nor_called_proven(name: str, step: int) -> None:
    assert not reading(ODD[name], step).end()
    assert identify(io.BytesIO(ODD[name])).sop_instance_uid == IMAGE


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", CUT)
def test_what_is_cut_short_is_refused(name: str, step: int) -> None:
    with pytest.raises(NotDicom, match="cut short"):
        reading(CUT[name], step).end()
    with pytest.raises(NotDicom, match="cut short"):
        identify(io.BytesIO(CUT[name]))


@pytest.mark.parametrize(
    "name", ["explicit", "implicit", "encapsulated", "UN of undefined length", "sequences in sequences"]
)
def test_a_file_cut_at_any_byte_within_an_element_is_refused(name: str) -> None:
    content = WHOLE[name]
    ends = set(ends_by_pydicom(content))
    first = content.index(b"\x20\x00\x0e\x00") + 20  # from here on it says whose it is
    told = {at: identified_or_code(content[:at]) for at in range(first, len(content))}
    wrong = {at: one for at, one in told.items() if (one == "not_dicom") == (at in ends)}
    assert not wrong


def identified_or_code(content: bytes) -> str:
    try:
        read = reading(content, 1 << 20)
        return "whole" if read.end(is_named=False) else "odd"
    except CourierError as error:
        return error.code


def ends_by_pydicom(content: bytes) -> list[int]:
    """Where the elements of the dataset end; a file that is cut there cannot be told from a whole one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        is_implicit, is_little_endian = pydicom.dcmread(io.BytesIO(content)).original_encoding
        stream = io.BytesIO(content)
        stream.seek(start_of_dataset(content))
        elements = data_element_generator(stream, bool(is_implicit), bool(is_little_endian))
        return [stream.tell() for _ in elements]


def test_the_wheel_of_pydicom_has_many_files() -> None:
    assert len(FILES) > 150


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(WHEEL)))
def test_a_file_of_pydicom_is_proven_whole_and_refused_if_it_is_cut(path: Path) -> None:
    content = path.read_bytes()
    assert identified_or_code(content) == "whole"
    if path.name == "image_dfl.dcm":  # its elements are where no cut can be made; its last byte is a padding
        assert {identified_or_code(content[:at]) for at in range(400, len(content) - 1, 97)} == {"not_dicom"}
        return
    ends = sorted({start_of_dataset(content), *ends_by_pydicom(content)})
    told = {at: identified_or_code(content[:at]) for at in places(ends[0], len(content))}
    for at, one in told.items():
        rest = content[ends[bisect(ends, at) - 1] : at]
        if path.name in ("priv_SQ.dcm", "nested_priv_SQ.dcm") and len(rest) < 8:
            continue  # the beginning of an element of a group that no one uses
        assert one == "not_dicom" or not rest.strip(b"\0"), (at, one)
    assert list(told.values()).count("not_dicom") > len(told) // 2


def start_of_dataset(content: bytes) -> int:
    at = 132
    while content[at : at + 2] == b"\x02\x00":
        vr, length = content[at + 4 : at + 6], struct.unpack_from("<H", content, at + 6)[0]
        at += 12 + struct.unpack_from("<L", content, at + 8)[0] if vr in LONG else 8 + length
    return at


def places(start: int, size: int) -> list[int]:
    """Some places for a cut; the last of them within what has to follow pixels that are compressed."""
    return sorted({*range(start + 1, size, max(1, (size - start) // 40)), *range(max(start + 1, size - 7), size)})


# --- UIDs that come twice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0x00080019, 0x0020000E + 1, 0x00300000, 0x7FE00011, 0xFFFF0000])
@pytest.mark.parametrize(
    ("tag", "name"),
    [
        (0x00080018, "two SOP Instance UIDs"),
        (0x0020000D, "two Study Instance UIDs"),
        (0x0020000E, "two Series Instance UIDs"),
        (0x00080016, "two SOP Class UIDs"),
    ],
)
def test_a_uid_that_comes_twice_with_two_values_is_refused_wherever_the_second_stands(
    tag: int, name: str, place: int
) -> None:
    content = file(dataset((place, element(tag, b"UI", uid("1.2.9")))))
    with pytest.raises(InvalidUid, match=name):
        identify(io.BytesIO(content))
    with pytest.raises(InvalidUid, match=name):
        reading(content, 50).end()
    blame = list[CourierError]()

    def blamed(error: CourierError) -> CourierError:
        blame.append(error)
        return PacsMisanswered("blamed")

    with pytest.raises(PacsMisanswered, match="blamed"):
        list(Incoming(pieces(content, 50), blame=blamed).chunks())
    assert [error.code for error in blame] == ["invalid_uid"]


@pytest.mark.parametrize("syntax", [IMPLICIT, DEFLATED])
def test_the_same_holds_for_other_encodings(syntax: str) -> None:
    twice = dataset((0x00300000, element(0x0020000D, b"UI", uid("1.2.9"))))
    if syntax == IMPLICIT:
        twice = implicit_dataset((0x00300000, implicit(0x0020000D, uid("1.2.9"))))
    content = file(deflated(twice) if syntax == DEFLATED else twice, syntax)
    with pytest.raises(InvalidUid, match="two Study Instance UIDs"):
        identify(io.BytesIO(content))


@pytest.mark.parametrize("again", [uid(STUDY), STUDY.encode() + b"\0 ", STUDY.encode() + b" "])
def test_the_same_uid_twice_is_no_contradiction(again: bytes) -> None:
    content = file(dataset((0x0020000D, element(0x0020000D, b"UI", again))))
    assert identify(io.BytesIO(content)).study_instance_uid == STUDY


@pytest.mark.parametrize("value", ["", "1.2.3.9"])
def test_an_empty_value_and_another_are_two_values(value: str) -> None:
    content = file(
        dataset((0x0020000D, element(0x0020000D, b"UI", b"")), (0x0020000D, element(0x0020000D, b"UI", uid(value))))
    )
    with pytest.raises(InvalidUid, match="two Study Instance UIDs"):
        identify(io.BytesIO(content))


def test_a_uid_in_an_item_of_a_sequence_is_not_the_file_s() -> None:
    other = element(0x00080018, b"UI", uid("1.2.9")) + element(0x0020000D, b"UI", uid("1.2.9"))
    for sequence in (
        opened(0x00081115) + open_item(other) + SEQUENCE_END,
        element(0x00081115, b"SQ", item(other)),
        opened(0x00081115) + item(other) + SEQUENCE_END,
    ):
        assert identify(io.BytesIO(file(dataset((0x00081115, sequence))))).study_instance_uid == STUDY


def test_two_transfer_syntaxes_are_refused() -> None:
    content = file(element(0x00020010, b"UI", uid(IMPLICIT)) + dataset())
    with pytest.raises(InvalidUid, match="two Transfer Syntax UIDs"):
        identify(io.BytesIO(content))


def test_a_uid_behind_zeros_that_look_like_the_end_contradicts_too() -> None:
    content = file(dataset() + bytes(64) + element(0x0020000D, b"UI", uid("1.2.9")))
    with pytest.raises(InvalidUid, match="two Study Instance UIDs"):
        identify(io.BytesIO(content))


# --- while it passes --------------------------------------------------------------------------------------------


def pieces(content: bytes, step: int) -> Iterator[bytes]:
    return (content[at : at + step] for at in range(0, len(content), step))


def blamed(error: CourierError) -> CourierError:
    return PacsMisanswered(error.message)


@pytest.mark.parametrize("step", [9, 100, 1 << 20])
def test_the_last_bytes_of_what_is_cut_short_never_pass(step: int) -> None:
    content = WHOLE["explicit"][:-1]
    passed = bytearray()
    with pytest.raises(PacsMisanswered, match="cut short"):  # noqa: PT012 - what passes before is what is asked
        for chunk in Incoming(pieces(content, step), blame=blamed).chunks():
            passed += chunk
    assert len(passed) < len(content)
    assert content.startswith(passed)


def test_what_is_whole_passes_as_it_is_and_is_proven_only_afterwards() -> None:
    content = WHOLE["explicit"]
    image = Incoming(pieces(content, 100), blame=blamed)
    assert not image.is_proven
    assert b"".join(image.chunks()) == content
    assert (image.is_proven, image.size_bytes) == (True, len(content))
    odd = Incoming(pieces(ODD["ones behind"], 100), blame=blamed)
    assert b"".join(odd.chunks()) == ODD["ones behind"]
    assert not odd.is_proven


def test_a_digest_of_what_is_cut_short_is_none() -> None:
    assert digest_of(pieces(WHOLE["explicit"], 10)) == digest_of(iter([WHOLE["explicit"]]))
    with pytest.raises(NotDicom, match="cut short"):
        digest_of(pieces(WHOLE["explicit"][:-1], 10))


def test_a_large_image_passes_in_flat_memory_and_little_time() -> None:
    size_bytes, block = 256 << 20, bytes(1 << 18)
    head = dataset(without=PIXELS) + struct.pack("<HH2s2xL", 0x7FE0, 0x0010, b"OW", size_bytes)

    def arriving() -> Iterator[bytes]:
        yield file(head)
        for _ in range(size_bytes // len(block)):
            yield block

    read = Reading()
    tracemalloc.start()
    started = time.thread_time()
    for chunk in arriving():
        read.feed(chunk)
    assert read.end()
    assert time.thread_time() - started < 0.5
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2_000_000
