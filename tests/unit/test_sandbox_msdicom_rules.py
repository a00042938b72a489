from __future__ import annotations

import io
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from sandbox.datasets import JsonStyle, NotDicomFile, read_header, whole
from sandbox.msdicom.query import RESOURCES, BadQuery, fold
from sandbox.msdicom.query import parse as parse_query
from sandbox.msdicom.rules import (
    accepts_dicom_json,
    check_file,
    is_date,
    is_uid,
    lenient_media_types,
    strict_media_type,
)
from sandbox.store import Condition
from sandbox.synthetic import image, new_uid


@pytest.mark.parametrize(
    ("uid", "valid"),
    [
        ("1.2.3", True),
        ("1.02.3", True),
        ("1.2.3  ", True),
        ("1" * 64, True),
        ("1" * 65, False),
        ("1.2.", False),
        ("1.2a", False),
        ("", False),
        ("11|", False),
        ("\u0661.2", False),
    ],
)
def test_uids_are_digits_and_dots_with_a_digit_at_the_end(uid: str, valid: bool) -> None:
    assert is_uid(uid) is valid


def test_dates_are_in_the_calendar() -> None:
    dates = ("20240229", "20230229", "2024022", "2024-2-9", "00000101")
    assert [is_date(text) for text in dates] == [True, False, False, False, False]


@pytest.mark.parametrize(
    "text",
    ["multipart/related; type=application/dicom", "application", "a/b; c", 'a/b; c="d', "a/b c", "a/b;c=d;;", ""],
)
def test_a_malformed_media_type_is_none(text: str) -> None:
    assert strict_media_type(text) is None


def test_a_media_type_is_read_with_its_parameters() -> None:
    kind = strict_media_type('Multipart/Related; Type="application/dicom";boundary="a;b\\"c"')
    assert kind is not None
    assert kind.name == "multipart/related"
    assert kind.parameters == {"type": "application/dicom", "boundary": 'a;b"c'}


def test_one_malformed_element_voids_the_whole_accept_list() -> None:
    assert accepts_dicom_json(["application/dicom+json"])
    assert accepts_dicom_json(["text/html", "*/*"])
    assert not accepts_dicom_json(["application/dicom+json, multipart/related; type=application/octet-stream"])
    assert not accepts_dicom_json([])


def test_retrieves_read_their_accept_list_leniently_and_by_quality() -> None:
    header = "application/dicom; q=0.5, multipart/related; type=application/dicom; transfer-syntax=*, */*"
    ranges = lenient_media_types([header])
    assert [one.name for one in ranges] == ["multipart/related", "*/*", "application/dicom"]
    assert ranges[0].parameters["type"] == "application/dicom"


def written(ds: Dataset) -> bytes:
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


def test_version_2_names_every_invalid_attribute_by_its_path_and_keeps_it_out_of_the_metadata() -> None:
    ds = pydicom.dcmread(io.BytesIO(image(new_uid())))
    inner = Dataset()
    with pydicom.config.disable_value_validation():
        inner.CodeValue = "much longer than sixteen characters"
        inner.CodeMeaning = "fine"
        ds.ProcedureCodeSequence = [inner]
        ds.PatientAge = "old"
    header = read_header(written(ds))
    verdict = check_file(header, 2, None)
    assert set(verdict.warnings) == {(0x00081032, 0, 0x00080100), (0x00101010,)}
    shown = whole(header, JsonStyle(bulk=lambda _path: None), verdict.warnings)
    assert "00101010" not in shown
    assert shown["00081032"]["Value"] == [{"00080104": {"vr": "LO", "Value": ["fine"]}}]
    assert check_file(header, 1, None).errors == {}


def test_ordinary_samples_are_stored_without_complaint() -> None:
    for name in ("CT_small.dcm", "MR_small.dcm", "MR_small_jp2klossless.dcm", "JPEG-lossy.dcm"):
        path = get_testdata_file(name)
        assert isinstance(path, str)
        verdict = check_file(read_header(Path(path)), 2, None)
        assert (verdict.errors, verdict.warnings) == ({}, {}), name


def test_a_file_cut_short_is_no_dicom_unless_the_cut_is_between_two_elements() -> None:
    whole_file = image(new_uid(), side=8)
    for keep in range(len(whole_file)):
        try:
            header = read_header(whole_file[:keep])
        except NotDicomFile:
            continue
        last = header.elements[max(header.elements)]
        assert last.value_tell + len(last.value) == keep


def test_numbers_in_text_become_numbers_where_they_parse() -> None:
    ds = pydicom.dcmread(io.BytesIO(image(new_uid())))
    with pydicom.config.disable_value_validation():
        ds.add_new(0x00180050, "LO", "1.50")
        ds.add_new(0x00181150, "LO", "abc\\12")
    content = written(ds).replace(b"\x18\x00\x50\x00LO", b"\x18\x00\x50\x00DS")
    content = content.replace(b"\x18\x00\x50\x11LO", b"\x18\x00\x50\x11IS")
    shown = whole(read_header(content), JsonStyle(bulk=lambda _path: None))
    assert shown["00180050"]["Value"] == [1.5]
    assert shown["00181150"]["Value"] == ["abc", 12]


def query(resource: str, *parameters: tuple[str, str]) -> tuple[Condition, ...]:
    return parse_query(RESOURCES[resource], 2, parameters, {}).conditions


def test_filters_become_conditions_on_folded_text() -> None:
    assert query("studies", ("PatientName", "HALL^Á")) == (Condition("patient_name", "=", "hall^a"),)
    assert query("studies", ("00100020", "Á1")) == (Condition("patient_id", "=", "á1"),)
    assert query("studies", ("StudyDate", "-20200101")) == (Condition("study_date", "<=", "20200101"),)
    assert query("studies", ("PatientID", "a*")) == (Condition("patient_id", "=", "a*"),)
    assert fold("00100020", "A\0") == "a"


@pytest.mark.parametrize(
    ("resource", "name"),
    [("studies", "SeriesInstanceUID"), ("studies/series", "PatientID"), ("studies/series/instances", "Modality")],
)
def test_each_resource_has_filters_of_its_own(resource: str, name: str) -> None:
    with pytest.raises(BadQuery):
        query(resource, (name, "1"))
