"""Which encodings of an image say the same, and that nothing else does."""

from __future__ import annotations

import copy
import io
import re
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pydicom.data
import pytest
from pydicom import dcmread, dcmwrite
from pydicom.datadict import keyword_for_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    JPEG2000,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
)

from courier.errors import InvalidUid, MissingUid, NotDicom
from worker.dicom.fingerprints import Fingerprint, Rewrites, Table, differing, equal, fingerprint, is_of, table
from worker.dicom.instances import identify
from worker.pacs.dcm4chee import REWRITES as DCM4CHEE
from worker.pacs.generic import GenericDicomWeb
from worker.pacs.msdicom import MsDicom
from worker.pacs.orthanc import Orthanc

NOTHING = Rewrites()
LATERALITY = "Laterality (0020,0060)"


def sample() -> Dataset:
    """An image with all that encodings treat in their own ways."""
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, "1.2.3.4"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3", "1.2.3.5"
    ds.PatientID, ds.PatientName = "ABC", "Square^Synthetic"
    ds.AccessionNumber, ds.StudyDescription = "", "odd"
    ds.Laterality = "R"
    ds.ImageComments = "x" * 3
    inner = Dataset()
    inner.CodeValue, inner.CodeMeaning = "12345", "A meaning"
    outer = Dataset()
    outer.PurposeOfReferenceCodeSequence = Sequence([inner])
    outer.ReferencedSOPInstanceUID = "1.2.3.4.56"
    ds.ReferencedImageSequence = Sequence([outer, copy.deepcopy(outer)])
    ds.ProcedureCodeSequence = Sequence([])
    block = ds.private_block(0x0029, "PACS COURIER", create=True)
    block.add_new(0x10, "LO", "private")
    block.add_new(0x11, "OB", b"\x01\x02\x03\x04")
    nested = Dataset()
    nested.CodeValue = "777"
    block.add_new(0x12, "SQ", Sequence([nested]))
    ds.Rows = ds.Columns = 2
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.add_new(0x00280120, "US", 1)  # PixelPaddingValue
    ds.add_new(0x7FE00010, "OW", bytes(range(8)))
    return ds


