"""What a filter of studies may be, and which values match it (PS3.4 C.2.2.2). No server, no dictionary."""

from __future__ import annotations

import subprocess
import sys
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.datadict import dictionary_VR, tag_for_keyword

from courier.errors import InvalidRequest
from courier.filters import VRS, check_filters, check_selecting, read
from courier.messages import AuditJob, BatchDeleteJob, BatchDownloadJob, BatchMigrateJob, StudiesJob, read_job

VR_OF = {
    "DA": "StudyDate",
    "TM": "StudyTime",
    "DT": "AcquisitionDateTime",
    "PN": "PatientName",
    "UI": "StudyInstanceUID",
}
VR_OF |= {"LO": "StudyDescription", "CS": "ModalitiesInStudy", "IS": "NumberOfStudyRelatedInstances", "ST": "Comment"}


def matches(vr: str, value: str, *stored: Any, keyword: str = "") -> bool:
    return read(keyword or VR_OF[vr], vr, value).matches({"vr": vr, "Value": list(stored)})


def name(alphabetic: str = "", ideographic: str = "", phonetic: str = "") -> dict[str, str]:
    groups = {"Alphabetic": alphabetic, "Ideographic": ideographic, "Phonetic": phonetic}
    return {group: text for group, text in groups.items() if text}


@pytest.mark.parametrize(
    ("vr", "value", "stored"),
    [
        ("LO", "CT head", "CT head"),
        ("LO", "CT head", " CT head "),
        ("LO", "CT*", "CT head"),
        ("LO", "*head", "CT head"),
        ("LO", "C? h??d", "CT head"),
        ("LO", "*", "anything"),
        ("LO", "a.b", "a.b"),
        ("LO", "[ab]", "[ab]"),
        ("LO", "(a|b)+$", "(a|b)+$"),
        ("LO", "a[!b]*", "a[!b]c"),
        ("LO", "head, neck", "head, neck"),
        ("LO", "A\\B", "B"),
        ("LO", "Schädel", unicodedata.normalize("NFD", "Schädel")),
        ("LO", unicodedata.normalize("NFD", "Schädel"), "Schädel"),
        ("ST", "a\\b", "a\\b"),
        ("CS", "CT", "CT"),
        ("CS", "CT\\MR", "MR"),
        ("CS", "SR", "CT\\SR"),
        ("UI", "1.2", "1.2"),
        ("UI", "1.2", "1.2\0"),
        ("UI", "1.2,1.3", "1.3"),
        ("UI", "1.2\\1.3", "1.3"),
        ("DA", "20260131", "20260131"),
        ("DA", "20260101-20261231", "20260131"),
        ("DA", "20260131-20260131", "20260131"),
        ("DA", "20260131-", "20260131"),
        ("DA", "-20260131", "20260131"),
        ("DA", "20260131", "2026.01.31"),
        ("DA", "*", "20260131"),
        ("DA", "20240229", "20240229"),
        ("DA", "20260101\\20260131", "20260131"),
        ("TM", "072730", "072730"),
        ("TM", "0727", "072730.25"),
        ("TM", "07", "0727"),
        ("TM", "07-08", "085959.999999"),
        ("TM", "0727-0728", "072830"),
        ("TM", "-0727", "072730"),
        ("TM", "0727-", "0727"),
        ("TM", "072730.5", "072730.5"),
        ("TM", "072730", "07:27:30"),
        ("DT", "20260131", "20260131072730"),
        ("DT", "2026-", "20260131"),
        ("DT", "202601-202602", "20260228235959"),
        ("IS", "3", 3),
        ("IS", "3", "3 "),
        ("IS", "3", 3.0),
        ("IS", "+03", "3"),
        ("PN", "Hall^Peter", name("Hall^Peter")),
        ("PN", "Hall^Peter", name("Hall^Peter^^^")),
        ("PN", "Hall^Peter^^", name("Hall^Peter")),
        ("PN", "Hall^Peter", name("Hall ^Peter ")),
        ("PN", "HALL^peter", name("Hall^Peter")),
        ("PN", "Hall*", name("Hall^Peter")),
        ("PN", "Hall^P*", name("Hall^Peter^Maria")),
        ("PN", "*Peter", name("Hall^Peter")),
        ("PN", "*^Peter", name("Hall^Peter")),
        ("PN", "Hall^*^^Dr", name("Hall^Peter^^Dr")),
        ("PN", "Müller^Jörg", name(unicodedata.normalize("NFD", "Müller^Jörg"))),
        ("PN", "MÜLLER^*", name("Müller^Jörg")),
        ("PN", "山田^太郎", name("Yamada^Tarou", "山田^太郎", "やまだ^たろう")),
        ("PN", "Yamada^Tarou", name("Yamada^Tarou", "山田^太郎")),
        ("PN", "Yamada^Tarou=山田^太郎", name("Yamada^Tarou", "山田^太郎", "やまだ^たろう")),
        ("PN", "=山田*", name("Yamada^Tarou", "山田^太郎")),
        ("PN", "==やまだ^たろう", name("Yamada^Tarou", "山田^太郎", "やまだ^たろう")),
        ("PN", "Yamada^Tarou=山田^太郎", name("Yamada^Tarou=山田^太郎")),
        ("PN", "=山田^太郎", "=山田^太郎"),
        ("PN", "Hall^Peter", "Hall^Peter"),
        ("PN", "Hall^?eter", "Doe^Jane\\Hall^Peter"),
    ],
)
def test_a_value_that_matches(vr: str, value: str, stored: object) -> None:
    assert matches(vr, value, stored)


