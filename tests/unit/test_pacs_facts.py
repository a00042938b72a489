"""What a naive implementer gets wrong, fact by fact, for each product. No server: the answers are the documented ones.

A test is named by product and number; the last test counts them.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from urllib3 import HTTPResponse

from courier.errors import CourierError, InvalidRequest, PacsMisanswered, PacsUnauthorized, PacsUnavailable, TryAgain
from courier.settings import ServerSettings, ServerType
from worker.dicom.instances import Instance
from worker.pacs import registry
from worker.pacs.connections import idle_limit_s
from worker.pacs.credentials import Fixed
from worker.pacs.dicomjson import number, text
from worker.pacs.protocol import DeletionFate, Fate, Found, Outcome, Pacs, Part, ServerState
from worker.pacs.stow import PREAMBLE
from worker.pacs.transport import Request, Transport

URLS: Mapping[ServerType, str] = {
    "msdicom": "http://msdicom.invalid/v2",
    "dcm4chee": "http://archive.invalid:8080/dcm4chee-arc/aets/DCM4CHEE/rs",
    "orthanc": "http://orthanc.invalid:8042/dicom-web",
    "dicomweb": "http://plain.invalid/dicomweb",
}
FACTS = {"msdicom": 15, "dcm4chee": 15, "orthanc": 15}
STUDY = Found("study", "1.1")
SERIES = Found("series", "1.1", "1.2")
IMAGE = Found("image", "1.1", "1.2", "1.3")
#: A key of Orthanc's own.
KEY = "9a074436-3507b7b2-d01ee301-285f2ecd-f7a62d8a"
ONE_PART = b"--BB\r\nContent-Type: application/dicom; transfer-syntax=1.2.3\r\n\r\nDICM\r\n--BB--\r\n"


class ScriptedReply(NamedTuple):
    status: int
    body: Any = b""
    headers: Mapping[str, str] = {}  # never changed


class Wire(Transport):
    """A transport whose server says what the test says, and that remembers what it was asked."""

    def __init__(self, server_type: ServerType, replies: Iterable[ScriptedReply]) -> None:
        server = ServerSettings(name=server_type, type=server_type, url=URLS[server_type])
        super().__init__(server, Fixed(), statuses=registry.STATUSES.get(server_type))
        self._replies = list(replies)
        self.sent: list[Request] = []
        self.bodies: list[bytes] = []

    def _send(self, request: Request, authorization: str | None) -> HTTPResponse:
        self.sent.append(request)
        self.bodies.append(b"".join(request.body or ()))
        status, body, headers = self._replies.pop(0)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = HTTPResponse(io.BytesIO(content), headers, status, preload_content=False)
        answer.reader = SimpleNamespace(deadline_s=0.0)  # type: ignore[attr-defined]  # as the connections have it
        return answer

    @property
    def calls(self) -> list[str]:
        return [f"{request.method} {request.target}" for request in self.sent]


def connected(server_type: ServerType, *replies: ScriptedReply) -> tuple[Pacs, Wire]:
    wire = Wire(server_type, replies)
    return registry.DIALECTS[server_type](wire), wire


def part(uid: str = "1.3", *, has_preamble: bool = True) -> Part:
    instance = Instance("1.1", "1.2", uid, "1.4", "1.2.840.10008.1.2.1", has_preamble)
    return Part(instance, lambda: io.BytesIO(b"content"), len(b"content"))


def item(uid: str | None, code: int | None = None, **more: Any) -> dict[str, Any]:
    ds: dict[str, Any] = {} if uid is None else {"00081155": {"vr": "UI", "Value": [uid]}}
    if code is not None:
        ds["00081197"] = {"vr": "US", "Value": [code]}
    return ds | more


def stow(stored: Iterable[Any] = (), failed: Iterable[Any] = ()) -> dict[str, Any]:
    sequences = {"00081198": list(failed), "00081199": list(stored)}
    return {tag: {"vr": "SQ", "Value": items} for tag, items in sequences.items() if items}


def study(uid: str = "1.1") -> dict[str, Any]:
    return {"0020000D": {"vr": "UI", "Value": [uid]}}


def indexed(uid: str) -> dict[str, Any]:
    """A study as Orthanc's own API tells it."""
    return {"ID": "k1", "MainDicomTags": {"StudyInstanceUID": uid}, "Type": "Study"}


def fates(pacs: Pacs, *uids: str) -> list[Fate]:
    return [outcome.fate for outcome in pacs.store([part(uid) for uid in uids])]


def retrieved(pacs: Pacs, found: Found) -> list[tuple[str | None, bytes]]:
    with pacs.retrieve(found) as parts:
        return [(one.transfer_syntax_uid, b"".join(one.chunks)) for one in parts]


def every_call(server_type: ServerType) -> list[Request]:
    """What goes over the wire for a query, a push, metadata, a page and a retrieval."""
    pacs, wire = connected(
        server_type,
        ScriptedReply(200, {"count": 0} if server_type == "dcm4chee" else []),
        ScriptedReply(200, imported("Success") if server_type == "orthanc" else stow([item("1.3")])),
        ScriptedReply(200, []),
        ScriptedReply(200, []),
        ScriptedReply(200, ONE_PART, {"Content-Type": "multipart/related; boundary=BB"}),
    )
    pacs.find("study", "1.1")
    pacs.store([part()])
    pacs.metadata(STUDY)
    pacs.studies(filters={}, limit=10, offset=0)
    retrieved(pacs, STUDY)
    return wire.sent


