"""How each product is asked for studies by filters, and by which of them nothing is ordered. No server."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

import pytest

from courier.errors import InvalidRequest
from courier.settings import ServerSettings, ServerType
from worker.pacs import dcm4chee, generic, msdicom, orthanc
from worker.pacs.matching import Matching, StudyQuery, read_filter, tag_of, vr_of

MATCHING: Mapping[ServerType, Matching] = {
    "msdicom": msdicom.MATCHING,
    "dcm4chee": dcm4chee.MATCHING,
    "orthanc": orthanc.MATCHING,
    "dicomweb": generic.MATCHING,
}


def query(server_type: ServerType, filters: Mapping[str, str]) -> StudyQuery:
    server = ServerSettings(name="ward", type=server_type, url="http://host/x")
    return StudyQuery.of(filters, MATCHING[server_type], server)


def sent_queries(server_type: ServerType, filters: Mapping[str, str]) -> list[list[tuple[str, str]]]:
    """The conditions of each query that is sent, without the attributes that are asked for."""
    one, offset, queries = query(server_type, filters), 0, []
    while True:
        parameters, _ = one.parameters(offset)
        queries.append([pair for pair in parameters if pair[0] != "includefield"])
        after = one.page([], offset=offset, limit=1, step=1).next_offset
        if after is None:
            return queries
        offset = after


def study(uid: str, **values: Any) -> dict[str, Any]:
    elements = {tag_of(keyword): {"vr": vr_of(keyword), "Value": [value]} for keyword, value in values.items()}
    return {"0020000D": {"vr": "UI", "Value": [uid]}, **elements}


# --- what is sent -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server_type", MATCHING)
def test_the_server_is_asked_to_return_what_is_filtered(server_type: ServerType) -> None:
    parameters, _ = query(server_type, {"PatientID": "7", "Manufacturer": "Acme", "StudyDate": "*"}).parameters(0)
    fields = [value for name, value in parameters if name == "includefield"]
    names = ["PatientID", "Manufacturer", "StudyDate"]
    assert fields == ([tag_of(name) for name in names] if server_type == "dicomweb" else names)


@pytest.mark.parametrize("server_type", MATCHING)
def test_what_the_server_does_not_match_or_matches_every_study_is_not_sent(server_type: ServerType) -> None:
    assert sent_queries(server_type, {"PatientID": "7", "Modality": "CT", "StudyDate": "*"}) == [[("PatientID", "7")]]


@pytest.mark.parametrize("server_type", MATCHING)
def test_a_list_of_patient_ids_is_one_query_for_each(server_type: ServerType) -> None:
    date = ("StudyDate", "20260101")
    for value in ("7\\8", "7\\8\\7"):
        filters = {"PatientID": value, "StudyDate": "20260101"}
        assert sent_queries(server_type, filters) == [[("PatientID", "7"), date], [("PatientID", "8"), date]]


@pytest.mark.parametrize("server_type", MATCHING)
def test_a_patient_id_with_a_comma_is_asked_for_as_it_is_too(server_type: ServerType) -> None:
    literal = "7*8" if server_type == "orthanc" else "7,8"
    assert sent_queries(server_type, {"PatientID": "7,8"}) == [[("PatientID", value)] for value in ("7", "8", literal)]


def test_each_takes_uids_in_its_own_way() -> None:
    filters = {"StudyInstanceUID": "1.1,1.2"}
    first, second = ("StudyInstanceUID", "1.1"), ("StudyInstanceUID", "1.2")
    assert sent_queries("dcm4chee", filters) == [[first, second]]
    assert sent_queries("orthanc", filters) == [[("StudyInstanceUID", "1.1,1.2")]]
    assert sent_queries("msdicom", filters) == sent_queries("dicomweb", filters) == [[first], [second]]


def test_lists_are_multiplied_and_too_many_are_refused() -> None:
    filters = {"PatientID": "7\\8", "ModalitiesInStudy": "CT\\MR"}
    values = [[value for _, value in one] for one in sent_queries("dicomweb", filters)]
    assert values == [["7", "CT"], ["7", "MR"], ["8", "CT"], ["8", "MR"]]
    many = ",".join(map(str, range(1001)))
    with pytest.raises(InvalidRequest, match="1000 queries"):
        query("dcm4chee", {"PatientID": many}).parameters(0)


@pytest.mark.parametrize(
    ("keyword", "value", "sent"),
    [
        ("PatientName", "Hall^Peter", "*Hall*Peter*"),
        ("PatientName", "Müller^J?rg", "*M*ller*J*rg*"),
        ("PatientName", "Yamada^Tarou=山田^太郎", "*Yamada*Tarou*"),
        ("PatientName", "山田^太郎", "*"),
        ("StudyDescription", "Schädel, nativ", "Sch*del*nativ"),
        ("StudyDate", "20260101-", "20260101-"),
        ("StudyTime", "0727", "0727-072759.999999"),
        ("StudyTime", "-07", "-075959.999999"),
        ("StudyTime", "072730", "072730-072730.999999"),
        ("StudyTime", "072730.5", "072730.5"),
        ("StudyTime", "07-", "07-"),
    ],
)
def test_orthanc_is_asked_for_more_than_is_meant(keyword: str, value: str, sent: str) -> None:
    assert sent_queries("orthanc", {keyword: value}) == [[(keyword, sent)]]


@pytest.mark.parametrize("server_type", ["dcm4chee", "dicomweb"])
def test_of_the_groups_of_a_name_the_first_is_sent_and_the_rest_is_matched_here(server_type: ServerType) -> None:
    assert sent_queries(server_type, {"PatientName": "YAMADA^TAROU=山田^太郎"}) == [[("PatientName", "YAMADA^TAROU*")]]
    assert sent_queries(server_type, {"PatientName": "=山田^太郎", "StudyID": "1"}) == [[("StudyID", "1")]]
    with pytest.raises(InvalidRequest):
        query(server_type, {"PatientName": "*=山田^太郎"}).check_order()


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("Müller^j*", "M*LLER^J*"),
        ("Mu\u0308ller", "M*LLER"),
        ("M?ller", "M*LLER"),
        ("Straße", "STRA*E"),
        ("山田^太郎", "山田^太郎"),
        ("Łukasz^Ø", "ŁUKASZ^Ø"),
        ("김^철수", "김^철수"),
        ("Ö", "Ö"),
    ],
)
def test_dcm4chee_is_asked_for_names_in_capitals_and_for_any_letter_that_has_two_spellings(
    name: str, sent: str
) -> None:
    assert sent_queries("dcm4chee", {"PatientName": name}) == [[("PatientName", sent)]]
    assert sent_queries("dcm4chee", {"PatientID": name}) == [[("PatientID", unicodedata.normalize("NFC", name))]]


@pytest.mark.parametrize("filters", [{"PatientName": "Hall*"}, {"PatientName": "=山田"}, {"StudyID": "1"}])
def test_msdicom_is_asked_for_whole_values_and_the_rest_is_matched_here(filters: Mapping[str, str]) -> None:
    with pytest.raises(InvalidRequest):
        query("msdicom", filters).check_asked()
    narrowed = query("msdicom", {**filters, "StudyDate": "20260101-"})
    narrowed.check_asked()
    assert [pair for pair in narrowed.parameters(0)[0] if pair[0] != "includefield"] == [("StudyDate", "20260101-")]


# --- what of it matches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("server_type", MATCHING)
def test_rows_that_contradict_or_lack_what_is_filtered_are_dropped(server_type: ServerType) -> None:
    rows = [study("1.1", PatientID="7"), study("1.2", PatientID="8"), study("1.3")]
    page = query(server_type, {"PatientID": "7"}).page(rows, offset=0, limit=10, step=3)
    assert (page.studies, page.dropped, page.lacking, page.next_offset) == (rows[:1], 2, (), 3)


def test_what_no_row_has_is_said() -> None:
    rows = [study("1.1", PatientID="7"), study("1.2", PatientID="7")]
    page = query("dicomweb", {"PatientID": "7", "Manufacturer": "Acme"}).page(rows, offset=0, limit=10, step=2)
    assert (page.studies, page.dropped, page.lacking) == ([], 2, ("Manufacturer",))


def test_what_dcm4chee_matches_without_showing_it_is_listed_as_it_says() -> None:
    rows = [study("1.1"), study("1.2", SeriesDescription="knee")]
    page = query("dcm4chee", {"SeriesDescription": "head"}).page(rows, offset=0, limit=10, step=2)
    assert (page.studies, page.dropped) == (rows[:1], 1)
    with pytest.raises(InvalidRequest, match=r"does not show SeriesDescription.*use StudyDescription"):
        query("dcm4chee", {"SeriesDescription": "head", "PatientID": "7"}).check_order()


def test_pages_of_one_query_follow_those_of_another_with_offsets_of_their_own() -> None:
    one, offset, rows = query("dcm4chee", {"PatientID": "7\\8"}), 0, [study("1.1", PatientID="7")]
    page = one.page(rows, offset=offset, limit=1, step=1)
    assert one.parameters(page.next_offset or 0)[1] == 1
    page = one.page([], offset=page.next_offset or 0, limit=1, step=1)
    parameters, at = one.parameters(page.next_offset or 0)
    assert (parameters[0], at) == (("PatientID", "8"), 0)
    assert one.page([], offset=page.next_offset or 0, limit=1, step=1).next_offset is None
    with pytest.raises(InvalidRequest, match="cursor"):
        one.parameters(5 * 10**9)


# --- what is not ordered ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("server_type", MATCHING)
@pytest.mark.parametrize(
    ("keyword", "value", "instead"),
    [
        ("Modality", "CT", "ModalitiesInStudy"),
        ("SeriesDate", "20260101", "StudyDate"),
        ("SOPInstanceUID", "1.2", "StudyInstanceUID"),
        ("NumberOfStudyRelatedInstances", "1", ""),
    ],
)
def test_nothing_is_ordered_by_a_key_that_alone_narrows_nothing(
    server_type: ServerType, keyword: str, value: str, instead: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"ward does not match {keyword}") as caught:
        query(server_type, {keyword: value}).check_order()
    assert caught.value.server_name == "ward"
    assert caught.value.details["keyword"] == keyword
    assert caught.value.details.get("instead", "") == instead
    assert (f"use {instead} instead" if instead else "it matches StudyDate") in caught.value.message or not instead
    query(server_type, {keyword: value, "StudyDate": "20260101-"}).check_order()


@pytest.mark.parametrize("server_type", MATCHING)
@pytest.mark.parametrize("value", ["*", "?*", "*\\7", "-"])
def test_a_filter_that_says_nothing_narrows_nothing(server_type: ServerType, value: str) -> None:
    with pytest.raises(InvalidRequest):
        query(server_type, {"Modality": "CT", "PatientID": value}).check_order()


def test_a_value_that_the_server_would_misread_narrows_nothing_there() -> None:
    with pytest.raises(InvalidRequest, match="whole values"):
        query("msdicom", {"PatientName": "Hall*"}).check_order()
    query("msdicom", {"PatientName": "Hall*", "StudyDate": "20260101"}).check_order()
    with pytest.raises(InvalidRequest, match="Modality"):
        query("orthanc", {"PatientName": "山田", "Modality": "CT"}).check_order()
    query("orthanc", {"PatientName": "山田"}).check_order()


def test_texts_that_orthanc_shows_without_all_letters_are_no_ground_for_an_order() -> None:
    with pytest.raises(InvalidRequest, match="does not show Manufacturer"):
        query("orthanc", {"PatientID": "7", "Manufacturer": "Acme"}).check_order()
    query("orthanc", {"PatientID": "7", "InstitutionName": "Acme"}).check_order()


@pytest.mark.parametrize(
    ("keyword", "nearest"),
    [
        ("PatientsName", "PatientName"),
        ("StudyDat", "StudyDate"),
        ("Modalitys", "Modality"),
        ("StudyDates", "StudyDate"),
    ],
)
def test_a_misspelt_keyword_is_refused_with_the_nearest(keyword: str, nearest: str) -> None:
    with pytest.raises(InvalidRequest, match=f"no DICOM keyword; {nearest} is"):
        read_filter(keyword, "1")


@pytest.mark.parametrize("keyword", ["NoSuchThing", "ReferencedStudySequence", "PixelData"])
def test_what_studies_cannot_be_filtered_by_is_refused(keyword: str) -> None:
    with pytest.raises(InvalidRequest):
        read_filter(keyword, "1")


# --- several values where the standard has one --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keyword", "value", "stored", "does"),
    [
        ("StudyDate", "-20041231", ["20040119", "20060101"], False),
        ("StudyDate", "-20061231", ["20040119", "20060101"], True),
        ("StudyDate", "20040119", ["20040119\\20060101"], False),
        ("PatientID", "A", ["A", "B"], False),
        ("PatientID", "A", ["A", "A"], True),
        ("PatientID", "A\\B", ["A\\B"], True),
        ("PatientName", "Hall*", [{"Alphabetic": "Hall^P"}, {"Alphabetic": "Wood^P"}], False),
        ("StudyTime", "1011", ["101112", ""], True),
        ("ModalitiesInStudy", "CT", ["CT", "SR"], True),
        ("OtherPatientNames", "Hall*", [{"Alphabetic": "Hall^P"}, {"Alphabetic": "Wood^P"}], True),
    ],
)
def test_each_value_has_to_match_where_the_standard_has_one(
    keyword: str, value: str, stored: list[Any], does: bool
) -> None:
    assert read_filter(keyword, value).matches({"vr": vr_of(keyword), "Value": stored}) is does
