"""The small pure functions below the dialects: statuses, waits, DICOM JSON, paths, filters. No server."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest

from courier.errors import (
    CourierError,
    InvalidRequest,
    InvalidUid,
    PacsMisanswered,
    PacsRejected,
    PacsUnauthorized,
    PacsUnavailable,
)
from courier.filters import read
from courier.messages import check_uid
from courier.settings import ServerSettings
from worker.pacs import dcm4chee, dicomjson, msdicom, odd_json, orthanc
from worker.pacs.connections import idle_limit_s
from worker.pacs.dicomweb import DicomWeb, path_of
from worker.pacs.matching import StudyQuery
from worker.pacs.protocol import Found
from worker.pacs.transport import Answer, Request, Transport, kind_of_status, retry_after_s

SERVER = ServerSettings.model_validate({"name": "one", "type": "msdicom", "url": "http://127.0.0.1:1"})


class Canned:
    """A transport that has one answer to everything."""

    base_path = ""
    server = SERVER

    def __init__(self, document: object) -> None:
        self._body = json.dumps(document).encode()

    def exchange(self, request: Request) -> Answer:
        return Answer(200, {}, self._body)

    def error(self, kind: type[CourierError], sentence: str, **more: Any) -> CourierError:
        return kind(sentence, **more)


def web_that_answers(document: object) -> DicomWeb:
    return DicomWeb(cast(Transport, Canned(document)))


KINDS: dict[type[CourierError], list[int]] = {
    PacsUnauthorized: [401, 403],
    PacsUnavailable: [408, 424, 425, 429, 500, 502, 503, 504, 507, 599],
    PacsMisanswered: [100, 201, 206, 301, 302, 304, 307, 308, 404, 405, 410, 501, 505],
    PacsRejected: [400, 402, 406, 409, 411, 412, 413, 414, 415, 417, 421, 422, 451],
}


@pytest.mark.parametrize(("kind", "status"), [(kind, status) for kind in KINDS for status in KINDS[kind]])
def test_an_unexpected_status_becomes_its_error(kind: type[CourierError], status: int) -> None:
    assert kind_of_status(status) is kind


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("7", 7.0),
        ("Thu, 01 Jan 1970 00:01:10 GMT", 60.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("soon", None),
        ("-5", None),
        ("²", None),
        ("٣", None),
        ("9" * 5000, float("inf")),
        ("Thu, 01 Jan 99999999999999999999 00:00:00 GMT", None),
        ("Thu, 01 Jan 2026 00:00:00 +99999999999999", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(header: str | None, seconds: float | None) -> None:
    assert retry_after_s(header, now=10.0) == seconds


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 15.0),
        ("timeout=1", 0.5),
        ("timeout=5, max=100", 2.5),
        ("max=100", 15.0),
        ("timeout=600", 15.0),
        ("x", 15.0),
        ("timeout=²", 15.0),
        ("timeout=" + "9" * 5000, 15.0),
    ],
)
def test_an_idle_connection_is_trusted_half_as_long_as_the_server_keeps_it(header: str | None, seconds: float) -> None:
    assert idle_limit_s(header) == seconds


@pytest.mark.parametrize(
    ("element", "number"),
    [
        ({"vr": "IS", "Value": [3]}, 3),
        ({"vr": "IS", "Value": ["3"]}, 3),
        ({"vr": "DS", "Value": [3.0]}, 3),
        ({"vr": "DS", "Value": ["3.0 "]}, 3),
        ({"vr": "IS", "Value": [None]}, None),
        ({"vr": "IS", "Value": []}, None),
        ({"vr": "IS", "Value": ["many"]}, None),
        ({"vr": "FL", "Value": ["-Infinity"]}, None),
        ({"vr": "IS"}, None),
        ("3", None),
        (None, None),
    ],
)
def test_a_number_is_read_however_it_is_written(element: Any, number: int | None) -> None:
    assert dicomjson.number({"00201208": element}, "00201208") == number


@pytest.mark.parametrize(
    "element", [{"vr": "SQ"}, {"vr": "SQ", "Value": None}, {"vr": "SQ", "Value": [None, "x"]}, None]
)
def test_a_sequence_without_items_has_none(element: Any) -> None:
    assert dicomjson.items({"00081199": element}, "00081199") == []


@pytest.mark.parametrize(
    ("found", "path"),
    [
        (Found("study", "1.1"), "/studies/1.1"),
        (Found("series", "1.1", "1.2"), "/studies/1.1/series/1.2"),
        (Found("image", "1.1", "1.2", "1.3"), "/studies/1.1/series/1.2/instances/1.3"),
    ],
)
def test_the_path_of_an_object_holds_its_parents(found: Found, path: str) -> None:
    assert path_of(found) == path


@pytest.mark.parametrize(
    "uid", ["*", "", "1.2,1.3", "1.2*", "1.2\n", "1..2", ".1", "1.", "a.b", "1." + "2" * 63, "١.٢"]
)
def test_a_uid_that_would_match_more_than_itself_is_never_asked_for(uid: str) -> None:
    with pytest.raises(InvalidUid):
        check_uid(uid)


@pytest.mark.parametrize("uid", ["../../other", "..", "1.2/3", "1.2?x=1", "1.2\r\n", "1 2", "١.٢", "1" * 65])
def test_a_uid_in_an_answer_that_would_lead_the_next_question_elsewhere_is_no_answer(uid: str) -> None:
    ds = {tag: {"vr": "UI", "Value": [value]} for tag, value in (("0020000D", uid), ("0020000E", "1.2"))}
    with pytest.raises(PacsMisanswered):
        web_that_answers([ds]).find("series", "1.2")
    with pytest.raises(PacsMisanswered):
        list(web_that_answers([{"00080018": {"Value": [uid]}}]).instances(Found("series", "1.1", "1.2"), page=10))


@pytest.mark.parametrize("filters", [{"Foo": "1"}, {"limit": "1"}, {"PatientID": " "}, {"PatientID": ""}])
def test_a_filter_that_is_none_is_refused(filters: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest):
        StudyQuery.of(filters, msdicom.MATCHING, SERVER)


def test_a_filter_that_the_server_does_not_match_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="Modality"):
        StudyQuery.of({"Modality": "CT"}, msdicom.MATCHING, SERVER).check_asked()


@pytest.mark.parametrize("value", ["A*", "A?", "1.2\\*3", "<b>"])
def test_msdicom_is_not_asked_for_what_it_takes_literally(value: str) -> None:
    with pytest.raises(InvalidRequest):
        StudyQuery.of({"PatientID": value}, msdicom.MATCHING, SERVER).check_asked()


@pytest.mark.parametrize(
    ("base", "path"),
    [
        ("/v2", "/health/check"),
        ("/v1", "/health/check"),
        ("/gateway/v2/partitions/ward-7", "/gateway/health/check"),
        ("", "/health/check"),
    ],
)
def test_msdicoms_health_report_stands_outside_the_versions(base: str, path: str) -> None:
    assert msdicom.health_path(base) == path


def test_the_calls_of_the_whole_archive_stand_above_its_application_entities() -> None:
    assert dcm4chee.archive_path("/dcm4chee-arc/aets/DCM4CHEE/rs") == "/dcm4chee-arc"


@pytest.mark.parametrize(("base", "root"), [("/dicom-web", ""), ("/pacs/dicom-web", "/pacs")])
def test_orthancs_rest_api_stands_beside_its_dicomweb_root(base: str, root: str) -> None:
    assert orthanc.rest_root(base) == root


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"errorMessage":"No such Application Entity: X"}', "No such Application Entity: X"),
        (b'{"errorMessage":"Study "1.2" is not there"}', 'Study "1.2" is not there'),
        (b"java.lang.NullPointerException\n\tat org.dcm4chee", "status 500"),
        (b"", "status 500"),
    ],
)
def test_the_archives_words_are_read_though_they_are_no_json(body: bytes, message: str) -> None:
    assert dcm4chee.error_message(Answer(500, {}, body)) == message


GB = 10**9


@pytest.mark.parametrize(
    ("systems", "total", "free"),
    [
        ([], None, None),
        ([{"dcmStorageID": "fs1", "totalSpace": 10 * GB, "usableSpace": 4 * GB}], 10 * GB, 4 * GB),
        ([{"dcmStorageID": n, "totalSpace": 10 * GB, "usableSpace": 4 * GB} for n in "ab"], 10 * GB, 4 * GB),
        (
            [
                {"dcmStorageID": "a", "totalSpace": 10 * GB, "usableSpace": 4 * GB},
                {"dcmStorageID": "b", "totalSpace": 20 * GB, "usableSpace": 5 * GB},
            ],
            30 * GB,
            9 * GB,
        ),
        ([{"dcmStorageID": "s3"}], None, None),
    ],
)
def test_the_archives_storage_is_summed_and_never_invented(
    systems: list[dict[str, Any]], total: int | None, free: int | None
) -> None:
    state = dcm4chee.storage_state(systems)
    assert (state.total_bytes, state.free_bytes) == (total, free)
    assert state.note


@pytest.mark.parametrize(
    ("value", "sent"),
    [("1C*", "1C*"), ("Hall^Peter", "Hall*Peter"), ("A B", "A*B"), ("A,B", "A*B"), ("A?B", "A*B"), ("ä&=%", "*")],
)
def test_orthanc_is_asked_in_characters_that_need_no_encoding(value: str, sent: str) -> None:
    assert orthanc.unencoded_value(read("StudyDescription", "LO", value), value) == sent


@pytest.mark.parametrize(
    ("name", "wanted", "matches"),
    [
        ("Hall^Peter", "hall^peter", True),
        ("Hall=Peter", "Hall^Peter", False),
        ("Hall^Peter", "Hall^P*", True),
        ("Hall^Peter", "Hall^Pete?", True),
        ("Hall^Peter.", "Hall^Peter", False),
        ("B C", "A B\\B C", True),
        ("", "Hall^Peter", False),
    ],
)
def test_what_orthanc_matched_too_widely_is_left_out(name: str, wanted: str, matches: bool) -> None:
    ds = {"00100010": {"vr": "PN", "Value": [{"Alphabetic": name}]}}
    query = StudyQuery.of({"PatientName": wanted}, orthanc.MATCHING, SERVER)
    assert len(query.page([ds], offset=0, limit=1, step=1).studies) == matches


@pytest.mark.parametrize("space", [[], {}, "x", None, 1.5])
def test_a_space_that_is_no_number_is_no_space(space: object) -> None:
    system = {"dcmStorageID": "fs1", "totalSpace": space, "usableSpace": 1}
    assert dcm4chee.storage_state([system]).total_bytes is None


def test_a_health_report_with_entries_that_are_none_says_nothing_of_the_database() -> None:
    report = cast(Transport, Canned({"details": ["x", None, 1, []]}))
    assert msdicom.MsDicom(report).database().ok is None


@pytest.mark.parametrize(
    "body",
    [
        b'{"errorMessage":"' + b"x" * 100_000 + b'"}',
        b"[" * 100_000,
        b'{"errorMessage":"two\\nlines"}',
        b"\xff" * 100,
        b"",
    ],
)
def test_an_archives_words_are_one_short_line_whatever_it_sends(body: bytes) -> None:
    words = dcm4chee.error_message(Answer(500, {}, body))
    assert 0 < len(words) <= 300
    assert words.isprintable()


def test_json_that_is_brackets_for_the_most_part_is_told_apart_from_the_thinnest_dicom_json() -> None:
    thinnest = json.dumps([{"00080020": {"vr": "DA", "Value": ["1"]}}] * 5_000, separators=(",", ":")).encode()
    assert not dicomjson.is_too_dense(thinnest)
    assert not dicomjson.is_too_dense(b"[" + b",".join([b"{}"] * 900) + b"]"), "small ones cost nothing"
    assert dicomjson.is_too_dense(b"[" + b",".join([b"{}"] * 5_000) + b"]")
    assert dicomjson.is_too_dense(b"[" * 100_000)


@pytest.mark.parametrize(
    "document",
    [
        {"0020000d": {"vr": "UI", "Value": ["1.2"]}},
        {"0020000D": {"VR": "UI", "value": ["1.2"]}},
        {"StudyInstanceUID": {"vr": "UI", "Value": "1.2"}},
    ],
)
def test_other_spellings_of_dicom_json_are_read_as_the_standards(document: dict[str, Any]) -> None:
    assert odd_json.is_odd(json.dumps([document]).encode())
    assert odd_json.in_standard_spelling([document]) == [{"0020000D": {"vr": "UI", "Value": ["1.2"]}}]


def test_items_and_names_of_persons_are_read_in_other_spellings_too() -> None:
    person = {"vr": "PN", "Value": [{"alphabetic": "Doe^Jane"}]}
    given = {"0040a730": {"vr": "SQ", "Value": [{"0040a123": person}]}, "00100010": {"vr": "PN", "Value": None}}
    read = odd_json.in_standard_spelling(given)
    assert read["0040A730"]["Value"][0]["0040A123"]["Value"] == [{"Alphabetic": "Doe^Jane"}]
    assert read["00100010"]["Value"] == []


def test_the_standards_own_spelling_costs_no_second_reading() -> None:
    document = [{"0020000D": {"vr": "UI", "Value": ["1.2"]}, "00100010": {"vr": "PN", "Value": [{"Alphabetic": "A"}]}}]
    assert not odd_json.is_odd(json.dumps(document).encode())
    assert odd_json.in_standard_spelling(document) == document


def test_one_element_in_two_spellings_is_read_only_where_both_say_the_same() -> None:
    one, other = {"vr": "UI", "Value": ["1.2"]}, {"vr": "UI", "Value": ["1.3"]}
    assert odd_json.in_standard_spelling({"0020000d": one, "0020000D": one}) == {"0020000D": one}
    with pytest.raises(ValueError, match="twice"):
        odd_json.in_standard_spelling({"0020000d": one, "StudyInstanceUID": other})