def encoded(ds: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    ds = copy.deepcopy(ds)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = CTImageStorage, "1.2.3.4"
    ds.file_meta.TransferSyntaxUID = syntax
    file = io.BytesIO()
    dcmwrite(file, ds, enforce_file_format=True)
    return file.getvalue()


def of(content: bytes, apart: frozenset[int] = frozenset()) -> Fingerprint:
    stream = io.BytesIO(content)
    return fingerprint(stream, identify(stream).transfer_syntax_uid, apart=apart)


def same(one: bytes, other: bytes, rewrites: tuple[Rewrites, Rewrites] = (NOTHING, NOTHING)) -> bool:
    """Judged by both ways, which have to agree."""
    apart = rewrites[0].tags | rewrites[1].tags
    ours, theirs = of(one, apart), of(other, apart)
    found = equal(ours, theirs, rewrites=rewrites)
    assert found == equal(theirs, ours, rewrites=rewrites[::-1])
    assert found == (not named(one, other, rewrites))
    return found


def named(one: bytes, other: bytes, rewrites: tuple[Rewrites, Rewrites] = (NOTHING, NOTHING)) -> list[str]:
    apart = rewrites[0].tags | rewrites[1].tags
    streams = [io.BytesIO(content) for content in (one, other)]
    tables = [table(stream, identify(stream).transfer_syntax_uid, apart=apart) for stream in streams]
    return differing(tables[0], tables[1], rewrites=rewrites)


def changed(change: Callable[[Dataset], object]) -> Dataset:
    ds = sample()
    change(ds)
    return ds


# What may be written in several ways


def undefined_lengths(ds: Dataset) -> None:
    for element in ds:
        if element.VR == "SQ":
            element.is_undefined_length = True
            for item in element.value:
                item.is_undefined_length_sequence_item = True
                undefined_lengths(item)


def with_group_lengths() -> bytes:
    """pydicom writes none, so one is put before the first element of group 0020 by hand."""
    content = encoded(sample())
    at = content.index(b"\x20\x00\x0d\x00UI")
    return content[:at] + b"\x20\x00\x00\x00UL\x04\x00\x10\x00\x00\x00" + content[at:]


def replaced(old: bytes, new: bytes) -> bytes:
    content = encoded(sample())
    assert content.count(old) == 1
    return content.replace(old, new)


def with_unknown_vr() -> bytes:
    """A short text as a writer leaves it that does not know the element: UN has a length of four bytes."""
    return replaced(b"LO\x04\x00odd ", b"UN\0\0\x04\0\0\0odd ")


LEGAL: dict[str, Callable[[], bytes]] = {
    "implicit VR": lambda: encoded(sample(), ImplicitVRLittleEndian),
    "deflated": lambda: encoded(sample(), DeflatedExplicitVRLittleEndian),
    "sequences of undefined length": lambda: encoded(changed(undefined_lengths)),
    "implicit and of undefined length": lambda: encoded(changed(undefined_lengths), ImplicitVRLittleEndian),
    "group lengths": with_group_lengths,
    "a VR that was left open": with_unknown_vr,
    "no preamble": lambda: encoded(sample())[132:],
    "another preamble": lambda: b"II*\0" + encoded(sample())[4:],
    "text padded with NUL": lambda: replaced(b"LO\x04\x00odd ", b"LO\x04\x00odd\0"),
    "text padded with more blanks": lambda: replaced(b"LO\x04\x00odd ", b"LO\x06\x00odd   "),
    "text without its padding": lambda: replaced(b"LO\x04\x00odd ", b"LO\x03\x00odd"),
    "a UID padded with a blank": lambda: replaced(b"UI\x08\x001.2.3.5\0", b"UI\x08\x001.2.3.5 "),
    "NULs behind the last element": lambda: encoded(sample()) + b"\0" * 21,
    "other meta information": lambda: encoded(sample()).replace(b"PYDICOM", b"DCM4CHE"),
}


@pytest.mark.parametrize("way", LEGAL)
def test_another_encoding_says_the_same(way: str) -> None:
    assert same(encoded(sample()), LEGAL[way]())


def test_two_legal_encodings_are_equal_to_each_other_as_well() -> None:
    assert same(LEGAL["deflated"](), LEGAL["implicit and of undefined length"]())


def test_a_sequence_hidden_in_un_is_compared_item_by_item() -> None:
    """An UN holds what implicit VR would (PS3.5 6.2.2), with a defined length or without."""
    implicit = encoded(sample(), ImplicitVRLittleEndian)
    start = implicit.index(b"\x29\x00\x12\x10")
    length = int.from_bytes(implicit[start + 4 : start + 8], "little")
    value = implicit[start + 8 : start + 8 + length]
    assert value.startswith(b"\xfe\xff\x00\xe0")
    undefined = implicit[:start] + b"\x29\x00\x12\x10\xff\xff\xff\xff" + value
    undefined += b"\xfe\xff\xdd\xe0\0\0\0\0" + implicit[start + 8 + length :]
    assert same(implicit, undefined)
    assert same(encoded(sample()), undefined)


def test_a_value_that_only_looks_like_an_item_is_compared_by_its_bytes() -> None:
    def with_private(value: bytes) -> bytes:
        return encoded(changed(lambda ds: ds[0x00291011].__setattr__("value", value)), ImplicitVRLittleEndian)

    looks = b"\xfe\xff\x00\xe0\x40\0\0\0abcdefgh"
    assert same(with_private(looks), with_private(looks))
    assert not same(with_private(looks), with_private(looks[:-1] + b"X"))


@pytest.mark.parametrize("vr", [b"OB", b"UN", b"\0\0"])
def test_what_only_bears_the_number_of_a_group_length_is_compared(vr: bytes) -> None:
    """With letters that are no VR its length covers elements behind it, up to pixels that read as padding."""

    def with_element(patient_id: str) -> bytes:
        ds = sample()
        ds.PatientID, ds.PixelData = patient_id, bytes(400_000)
        content = encoded(ds)
        at = content.index(b"\x10\x00\x10\x00PN")
        value = b"\x04\x00\0\0\0\0" if vr == b"\0\0" else b"\0\0\x06\0\0\0" + patient_id.encode()
        return content[:at] + b"\x09\x00\x00\x00" + vr + value + content[at:]

    assert same(with_element("ABCDEF"), with_element("ABCDEF"))
    other = with_element("ABCDEX")
    if vr != b"\0\0":  # in nothing but this element
        other = other.replace(b"LO\x06\x00ABCDEX", b"LO\x06\x00ABCDEF")
    assert not same(with_element("ABCDEF"), other)


def encapsulated(*frames: bytes, syntax: str = JPEG2000Lossless, table_of_offsets: bool = True) -> bytes:
    ds = sample()
    ds.NumberOfFrames = len(frames)
    ds.PixelData = encapsulate(list(frames), has_bot=table_of_offsets)
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    return encoded(ds, syntax)


def test_compressed_pixel_data_are_compared_fragment_by_fragment() -> None:
    assert same(encapsulated(b"abcd", b"efgh"), encapsulated(b"abcd", b"efgh"))
    assert named(encapsulated(b"abcd", b"efgh"), encapsulated(b"abcd", b"efgX")) == ["PixelData (7FE0,0010)"]
    assert not same(encapsulated(b"abcdefgh"), encapsulated(b"abcd", b"efgh"))


# What makes another image of it


def remove(keyword: str) -> Callable[[Dataset], object]:
    return lambda ds: delattr(ds, keyword)


def put(keyword: str, value: object) -> Callable[[Dataset], object]:
    return lambda ds: setattr(ds, keyword, value)


DIFFERENT: dict[str, tuple[Callable[[Dataset], object], str]] = {
    "another value": (put("Laterality", "L"), LATERALITY),
    "a value that is gone": (remove("Laterality"), LATERALITY),
    "a value that is emptied": (put("Laterality", ""), LATERALITY),
    "an empty element that is gone": (remove("AccessionNumber"), "AccessionNumber (0008,0050)"),
    "an empty element that got a value": (put("AccessionNumber", "7"), "AccessionNumber (0008,0050)"),
    "a new element": (put("BodyPartExamined", "HEAD"), "BodyPartExamined (0018,0015)"),
    "a new empty element": (put("BodyPartExamined", ""), "BodyPartExamined (0018,0015)"),
    "a blank before a text": (put("StudyDescription", " odd"), "StudyDescription (0008,1030)"),
    "another character set": (put("SpecificCharacterSet", "ISO_IR 192"), "SpecificCharacterSet (0008,0005)"),
    "another time": (put("AcquisitionTime", "101112"), "AcquisitionTime (0008,0032)"),
    "a number of another sign": (
        lambda ds: ds.__setitem__(0x00280120, DataElement(0x00280120, "SS", 1)),
        "PixelPaddingValue (0028,0120)",
    ),
    "two numbers for one": (put("PixelPaddingValue", [1, 0]), "PixelPaddingValue (0028,0120)"),
    "nested": (
        lambda ds: setattr(ds.ReferencedImageSequence[1].PurposeOfReferenceCodeSequence[0], "CodeValue", "54321"),
        "ReferencedImageSequence (0008,1140) > PurposeOfReferenceCodeSequence (0040,A170) > CodeValue (0008,0100)",
    ),
    "an element more in an item": (
        lambda ds: setattr(ds.ReferencedImageSequence[0], "PatientID", "X"),
        "ReferencedImageSequence (0008,1140) > PatientID (0010,0020)",
    ),
    "an empty sequence that is gone": (remove("ProcedureCodeSequence"), "ProcedureCodeSequence (0008,1032)"),
    "an empty item": (
        lambda ds: ds.ProcedureCodeSequence.append(Dataset()),
        "ProcedureCodeSequence (0008,1032)",
    ),
    "items in another order": (
        lambda ds: (
            setattr(ds.ReferencedImageSequence[0], "ReferencedSOPInstanceUID", "1.2.3.4.57"),
            ds.ReferencedImageSequence.reverse(),
        ),
        "ReferencedImageSequence (0008,1140) > ReferencedSOPInstanceUID (0008,1155)",
    ),
    "private text": (lambda ds: ds[0x00291010].__setattr__("value", "PRIVATE"), "private (0029,1010)"),
    "private bytes": (lambda ds: ds[0x00291011].__setattr__("value", b"\x01\x02\x03\x05"), "private (0029,1011)"),
    "private bytes, one NUL more": (
        lambda ds: ds[0x00291011].__setattr__("value", b"\x01\x02\x03\x04\0\0"),
        "private (0029,1011)",
    ),
    "a private sequence": (
        lambda ds: setattr(ds[0x00291012].value[0], "CodeValue", "778"),
        "private (0029,1012) > CodeValue (0008,0100)",
    ),
    "pixels": (put("PixelData", bytes(range(1, 9))), "PixelData (7FE0,0010)"),
    "another patient": (put("PatientID", "XYZ"), "PatientID (0010,0020)"),
}


@pytest.mark.parametrize("rewrites", [(NOTHING, NOTHING), (NOTHING, DCM4CHEE), (DCM4CHEE, DCM4CHEE)])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
@pytest.mark.parametrize("what", DIFFERENT)
def test_one_element_that_differs_is_found_and_named(
    what: str, syntax: str, rewrites: tuple[Rewrites, Rewrites]
) -> None:
    change, name = DIFFERENT[what]
    one, other = encoded(sample(), syntax), encoded(changed(change), syntax)
    if what == "a number of another sign" and syntax == ImplicitVRLittleEndian:
        assert one == other, "implicit VR does not say it"
        return
    if what == "items in another order":
        one = encoded(
            changed(lambda ds: setattr(ds.ReferencedImageSequence[0], "ReferencedSOPInstanceUID", "1.2.3.4.57")), syntax
        )
    assert not same(one, other, rewrites)
    found = named(one, other, rewrites)
    assert name in found
    assert not any(value in " ".join(found) for value in ("XYZ", "54321", "PRIVATE"))


def test_no_value_is_told_and_no_list_is_endless() -> None:
    many = sample()
    for number in range(16, 40):
        many.add_new(0x00091000 + number, "LO", "secret")
    found = named(encoded(sample()), encoded(many))
    assert (len(found), found[-1]) == (11, "14 more")
    assert "secret" not in str(found)


@pytest.mark.parametrize("syntax", [ExplicitVRBigEndian, JPEG2000, JPEG2000Lossless])
def test_another_transfer_syntax_is_another_image_unless_it_is_plain_little_endian(syntax: str) -> None:
    pixels = sample().PixelData
    other = encoded(sample(), syntax) if syntax == ExplicitVRBigEndian else encapsulated(pixels, syntax=syntax)
    assert named(encoded(sample()), other)[0] == "TransferSyntaxUID (0002,0010)"
    assert not same(encoded(sample()), other)
    assert same(other, other)


def test_big_endian_images_are_compared_among_themselves() -> None:
    other = changed(put("Rows", 3))
    assert named(encoded(sample(), ExplicitVRBigEndian), encoded(other, ExplicitVRBigEndian)) == ["Rows (0028,0010)"]


# What a dialect may rewrite


def trail(*when: str) -> Sequence:
    items = []
    for one in when:
        item = Dataset()
        item.AttributeModificationDateTime = one
        items.append(item)
    return Sequence(items)


ADDED: dict[str, Callable[[Dataset], object]] = {
    "PatientID": remove("PatientID"),
    "PatientID where it was empty": put("PatientID", ""),
    "IssuerOfPatientID": lambda _: None,
    "PatientComments": lambda _: None,
    "OriginalAttributesSequence": lambda _: None,
}


@pytest.mark.parametrize("what", ADDED)
def test_what_dcm4chee_adds_is_no_difference_where_the_original_has_none(what: str) -> None:
    original = changed(ADDED[what])
    returned = copy.deepcopy(original)
    keyword = what.split(" ", maxsplit=1)[0]
    setattr(returned, keyword, trail("20260101") if keyword.endswith("Sequence") else "ADDED")
    one, other = encoded(original), encoded(returned, ImplicitVRLittleEndian)
    assert same(one, other, (NOTHING, DCM4CHEE))
    assert same(other, one, (DCM4CHEE, NOTHING)), "on its way back it is DCM4CHEE that has added it"
    assert same(other, one, (DCM4CHEE, DCM4CHEE))
    assert not same(one, other), "any other server is not known to add it"
    assert not same(other, one, (NOTHING, DCM4CHEE)), "nor is DCM4CHEE known to take it away"


@pytest.mark.parametrize("keyword", ["PatientID", "IssuerOfPatientID", "PatientComments"])
def test_what_the_original_has_comes_back_as_it_was(keyword: str) -> None:
    one, other = (encoded(changed(put(keyword, value))) for value in ("ONE", "OTHER"))
    for rewrites in ((NOTHING, DCM4CHEE), (DCM4CHEE, NOTHING), (DCM4CHEE, DCM4CHEE)):
        assert not same(one, other, rewrites)
        assert named(one, other, rewrites)[0].startswith(keyword)


def tabled(content: bytes, apart: frozenset[int]) -> Table:
    stream = io.BytesIO(content)
    return table(stream, identify(stream).transfer_syntax_uid, apart=apart)


def may_be_of_dcm4chee(given: Dataset, returned: Dataset) -> bool:
    one, other = (tabled(encoded(ds), DCM4CHEE.known) for ds in (given, returned))
    return is_of(DCM4CHEE, one, other, rewrites=(NOTHING, NOTHING))


def other_ids(ds: Dataset) -> None:
    item = Dataset()
    item.PatientID = "X1"
    ds.OtherPatientIDsSequence = Sequence([item])


CHANGED: dict[str, Callable[[Dataset], object]] = {
    "SpecificCharacterSet": put("SpecificCharacterSet", "ISO_IR 192"),
    "AcquisitionTime": put("AcquisitionTime", "101010"),
    "PatientSex": put("PatientSex", "F"),
    "OtherPatientIDsSequence": other_ids,
}


@pytest.mark.parametrize("keyword", CHANGED)
def test_what_dcm4chee_was_seen_to_change_counts_as_a_difference_and_is_named_as_its_doing(keyword: str) -> None:
    given, returned = sample(), changed(CHANGED[keyword])
    for rewrites in ((NOTHING, DCM4CHEE), (DCM4CHEE, NOTHING), (DCM4CHEE, DCM4CHEE)):
        assert not same(encoded(given), encoded(returned), rewrites)
    assert may_be_of_dcm4chee(given, returned)
    put("PixelData", bytes(8))(returned)
    assert not may_be_of_dcm4chee(given, returned), "pixels are not"


@pytest.mark.parametrize("what", ADDED)
def test_what_dcm4chee_adds_is_named_as_its_doing_where_the_original_has_none(what: str) -> None:
    given = changed(ADDED[what])
    returned, keyword = copy.deepcopy(given), what.split(" ", maxsplit=1)[0]
    setattr(returned, keyword, trail("20260101") if keyword.endswith("Sequence") else "ADDED")
    assert may_be_of_dcm4chee(given, returned)
    assert not may_be_of_dcm4chee(returned, given), "nor does it take anything away"
    if not keyword.endswith("Sequence"):
        assert not may_be_of_dcm4chee(changed(put(keyword, "OTHER")), returned), "nor put another in its place"
    assert not may_be_of_dcm4chee(given, given), "where nothing differs, it has done nothing"


def test_dcm4chee_may_append_to_the_trail_of_changes_and_change_none_of_it() -> None:
    one, more, less = (
        encoded(changed(put("OriginalAttributesSequence", trail(*when))))
        for when in (("2024", "2025"), ("2024", "2025", "2026"), ("2025", "2026"))
    )
    assert same(one, more, (NOTHING, DCM4CHEE))
    assert not same(more, one, (NOTHING, DCM4CHEE))
    assert not same(one, less, (NOTHING, DCM4CHEE))


def test_only_the_elements_of_the_image_itself_may_be_added_not_those_of_its_items() -> None:
    other = changed(lambda ds: setattr(ds.ReferencedImageSequence[0], "PatientComments", "X"))
    assert not same(encoded(sample()), encoded(other), (NOTHING, DCM4CHEE))


def test_dcm4chee_may_drop_the_length_of_its_pixel_data_and_not_add_one() -> None:
    long = encoded(changed(lambda ds: ds.add_new(0x7FE00003, "UV", 8)))
    assert same(long, encoded(sample()), (NOTHING, DCM4CHEE))
    assert not same(encoded(sample()), long, (NOTHING, DCM4CHEE))
    assert not same(long, encoded(sample()))


# The list in the code and the list for people

ODDITIES = (Path(__file__).parents[2] / "docs" / "pacs-oddities.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("heading", "rewrites"),
    [("What DCM4CHEE rewrites", DCM4CHEE), ("What a plain DICOMweb server rewrites", GenericDicomWeb.rewrites)],
)
def test_the_docs_list_what_the_code_leaves_out_of_the_comparison(heading: str, rewrites: Rewrites) -> None:
    section = ODDITIES.partition(f"\n### {heading}\n")[2].partition("\n#")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.split("\n") if line[:1] == "|"]
    listed: dict[str, set[int]] = {"added": set(), "dropped": set()}
    for element, condition, *_ in rows[2:]:
        if found := re.fullmatch(r"(\w+) \(([0-9A-F]{4}),([0-9A-F]{4})\)", element):
            tag = int(found[2] + found[3], 16)
            assert found[1] == keyword_for_tag(tag)
            listed[condition.split(" ")[0].strip(",")].add(tag)
    assert (listed["added"], listed["dropped"]) == (rewrites.added, rewrites.dropped)
    assert [row[0] for row in rows[2:4]] == ["group 0002", "group lengths (gggg,0000)"]