@pytest.mark.parametrize("server_type", ["dcm4chee", "dicomweb", "msdicom", "orthanc"])
def test_metadata_are_asked_for_compressed_except_those_of_one_image(server_type: ServerType) -> None:
    pacs, wire = connected(
        server_type, ScriptedReply(200, [study()]), ScriptedReply(200, [study()]), ScriptedReply(200, [study()])
    )
    for found in (STUDY, SERIES, IMAGE):
        assert pacs.metadata(found) == [study()]
    assert [call.headers.get("Accept-Encoding") for call in wire.sent] == ["gzip", "gzip", None]


# MSDICOM


def test_msdicom_01_a_202_is_success_with_warnings_unless_an_item_says_otherwise() -> None:
    comment = {"00000902": {"vr": "LO", "Value": ["DICOM100: (0008,0020) - not a date"]}}
    warned = {"00081196": {"vr": "US", "Value": [1]}, "00741048": {"vr": "SQ", "Value": [comment]}}
    implicit = {"00081196": {"vr": "US", "Value": [45063]}, "00741048": {"vr": "SQ"}}
    pacs, _ = connected("msdicom", ScriptedReply(202, stow([item("1.3", **warned), item("1.4", **implicit)])))
    outcomes = pacs.store([part("1.3"), part("1.4")])
    assert [outcome.fate for outcome in outcomes] == [Fate.STORED, Fate.STORED]
    assert "StudyDate" in outcomes[0].warnings[0]
    assert "implicit" in outcomes[1].warnings[0]


@pytest.mark.parametrize(
    ("code", "fate"),
    [(45070, Fate.ALREADY_THERE), (45071, Fate.PENDING), (272, Fate.TRY_AGAIN), (43264, Fate.REJECTED)],
)
def test_msdicom_02_a_409_says_none_stored_and_the_code_says_why(code: int, fate: Fate) -> None:
    pacs, _ = connected("msdicom", ScriptedReply(409, stow(failed=[item("1.3", code)])))
    assert fates(pacs, "1.3") == [fate]


def test_msdicom_03_duplicate_and_pending_are_failures_although_b00x_is_a_warning_elsewhere() -> None:
    pacs, _ = connected("msdicom", ScriptedReply(202, stow([item("1.3")], [item("1.4", 0xB00E), item("1.5", 0xB00F)])))
    assert fates(pacs, "1.3", "1.4", "1.5") == [Fate.STORED, Fate.ALREADY_THERE, Fate.PENDING]


def test_msdicom_04_a_file_it_cannot_parse_comes_back_without_uid() -> None:
    pacs, _ = connected("msdicom", ScriptedReply(202, stow([item("1.3")], [item(None, 43264)])))
    assert fates(pacs, "1.2.9", "1.3") == [Fate.REJECTED, Fate.STORED]


def test_msdicom_05_items_can_vanish_from_a_200_and_a_204_mentions_none() -> None:
    pacs, _ = connected("msdicom", ScriptedReply(200, stow([item("1.3")])), ScriptedReply(204))
    assert fates(pacs, "1.3", "1.4") == [Fate.STORED, Fate.UNMENTIONED]
    assert fates(pacs, "1.3") == [Fate.UNMENTIONED]


def test_msdicom_06_the_type_of_a_part_bears_no_parameter() -> None:
    pacs, wire = connected("msdicom", ScriptedReply(200, stow([item("1.3")])))
    pacs.store([part()])
    assert re.findall(rb"Content-Type:[^\r]*", wire.bodies[0]) == [b"Content-Type: application/dicom"]


def test_msdicom_07_every_call_says_what_it_accepts_and_quotes_a_type() -> None:
    for request in every_call("msdicom"):
        assert request.headers["Accept"]
        assert not re.search(r"type=[^\"]", request.headers["Accept"])


def test_msdicom_08_a_study_is_asked_for_as_stored() -> None:
    assert "transfer-syntax=*" in every_call("msdicom")[-1].headers["Accept"]


def test_msdicom_09_a_retrieval_names_its_syntax_in_the_parts_only() -> None:
    pacs, _ = connected("msdicom", ScriptedReply(200, ONE_PART, {"Content-Type": "multipart/related; boundary=BB"}))
    assert retrieved(pacs, IMAGE) == [("1.2.3", b"DICM")]


def test_msdicom_10_nothing_found_is_a_204_and_what_it_cannot_match_is_not_asked() -> None:
    pacs, wire = connected("msdicom", ScriptedReply(204), ScriptedReply(200, [study()]), ScriptedReply(204))
    assert pacs.find("image", "1.3") == []
    assert pacs.studies(filters={}, limit=1000, offset=0).next_offset == 200
    assert pacs.studies(filters={}, limit=1000, offset=200).next_offset is None
    for filters in ({"Modality": "CT"}, {"PatientID": "A*"}, {"StudyID": "1"}):
        with pytest.raises(InvalidRequest):
            pacs.studies(filters=filters, limit=10, offset=0)
    assert wire.calls[0] == "GET /v2/instances?SOPInstanceUID=1.3"
    assert "limit=200" in wire.calls[1]