@pytest.mark.parametrize(
    ("vr", "value", "stored"),
    [
        ("LO", "CT head", "CT heads"),
        ("LO", "CT head", "ct head"),
        ("LO", "CT?", "CT"),
        ("LO", "a.b", "axb"),
        ("LO", "[ab]", "a"),
        ("LO", "(a|b)+", "ab"),
        ("LO", "a[!b]*", "ac"),
        ("LO", ".*", "anything"),
        ("LO", "%", "anything"),
        ("LO", "head, neck", "head"),
        ("LO", "Schadel", "Schädel"),
        ("LO", "?*", ""),
        ("ST", "a\\b", "a"),
        ("CS", "CT", "CTX"),
        ("CS", "ct", "CT"),
        ("UI", "1.2", "1.20"),
        ("UI", "1.2,1.3", "1.2,1.3"),
        ("DA", "20260131", "20260130"),
        ("DA", "20260101-20261231", "20270101"),
        ("DA", "-20260131", "20260201"),
        ("DA", "20260131-", "20260130"),
        ("DA", "-20260131", "2026"),
        ("DA", "-20260131", "unknown"),
        ("DA", "-20260131", None),
        ("TM", "0727", "0728"),
        ("TM", "072730", "0727"),
        ("TM", "0727-0728", "07"),
        ("TM", "-0728", "0729"),
        ("TM", "0727-", "0726"),
        ("TM", "0727", "unknown"),
        ("DT", "20260131", "202601"),
        ("DT", "20260131", "20260131072730+0100"),
        ("IS", "3", 33),
        ("IS", "3", "three"),
        ("IS", "1", True),
        ("PN", "Hall^Peter", name("Hall^Petra")),
        ("PN", "Hall", name("Hall^Peter")),
        ("PN", "Hall^Peter", name("Hall")),
        ("PN", "Hall^Peter", name("Hall^Peter^Maria")),
        ("PN", "Hall^^Peter", name("Hall^Peter")),
        ("PN", "H*^P*", name("Hall^Adam^Peter")),
        ("PN", "*^Peter", name("Hall^Maria^Peter")),
        ("PN", "Muller", name("Müller")),
        ("PN", "Strasse", name("Straße")),
        ("PN", "山田*", name("Yamada^Tarou")),
        ("PN", "Yamada^Tarou=鈴木*", name("Yamada^Tarou", "山田^太郎")),
        ("PN", "=Yamada^Tarou", name("Yamada^Tarou", "山田^太郎")),
        ("PN", "Yamada^Tarou=*", name("Yamada^Tarou")),
        ("PN", "^", name("Hall^Peter")),
        ("PN", "==", name("Hall^Peter")),
        ("PN", "?*", name("")),
        ("PN", "Hall", {"Alphabetic": None}),
        ("PN", "Hall", ["Hall"]),
    ],
)
def test_a_value_that_does_not(vr: str, value: str, stored: object) -> None:
    assert not matches(vr, value, stored)


@pytest.mark.parametrize(
    "element", [None, {}, {"vr": "LO"}, {"vr": "LO", "Value": []}, {"Value": [""]}, {"Value": None}]
)
@pytest.mark.parametrize(("vr", "value"), [("DA", "-20260131"), ("LO", "?*"), ("PN", "A*"), ("UI", "1.2"), ("IS", "0")])
def test_a_study_that_lacks_the_attribute_matches_a_universal_filter_alone(
    vr: str, value: str, element: object
) -> None:
    assert not read(VR_OF[vr], vr, value).matches(element)
    assert read(VR_OF[vr], vr, "*").matches(element)