@pytest.mark.parametrize("dialect", [MsDicom, Orthanc])
def test_a_server_that_keeps_bytes_rewrites_nothing(dialect: type) -> None:
    assert (dialect.keeps_bytes, dialect.rewrites) == (True, NOTHING)


# Files as they are


@pytest.mark.filterwarnings("ignore")
def test_every_file_that_pydicom_comes_with_equals_itself_when_it_is_written_anew() -> None:
    """Reading all of its values converts each; pydicom infers VRs that were left open, and writes its own lengths."""
    counted = 0
    for path in sorted(Path(pydicom.data.__file__).parent.glob("test_files/*.dcm")):
        content = path.read_bytes()
        try:
            identify(io.BytesIO(content))
        except (NotDicom, MissingUid, InvalidUid):
            continue
        ds, file = dcmread(io.BytesIO(content)), io.BytesIO()
        list(ds.iterall())
        dcmwrite(file, ds)
        assert same(content, file.getvalue()), path.name
        counted += 1
    assert counted > 60


@pytest.mark.parametrize("way", ["explicit", "implicit and of undefined length", "encapsulated"])
def test_an_image_that_ends_early_has_no_fingerprint_or_another(way: str) -> None:
    ways = {**LEGAL, "explicit": lambda: encoded(sample()), "encapsulated": lambda: encapsulated(b"abcd")}
    content = ways[way]()
    for cut in range(1, 200):
        stream = io.BytesIO(content[:-cut])
        try:
            found = fingerprint(stream, identify(io.BytesIO(content)).transfer_syntax_uid, apart=frozenset())
        except NotDicom:
            continue
        assert found.elements != of(content).elements, cut


@pytest.mark.parametrize("deflated", [b"", b"\xff\xff\xff", zlib.compress(b"no raw stream")])
def test_what_cannot_be_inflated_has_no_fingerprint(deflated: bytes) -> None:
    content = encoded(sample(), DeflatedExplicitVRLittleEndian)
    start = 132 + 12 + int.from_bytes(content[140:144], "little")
    with pytest.raises(NotDicom, match="cannot be read to its end"):
        fingerprint(io.BytesIO(content[:start] + deflated), DeflatedExplicitVRLittleEndian, apart=frozenset())


def test_sequences_nested_without_end_are_refused_and_not_followed() -> None:
    deep = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 5_000
    content = encoded(sample())
    at = content.index(b"\x20\x00\x0d\x00UI")
    with pytest.raises(NotDicom, match="not nested"):
        fingerprint(io.BytesIO(content[:at] + deep), ExplicitVRLittleEndian, apart=frozenset())


def test_an_image_of_any_size_takes_the_same_memory() -> None:
    ds = sample()
    ds.PixelData = bytes(64 * 1_048_576)
    content = io.BytesIO(encoded(ds))
    tracemalloc.start()
    try:
        fingerprint(content, ExplicitVRLittleEndian, apart=frozenset())
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * 1_048_576