def test_msdicom_11_counts_are_asked_for_because_they_are_not_told_otherwise() -> None:
    pacs, wire = connected("msdicom", ScriptedReply(200, [study()]))
    assert pacs.studies(filters={}, limit=10, offset=0).studies == [study()]
    assert re.search("includefield=ModalitiesInStudy(,|%2C)NumberOfStudyRelatedInstances", wire.calls[0])


def test_msdicom_12_metadata_has_no_bulk_data_and_its_etag_is_left_alone() -> None:
    pacs, wire = connected("msdicom", ScriptedReply(200, [study()], {"ETag": "12-1"}))
    assert pacs.metadata(STUDY) == [study()]
    assert "If-None-Match" not in wire.sent[0].headers


def test_msdicom_13_a_delete_of_nothing_is_a_404_and_files_are_freed_later() -> None:
    pacs, wire = connected("msdicom", ScriptedReply(204), ScriptedReply(404, b"not found"))
    first, second = pacs.delete(SERIES, permanent=True), pacs.delete(SERIES, permanent=True)
    assert (first.fate, second.fate) == (DeletionFate.DELETED, DeletionFate.NOT_THERE)
    assert "three days" in first.note
    assert wire.calls[0] == "DELETE /v2/studies/1.1/series/1.2"


def test_msdicom_14_a_cancelled_call_is_a_400_and_waits_are_minutes() -> None:
    pacs, wire = connected("msdicom", ScriptedReply(400, b"The request was cancelled"))
    with pytest.raises(TryAgain) as refusal:
        pacs.store([part()])
    assert refusal.value.retry_after_s is None
    assert wire.server.read_timeout_s >= 60


def test_msdicom_15_health_stands_outside_the_version_and_degraded_is_ready() -> None:
    def report(overall: str, database: str) -> Any:
        details = [{"name": "DataStoreHealthCheck", "status": database}]
        return {"overallStatus": overall, "details": details}

    pacs, wire = connected(
        "msdicom",
        ScriptedReply(200, report("Degraded", "Healthy")),
        ScriptedReply(204),
        ScriptedReply(503, report("Unhealthy", "Unhealthy")),
        ScriptedReply(503, report("Unhealthy", "Unhealthy")),
        ScriptedReply(404),
        ScriptedReply(204),
    )
    assert pacs.state().ready is True
    assert pacs.state().ready is False
    assert pacs.database().ok is False
    assert pacs.state().ready is None
    assert set(wire.calls) == {"GET /health/check", "GET /v2/studies?limit=1"}


def refusal_of(*comments: str) -> Outcome:
    """What MSDICOM's refusal of an image with such comments (0000,0902) comes to."""
    entries = [{"00000902": {"vr": "LO", "Value": [comment]}} for comment in comments]
    pacs, _ = connected(
        "msdicom", ScriptedReply(409, stow(failed=[item("1.3", 43264, **{"00741048": {"Value": entries}})]))
    )
    (outcome,) = pacs.store([part()])
    assert (outcome.fate, outcome.failure_reason) == (Fate.REJECTED, 43264)
    return outcome


def test_a_refusal_of_msdicom_shows_the_attributes_that_it_names_and_none_of_their_values() -> None:
    outcome = refusal_of("DICOM100: (0010,0020) - Hall^Peter is not valid", "DICOM100: (0008,103e) - too long")
    named = ["PatientID (0010,0020)", "SeriesDescription (0008,103e)"]
    assert outcome.details == {"attributes": named}
    assert outcome.message.endswith(f"It names {named[0]}, {named[1]}.")
    assert "Hall" not in outcome.message


def test_a_refusal_of_msdicom_that_names_an_attribute_without_a_keyword_shows_its_tag() -> None:
    assert refusal_of("DICOM100: (0009,1001) - bad", "DICOM100: (0009,1001) - bad").details == {
        "attributes": ["attribute (0009,1001)"]
    }


@pytest.mark.parametrize("comments", [(), ("not a DICOM file",), ("",), ("(0010,0020",)])
def test_a_refusal_of_msdicom_that_names_no_attribute_is_left_as_it_is(comments: tuple[str, ...]) -> None:
    outcome = refusal_of(*comments)
    assert (outcome.details, "names" in outcome.message) == ({}, False)


def test_of_many_attributes_a_refusal_of_msdicom_shows_ten() -> None:
    outcome = refusal_of(*(f"DICOM100: (0009,10{number:02}) - bad" for number in range(14)))
    assert len(outcome.details["attributes"]) == 10
    assert outcome.message.endswith(" and 4 more.")


# What stands at the configured url