def test_any_of_several_values_may_match_and_a_value_without_a_list_is_one() -> None:
    assert matches("CS", "SR", "CT", "SR")
    assert not matches("CS", "MR", "CT", "SR")
    assert read("ModalitiesInStudy", "CS", "CT").matches({"vr": "CS", "Value": "CT"})


def test_a_comma_in_a_patient_id_is_looked_for_both_as_a_separator_and_as_part_of_the_id() -> None:
    for value in ("A,B", "A, B", "B,A"):
        assert [matches("LO", value, one, keyword="PatientID") for one in ("A", "B", "C")] == [True, True, False]
    assert matches("LO", "A,B", "A,B", keyword="PatientID")
    assert not matches("LO", "A\\B", "A,B", keyword="PatientID")
    assert matches("LO", "A?B", "A,B", keyword="PatientID")
    assert not matches("LO", "A,B", "A"), "in other texts a comma is a letter"


def test_a_long_list_of_patient_ids_is_no_id() -> None:
    ids = [f"{number:04}" for number in range(1_000)]
    assert read("PatientID", "LO", ",".join(ids)).members == tuple(ids)


@pytest.mark.parametrize("form", [BatchDeleteJob, BatchDownloadJob, BatchMigrateJob])
@pytest.mark.parametrize("value", ["A,B", "DOE, 1", "A\\B,C", "A*,B"])
def test_an_order_by_a_patient_id_with_a_comma_is_refused_and_says_what_to_write(form: Any, value: str) -> None:
    more = {"destination": "s3://kept/"} if form is BatchDownloadJob else {}
    more |= {"from_server": "a", "to_server": "b"} if form is BatchMigrateJob else {}
    with pytest.raises(InvalidRequest, match=r"in quotes: 'PatientID=A\\B'") as refused:
        read_job(form, {"filters": {"PatientID": value, "StudyDate": "20040119"}, **more})
    assert value not in str(refused.value), "an ID may be a patient's"
    read_job(form, {"filters": {"PatientID": "A\\B"}, **more})


def test_lists_take_a_patient_id_with_a_comma() -> None:
    for form in (StudiesJob, AuditJob):
        assert read_job(form, {"filters": {"PatientID": "A,B"}}).filters == {"PatientID": "A,B"}


@pytest.mark.parametrize("value", ["CT,MR", "CT, MR", "C*,MR"])
def test_a_comma_between_codes_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest, match="separate several by a backslash"):
        read("ModalitiesInStudy", "CS", value)


@pytest.mark.parametrize("value", ["M\udcfcller", "\ud83d", "*\udfff*"])
def test_bytes_that_are_no_unicode_are_refused_as_a_filter(value: str) -> None:
    with pytest.raises(InvalidRequest, match="no Unicode text"):
        check_filters({"PatientName": value})


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="*?\\\0"), min_size=1))
def test_a_value_without_wildcards_matches_itself_and_nothing_longer(text: str) -> None:
    if not unicodedata.normalize("NFC", text.strip(" \0")):
        return
    assert matches("LO", text, text)
    assert not matches("LO", text, f"{text}x")
    assert not matches("LO", text, f"x{text}")


