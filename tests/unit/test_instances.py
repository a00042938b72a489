"""What `identify` makes of files: pydicom's own samples as ground truth, and everything that can be wrong with one."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
)

from courier.errors import CourierError, InvalidUid, MissingUid, NotDicom
from worker.dicom.instances import Instance, identify, title_code

SAMPLE_FOLDER = Path(str(get_testdata_file("CT_small.dcm"))).parent
IDENTITY = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")


SAMPLES = sorted(path.name for path in SAMPLE_FOLDER.glob("*.dcm"))
NUMBERS = {"study": "1.2.840.99.1", "series": "1.2.840.99.1.2", "instance": "1.2.840.99.1.2.3"}


def sample(name: str) -> bytes:
    return (SAMPLE_FOLDER / name).read_bytes()


def synthetic(transfer_syntax_uid: UID = ExplicitVRLittleEndian, **changes: object) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, NUMBERS["instance"]
    ds.StudyInstanceUID, ds.SeriesInstanceUID = NUMBERS["study"], NUMBERS["series"]
    ds.Rows = ds.Columns = 16
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = transfer_syntax_uid
    ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = NUMBERS["instance"]
    for keyword, value in changes.items():
        setattr(ds, keyword, value)
    return ds


def as_file(ds: Dataset) -> bytes:
    stream = io.BytesIO()
    ds.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def element(tag: int, vr: bytes, value: bytes) -> bytes:
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, len(value)) + value


def with_raw(tag: int, value: bytes) -> bytes:
    """A minimal file whose one UID has exactly these bytes, which pydicom would not write."""
    values = {
        0x00080016: CTImageStorage.encode() + b"\0",
        0x00080018: b"1.2.3\0",
        0x0020000D: b"1.2\0",
        0x0020000E: b"1.2.4\0",
        tag: value,
    }
    meta = element(0x00020010, b"UI", ExplicitVRLittleEndian.encode() + b"\0")
    return bytes(128) + b"DICM" + meta + b"".join(element(key, b"UI", values[key]) for key in sorted(values))


def identified(data: bytes) -> Instance:
    stream = io.BytesIO(data)
    instance = identify(stream)
    assert stream.tell() == 0
    return instance


def identity_by_pydicom(name: str) -> Instance | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ds = pydicom.dcmread(SAMPLE_FOLDER / name, stop_before_pixels=True)
            return Instance(*(ds[keyword].value for keyword in IDENTITY), ds.file_meta.TransferSyntaxUID)
        except (pydicom.errors.InvalidDicomError, KeyError, AttributeError):
            return None


@pytest.mark.parametrize("name", [name for name in SAMPLES if "truncated" not in name])
def test_identify_says_of_a_sample_what_pydicom_says_and_refuses_what_pydicom_cannot_name(name: str) -> None:
    expected = identity_by_pydicom(name)
    if expected is None:
        with pytest.raises((NotDicom, MissingUid)):
            identified(sample(name))
    else:
        assert identified(sample(name)) == expected


def test_most_samples_have_an_identity_by_pydicom() -> None:
    assert sum(identity_by_pydicom(name) is not None for name in SAMPLES) >= 50


def in_explicit(*more: bytes) -> bytes:
    """A file with the SOP UIDs, then ``more``, then the UIDs of study and series."""
    image, study = with_raw(0x00080018, b"1.2.3\0"), struct.pack("<HH", 0x20, 0xD)
    at = image.index(study)
    return image[:at] + b"".join(more) + image[at:]


LEADS_NOWHERE = struct.pack("<HH2sHL", 9, 0x1001, b"  ", 7, 99)


@pytest.mark.parametrize(
    "data",
    [
        in_explicit(LEADS_NOWHERE),
        in_explicit(b"\xff" * 40),
        in_explicit(bytes(128) + b"DICM"),
        in_explicit(struct.pack("<HH2sH", 9, 0x1001, b"??", 3), b"abcdefg"),
    ],
)
def test_what_cannot_be_followed_up_to_its_uids_is_not_said_to_have_none(data: bytes) -> None:
    with pytest.raises(NotDicom, match="cannot be followed to their end") as caught:
        identified(data)
    assert "has no" not in caught.value.message
    assert "cut short" not in caught.value.message


def test_pydicom_s_reader_is_asked_where_ours_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    content = sample("CT_small.dcm")
    expected, files = identified(content), []

    def read(*args: Any, **options: Any) -> Dataset:
        files.append(args[0])
        return pydicom.dcmread(*args, **options)

    monkeypatch.setattr("worker.dicom.instances.dcmread", read)
    monkeypatch.setattr("worker.dicom.structure.Walk.__init__.__kwdefaults__", {"max_steps": 15})
    assert identified(content) == expected
    assert len(files) == 1


def test_nothing_deflated_is_given_to_pydicom_s_reader_which_would_inflate_all_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.dicom.instances.dcmread", lambda *_, **__: pytest.fail("pydicom was asked"))
    monkeypatch.setattr("worker.dicom.instances._INFLATED_STEPS", 3)
    monkeypatch.setattr("worker.dicom.instances._STEPS_PER_BYTE", 0)
    whole = sample("image_dfl.dcm")
    with pytest.raises(NotDicom, match="cannot be followed to their end"):
        identified(whole)
    with pytest.raises(NotDicom, match="deflated"):
        title_code(io.BytesIO(whole))


@pytest.mark.parametrize("keep", [0, 128])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_a_dataset_without_file_meta_information_is_called_so(keep: int, syntax: UID) -> None:
    stream = io.BytesIO()
    ds = synthetic(syntax, SpecificCharacterSet="ISO_IR 100")
    del ds.file_meta
    ds.save_as(stream, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=True)
    with pytest.raises((NotDicom, MissingUid), match=r"without file meta information|Transfer Syntax UID"):
        identified((bytes(128) + b"DICM" if keep else b"") + stream.getvalue())


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_each_way_of_writing_a_dataset_is_read(syntax: UID) -> None:
    ds = synthetic(syntax, PixelData=bytes(512), BitsAllocated=16)
    ds.ReferencedImageSequence = Sequence([Dataset(), Dataset()])
    ds["ReferencedImageSequence"].is_undefined_length = True
    instance = identified(as_file(ds))
    assert instance.transfer_syntax_uid == syntax
    assert instance.sop_instance_uid == NUMBERS["instance"]
    assert instance.has_preamble


def test_a_file_that_starts_at_its_meta_group_is_read_and_said_to_lack_the_preamble() -> None:
    whole = sample("CT_small.dcm")
    instance = identified(whole[132:])
    assert not instance.has_preamble
    assert instance.sop_instance_uid == identified(whole).sop_instance_uid


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>Please log in</body></html>", "HTML page"),
        (b"\xef\xbb\xbf\r\n  <html lang='en'>", "HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
        (b'{"error": "no"}', "JSON"),
        (b"PK\x03\x04" + bytes(300), "ZIP"),
        (b"\x1f\x8b\x08" + bytes(300), "gzip"),
        (b"%PDF-1.7", "PDF"),
        (b"\xff\xd8\xff\xe0", "JPEG"),
        (b"\x89PNG\r\n", "PNG"),
        (b"hello", "not DICOM"),
        (bytes(5000), "not DICOM"),
        (b"\x02\x00", "not DICOM"),
        (sample("no_meta.dcm"), "not DICOM"),
    ],
)
def test_what_is_not_dicom_is_refused_with_a_guess_at_what_it_is(data: bytes, hint: str) -> None:
    with pytest.raises(NotDicom, match=hint):
        identified(data)


def test_a_dicomdir_is_refused_with_the_advice_to_upload_what_it_lists() -> None:
    with pytest.raises(MissingUid, match="upload the files that it lists"):
        identified(sample("dicomdirtests/DICOMDIR"))


@pytest.mark.parametrize("name", ["MR_truncated.dcm", "rtplan_truncated.dcm"])
def test_a_sample_cut_short_is_refused(name: str) -> None:
    with pytest.raises(NotDicom, match="cut short"):
        identified(sample(name))


@pytest.mark.parametrize("name", ["CT_small.dcm", "JPEG2000.dcm", "MR_small_bigendian.dcm", "waveform_ecg.dcm"])
@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 0.77, 0.99])
def test_a_file_cut_anywhere_is_refused(name: str, share: float) -> None:
    whole = sample(name)
    with pytest.raises(CourierError) as refused:
        identified(whole[: int(len(whole) * share)])
    assert refused.value.code in ("not_dicom", "missing_uid")


@pytest.mark.parametrize("missing_bytes", [1, 2, 7, 8, 9, 300])
def test_encapsulated_pixels_without_their_end_are_cut_short(missing_bytes: int) -> None:
    ds = synthetic(JPEG2000Lossless, PixelData=encapsulate([bytes(100), bytes(200)]), BitsAllocated=8)
    whole = as_file(ds)
    assert identified(whole).transfer_syntax_uid == JPEG2000Lossless
    with pytest.raises(NotDicom, match="cut short"):
        identified(whole[:-missing_bytes])


@pytest.mark.parametrize("padding", [1, 2, 100])
def test_zeros_behind_the_last_element_are_no_fault(padding: int) -> None:
    compressed = synthetic(JPEG2000Lossless, PixelData=encapsulate([bytes(100)]), BitsAllocated=8)
    for whole in (as_file(compressed), as_file(synthetic())):
        assert identified(whole + bytes(padding)).study_instance_uid == NUMBERS["study"]


def test_a_deflated_dataset_without_its_end_is_cut_short() -> None:
    whole = sample("image_dfl.dcm")
    with pytest.raises(NotDicom, match="cut short"):
        identified(whole[: len(whole) // 2])


def test_a_dataset_that_only_claims_to_be_deflated_is_refused() -> None:
    plain = as_file(synthetic())
    deflated = as_file(synthetic(DeflatedExplicitVRLittleEndian))
    meta_end = 132 + 12 + struct.unpack_from("<L", deflated, 140)[0]
    with pytest.raises(NotDicom, match="cannot be inflated"):
        identified(deflated[:meta_end] + b"\xff" * 50 + plain)


@pytest.mark.parametrize(
    ("keyword", "name"),
    [
        ("StudyInstanceUID", r"Study Instance UID \(0020,000D\)"),
        ("SeriesInstanceUID", r"Series Instance UID \(0020,000E\)"),
        ("SOPInstanceUID", r"SOP Instance UID \(0008,0018\)"),
        ("SOPClassUID", r"SOP Class UID \(0008,0016\)"),
    ],
)
def test_a_missing_or_empty_uid_is_named(keyword: str, name: str) -> None:
    absent, empty = synthetic(), synthetic()
    delattr(absent, keyword)
    setattr(empty, keyword, "")
    for ds in (absent, empty):
        with pytest.raises(MissingUid, match=name):
            identified(as_file(ds))


def test_all_missing_uids_are_named_at_once() -> None:
    ds = synthetic()
    del ds.StudyInstanceUID, ds.SOPInstanceUID
    with pytest.raises(MissingUid, match=r"Study Instance UID .* and no SOP Instance UID"):
        identified(as_file(ds))


def test_a_file_without_transfer_syntax_is_refused_by_that_name() -> None:
    with pytest.raises(MissingUid, match="Transfer Syntax UID"):
        identified(sample("meta_missing_tsyntax.dcm"))


@pytest.mark.parametrize(
    "value",
    [
        b"1." + b"2" * 63 + b"\0",
        b"1.2." * 40 + b"3\0",
        b"1." * 2000 + b"3\0",
        b"1.2.abc\0",
        b"1.2.\xe9.3\0",
        b"1..2\0",
        b".1.2\0",
        b"1.2.\0\0",
        b" 1.2",
        b"1.2\\1.3\0",
        b"1.2\r\nX: y",
        b"1.2/../3\0\0",
        b"DOE^JOHN",
    ],
)
def test_a_uid_that_breaks_the_rules_is_refused_by_name_and_never_quoted(value: bytes) -> None:
    with pytest.raises(InvalidUid, match=r"SOP Instance UID \(0008,0018\)") as refused:
        identified(with_raw(0x00080018, value))
    assert value[:6].decode("latin-1") not in str(refused.value)


@pytest.mark.parametrize("value", [b"1.2.3\0", b"1.2.3 ", b"1.2.3\0\0\0", b"1.2.3\0 ", b"1.2.3"])
def test_padding_behind_a_uid_is_not_part_of_it(value: bytes) -> None:
    assert identified(with_raw(0x00080018, value)).sop_instance_uid == "1.2.3"


def test_a_uid_of_64_characters_is_allowed() -> None:
    uid = "1." + "2" * 62
    assert identified(with_raw(0x0020000D, uid.encode())).study_instance_uid == uid


def test_a_transfer_syntax_that_is_no_uid_never_gets_into_a_header() -> None:
    meta = element(0x00020010, b"UI", b"1.2\r\nEvil: yes ")
    with pytest.raises(InvalidUid, match="Transfer Syntax UID"):
        identified(bytes(128) + b"DICM" + meta + with_raw(0x00080018, b"1.2.3\0")[166:])


def test_sequences_nested_ten_thousand_deep_are_walked_without_recursion() -> None:
    item, sequence = b"\xfe\xff\x00\xe0\xff\xff\xff\xff", b"\x40\x00\x75\x02SQ\0\0\xff\xff\xff\xff"
    ends = b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    nested = (sequence + item) * 10_000
    base = with_raw(0x00080018, b"1.2.3\0")
    assert identified(base + nested + ends * 10_000).sop_instance_uid == "1.2.3"
    with pytest.raises(NotDicom, match="cut short"):
        identified(base + nested)


def test_an_unknown_sequence_of_undefined_length_holds_implicit_elements() -> None:
    inner = struct.pack("<HHL", 0x0010, 0x0010, 6) + b"AA^BBB"
    unknown = b"\x09\x00\x10\x10UN\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + inner
    unknown += b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    plain = with_raw(0x00080018, b"1.2.3\0")
    split = plain.index(b"\x20\x00\x0d\x00UI")
    assert identified(plain[:split] + unknown + plain[split:]).study_instance_uid == "1.2"


def test_a_deflation_bomb_costs_neither_memory_nor_time() -> None:
    bomb = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    header = with_raw(0x00080018, b"1.2.3\0")
    dataset = header[header.index(b"\x08\x00\x16\x00UI") :]
    filler = b"\xe1\x7f\x10\x10OB\0\0" + struct.pack("<L", 128 << 20)
    body = bomb.compress(dataset + filler) + b"".join(bomb.compress(bytes(1 << 20)) for _ in range(128)) + bomb.flush()
    meta = element(0x00020010, b"UI", DeflatedExplicitVRLittleEndian.encode())
    data = bytes(128) + b"DICM" + meta + body
    tracemalloc.start()
    started = time.thread_time()
    instance = identified(data)
    assert time.thread_time() - started < 1
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert instance.sop_instance_uid == "1.2.3"
    assert peak_bytes < 2 * 1_048_576


def test_a_gigabyte_of_pixels_is_never_read(tmp_path: Path) -> None:
    pixels = b"\xe0\x7f\x10\x00OW\0\0" + struct.pack("<L", 1 << 30)
    path = tmp_path / "large.dcm"
    path.write_bytes(with_raw(0x00080018, b"1.2.3\0") + pixels)
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + (1 << 30))
        tracemalloc.start()
        instance = identify(stream)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert instance.sop_instance_uid == "1.2.3"
        assert peak_bytes < 1_048_576
        stream.truncate(path.stat().st_size - 1)
        with pytest.raises(NotDicom, match="cut short"):
            identify(stream)


def test_a_million_tiny_elements_end_the_check_and_not_the_patience() -> None:
    data = with_raw(0x00080018, b"1.2.3\0") + element(0x00410010, b"LO", b"") * 1_000_000
    started = time.thread_time()
    assert identified(data).sop_instance_uid == "1.2.3"
    assert time.thread_time() - started < 3


@settings(max_examples=300, deadline=None)  # it would count what neighbours take; see below
@given(data=st.data())
def test_a_damaged_file_ends_as_an_instance_or_as_an_error_of_ours(data: st.DataObject) -> None:
    whole = bytearray(
        sample(data.draw(st.sampled_from(("CT_small.dcm", "JPEG2000.dcm", "image_dfl.dcm", "rtplan.dcm"))))
    )
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, min(len(whole) - 1, 2000)))] = data.draw(st.integers(0, 255))
    started = time.thread_time()
    with suppress(NotDicom, MissingUid, InvalidUid):
        identify(io.BytesIO(bytes(whole)))
    assert time.thread_time() - started < 1


@given(st.binary(max_size=400))
def test_any_bytes_behind_a_preamble_end_as_an_error_of_ours(rest: bytes) -> None:
    for data in (
        rest,
        bytes(128) + b"DICM" + rest,
        bytes(128) + b"DICM\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\0" + rest,
    ):
        with suppress(NotDicom, MissingUid, InvalidUid):
            identify(io.BytesIO(data))