def well(server_type: ServerType) -> list[ScriptedReply]:
    """What a server that is well answers when it is asked how it is, before it is asked a query."""
    return {
        "msdicom": [ScriptedReply(200, {"overallStatus": "Healthy"})],
        "dcm4chee": [
            ScriptedReply(200, {"status": "STARTED"}),
            ScriptedReply(200, {"count": 0}),
            *(ScriptedReply(404),) * 2,
        ],
        "orthanc": [ScriptedReply(200, {"Version": "1.12.4"})],
        "dicomweb": [],
    }[server_type]


JSON_OF_DICOM = {"Content-Type": "application/dicom+json"}


def after(server_type: ServerType, query: ScriptedReply) -> tuple[ServerState, str]:
    """How a server is that is well and answers ``query`` to a query; the request of that query."""
    more = [query] * 6 if server_type == "dicomweb" else []  # whose root is looked at more closely
    pacs, wire = connected(
        server_type, *well(server_type), query, *more, ScriptedReply(404)
    )  # DCM4CHEE's devices come last
    state = pacs.state()
    return state, next(call for call in wire.calls if "limit=1" in call)


@pytest.mark.parametrize("server_type", URLS)
@pytest.mark.parametrize(
    "query",
    [ScriptedReply(200, [], JSON_OF_DICOM), ScriptedReply(200, [study()], JSON_OF_DICOM), ScriptedReply(204)],
    ids=["no study", "a study", "204"],
)
def test_a_server_is_ready_whose_configured_url_answers_a_query(server_type: ServerType, query: ScriptedReply) -> None:
    state, call = after(server_type, query)
    assert state.ready is True
    assert call == f"GET {urlsplit(URLS[server_type]).path}/studies?limit=1"


@pytest.mark.parametrize("server_type", URLS)
@pytest.mark.parametrize(
    "query",
    [
        ScriptedReply(404),
        ScriptedReply(400, b"no such version"),
        ScriptedReply(405),
        ScriptedReply(200, b"<!doctype html>", {"Content-Type": "text/html"}),
        ScriptedReply(200, ["9a074436"], {"Content-Type": "application/json"}),
        ScriptedReply(302, b"", {"Location": "/login"}),
    ],
    ids=["404", "400", "405", "a page", "keys of Orthanc", "a redirect"],
)
def test_a_server_is_not_ready_whose_configured_url_is_no_root(server_type: ServerType, query: ScriptedReply) -> None:
    state, _ = after(server_type, query)
    assert state.ready is False
    assert "check the server's url" in state.note


def test_an_empty_list_of_orthancs_own_is_no_answer_to_a_query() -> None:
    state, _ = after("orthanc", ScriptedReply(200, [], {"Content-Type": "application/json; charset=utf-8"}))
    assert state.ready is False
    assert "/dicom-web" in state.note


@pytest.mark.parametrize(
    ("status", "error"),
    [(401, PacsUnauthorized), (403, PacsUnauthorized), (500, PacsUnavailable), (503, PacsUnavailable)],
)
def test_trouble_at_the_configured_url_is_not_taken_for_a_wrong_url(status: int, error: type[CourierError]) -> None:
    for server_type in URLS:
        with pytest.raises(error):
            after(server_type, ScriptedReply(status))


# DCM4CHEE


def test_dcm4chee_01_a_duplicate_is_a_success_like_any_other() -> None:
    pacs, _ = connected("dcm4chee", ScriptedReply(200, stow([item("1.3")])))
    (outcome,) = pacs.store([part()])
    assert (outcome.fate, outcome.warnings) == (Fate.STORED, ())


@pytest.mark.parametrize("code", [0xA700, 0x0110])
def test_dcm4chee_02_a_full_disk_is_a_409_or_a_202_and_a_204_is_no_answer(code: int) -> None:
    pacs, _ = connected(
        "dcm4chee",
        ScriptedReply(409, stow(failed=[item("1.3", code)])),
        ScriptedReply(202, stow([item("1.3")], [item("1.4", code)])),
        ScriptedReply(204),
    )
    assert fates(pacs, "1.3") == [Fate.TRY_AGAIN]
    assert fates(pacs, "1.3", "1.4") == [Fate.STORED, Fate.TRY_AGAIN]
    with pytest.raises(PacsMisanswered):
        pacs.store([part()])


def test_dcm4chee_03_a_count_is_a_string() -> None:
    counted = study() | {"00201208": {"vr": "IS", "Value": ["3"]}}
    pacs, _ = connected("dcm4chee", ScriptedReply(200, [counted]))
    (ds,) = pacs.studies(filters={}, limit=1, offset=0).studies
    assert number(ds, "00201208") == 3


def test_dcm4chee_04_nothing_found_is_a_204_or_an_empty_list() -> None:
    pacs, _ = connected("dcm4chee", ScriptedReply(204), ScriptedReply(200, []), ScriptedReply(200, []))
    assert pacs.find("series", "1.1") == []
    assert pacs.find("series", "1.1") == []
    assert pacs.studies(filters={}, limit=10, offset=0).next_offset is None