@given(st.text("*?a^=", min_size=1, max_size=40), st.text("a", max_size=40))
def test_wildcards_take_no_longer_than_the_text(pattern: str, text: str) -> None:
    matches("LO", pattern, text)


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keyword", "value", "advice"),
    [
        ("StudyDate", "2004", "YYYY0101-YYYY1231"),
        ("StudyDate", "2004-01-01", "YYYYMMDD"),
        ("StudyDate", "200401", "YYYYMMDD"),
        ("StudyDate", "2004*", "without wildcards"),
        ("StudyDate", "20040230", "calendar"),
        ("StudyDate", "20041301", "calendar"),
        ("StudyDate", "00000101", "calendar"),
        ("StudyDate", "20250229-", "calendar"),
        ("StudyDate", "20261231-20260101", "ends before it begins"),
        ("StudyDate", "20260101-20261231-", "YYYYMMDD"),
        ("StudyDate", "20260101 - 20261231", "YYYYMMDD"),
        ("StudyDate", "٢٠٢٦٠١٠١", "YYYYMMDD"),
        ("StudyDate", "-", "YYYYMMDD"),
        ("StudyDate", "today", "YYYYMMDD"),
        ("PatientBirthDate", "1970", "YYYYMMDD"),
        ("StudyTime", "7:27", "HHMMSS"),
        ("StudyTime", "0727*", "without wildcards"),
        ("StudyTime", "2460", "HHMMSS"),
        ("StudyTime", "0761", "HHMMSS"),
        ("StudyTime", "072730.1234567", "HHMMSS"),
        ("StudyTime", "2200-0600", "ends before it begins"),
        ("StudyTime", "abc", "HHMMSS"),
        ("StudyInstanceUID", "1.2.*", "digits and dots"),
        ("StudyInstanceUID", "abc", "digits and dots"),
        ("StudyInstanceUID", "1.2,,1.3", "empty value in its list"),
        ("StudyInstanceUID", "1" * 65, "64"),
        ("PatientID", "A\\", "empty value in its list"),
        ("PatientID", "", "no value"),
        ("PatientID", " ", "no value"),
        ("PatientName", "A=B=C=D", "three such groups"),
        ("PatientName", "A^B^C^D^E^F", "five components"),
        ("NumberOfStudyRelatedInstances", "1-5", "number"),
        ("NumberOfStudyRelatedInstances", "many", "number"),
        ("studydate", "20260101", "StudyDate is"),
        ("Patient Name", "A", "PatientName is"),
        ("00100020", "A", "such as StudyDate"),
    ],
)
def test_a_wrong_filter_is_refused_in_every_message_with_what_to_write(keyword: str, value: str, advice: str) -> None:
    filters, selecting = {keyword: value}, {"AccessionNumber": "7", keyword: value}
    for refused in (
        lambda: check_filters(filters),
        lambda: read_job(StudiesJob, {"filters": filters}),
        lambda: read_job(AuditJob, {"filters": filters}),
        lambda: read_job(BatchDeleteJob, {"filters": selecting}),
        lambda: read_job(BatchDownloadJob, {"filters": selecting, "destination": "file:///out"}),
        lambda: read_job(BatchMigrateJob, {"filters": selecting, "from_server": "a", "to_server": "b"}),
    ):
        with pytest.raises(InvalidRequest) as caught:
            refused()
        assert advice in caught.value.message
        assert caught.value.details["field"] == "filters"
        assert len(value) < 6 or value not in caught.value.message, "a value may name a patient"


def test_a_refusal_shows_no_secret_that_was_given_for_a_keyword() -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_filters({"https://host/x?sig=SECRET": "1"})
    assert "SECRET" not in caught.value.message


@pytest.mark.parametrize("value", ["20260230", "20260101-20260230000000", "2026-2025", "20260101+0100", "202613"])
def test_a_moment_that_cannot_be_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest):
        read("AcquisitionDateTime", "DT", value)


@pytest.mark.parametrize(
    "filters",
    [
        {"PatientName": "*"},
        {"PatientName": "**"},
        {"PatientName": "?*"},
        {"PatientName": "*?*"},
        {"PatientName": "*^*"},
        {"PatientName": "*=*"},
        {"PatientName": ""},
        {"PatientID": "-"},
        {"StudyDate": "-"},
        {"StudyDate": "*"},
        {"StudyDate": ""},
        {"PatientID": "A\\*"},
        {"PatientID": "A,*"},
        {"StudyInstanceUID": "1.2,*"},
        {"PatientID": "*", "StudyDate": "-", "PatientName": " "},
        {},
    ],
)
def test_an_order_whose_filters_choose_every_study_is_refused_and_told_of_all(filters: dict[str, str]) -> None:
    for kind, more in (
        (BatchDeleteJob, {}),
        (BatchDownloadJob, {"destination": "file:///out"}),
        (BatchMigrateJob, {"from_server": "a", "to_server": "b"}),
        (BatchMigrateJob, {"from_server": "a", "to_server": "b", "delete_source": True}),
    ):
        with pytest.raises(InvalidRequest, match="--all"):
            read_job(kind, {"filters": filters, **more})


@pytest.mark.parametrize(
    "filters", [{"PatientName": "A*"}, {"StudyDate": "19000101-"}, {"PatientID": "*", "StudyID": "1"}]
)
def test_one_filter_that_says_something_is_enough(filters: dict[str, str]) -> None:
    check_selecting(filters)
    assert read_job(BatchDeleteJob, {"filters": filters}).filters == filters


def test_what_a_producer_knows_of_vrs_is_what_the_dictionary_says() -> None:
    assert {keyword: dictionary_VR(tag_for_keyword(keyword) or 0) for keyword in VRS} == VRS


def test_checking_filters_loads_no_dicom() -> None:
    code = "import producer.client, producer.cli.orders, courier.filters, sys; sys.exit('pydicom' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