def test_dcm4chee_05_pages_are_ordered_and_hold_at_most_1000() -> None:
    pacs, wire = connected("dcm4chee", ScriptedReply(200, [study()]))
    page = pacs.studies(filters={}, limit=5000, offset=2000)
    assert page.next_offset == 3000
    assert re.search(r"orderby=StudyInstanceUID&limit=1000&offset=2000", wire.calls[0])
    pacs, wire = connected("dcm4chee", ScriptedReply(200, [study()]), ScriptedReply(200, [study()]))
    assert pacs.newest_studies(filters={}, limit=7, offset=0).is_sorted
    assert "orderby=-StudyDate%2C-StudyTime%2CStudyInstanceUID&limit=7" in wire.calls[0]
    assert not pacs.newest_studies(filters={"PatientID": "A,B"}, limit=7, offset=0).is_sorted
    with pytest.raises(InvalidRequest, match="StudyDate"):
        pacs.studies(filters={}, limit=1000, offset=100_000)


def test_dcm4chee_06_the_circumflex_of_a_code_is_encoded_once() -> None:
    pacs, wire = connected("dcm4chee", ScriptedReply(200, {"count": 1}))
    pacs.delete(SERIES, permanent=True)
    assert wire.calls[0].endswith("/studies/1.1/series/1.2/reject/113039%5EDCM")


def test_dcm4chee_07_no_parameter_is_sent_that_it_does_not_know_and_uids_are_repeated() -> None:
    calls = every_call("dcm4chee")
    assert "?" not in calls[1].target
    assert calls[0].target.endswith("/studies/1.1/instances/count")
    pacs, wire = connected("dcm4chee", ScriptedReply(204))
    pacs.studies(filters={"StudyInstanceUID": "1.1,1.2", "PatientName": "A,B"}, limit=1, offset=0)
    assert "StudyInstanceUID=1.1&StudyInstanceUID=1.2&PatientName=A%2CB" in wire.calls[0]
    with pytest.raises(InvalidRequest):
        pacs.studies(filters={"StudyInstanceUIDs": "1.1"}, limit=1, offset=0)


def test_dcm4chee_08_a_study_is_rejected_then_deleted_and_nothing_else_is_deleted() -> None:
    pacs, wire = connected(
        "dcm4chee", ScriptedReply(200, {"count": 2}), ScriptedReply(204), ScriptedReply(200, {"count": 1})
    )
    assert pacs.delete(STUDY, permanent=True).fate is DeletionFate.DELETED
    assert pacs.delete(IMAGE, permanent=True).fate is DeletionFate.HIDDEN
    assert [request.method for request in wire.sent] == ["POST", "DELETE", "POST"]
    partly = b'{"errorMessage":"Deletion of Study with Rejection State: PARTIAL not permitted"}'
    pacs, wire = connected(
        "dcm4chee", ScriptedReply(200, {"count": 2}), ScriptedReply(403, partly), ScriptedReply(200, {"count": 1})
    )
    refused = pacs.delete(STUDY, permanent=True)
    assert refused.fate is DeletionFate.REFUSED
    assert "PARTIAL" in refused.note
    assert [request.method for request in wire.sent] == ["POST", "DELETE", "GET"], "an image is shown: so it stays"


def test_dcm4chee_08_a_rejection_that_stopped_half_way_is_completed_where_nothing_is_shown() -> None:
    none = b'{"errorMessage":"Deletion of Study with Rejection State: NONE not permitted"}'
    replies = [
        ScriptedReply(404),
        ScriptedReply(403, none),
        ScriptedReply(200, {"count": 0}),
        ScriptedReply(200, {"count": 2}),
        ScriptedReply(204),
    ]
    pacs, wire = connected("dcm4chee", *replies)
    assert pacs.delete(STUDY, permanent=True).fate is DeletionFate.DELETED
    assert wire.calls[3].startswith("POST /dcm4chee-arc/aets/IOCM_EXPIRED/rs/studies/1.1/reject/113039%5EDCM")
    pacs, wire = connected("dcm4chee", *replies[:3], ScriptedReply(404))
    assert pacs.delete(STUDY, permanent=True).fate is DeletionFate.REFUSED, "nothing was hidden by us, or none may look"


def test_dcm4chee_09_the_rejection_is_the_one_that_stays_hidden_and_lets_images_be_stored_again() -> None:
    pacs, wire = connected("dcm4chee", ScriptedReply(200, {"count": 2}))
    hidden = pacs.delete(STUDY, permanent=False)
    assert hidden.fate is DeletionFate.HIDDEN
    assert "/reject/113039%5EDCM" in wire.calls[0]
    assert len(wire.calls) == 1


def test_dcm4chee_10_the_archive_wide_purge_is_never_called_and_a_note_says_what_frees() -> None:
    pacs, wire = connected(
        "dcm4chee", ScriptedReply(200, {"count": 2}), ScriptedReply(200, {"count": 2}), ScriptedReply(204)
    )
    note = pacs.delete(SERIES, permanent=True).note
    assert "one day" in note
    assert "five minutes" in pacs.delete(STUDY, permanent=True).note
    assert not any("/dcm4chee-arc/reject/" in call for call in wire.calls)


def test_dcm4chee_11_a_study_is_there_if_its_images_are_counted_not_if_studies_are() -> None:
    pacs, wire = connected("dcm4chee", ScriptedReply(200, {"count": 0}), ScriptedReply(200, {"count": 1}))
    assert pacs.find("study", "1.1") == []
    assert len(pacs.find("study", "1.1")) == 1
    assert all(call.endswith("/studies/1.1/instances/count") for call in wire.calls)


def test_dcm4chee_11_where_nothing_is_counted_the_study_is_listed() -> None:
    pacs, wire = connected(
        "dcm4chee", ScriptedReply(404, {"errorMessage": "No Web Application"}), ScriptedReply(200, [study()])
    )
    assert [found.study_instance_uid for found in pacs.find("study", "1.1")] == ["1.1"]
    assert wire.calls[1].endswith("/studies?StudyInstanceUID=1.1")
    for status, error in ((404, PacsMisanswered), (500, PacsUnavailable)):
        pacs, _ = connected("dcm4chee", ScriptedReply(404), ScriptedReply(status))
        with pytest.raises(error):
            pacs.find("study", "1.1")
    for status, error in ((204, PacsMisanswered), (206, PacsMisanswered), (503, PacsUnavailable)):
        pacs, _ = connected("dcm4chee", ScriptedReply(status, {"count": 0}))
        with pytest.raises(error):
            pacs.find("study", "1.1")


def test_dcm4chee_12_images_are_asked_for_as_stored_and_in_many_parts() -> None:
    accept = every_call("dcm4chee")[-1].headers["Accept"]
    assert accept == 'multipart/related; type="application/dicom"; transfer-syntax=*'


def test_dcm4chee_13_what_comes_back_is_not_what_was_sent_and_another_name_is_a_conflict() -> None:
    pacs, _ = connected("dcm4chee", ScriptedReply(409, stow(failed=[item("1.3", 0xA778)])))
    assert pacs.keeps_bytes is False
    assert fates(pacs, "1.3") == [Fate.CONFLICT]


def test_dcm4chee_14_a_stack_trace_is_an_outage_and_stands_in_no_message() -> None:
    trace = b"java.lang.IllegalStateException: Hall^Peter\n\tat org.dcm4chee.arc.stow.StowRS"
    pacs, wire = connected("dcm4chee", ScriptedReply(500, trace, {"Content-Type": "text/plain"}))
    with pytest.raises(PacsUnavailable) as outage:
        pacs.store([part()])
    assert "Hall" not in json.dumps(outage.value.payload)
    assert wire.sent[0].headers["Accept"] == "application/dicom+json"


def test_dcm4chee_15_started_is_not_a_database_and_an_empty_storage_list_is_trouble() -> None:
    pacs, wire = connected(
        "dcm4chee",
        ScriptedReply(200, {"status": "STARTED"}),
        ScriptedReply(500, b"stack trace"),
        *(ScriptedReply(404),) * 3,  # what it does not tell of its configuration says nothing
        ScriptedReply(500, b"stack trace"),
        ScriptedReply(200, {"count": 0}),
        ScriptedReply(200, []),
        ScriptedReply(200, {"count": 2}),
    )
    assert pacs.state().ready is False
    assert pacs.database().ok is False
    assert pacs.database().ok is True
    assert "none can be opened" in pacs.storage().note
    pacs.delete(IMAGE, permanent=True)
    assert [call.removeprefix("GET /dcm4chee-arc") for call in wire.calls[:8]] == [
        "/ctrl/status",
        "/queue/Export/count",
        "/aets",
        "/webapps",
        "/devices",
        "/queue/Export/count",
        "/queue/Export/count",
        "/storage",
    ]
    assert (wire.sent[-1].read_timeout_s or 0) >= 600


# Orthanc


def imported(*statuses: str) -> list[dict[str, Any]]:
    """What Orthanc says of the files of an archive that it could read; one that failed has no key."""
    told = [{"ID": f"{KEY[:-1]}{number}", "Status": status} for number, status in enumerate(statuses)]
    return [one if one["Status"] != "Failure" else {"Status": "Failure"} for one in told]


def test_orthanc_01_a_duplicate_is_told_as_an_archive_and_not_by_stow() -> None:
    pacs, wire = connected("orthanc", ScriptedReply(200, imported("Success", "AlreadyStored")))
    assert fates(pacs, "1.3", "1.4") == [Fate.STORED, Fate.ALREADY_THERE]
    assert wire.calls == ["POST /instances"]


def test_orthanc_02_the_good_ones_are_stored_beside_a_bad_one_and_told_by_their_keys() -> None:
    of_the_key = {"ID": KEY, "MainDicomTags": {"SOPInstanceUID": "1.3"}}
    pacs, wire = connected("orthanc", ScriptedReply(200, imported("Success")), ScriptedReply(200, of_the_key))
    assert fates(pacs, "1.2.9", "1.3") == [Fate.REJECTED, Fate.STORED]
    assert wire.calls[1] == f"GET /instances/{KEY[:-1]}0"


def test_orthanc_is_not_asked_for_the_key_of_what_it_filtered_out() -> None:
    of_the_key = {"ID": KEY, "MainDicomTags": {"SOPInstanceUID": "1.3"}}
    pacs, wire = connected(
        "orthanc", ScriptedReply(200, imported("FilteredOut", "Success")), ScriptedReply(200, of_the_key)
    )
    assert fates(pacs, "1.2.8", "1.3", "1.2.9") == [Fate.REJECTED, Fate.STORED, Fate.REJECTED]
    assert len(wire.calls) == 2


def test_orthanc_03_a_200_without_any_image_stored_nothing() -> None:
    pacs, _ = connected("orthanc", ScriptedReply(200, []))
    assert fates(pacs, "1.3") == [Fate.REJECTED]


def test_orthanc_04_what_is_left_out_is_bad_unless_something_failed() -> None:
    pacs, _ = connected("orthanc", ScriptedReply(200, []), ScriptedReply(200, imported("Failure")))
    assert fates(pacs, "1.3", "1.4") == [Fate.REJECTED, Fate.REJECTED]
    assert fates(pacs, "1.3", "1.4") == [Fate.TRY_AGAIN, Fate.TRY_AGAIN]


@pytest.mark.parametrize(
    ("status", "fate"),
    [("Failure", Fate.TRY_AGAIN), ("FilteredOut", Fate.REJECTED), ("Thrown into the sea", Fate.TRY_AGAIN)],
)
def test_orthanc_says_what_became_of_an_image_in_words(status: str, fate: Fate) -> None:
    pacs, _ = connected("orthanc", ScriptedReply(200, imported(status)))
    assert fates(pacs, "1.3") == [fate]


@pytest.mark.parametrize(
    "answer",
    [
        imported("Success", "Success", "Success"),
        {},
        [1],
        imported("Success")[0],
        [{"Status": "Success"}, *imported("Success")],
        [{"ID": "../1", "Status": "Success"}],
        imported("Success") * 2,
    ],
)
def test_orthanc_has_to_speak_of_what_it_was_sent(answer: object) -> None:
    pacs, _ = connected("orthanc", ScriptedReply(200, answer))
    with pytest.raises(PacsMisanswered):
        fates(pacs, "1.3", "1.4")


def test_orthanc_that_refuses_an_archive_leaves_open_what_it_has_stored() -> None:
    pacs, _ = connected("orthanc", ScriptedReply(400, {"OrthancStatus": 15}))
    assert fates(pacs, "1.3", "1.4") == [Fate.UNMENTIONED] * 2


def test_orthanc_that_refuses_an_archive_of_one_file_refuses_the_file() -> None:
    pacs, _ = connected("orthanc", ScriptedReply(400, {"OrthancStatus": 15}))
    assert fates(pacs, "1.3") == [Fate.REJECTED]


def test_orthanc_05_a_file_without_preamble_is_no_file_of_the_standard_so_it_gets_one() -> None:
    pacs, wire = connected("orthanc", ScriptedReply(200, imported("Success")))
    pacs.store([part(has_preamble=False)])
    with zipfile.ZipFile(io.BytesIO(wire.bodies[0])) as archive:
        assert archive.read("0") == PREAMBLE + b"content"


def test_orthanc_06_nothing_found_is_an_empty_list() -> None:
    pacs, _ = connected("orthanc", ScriptedReply(200, []))
    assert pacs.find("series", "1.2") == []


def test_orthanc_07_a_key_it_does_not_know_returns_everything_so_answers_are_compared() -> None:
    pacs, _ = connected("orthanc", ScriptedReply(200, [indexed("1.1"), indexed("1.9")]))
    with pytest.raises(PacsMisanswered):
        pacs.find("study", "1.1")
    with pytest.raises(InvalidRequest):
        pacs.studies(filters={"NoSuchKey": "1"}, limit=1, offset=0)


def test_orthanc_is_asked_by_qido_for_the_uids_above_what_its_index_has() -> None:
    image = {"MainDicomTags": {"SOPInstanceUID": "1.3"}}
    pacs, wire = connected(
        "orthanc",
        ScriptedReply(200, [image]),
        ScriptedReply(200, [image_item("1.3")]),
        ScriptedReply(200, [indexed("1.1")]),
    )
    assert [replace(found, attributes={}) for found in pacs.find("image", "1.3")] == [IMAGE]
    assert pacs.find("study", "1.1") == [STUDY]
    assert wire.calls == ["POST /tools/find", "GET /dicom-web/instances?SOPInstanceUID=1.3", "POST /tools/find"]


@pytest.mark.parametrize("answer", [{}, ["k1"], [{"ID": "k1"}], [{"MainDicomTags": {}}], [{"MainDicomTags": ["1.1"]}]])
def test_orthancs_index_has_to_say_what_it_found(answer: object) -> None:
    pacs, _ = connected("orthanc", ScriptedReply(200, answer))
    with pytest.raises(PacsMisanswered):
        pacs.find("study", "1.1")


def test_orthanc_08_values_are_not_decoded_so_none_is_encoded() -> None:
    names = [{"00100010": {"vr": "PN", "Value": [{"Alphabetic": name}]}} for name in ("A^B", "A B")]
    kept = [{**indexed(uid), "PatientMainDicomTags": {"PatientName": n}} for uid, n in (("1.1", "A^B"), ("1.9", "A B"))]
    pacs, wire = connected(
        "orthanc", ScriptedReply(200, [study("1.1") | names[0], study("1.9") | names[1]]), ScriptedReply(200, kept)
    )
    page = pacs.studies(filters={"PatientName": "A^B"}, limit=10, offset=0)
    assert "PatientName=*A*B*" in wire.calls[0]
    assert [text(ds, "0020000D") for ds in page.studies] == ["1.1"]
    assert (page.next_offset, page.dropped) == (2, 1)


def test_orthanc_09_a_limit_of_none_or_less_is_never_sent() -> None:
    pacs, wire = connected("orthanc", ScriptedReply(200, []), ScriptedReply(200, []))
    for limit in (0, -1):
        pacs.studies(filters={}, limit=limit, offset=0)
    assert all("limit=1&" in call for call in wire.calls)


def test_orthanc_10_a_part_does_not_name_its_syntax_and_single_part_is_never_asked() -> None:
    body = b"--BB\r\nContent-Type: application/dicom\r\nContent-Length: 4\r\n\r\nDICM\r\n--BB--\r\n"
    pacs, wire = connected("orthanc", ScriptedReply(200, body, {"Content-Type": "multipart/related; boundary=BB"}))
    assert retrieved(pacs, IMAGE) == [(None, b"DICM")]
    assert wire.sent[0].headers["Accept"].startswith("multipart/related;")


def test_orthanc_11_images_are_not_asked_for_compressed() -> None:
    assert "Accept-Encoding" not in every_call("orthanc")[-1].headers


def test_orthanc_12_a_delete_goes_through_its_own_api_by_its_own_keys() -> None:
    pacs, wire = connected("orthanc", ScriptedReply(200, ["k1"]), ScriptedReply(200, {}), ScriptedReply(200, []))
    assert pacs.delete(SERIES, permanent=True).fate is DeletionFate.DELETED
    assert pacs.delete(SERIES, permanent=True).fate is DeletionFate.NOT_THERE
    assert wire.calls == ["POST /tools/find", "DELETE /series/k1", "POST /tools/find"]
    query = {"StudyInstanceUID": "1.1", "SeriesInstanceUID": "1.2"}
    assert json.loads(wire.bodies[0]) == {"Level": "Series", "Query": query}


def test_orthanc_13_a_delete_that_another_did_first_is_not_there() -> None:
    pacs, _ = connected("orthanc", ScriptedReply(200, ["k1"]), ScriptedReply(404))
    assert pacs.delete(STUDY, permanent=True).fate is DeletionFate.NOT_THERE


def test_orthanc_14_its_statistics_tell_what_is_used_as_a_string_and_no_total() -> None:
    pacs, _ = connected(
        "orthanc",
        ScriptedReply(200, {"TotalDiskSize": "39206", "CountInstances": 1}),
        ScriptedReply(200, {"Version": "1.10.1"}),
        ScriptedReply(200, [], {"Content-Type": "application/dicom+json"}),
    )
    storage = pacs.storage()
    assert (storage.used_bytes, storage.total_bytes, storage.free_bytes) == (39206, None, None)
    assert pacs.state().version == "1.10.1"


def test_orthanc_15_a_connection_is_not_reused_when_it_is_about_to_be_closed() -> None:
    assert idle_limit_s("timeout=1") < 1


def image_item(uid: str) -> dict[str, Any]:
    uids = {"0020000D": "1.1", "0020000E": "1.2", "00080018": uid}
    return {tag: {"vr": "UI", "Value": [value]} for tag, value in uids.items()}


def test_pages_smaller_than_asked_for_lose_no_image() -> None:
    pages = [[image_item("1.3"), image_item("1.4")], [image_item("1.5")]]
    pacs, wire = connected("dicomweb", *[ScriptedReply(200, page) for page in pages], ScriptedReply(200, []))
    assert [found.sop_instance_uid for found in pacs.instances(STUDY)] == ["1.3", "1.4", "1.5"]
    assert [call.rpartition("offset=")[2] for call in wire.calls] == ["0", "2", "3"]


def test_the_list_of_a_server_that_does_not_page_ends_where_its_count_says_that_it_is_whole() -> None:
    page = ScriptedReply(200, [image_item("1.3")])
    pacs, wire = connected(
        "dicomweb", page, page, ScriptedReply(200, [study() | {"00201208": {"vr": "IS", "Value": [1]}}])
    )
    assert [one.sop_instance_uid for one in pacs.instances(STUDY)] == ["1.3"]
    pacs, wire = connected("dicomweb", page, page, ScriptedReply(200, [study()]), ScriptedReply(404))
    with pytest.raises(PacsMisanswered, match="nothing shows whether these are all") as caught:
        list(pacs.instances(STUDY))
    assert caught.value.is_lasting
    assert len(wire.calls) == 4


def test_every_fact_of_every_reference_has_its_test() -> None:
    found = [match for name in globals() if (match := re.match(r"test_([a-z0-9]+)_(\d\d)_", name))]
    numbers = {product: {int(match[2]) for match in found if match[1] == product} for product in FACTS}
    assert numbers == {product: set(range(1, count + 1)) for product, count in FACTS.items()}
