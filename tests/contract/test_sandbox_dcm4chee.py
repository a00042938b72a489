"""The sandbox's DCM4CHEE, held against the conformance table that was drawn from the product's sources.

Each function marked `row` is a row of the table, or several, and its name is what they say. What follows are
statements of the same description that have no row, and how the archive answers when its database or storage is
down.
"""

from __future__ import annotations

import http.client
import io
import json
import re
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from email.parser import BytesParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from xml.etree import ElementTree

import pydicom
import pytest
import requests
from pydicom.data import get_testdata_file

from sandbox import synthetic
from sandbox.processes import Processes, SandboxPart
from sandbox.synthetic import image, new_uid
from tests import real_archive
from tests.real_archive import only_the_sandbox

DICOM_JSON = "application/dicom+json"
MULTIPART = 'multipart/related; type="application/dicom"'
AS_STORED = f"{MULTIPART}; transfer-syntax=*"
QUALITY, SAFETY, EXPIRED = "113001%5EDCM", "113037%5EDCM", "113039%5EDCM"
NATIVE = "{http://dicom.nema.org/PS3.19/models/NativeDICOM}"


# -- a client that does only what it is told -------------------------------------------------------------------------


@dataclass
class SandboxArchive:
    """The sandbox's DCM4CHEE, over HTTP."""

    part: SandboxPart
    files: Path
    http: requests.Session = field(default_factory=requests.Session)

    @property
    def arc(self) -> str:
        return self.part.dcm4chee.partition("/aets/")[0]

    def rs(self, aet: str = "DCM4CHEE") -> str:
        return f"{self.arc}/aets/{aet}/rs"

    def get(self, path: str, accept: str | None = None, aet: str = "DCM4CHEE", **options: Any) -> requests.Response:
        url = path if path.startswith("http") else self.rs(aet) + path
        headers = {"Accept": accept, **options.pop("headers", {})}
        return self.http.get(url, headers=headers, timeout=30, **options)

    def post(self, path: str, body: bytes, content_type: str | None = None, **options: Any) -> requests.Response:
        """A STOW; ``content_type`` and ``accept`` are right unless they are given."""
        accept = options.pop("accept", DICOM_JSON)
        headers = {"Content-Type": content_type or f"{MULTIPART}; boundary=b", "Accept": accept}
        return self.http.post(self.rs(options.pop("aet", "DCM4CHEE")) + path, data=body, headers=headers, timeout=60)

    def stow(self, *objects: bytes, path: str = "/studies", **options: Any) -> requests.Response:
        return self.post(path, body_of(*(part(one) for one in objects)), **options)

    def reject(self, path: str, code: str = EXPIRED, query: str = "") -> requests.Response:
        return self.http.post(f"{self.rs()}{path}/reject/{code}{query}", timeout=30)

    def delete(self, path: str) -> requests.Response:
        return self.http.delete(path if path.startswith("http") else self.rs() + path, timeout=30)

    def visible(self, study: str, aet: str = "DCM4CHEE") -> int:
        """How many of the study's instances this AE lists."""
        answer = self.get(f"/studies/{study}/instances", aet=aet)
        return len(answer.json()) if answer.status_code == 200 else 0


def part(content: bytes, content_type: str | None = "application/dicom") -> bytes:
    header = f"Content-Type: {content_type}\r\n" if content_type else ""
    return f"--b\r\n{header}\r\n".encode() + content + b"\r\n"


def body_of(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--b--\r\n"


def items(answer: requests.Response, tag: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = answer.json().get(tag, {}).get("Value", [])
    return found


def stored(answer: requests.Response) -> list[dict[str, Any]]:
    return items(answer, "00081199")


def reasons(answer: requests.Response) -> list[int]:
    return [item["00081197"]["Value"][0] for item in items(answer, "00081198")]


def value(dataset: dict[str, Any], tag: str) -> Any:
    return dataset[tag]["Value"][0]


def received(answer: requests.Response) -> list[tuple[str, bytes]]:
    """Content type and body of each part of a multipart answer."""
    head = f"Content-Type: {answer.headers['Content-Type']}\r\n\r\n".encode()
    message = BytesParser().parsebytes(head + answer.content)
    # The MIME parser takes line ends off; parts of DICOM are cut out by hand.
    boundary = message.get_boundary()
    assert boundary is not None
    pieces = answer.content.split(f"--{boundary}".encode())[1:-1]
    found = []
    for piece in pieces:
        header, _, content = piece.partition(b"\r\n\r\n")
        kind = re.search(rb"(?i)content-type: *(\S+)", header)
        assert kind is not None
        found.append((kind.group(1).decode(), content[:-2]))
    return found


def own_size(sent: bytes) -> Any:
    """The size of the archive's own file of what was sent: the meta information differs by some bytes."""
    return pytest.approx(len(sent), abs=100)


def parameters_of(answer: requests.Response) -> set[str]:
    return {parameter.strip() for parameter in answer.headers["Content-Type"].split(";")}


def objects(answer: requests.Response) -> list[pydicom.FileDataset]:
    return [pydicom.dcmread(io.BytesIO(content)) for _kind, content in received(answer)]


def sample(name: str, study: str) -> bytes:
    """One of pydicom's sample files as part of our study."""
    path = get_testdata_file(name)
    assert isinstance(path, str)
    ds = pydicom.dcmread(path)
    ds.StudyInstanceUID = study
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = new_uid()
    ds.PatientID, ds.PatientName, ds.PatientBirthDate = synthetic.PATIENT_ID, "Synthetic^Square", "19700101"
    content = io.BytesIO()
    ds.save_as(content, enforce_file_format=True)
    return content.getvalue()


Row = Callable[[SandboxArchive], None]
ROWS: dict[str, Row] = {}


def row(*identities: str) -> Callable[[Row], Row]:
    """The rows that a function holds; its name is what they say."""

    def mark(function: Row) -> Row:
        for identity in identities:
            assert identity not in ROWS
            ROWS[identity] = function
        return function

    return mark


@pytest.fixture
def archive(sandbox: SandboxPart, processes: Processes) -> Iterator[SandboxArchive]:
    one = SandboxArchive(sandbox, processes.folder / "sandbox-data" / "dcm4chee" / "files")
    with one.http:
        yield one
        if real_archive.address() is None:
            one.http.put(f"{sandbox.control}/clock", json={"ahead_s": 0})
            one.http.post(f"{one.arc}/ctrl/start")


# -- the table: STOW -------------------------------------------------------------------------------------------------


@row("1")
def one_new_object_is_stored(archive: SandboxArchive) -> None:
    study = new_uid()
    answer = archive.stow(image(study))
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == DICOM_JSON
    assert len(stored(answer)) == 1
    assert "00081198" not in answer.json()
    assert value(answer.json(), "00081190").endswith(f"/studies/{study}")


@row("2")
def posting_to_the_study_gives_its_url(archive: SandboxArchive) -> None:
    study = new_uid()
    answer = archive.stow(image(study), path=f"/studies/{study}")
    assert answer.status_code == 200
    assert value(answer.json(), "00081190") == answer.url


@row("3")
def another_study_in_the_url_is_a_conflict(archive: SandboxArchive) -> None:
    answer = archive.stow(image(new_uid()), path=f"/studies/{new_uid()}")
    assert answer.status_code == 409
    assert reasons(answer) == [50185]
    assert "00081199" not in answer.json()
    assert "Value" not in answer.json()["00081190"]
    assert answer.headers["Warning"].startswith("299 dcm4chee-arc ")


@row("4")
def one_of_two_in_the_wrong_study_is_a_202(archive: SandboxArchive) -> None:
    study = new_uid()
    answer = archive.stow(image(study), image(new_uid()), path=f"/studies/{study}")
    assert answer.status_code == 202
    assert len(stored(answer)) == 1
    assert reasons(answer) == [50185]


@row("5")
def two_studies_have_no_common_url(archive: SandboxArchive) -> None:
    answer = archive.stow(image(new_uid()), image(new_uid()))
    assert answer.status_code == 200
    assert len(stored(answer)) == 2
    assert "Value" not in answer.json()["00081190"]


@row("6")
def the_same_object_again_is_a_silent_success(archive: SandboxArchive) -> None:
    study = new_uid()
    one = image(study)
    archive.stow(one)
    answer = archive.stow(one)
    assert answer.status_code == 200
    assert len(stored(answer)) == 1
    assert "00081198" not in answer.json()
    assert "Warning" not in answer.headers
    assert archive.visible(study) == 1


@row("7")
def other_pixels_under_the_same_uid_are_ignored(archive: SandboxArchive) -> None:
    study, sop = new_uid(), new_uid()
    archive.stow(image(study, sop=sop, seed=1))
    answer = archive.stow(image(study, sop=sop, seed=2))
    assert answer.status_code == 200
    assert len(stored(answer)) == 1
    kept = objects(archive.get(f"/studies/{study}", AS_STORED))[0]
    assert kept.PixelData == pydicom.dcmread(io.BytesIO(image(study, sop=sop, seed=1))).PixelData


@row("8")
def the_same_uid_in_another_study_is_a_success_that_stores_nothing(archive: SandboxArchive) -> None:
    first, second, sop = new_uid(), new_uid(), new_uid()
    archive.stow(image(first, sop=sop))
    answer = archive.stow(image(second, sop=sop))
    assert answer.status_code == 200
    assert f"/studies/{second}/" in value(stored(answer)[0], "00081190")
    assert archive.get("/studies", params={"StudyInstanceUID": second}).status_code == 204


@row("9")
def bytes_that_are_no_dicom_fail_under_a_made_up_uid(archive: SandboxArchive) -> None:
    answer = archive.stow(b"this is not DICOM at all")
    assert answer.status_code == 409
    assert reasons(answer) == [50329]
    item = items(answer, "00081198")[0]
    assert value(item, "00081150") == "1.2.40.0.13.1.15.110.3.165.2"
    assert value(item, "00081155").startswith("2.25.")
    again = items(archive.stow(b"this is not DICOM at all"), "00081198")[0]
    assert value(item, "00081155") != value(again, "00081155")


@row("10")
def garbage_beside_a_valid_object_is_a_202(archive: SandboxArchive) -> None:
    answer = archive.stow(b"garbage", image(new_uid()))
    assert answer.status_code == 202
    assert (len(stored(answer)), reasons(answer)) == (1, [50329])


@row("11")
def only_text_parts_are_a_409_with_nothing_in_it(archive: SandboxArchive) -> None:
    answer = archive.post("/studies", body_of(part(b"hello", "text/plain"), part(b"there", "text/plain")))
    assert answer.status_code == 409
    assert answer.json() == {"00081190": {"vr": "UR"}}
    assert "Warning" not in answer.headers


@row("12")
def a_text_part_beside_an_object_is_not_mentioned(archive: SandboxArchive) -> None:
    answer = archive.post("/studies", body_of(part(image(new_uid())), part(b"hello", "text/plain")))
    assert answer.status_code == 200
    assert len(stored(answer)) == 1
    assert "00081198" not in answer.json()


@row("13")
def a_part_without_content_type_is_a_500_after_the_parts_before_it(archive: SandboxArchive) -> None:
    study = new_uid()
    answer = archive.post("/studies", body_of(part(image(study)), part(image(study), None)))
    assert answer.status_code == 500
    assert answer.headers["Content-Type"] == DICOM_JSON
    assert archive.visible(study) == 1


@row("14")
def a_missing_boundary_is_a_400(archive: SandboxArchive) -> None:
    answer = archive.post("/studies", body_of(part(image(new_uid()))), MULTIPART)
    assert answer.status_code == 400
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert "Missing Boundary Parameter" in answer.json()["errorMessage"]


@row("15")
def an_empty_body_is_a_500(archive: SandboxArchive) -> None:
    assert archive.post("/studies", b"").status_code == 500


@row("16")
def a_truncated_body_leaves_its_first_part_stored(archive: SandboxArchive) -> None:
    study = new_uid()
    answer = archive.post("/studies", part(image(study)) + part(image(study))[:-2000])
    assert answer.status_code == 500
    assert answer.content == b""
    assert archive.visible(study) == 1


@row("17")
def a_single_part_body_is_a_415(archive: SandboxArchive) -> None:
    assert archive.post("/studies", image(new_uid()), "application/dicom").status_code == 415


@row("18")
def plain_json_is_not_an_answer_it_can_give(archive: SandboxArchive) -> None:
    assert archive.stow(image(new_uid()), accept="application/json").status_code == 406


@row("19")
def the_answer_can_be_xml(archive: SandboxArchive) -> None:
    study = new_uid()
    answer = archive.stow(image(study), accept="application/dicom+xml")
    assert answer.status_code == 200
    root = ElementTree.fromstring(answer.content)
    assert root.tag == "NativeDicomModel"
    first = root[0]
    assert (first.attrib["keyword"], first.attrib["tag"], first.attrib["vr"]) == ("RetrieveURL", "00081190", "UR")


@row("20")
def only_the_ae_dcm4chee_stores(archive: SandboxArchive) -> None:
    answer = archive.stow(image(new_uid()), aet="AS_RECEIVED")
    assert answer.status_code == 404
    wanted = "No Web Application with STOW_RS service class found for Application Entity: AS_RECEIVED"
    assert answer.json()["errorMessage"] == wanted


@row("21")
def an_unknown_ae_is_a_404(archive: SandboxArchive) -> None:
    answer = archive.stow(image(new_uid()), aet="XYZ")
    assert answer.status_code == 404
    assert answer.json() == {"errorMessage": "No such Application Entity: XYZ"}


@row("22")
def an_unknown_parameter_of_a_store_is_a_400(archive: SandboxArchive) -> None:
    study = new_uid()
    answer = archive.stow(image(study), path="/studies?foo=bar")
    assert answer.status_code == 400
    assert answer.headers["validation-exception"] == "true"
    assert archive.visible(study) == 0


@row("23")
def a_keyword_in_the_url_is_written_into_the_database_and_not_into_the_object(archive: SandboxArchive) -> None:
    study = new_uid()
    assert archive.stow(image(study, PatientID="OLD"), path="/studies?PatientID=NEW").status_code == 200
    listed = archive.get("/studies", params={"StudyInstanceUID": study}).json()[0]
    assert value(listed, "00100020") == "NEW"
    for aet, patient in (("DCM4CHEE", "NEW"), ("AS_RECEIVED", "OLD")):
        assert objects(archive.get(f"/studies/{study}", AS_STORED, aet))[0].PatientID == patient


@row("24")
def a_missing_patient_id_is_made_up(archive: SandboxArchive) -> None:
    study = new_uid()
    assert archive.stow(image(study, PatientID="")).status_code == 200
    listed = archive.get("/studies", params={"StudyInstanceUID": study}).json()[0]
    assert value(listed, "00100020")
    # The next object of the study belongs to the same patient.
    assert archive.stow(image(study, PatientID="")).status_code == 200


@row("25")
def another_name_for_the_patient_of_a_study_is_a_conflict(archive: SandboxArchive) -> None:
    study = new_uid()
    archive.stow(image(study))
    answer = archive.stow(image(study, PatientName="Somebody^Else"))
    assert answer.status_code == 409
    assert reasons(answer) == [42872]
    assert archive.stow(image(study, PatientName="Somebody^Else"), image(study)).status_code == 202


@row("26")
def a_failing_disk_is_reason_a700(archive: SandboxArchive) -> None:
    archive.part.set_fault("dcm4chee", "store", disk_full="A700")
    answer = archive.stow(image(new_uid()))
    assert answer.status_code == 409
    assert reasons(answer) == [42752]


@row("27")
def a_storage_over_its_threshold_is_reason_272(archive: SandboxArchive) -> None:
    archive.part.set_fault("dcm4chee", "store", disk_full="272")
    answer = archive.stow(image(new_uid()))
    assert answer.status_code == 409
    assert reasons(answer) == [272]
    assert "No space left" in answer.headers["Warning"]


@row("28")
def a_collision_in_the_database_is_a_272_that_passes(archive: SandboxArchive) -> None:
    study = new_uid()
    one = image(study)
    archive.part.set_fault("dcm4chee", "store", transient_272=True, times=1)
    answer = archive.stow(one)
    assert answer.status_code == 409
    assert reasons(answer) == [272]
    assert archive.stow(one).status_code == 200
    assert archive.visible(study) == 1


@row("29")
def a_body_announced_as_too_long_is_a_400(archive: SandboxArchive) -> None:
    url = urlsplit(archive.rs() + "/studies")
    with socket.create_connection((url.hostname, url.port), timeout=10) as connection:
        connection.sendall(
            f"POST {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\nAccept: {DICOM_JSON}\r\n"
            f"Content-Type: {MULTIPART}; boundary=b\r\nContent-Length: 10000000001\r\n\r\n--b\r\n".encode()
        )
        assert connection.recv(64).startswith(b"HTTP/1.1 400 ")


@row("30")
def a_method_that_is_not_there_is_a_405(archive: SandboxArchive) -> None:
    answer = archive.http.patch(archive.rs() + "/studies")
    assert answer.status_code == 405
    assert {"GET", "POST"} <= {method.strip() for method in answer.headers["Allow"].split(",")}


# -- the table: QIDO -------------------------------------------------------------------------------------------------

STUDY_DEFAULTS = (
    "00080005 00080020 00080030 00080050 00080054 00080056 00080061 00080090 00080201 00081190 00100010 00100020 "
    "00100030 00100040 0020000D 00200010 00201206 00201208"
)


def studies(archive: SandboxArchive, count: int) -> list[str]:
    """So many new studies of one small image each, in one request."""
    uids = [new_uid() for _ in range(count)]
    assert archive.stow(*(image(uid, side=2) for uid in uids)).status_code == 200
    return uids


@row("31")
def a_known_study_is_listed_with_the_default_attributes(archive: SandboxArchive) -> None:
    study = new_uid()
    archive.stow(image(study), image(study), image(study))
    answer = archive.get("/studies", params={"StudyInstanceUID": study})
    assert answer.status_code == 200
    assert len(answer.json()) == 1
    listed = answer.json()[0]
    assert sorted(listed) == STUDY_DEFAULTS.split()
    assert listed["00201208"] == {"vr": "IS", "Value": ["3"]}
    assert listed["00201206"] == {"vr": "IS", "Value": ["1"]}
    assert listed["00080050"] == {"vr": "SH"}
    assert listed["00100010"] == {"vr": "PN", "Value": [{"Alphabetic": "Synthetic^Square"}]}
    assert answer.headers["Cache-Control"] == "no-cache"


@row("32")
def an_unknown_study_is_a_204(archive: SandboxArchive) -> None:
    answer = archive.get("/studies", params={"StudyInstanceUID": new_uid()})
    assert (answer.status_code, answer.content) == (204, b"")


@row("33")
def a_limit_of_zero_is_a_400(archive: SandboxArchive) -> None:
    assert archive.get("/studies?limit=0").status_code == 400


@row("34")
def an_offset_of_six_digits_is_a_400(archive: SandboxArchive) -> None:
    assert archive.get("/studies?offset=100000").status_code == 400


@row("35")
def a_limit_gives_no_warning(archive: SandboxArchive) -> None:
    studies(archive, 3)
    answer = archive.get("/studies?limit=1")
    assert answer.status_code == 200
    assert len(answer.json()) == 1
    assert "Warning" not in answer.headers


@row("36", "37")
def a_list_without_a_limit_or_with_one_above_a_thousand_ends_at_a_thousand(archive: SandboxArchive) -> None:
    studies(archive, 1001)
    for path in ("/studies", "/studies?limit=2000"):
        answer = archive.get(path)
        assert answer.status_code == 200
        assert len(answer.json()) == 1000
        assert "There are 1 additional results that can be requested" in answer.headers["Warning"]


@row("38")
def an_offset_behind_the_last_one_is_a_204(archive: SandboxArchive) -> None:
    studies(archive, 2)
    assert archive.get("/studies?offset=1").status_code == 200
    assert archive.get("/studies?offset=2").status_code == 204


@row("39")
def an_unknown_parameter_of_a_search_is_a_400(archive: SandboxArchive) -> None:
    answer = archive.get("/studies?Foo=1", "application/json")
    assert answer.status_code == 400
    assert answer.headers["validation-exception"] == "true"
    (violation,) = answer.json()["classViolations"]
    assert (violation["message"], violation["value"]) == (
        "Invalid Query Parameter",
        urlsplit(answer.url).path + "?Foo=1",
    )


@row("39a")
def a_list_of_uids_is_split_at_commas_as_written(archive: SandboxArchive) -> None:
    first, second, _third = studies(archive, 3)
    assert len(archive.get(f"/studies?StudyInstanceUID={first},{second}").json()) == 2
    repeated = [("StudyInstanceUID", first), ("StudyInstanceUID", second)]
    assert len(archive.get("/studies", params=repeated).json()) == 2


@row("39b")
def an_encoded_comma_makes_one_odd_value(archive: SandboxArchive) -> None:
    first, second = studies(archive, 2)
    assert archive.get(f"/studies?StudyInstanceUID={first}%2C{second}").status_code == 204


@row("39c")
def a_retrieve_ignores_unknown_parameters(archive: SandboxArchive) -> None:
    (study,) = studies(archive, 1)
    assert archive.get(f"/studies/{study}?Foo=1").status_code == 200


@row("39d")
def a_delete_refuses_unknown_parameters(archive: SandboxArchive) -> None:
    (study,) = studies(archive, 1)
    archive.reject(f"/studies/{study}")
    assert archive.delete(f"/studies/{study}?Foo=1").status_code == 400
    assert archive.visible(study, "AS_RECEIVED") == 2


@row("40")
def includefield_all_gives_private_attributes_too(archive: SandboxArchive) -> None:
    study = new_uid()
    one = image(study, StudyDescription="A square")
    archive.stow(one)
    listed = archive.get("/studies?includefield=all").json()[0]
    assert value(listed, "00081030") == "A square"
    assert "77770010" in listed
    assert value(listed, "77771029") * 1000 + value(listed, "7777102A") == own_size(one)
    assert "77771024" not in listed


@row("41")
def the_study_description_has_to_be_asked_for(archive: SandboxArchive) -> None:
    archive.stow(image(new_uid(), StudyDescription="A square"))
    listed = archive.get("/studies").json()[0]
    assert "00081030" not in listed
    assert not [tag for tag in listed if tag.startswith("7777")]
    assert value(archive.get("/studies?includefield=StudyDescription").json()[0], "00081030") == "A square"


@row("42")
def a_list_cannot_be_html(archive: SandboxArchive) -> None:
    studies(archive, 1)
    assert archive.get("/studies", "text/html").status_code == 406


@row("43")
def a_list_can_be_csv(archive: SandboxArchive) -> None:
    (study,) = studies(archive, 1)
    answer = archive.get("/studies", "text/csv")
    assert answer.headers["Content-Type"].startswith("text/csv")
    heading, line = answer.text.splitlines()
    assert '"StudyInstanceUID"' in heading.split(",")
    assert all(cell.startswith('"') and cell.endswith('"') for cell in heading.split(","))
    assert f'"{study}"' in line.split(",")


@row("44")
def studies_are_counted(archive: SandboxArchive) -> None:
    studies(archive, 2)
    answer = archive.get("/studies/count")
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.json() == {"count": 2}


@row("45")
def studies_are_measured(archive: SandboxArchive) -> None:
    one = image(new_uid())
    archive.stow(one)
    assert archive.get("/studies/size").json() == {"size": own_size(one)}


@row("46")
def the_worklist_ae_has_no_search(archive: SandboxArchive) -> None:
    answer = archive.get("/studies", aet="WORKLIST")
    assert answer.status_code == 404
    assert "No Web Application with QIDO_RSservice class found" in answer.json()["errorMessage"]


@row("47")
def an_unknown_storage_is_an_empty_list(archive: SandboxArchive) -> None:
    studies(archive, 1)
    answer = archive.get("/studies?storageID=none")
    assert (answer.status_code, answer.json()) == (200, [])


# -- the table: WADO -------------------------------------------------------------------------------------------------


@row("48")
def a_study_is_retrieved_as_stored(archive: SandboxArchive) -> None:
    study = new_uid()
    archive.stow(image(study), sample("JPEG2000.dcm", study))
    answer = archive.get(f"/studies/{study}", AS_STORED)
    assert answer.status_code == 200
    kinds = [kind for kind, _content in received(answer)]
    assert sorted(kinds) == [
        "application/dicom;transfer-syntax=1.2.840.10008.1.2.1",
        "application/dicom;transfer-syntax=1.2.840.10008.1.2.4.91",
    ]
    first, *_ = kinds
    assert {'type="application/dicom"', first.partition(";")[2]} <= parameters_of(answer)
    assert answer.headers["Accept-Ranges"] == "none"


@row("49")
def without_a_transfer_syntax_a_jpeg_is_decompressed(archive: SandboxArchive) -> None:
    only_the_sandbox("decompresses JPEG, for which an archive needs its native codecs")
    study = new_uid()
    assert archive.stow(sample("SC_rgb_jpeg_dcmtk.dcm", study)).status_code == 200
    answer = archive.get(f"/studies/{study}", MULTIPART)
    ((kind, content),) = received(answer)
    assert kind.endswith("transfer-syntax=1.2.840.10008.1.2.1")
    ds = pydicom.dcmread(io.BytesIO(content))
    assert ds.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"
    assert len(ds.PixelData) == ds.Rows * ds.Columns * 3


@row("50")
def a_single_part_object_cannot_be_had(archive: SandboxArchive) -> None:
    study, sop = new_uid(), new_uid()
    archive.stow(image(study, sop=sop))
    path = f"/studies/{study}/series/{study}.1/instances/{sop}"
    assert archive.get(path, "application/dicom").status_code == 406
    assert archive.get(path, MULTIPART).status_code == 200


@row("51")
def retrieving_an_unknown_study_is_a_404(archive: SandboxArchive) -> None:
    answer = archive.get(f"/studies/{new_uid()}", AS_STORED)
    assert answer.status_code == 404
    assert answer.json() == {"errorMessage": "No matches found."}


@row("52")
def a_study_can_be_had_as_zip_by_link(archive: SandboxArchive) -> None:
    study = new_uid()
    archive.stow(image(study), image(study))
    answer = archive.get(f"/studies/{study}?accept=application/zip", "text/html")
    assert answer.headers["Content-Type"] == "application/zip"
    assert "Content-Length" not in answer.headers
    with zipfile.ZipFile(io.BytesIO(answer.content)) as packed:
        assert packed.testzip() is None
        names = [name for name in packed.namelist() if not name.endswith("/")]
        assert len(names) == 2
        assert len(packed.namelist()) > 2
        for name in names:
            assert re.fullmatch(r"DICOM/[0-9A-F]{8}/[0-9A-F]{8}/[0-9A-F]{8}\.dcm", name)
            assert pydicom.dcmread(io.BytesIO(packed.read(name))).StudyInstanceUID == study


@row("53")
def metadata_names_the_instance_as_its_pixels(archive: SandboxArchive) -> None:
    study, sop = new_uid(), new_uid()
    archive.stow(image(study, sop=sop))
    answer = archive.get(f"/studies/{study}/metadata", "application/json")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == DICOM_JSON
    (dataset,) = answer.json()
    url = f"{archive.rs()}/studies/{study}/series/{study}.1/instances/{sop}"
    assert dataset["7FE00010"] == {"vr": "OW", "BulkDataURI": url}
    pixels = received(archive.get(url, 'multipart/related; type="application/octet-stream"'))[0][1]
    assert pixels == pydicom.dcmread(io.BytesIO(image(study, sop=sop))).PixelData


@row("54")
def frames_of_a_report_are_a_404(archive: SandboxArchive) -> None:
    study = new_uid()
    answer = archive.stow(sample("reportsi.dcm", study))
    url = value(stored(answer)[0], "00081190")
    answer = archive.get(f"{url}/frames/1")
    assert answer.status_code == 404
    assert answer.json() == {"errorMessage": "Not an image."}


def image_url(archive: SandboxArchive) -> str:
    return str(value(stored(archive.stow(image(new_uid())))[0], "00081190"))


@row("55")
def a_frame_behind_the_last_is_a_404(archive: SandboxArchive) -> None:
    answer = archive.get(f"{image_url(archive)}/frames/99")
    assert answer.status_code == 404
    assert answer.json() == {"errorMessage": "No such frame."}


@row("56")
def some_frames_are_a_206(archive: SandboxArchive) -> None:
    answer = archive.get(f"{image_url(archive)}/frames/1,99")
    assert answer.status_code == 206
    assert "Warning" not in answer.headers
    ((_kind, content),) = received(answer)
    assert len(content) == 64 * 64 * 2


def lose_file(archive: SandboxArchive, sop_instance_uid: str) -> None:
    """Take one object's file away from under the archive."""
    only_the_sandbox("loses a file")
    (path,) = [
        one for one in archive.files.rglob("*") if one.is_file() and sop_instance_uid.encode() in one.read_bytes()
    ]
    path.unlink()


@row("57")
def a_lost_file_makes_a_206(archive: SandboxArchive) -> None:
    study, lost = new_uid(), new_uid()
    archive.stow(image(study, sop=lost), image(study))
    lose_file(archive, lost)
    answer = archive.get(f"/studies/{study}", AS_STORED)
    assert answer.status_code == 206
    assert "1 objects no longer accessible." in answer.headers["Warning"]
    assert len(received(answer)) == 1


@row("58")
def a_study_without_any_file_is_a_410(archive: SandboxArchive) -> None:
    study, lost = new_uid(), new_uid()
    archive.stow(image(study, sop=lost))
    lose_file(archive, lost)
    answer = archive.get(f"/studies/{study}", AS_STORED)
    assert answer.status_code == 410
    assert answer.json() == {"errorMessage": "No longer accessible."}


@row("59")
def a_known_etag_is_a_304(archive: SandboxArchive) -> None:
    study = new_uid()
    archive.stow(image(study))
    tag = archive.get(f"/studies/{study}", AS_STORED).headers["ETag"]
    assert archive.get(f"/studies/{study}", AS_STORED, headers={"If-None-Match": tag}).status_code == 304
    archive.stow(image(study))
    assert archive.get(f"/studies/{study}", AS_STORED, headers={"If-None-Match": tag}).status_code == 200


# -- the table: deletion ---------------------------------------------------------------------------------------------


def rejected_study(archive: SandboxArchive, code: str = EXPIRED) -> tuple[str, bytes]:
    """A study of one image, rejected; and the image."""
    study = new_uid()
    one = image(study)
    archive.stow(one)
    assert archive.reject(f"/studies/{study}", code).json() == {"count": 1}
    return study, one


@row("60")
def a_study_is_rejected(archive: SandboxArchive) -> None:
    study = new_uid()
    archive.stow(image(study), image(study))
    answer = archive.reject(f"/studies/{study}")
    assert (answer.status_code, answer.json()) == (200, {"count": 2})


@row("61")
def a_raw_caret_never_reaches_the_archive(archive: SandboxArchive) -> None:
    (study,) = studies(archive, 1)
    url = urlsplit(archive.rs())
    connection = http.client.HTTPConnection(url.netloc, timeout=10)
    try:
        connection.request("POST", f"{url.path}/studies/{study}/reject/113039^DCM")
        assert connection.getresponse().status == 400
    finally:
        connection.close()
    assert archive.visible(study) == 1


@row("62")
def rejecting_again_finds_nothing(archive: SandboxArchive) -> None:
    study, _one = rejected_study(archive)
    answer = archive.reject(f"/studies/{study}")
    assert answer.status_code == 404
    assert answer.json() == {"errorMessage": f"No instances of Study[UID={study}] found for rejection."}


@row("63")
def a_rejected_study_is_an_empty_list(archive: SandboxArchive) -> None:
    study, _one = rejected_study(archive)
    answer = archive.get("/studies", params={"StudyInstanceUID": study})
    assert (answer.status_code, answer.json()) == (200, [])
    answer = archive.get(f"/studies/{study}/series")
    assert (answer.status_code, answer.json()) == (200, [])


@row("64")
def its_instances_are_a_204(archive: SandboxArchive) -> None:
    study, _one = rejected_study(archive)
    assert archive.get(f"/studies/{study}/instances").status_code == 204
    assert archive.get(f"/instances/count?StudyInstanceUID={study}").json() == {"count": 0}


@row("65")
def it_is_still_counted(archive: SandboxArchive) -> None:
    study, _one = rejected_study(archive)
    assert archive.get(f"/studies/count?StudyInstanceUID={study}").json() == {"count": 1}


@row("66")
def it_cannot_be_retrieved(archive: SandboxArchive) -> None:
    study, _one = rejected_study(archive)
    assert archive.get(f"/studies/{study}", AS_STORED).status_code == 404
    assert archive.get(f"/studies/{study}/metadata").status_code == 404


@row("67")
def other_aes_still_see_it(archive: SandboxArchive) -> None:
    study, _one = rejected_study(archive)
    for aet, shown in (("AS_RECEIVED", "2"), ("IOCM_EXPIRED", "1")):  # the former shows the note, too
        (listed,) = archive.get(f"/studies?StudyInstanceUID={study}", aet=aet).json()
        assert value(listed, "00201208") == shown
    assert archive.get(f"/studies?StudyInstanceUID={study}", aet="IOCM_QUALITY").status_code == 204


@row("68")
def storing_an_expired_object_again_restores_it(archive: SandboxArchive) -> None:
    study, one = rejected_study(archive, EXPIRED)
    assert archive.stow(one).status_code == 200
    (listed,) = archive.get(f"/studies?StudyInstanceUID={study}").json()
    assert value(listed, "00201208") == "1"


@row("69")
def a_rejection_for_quality_leaves_a_visible_note(archive: SandboxArchive) -> None:
    study, _one = rejected_study(archive, QUALITY)
    (listed,) = archive.get(f"/studies?StudyInstanceUID={study}").json()
    assert value(listed, "00080061") == "KO"
    assert value(listed, "00201208") == "1"
    (note,) = objects(archive.get(f"/studies/{study}", AS_STORED))
    assert note.SOPClassUID == "1.2.840.10008.5.1.4.1.1.88.59"
    assert note.ConceptNameCodeSequence[0].CodeValue == "113001"
    assert archive.reject(f"/studies/{study}", QUALITY).json() == {"count": 1}


@row("70")
def storing_an_object_rejected_for_quality_leaves_it_hidden(archive: SandboxArchive) -> None:
    study, one = rejected_study(archive, QUALITY)
    answer = archive.stow(one)
    assert answer.status_code == 200
    assert len(stored(answer)) == 1
    (listed,) = archive.get(f"/studies?StudyInstanceUID={study}").json()
    assert value(listed, "00080061") == "KO"


@row("71")
def an_object_rejected_for_safety_is_refused(archive: SandboxArchive) -> None:
    _study, one = rejected_study(archive, SAFETY)
    answer = archive.stow(one)
    assert answer.status_code == 409
    assert reasons(answer) == [42865]


@row("72")
def an_unknown_code_is_a_404(archive: SandboxArchive) -> None:
    (study,) = studies(archive, 1)
    answer = archive.reject(f"/studies/{study}", "999%5EDCM")
    assert (answer.status_code, answer.json()["errorMessage"]) == (404, "Unknown Rejection Note Code: (999, DCM)")
    answer = archive.reject(f"/studies/{study}", "113039%255EDCM")
    assert (answer.status_code, answer.content) == (404, b"")


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not come true within ten seconds"
        time.sleep(0.01)


@row("73")
def a_queued_rejection_is_a_202(archive: SandboxArchive) -> None:
    (study,) = studies(archive, 1)
    answer = archive.reject(f"/studies/{study}", query="?queue=true")
    assert (answer.status_code, answer.content) == (202, b"")
    until(lambda: archive.visible(study) == 0)


@row("74")
def rejecting_an_unknown_study_is_a_404(archive: SandboxArchive) -> None:
    assert archive.reject(f"/studies/{new_uid()}").status_code == 404


@row("75")
def a_study_that_is_not_rejected_cannot_be_deleted(archive: SandboxArchive) -> None:
    (study,) = studies(archive, 1)
    answer = archive.delete(f"/studies/{study}")
    assert answer.status_code == 403
    assert answer.json()["errorMessage"] == "Deletion of Study with Rejection State: NONE not permitted"


@row("76")
def nor_can_one_that_is_partly_rejected(archive: SandboxArchive) -> None:
    study, first = new_uid(), new_uid()
    archive.stow(image(study, series=first), image(study, series=new_uid()))
    assert archive.reject(f"/studies/{study}/series/{first}").json() == {"count": 1}
    answer = archive.delete(f"/studies/{study}")
    assert answer.status_code == 403
    assert "Rejection State: PARTIAL" in answer.text
    assert archive.visible(study) == 1


@row("77")
def a_rejected_study_is_deleted_for_every_ae(archive: SandboxArchive) -> None:
    for code in (EXPIRED, QUALITY):
        study, _one = rejected_study(archive, code)
        answer = archive.delete(f"/studies/{study}")
        assert (answer.status_code, answer.content) == (204, b"")
        for aet in ("DCM4CHEE", "AS_RECEIVED", "IOCM_EXPIRED"):
            assert archive.get(f"/studies?StudyInstanceUID={study}", aet=aet).status_code == 204
            assert archive.get(f"/studies/{study}", AS_STORED, aet).status_code == 404


@row("78")
def deleting_again_is_a_404(archive: SandboxArchive) -> None:
    study, _one = rejected_study(archive)
    archive.delete(f"/studies/{study}")
    assert archive.delete(f"/studies/{study}").status_code == 404


@row("79")
def a_second_delete_meets_the_first(archive: SandboxArchive) -> None:
    study, _one = rejected_study(archive)
    archive.part.set_fault("dcm4chee", "delete", latency_ms=700, times=1)
    statuses: list[int] = []

    def delete() -> None:
        statuses.append(requests.delete(f"{archive.rs()}/studies/{study}", timeout=30).status_code)

    first = threading.Thread(target=delete)
    first.start()
    until(lambda: "delete" not in archive.get(f"{archive.part.control}/faults").json()["dcm4chee"])
    # The first one sleeps in front of the door, then at work: one sent half-way through its work meets it there.
    # Nothing on the wire tells which of the two it is, so this is by the clock: 0.7 s each.
    time.sleep(1.0)
    delete()
    answer = archive.stow(image(study))
    first.join()
    assert reasons(answer) == [42874]
    assert sorted(statuses) == [204, 409]


@row("80")
def series_and_instances_cannot_be_deleted(archive: SandboxArchive) -> None:
    study, sop = new_uid(), new_uid()
    archive.stow(image(study, sop=sop))
    archive.reject(f"/studies/{study}")
    assert archive.delete(f"/studies/{study}/series/{study}.1").status_code == 405
    assert archive.delete(f"/studies/{study}/series/{study}.1/instances/{sop}").status_code == 405


@row("81")
def the_purge_of_a_code_takes_every_instance_rejected_with_it(archive: SandboxArchive) -> None:
    only_the_sandbox("purges what other people rejected too")
    study, series, other = new_uid(), new_uid(), new_uid()
    archive.stow(image(study, series=series), image(study, series=series), image(study, series=other))
    somebody_elses, _one = rejected_study(archive)
    archive.reject(f"/studies/{study}/series/{series}")
    answer = archive.delete(f"{archive.arc}/reject/113039%5EDCM")
    # Two objects and one note of ours, one of each of somebody else's study.
    assert (answer.status_code, answer.json()) == (200, {"deleted": 5})
    (left,) = archive.get(f"/studies/{study}/series", aet="AS_RECEIVED").json()
    assert value(left, "0020000E") == other
    assert archive.get(f"/studies?StudyInstanceUID={somebody_elses}").status_code == 204


@row("82")
def the_purge_of_an_unknown_code_is_a_404(archive: SandboxArchive) -> None:
    assert archive.delete(f"{archive.arc}/reject/999%5EX").status_code == 404


@row("83")
def the_purge_wants_a_whole_date(archive: SandboxArchive) -> None:
    study, _one = rejected_study(archive)
    assert archive.delete(f"{archive.arc}/reject/113039%5EDCM?rejectedBefore=2026").status_code == 400
    answer = archive.delete(f"{archive.arc}/reject/113039%5EDCM?rejectedBefore=2000-01-01")
    assert answer.json() == {"deleted": 0}
    assert archive.visible(study, "AS_RECEIVED") == 2


@row("84")
def after_a_delete_everything_is_forgotten(archive: SandboxArchive) -> None:
    study, one = rejected_study(archive, SAFETY)
    assert archive.delete(f"/studies/{study}").status_code == 204
    assert archive.stow(one).status_code == 200
    assert archive.visible(study) == 1


# -- the table: the archive's own state ------------------------------------------------------------------------------


@row("85")
def the_status_does_not_ask_the_database(archive: SandboxArchive) -> None:
    for down in (False, True):
        archive.part.set_fault("dcm4chee", "*", database_down=down)
        answer = archive.get(f"{archive.arc}/ctrl/status")
        assert (answer.status_code, answer.json()) == (200, {"status": "STARTED"})


@row("86")
def a_stopped_archive_goes_on_answering(archive: SandboxArchive) -> None:
    only_the_sandbox("stops the archive")
    assert archive.http.post(f"{archive.arc}/ctrl/stop").status_code == 204
    assert archive.get(f"{archive.arc}/ctrl/status").json() == {"status": "STOPPED"}
    assert archive.stow(image(new_uid())).status_code == 200


@row("87")
def the_storage_tells_its_space(archive: SandboxArchive) -> None:
    (storage,) = archive.get(f"{archive.arc}/storage").json()
    assert storage["dcmStorageID"] == "fs1"
    assert isinstance(storage["usableSpace"], int)
    assert isinstance(storage["totalSpace"], int)
    assert 0 < storage["usableSpace"] <= storage["totalSpace"]


@row("88")
def a_broken_storage_is_left_out(archive: SandboxArchive) -> None:
    archive.part.set_fault("dcm4chee", "storage", storage_down=True)
    answer = archive.get(f"{archive.arc}/storage")
    assert (answer.status_code, answer.json()) == (200, [])


@row("89")
def space_comes_back_with_the_purge(archive: SandboxArchive) -> None:
    only_the_sandbox("sets its clock")

    def usable() -> int:
        space: int = archive.get(f"{archive.arc}/storage").json()[0]["usableSpace"]
        return space

    before = usable()
    study, one = rejected_study(archive)
    with_study = usable()
    assert with_study <= before - len(one)
    archive.delete(f"/studies/{study}")
    assert usable() == with_study
    archive.http.put(f"{archive.part.control}/clock", json={"advance_s": 301})
    until(lambda: usable() == before)


@row("90")
def the_server_tells_its_time(archive: SandboxArchive) -> None:
    answer = archive.get(f"{archive.arc}/monitor/serverTime")
    (text,) = answer.json().values()
    assert list(answer.json()) == ["serverTimeWithTimezone"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d{4}", text)


@row("91")
def a_queued_rejection_is_listed_when_done(archive: SandboxArchive) -> None:
    (study,) = studies(archive, 1)
    mine = new_uid()
    archive.reject(f"/studies/{study}", query=f"?queue=true&batchID={mine}")
    listing = f"{archive.arc}/queue/Rejection?status=COMPLETED&batchID={mine}"
    until(lambda: len(archive.get(listing).json()) == 1)
    (task,) = archive.get(listing).json()
    assert (task["queue"], task["batchID"]) == ("Rejection", mine)


@row("92")
def a_queue_s_name_is_only_a_filter(archive: SandboxArchive) -> None:
    assert archive.get(f"{archive.arc}/queue/NoSuch").json() == []
    assert archive.get(f"{archive.arc}/queue/NoSuch/count").json() == {"count": 0}
    assert archive.get(f"{archive.arc}/queue/Export/count").json() == {"count": 0}


@row("93")
def the_aes_tell_the_policy(archive: SandboxArchive) -> None:
    listed = {ae["dicomAETitle"]: ae for ae in archive.get(f"{archive.arc}/aets").json()}
    assert listed["DCM4CHEE"]["dcmAllowDeleteStudyPermanently"] == "REJECTED"
    assert len(listed) == 8


@row("94")
def four_rejection_codes_are_listed(archive: SandboxArchive) -> None:
    codes = archive.get(f"{archive.arc}/reject").json()
    assert [code["label"] for code in codes] == sorted(code["label"] for code in codes)
    assert {code["codeValue"] for code in codes} == {"113001", "113037", "113038", "113039"}
    (revoke,) = archive.get(f"{archive.arc}/reject?dcmRevokeRejection=true").json()
    assert revoke["codeValue"] == "REVOKE_REJECTION"


@row("95")
def an_unknown_metric_is_a_404(archive: SandboxArchive) -> None:
    assert archive.get(f"{archive.arc}/metrics/nope").status_code == 404
    assert archive.get(f"{archive.arc}/metrics/write-to-fs1").status_code == 200


@row("96")
def without_a_token_a_secured_archive_answers_401(archive: SandboxArchive) -> None:
    archive.part.set_fault("dcm4chee", "*", bearer=True)
    assert archive.get("/studies").status_code == 401


def token(archive: SandboxArchive, client: str) -> str:
    answer = archive.http.post(
        f"{archive.part.control}/keycloak/realms/dcm4che/protocol/openid-connect/token",
        data={"grant_type": "client_credentials", "client_id": client, "client_secret": f"{client}-secret"},
    )
    assert answer.status_code == 200, answer.text
    return str(answer.json()["access_token"])


@row("97")
def a_token_without_a_role_is_a_403_without_a_word(archive: SandboxArchive) -> None:
    archive.part.set_fault("dcm4chee", "*", bearer=True)
    answer = archive.get("/studies", headers={"Authorization": f"Bearer {token(archive, 'visitor')}"})
    assert (answer.status_code, answer.content) == (403, b"")
    answer = archive.get("/studies", headers={"Authorization": f"Bearer {token(archive, 'courier')}"})
    assert answer.status_code == 204


@row("98")
def without_a_database_a_search_is_a_stack_trace(archive: SandboxArchive) -> None:
    archive.part.set_fault("dcm4chee", "*", database_down=True)
    answer = archive.get("/studies")
    assert answer.status_code == 500
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert "\n\tat org.dcm4chee" in answer.text


@row("99")
def wildfly_s_health_is_an_array(archive: SandboxArchive) -> None:
    archive.part.set_fault("dcm4chee", "*", database_down=True)
    origin = archive.arc.removesuffix("/dcm4chee-arc")
    for path in ("/health", "/health/live", "/health/ready", "/health/started"):
        answer = archive.get(origin + path)
        assert answer.status_code == 200
        assert [check["outcome"] for check in answer.json()] == [True] * 5


@pytest.mark.parametrize("holds", [pytest.param(one, id=one.__name__) for one in dict.fromkeys(ROWS.values())])
def test_what_was_seen_of_a_dcm4chee_holds(holds: Row, archive: SandboxArchive) -> None:
    holds(archive)


def test_every_row_of_the_table_is_executed() -> None:
    table = [str(number) for number in range(1, 100)] + ["39a", "39b", "39c", "39d"]
    assert sorted(ROWS) == sorted(table)


# -- what has no row -------------------------------------------------------------------------------------------------


def test_without_its_database_the_archive_fails_each_instance_and_crashes_on_every_question(
    archive: SandboxArchive,
) -> None:
    (study,) = studies(archive, 1)
    archive.part.set_fault("dcm4chee", "*", database_down=True)
    answer = archive.stow(image(new_uid()))
    assert (answer.status_code, reasons(answer)) == (409, [272])
    for path in ("/studies", f"/studies/{study}", f"/studies/{study}/metadata", "/studies/count"):
        assert archive.get(path).status_code == 500
    assert archive.get(f"{archive.arc}/queue/Export/count").status_code == 500
    assert archive.reject(f"/studies/{study}").status_code == 500
    assert archive.delete(f"/studies/{study}").status_code == 500
    assert len(archive.get(f"{archive.arc}/storage").json()) == 1


def test_without_its_storage_the_archive_still_finds_but_neither_stores_nor_gives(archive: SandboxArchive) -> None:
    (study,) = studies(archive, 1)
    archive.part.set_fault("dcm4chee", "*", storage_down=True)
    answer = archive.stow(image(new_uid()))
    assert (answer.status_code, reasons(answer)) == (409, [42752])
    assert archive.get("/studies").status_code == 200
    assert archive.get(f"/studies/{study}", AS_STORED).status_code == 410


def test_an_object_whose_end_is_missing_is_no_success(archive: SandboxArchive) -> None:
    answer = archive.stow(image(new_uid())[:-100])
    assert answer.status_code == 409
    assert reasons(answer) == [272]


def test_the_last_part_of_a_store_can_get_lost(archive: SandboxArchive) -> None:
    study, first, last = new_uid(), new_uid(), new_uid()
    archive.part.set_fault("dcm4chee", "store", lose_last_part=True, times=1)
    answer = archive.stow(image(study, sop=first), image(study, sop=last))
    assert answer.status_code == 200
    assert [value(item, "00081155") for item in stored(answer)] == [first]
    assert archive.visible(study) == 1


def test_the_first_object_decides_what_a_study_says_of_itself(archive: SandboxArchive) -> None:
    study = new_uid()
    archive.stow(image(study, StudyDescription="First"), image(study, StudyDescription="Second"))
    said = {ds.StudyDescription for ds in objects(archive.get(f"/studies/{study}", AS_STORED))}
    assert said == {"First"}
    received_as = {ds.StudyDescription for ds in objects(archive.get(f"/studies/{study}", AS_STORED, "AS_RECEIVED"))}
    assert received_as == {"First", "Second"}


def test_what_is_retrieved_is_not_the_file_that_was_sent_but_bears_its_pixels(archive: SandboxArchive) -> None:
    study = new_uid()
    sent = image(study, PatientName="Äöü^Çelik", SpecificCharacterSet="ISO_IR 100")
    archive.stow(sent)
    ((_kind, content),) = received(archive.get(f"/studies/{study}", AS_STORED))
    assert content != sent
    ds, original = pydicom.dcmread(io.BytesIO(content)), pydicom.dcmread(io.BytesIO(sent))
    assert ds.IssuerOfPatientID.startswith("DCM4CHEE.")
    assert ds.PixelData == original.PixelData
    assert str(ds.PatientName) == "Äöü^Çelik"
    ((_kind, content),) = received(archive.get(f"/studies/{study}", AS_STORED, "AS_RECEIVED"))
    ds = pydicom.dcmread(io.BytesIO(content))
    assert ds == original
    assert ds.file_meta != original.file_meta, "even as it was received, its meta information is the archive's own"


def test_a_patient_id_that_is_made_up_leaves_no_trail_in_the_object(archive: SandboxArchive) -> None:
    study = new_uid()
    archive.stow(image(study, PatientID=""))
    ((_kind, content),) = received(archive.get(f"/studies/{study}", AS_STORED))
    ds = pydicom.dcmread(io.BytesIO(content))
    assert (ds.PatientID[:2], ds.IssuerOfPatientID) == ("P-", "DCM4CHEE.48199C56.09F24A43")
    assert "OriginalAttributesSequence" not in ds


def test_what_an_object_says_otherwise_than_its_study_is_left_in_its_trail(archive: SandboxArchive) -> None:
    study = new_uid()
    archive.stow(image(study, seed=1, StudyDescription="A", AccessionNumber="7"))
    archive.stow(image(study, seed=2, StudyDescription="B", PatientSex="F"))
    first, second = sorted(
        objects(archive.get(f"/studies/{study}", AS_STORED)), key=lambda ds: "OriginalAttributesSequence" in ds
    )
    assert "OriginalAttributesSequence" not in first
    assert (second.StudyDescription, second.AccessionNumber, second.PatientSex) == ("A", "7", "O")
    (change,) = second.OriginalAttributesSequence
    (before,) = change.ModifiedAttributesSequence
    assert {element.keyword: element.value for element in before} == {"StudyDescription": "B", "PatientSex": "F"}
    assert change.ReasonForTheAttributeModification == "COERCE"
    received_as = objects(archive.get(f"/studies/{study}", AS_STORED, "AS_RECEIVED"))
    assert not any("OriginalAttributesSequence" in ds for ds in received_as)


@pytest.mark.parametrize("charset", ["ISO_IR 100", "ISO_IR 192", None])
def test_the_character_set_that_is_told_is_that_of_the_object(archive: SandboxArchive, charset: str | None) -> None:
    study, named = new_uid(), {} if charset is None else {"SpecificCharacterSet": charset}
    archive.stow(image(study, StudyDescription="Thorax" if charset is None else "Schädel", **named))
    paths = (f"/studies?StudyInstanceUID={study}", f"/studies/{study}/instances")
    rows = [archive.get(path, aet=aet).json()[0] for path in paths for aet in ("DCM4CHEE", "AS_RECEIVED")]
    told = {"vr": "CS"} if charset is None else {"vr": "CS", "Value": [charset]}
    assert [row["00080005"] for row in rows] == [told] * 4
    assert {value(row, "00080054") for row in rows} == {"DCM4CHEE"}
    assert archive.get(f"/studies/{study}/metadata").json()[0].get("00080005") == (told if charset else None)


@pytest.mark.parametrize("where", ["series", "study"])
@pytest.mark.parametrize("code", ["113001", "113037", "113038", "113039"])
def test_what_was_rejected_elsewhere_is_a_success_that_changes_nothing(
    archive: SandboxArchive, where: str, code: str
) -> None:
    study, other, sop = new_uid(), new_uid(), new_uid()
    archive.stow(image(study, sop=sop))
    archive.reject(f"/studies/{study}", f"{code}%5EDCM")
    shown, known = archive.visible(study), archive.visible(study, "AS_RECEIVED")
    again = image(other, sop=sop) if where == "study" else image(study, sop=sop, series=f"{study}.9")
    assert archive.stow(again).status_code == 200
    assert (archive.visible(study), archive.visible(study, "AS_RECEIVED")) == (shown, known)
    assert archive.visible(other, "AS_RECEIVED") == 0


@pytest.mark.parametrize(
    ("end", "is_read"),
    [
        (b"\0" * 8, True),
        (b"\0" * 512, True),
        (b"\xfc\xff\xfc\xffOB\0\0\4\0\0\0\0\0\0\0", True),
        (b"\0", False),
        (b"\0" * 9, False),
        (b"junk", False),
        (b"\r\n", False),
        (b"<html></html>", False),
    ],
)
def test_bytes_behind_the_dataset_are_read_as_elements_or_are_272(
    archive: SandboxArchive, end: bytes, is_read: bool
) -> None:
    for content in (image(new_uid(), side=8), sample("JPEG2000.dcm", new_uid())):
        answer = archive.stow(content + end)
        assert (answer.status_code, reasons(answer)) == ((200, []) if is_read else (409, [272]))
        assert is_read or answer.headers["Warning"] == '299 dcm4chee-arc "java.io.EOFException"'


def test_a_file_without_its_preamble_is_stored(archive: SandboxArchive) -> None:
    study = new_uid()
    assert archive.stow(image(study)[132:]).status_code == 200
    for aet in ("DCM4CHEE", "AS_RECEIVED"):
        ((_kind, content),) = received(archive.get(f"/studies/{study}", AS_STORED, aet))
        assert content[128:132] == b"DICM"
        assert pydicom.dcmread(io.BytesIO(content)).StudyInstanceUID == study


def item(keywords: dict[str, str]) -> pydicom.Dataset:
    made = pydicom.Dataset()
    for keyword, text in keywords.items():
        setattr(made, keyword, text)
    return made


TEXTS: dict[str, tuple[dict[str, Any], bool]] = {
    "a long second value": ({"AccessionNumber": ["a", "b" * 300]}, True),
    "a NUL in a second value": ({"AccessionNumber": ["a", "b\0c"]}, True),
    "a NUL in a first value": ({"AccessionNumber": ["b\0c", "a"]}, False),
    "blanks before": ({"AccessionNumber": " " * 300 + "a"}, True),
    "blanks within": ({"AccessionNumber": "a" + " " * 300 + "a"}, False),
    "birth date": ({"PatientBirthDate": "1" * 256}, False),
    "responsible person": ({"ResponsiblePerson": "R" * 256}, False),
    "verification flag": ({"VerificationFlag": "V" * 256}, False),
    "request": ({"RequestAttributesSequence": [{}, {"RequestedProcedureID": "R" * 256}]}, False),
    "requesting physician": ({"RequestAttributesSequence": [{"RequestingPhysician": "a\0b"}]}, False),
    "comments on a request": ({"RequestAttributesSequence": [{"RequestedProcedureComments": "R" * 256}]}, True),
    "other patient ID": ({"OtherPatientIDsSequence": [{"PatientID": "R" * 256}]}, False),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", TEXTS)
def test_of_texts_the_database_keeps_first_values_and_those_of_some_items(archive: SandboxArchive, name: str) -> None:
    keywords, is_stored = TEXTS[name]
    given = {
        keyword: list(map(item, text)) if keyword.endswith("Sequence") else text for keyword, text in keywords.items()
    }
    answer = archive.stow(image(new_uid(), side=8, **given))
    assert (answer.status_code, reasons(answer)) == ((200, []) if is_stored else (409, [272]))


def test_group_lengths_are_not_given_back(archive: SandboxArchive) -> None:
    study = new_uid()
    sent = image(study)
    at = sent.index(b"\x20\x00\x0d\x00UI")
    archive.stow(sent[:at] + b"\x20\x00\x00\x00UL\x04\x00\x10\x00\x00\x00" + sent[at:])
    ((_kind, content),) = received(archive.get(f"/studies/{study}", AS_STORED, "AS_RECEIVED"))
    assert b"\x20\x00\x00\x00UL" not in content
    assert pydicom.dcmread(io.BytesIO(content)) == pydicom.dcmread(io.BytesIO(sent))


@pytest.mark.parametrize(
    "name", ["image_dfl.dcm", "ExplVR_BigEnd.dcm", "JPEG2000.dcm", "MR_small_RLE.dcm", "rtplan.dcm", "CT_small.dcm"]
)
def test_objects_of_every_kind_survive_the_change_of_their_header(archive: SandboxArchive, name: str) -> None:
    study = new_uid()
    sent = sample(name, study)
    assert archive.stow(sent).status_code == 200
    (ds,) = objects(archive.get(f"/studies/{study}", AS_STORED))
    original = pydicom.dcmread(io.BytesIO(sent))
    assert ds.file_meta.TransferSyntaxUID == original.file_meta.TransferSyntaxUID
    assert ds.IssuerOfPatientID == "DCM4CHEE.48199C56.09F24A43"
    assert ds.get("PixelData") == original.get("PixelData")
    assert set(original.keys()) <= set(ds.keys())


def other_id(value: str) -> list[pydicom.Dataset]:
    item = pydicom.Dataset()
    item.PatientID, item.IssuerOfPatientID = value, "ELSEWHERE"
    return [item]


def test_an_image_comes_back_with_what_other_images_say_of_its_patient(archive: SandboxArchive) -> None:
    plain, first, later = new_uid(), new_uid(), new_uid()
    ids = [f"X{number}{new_uid()[-12:]}" for number in range(2)]
    more = {"PatientComments": "first", "OtherPatientIDsSequence": other_id(ids[0]), "PatientSex": "M"}
    archive.stow(image(plain, side=8))
    archive.stow(image(first, side=8, **more))
    archive.stow(image(later, side=8, PatientComments="later", OtherPatientIDsSequence=other_id(ids[1])))

    def told(study: str, aet: str = "DCM4CHEE") -> tuple[Any, ...]:
        (ds,) = objects(archive.get(f"/studies/{study}", AS_STORED, aet=aet))
        known = {one.PatientID for one in ds.get("OtherPatientIDsSequence", ())}
        return ds.get("PatientComments"), ds.PatientSex, known

    assert [told(study) for study in (plain, first, later)] == [("first", "O", set(ids))] * 3
    assert told(plain, "AS_RECEIVED") == (None, "O", set())
    assert told(first, "AS_RECEIVED") == ("first", "M", {ids[0]})
    for study in (first, later):
        assert archive.reject(f"/studies/{study}").status_code == 200
        assert archive.delete(f"/studies/{study}").status_code == 204
    assert told(plain) == ("first", "O", set(ids)), "patients outlive their studies"


def test_numbers_in_text_stay_as_they_were_written(archive: SandboxArchive) -> None:
    study = new_uid()
    archive.stow(image(study, SliceThickness="05.00", InstanceNumber="007"))
    (dataset,) = archive.get(f"/studies/{study}/metadata").json()
    assert dataset["00180050"] == {"vr": "DS", "Value": ["05.00"]}
    assert dataset["00200013"] == {"vr": "IS", "Value": ["007"]}
    assert dataset["00280010"] == {"vr": "US", "Value": [64]}


def test_a_revoked_rejection_needs_an_ae_that_sees_it(archive: SandboxArchive) -> None:
    study, _one = rejected_study(archive)
    revoke = f"/studies/{study}/reject/REVOKE_REJECTION%5E99DCM4CHEE"
    assert archive.http.post(archive.rs() + revoke).status_code == 404
    assert archive.http.post(archive.rs("AS_RECEIVED") + revoke).json() == {"count": 2}, "with the note"
    assert archive.visible(study) == 1


def test_a_rejection_is_repeated_where_what_it_hides_is_shown(archive: SandboxArchive) -> None:
    study, _one = rejected_study(archive, EXPIRED)
    again = f"/studies/{study}/reject/{EXPIRED}"
    assert archive.http.post(archive.rs() + again).status_code == 404
    assert archive.http.post(archive.rs("IOCM_EXPIRED") + again).json() == {"count": 1}
    assert archive.visible(study) == 0
    assert archive.http.post(f"{archive.rs('IOCM_EXPIRED')}/studies/{new_uid()}/reject/{EXPIRED}").status_code == 404


def test_a_rejection_that_stops_half_way_hides_a_study_that_counts_as_not_rejected(archive: SandboxArchive) -> None:
    study = new_uid()
    assert archive.stow(image(study, side=8)).status_code == 200
    archive.part.set_fault("dcm4chee", "reject", crash_in_reject=True, times=1)
    assert archive.reject(f"/studies/{study}", EXPIRED).status_code == 500
    assert archive.visible(study) == 0
    assert archive.reject(f"/studies/{study}", EXPIRED).status_code == 404
    refused = archive.http.delete(f"{archive.rs()}/studies/{study}")
    assert (refused.status_code, "Rejection State: NONE" in refused.text) == (403, True)
    again = f"{archive.rs('IOCM_EXPIRED')}/studies/{study}/reject/{EXPIRED}"
    assert archive.http.post(again).json() == {"count": 1}
    assert archive.http.delete(f"{archive.rs()}/studies/{study}").status_code == 204


@pytest.mark.parametrize("code", [QUALITY, SAFETY, "113038%5EDCM"])
def test_a_rejection_note_that_is_stored_needs_what_it_names_and_rejects_it(archive: SandboxArchive, code: str) -> None:
    study, alive, dead = new_uid(), new_uid(), new_uid()
    files = [image(study, sop=sop, side=8) for sop in (alive, dead)]
    assert archive.stow(*files).status_code == 200
    assert archive.reject(f"/studies/{study}/series/{study}.1/instances/{dead}", code).status_code == 200
    (note,) = [ds for ds in objects(archive.get(f"/studies/{study}", AS_STORED)) if ds.Modality == "KO"]
    content = io.BytesIO()
    note.save_as(content)
    assert archive.reject(f"/studies/{study}").status_code == 200
    assert archive.http.delete(f"{archive.rs()}/studies/{study}").status_code == 204

    def failures(*stored: bytes) -> list[int]:
        answer = archive.stow(*stored).json()
        return [item["00081197"]["Value"][0] for item in answer.get("00081198", {}).get("Value", ())]

    assert failures(content.getvalue()) == [42866], "there is no such series"
    assert failures(files[0]) == []
    assert failures(content.getvalue()) == [42866], "there is no such instance"
    assert failures(files[1], content.getvalue()) == []
    shown = {ds.SOPInstanceUID for ds in objects(archive.get(f"/studies/{study}", AS_STORED))}
    assert shown == {alive, note.SOPInstanceUID}, "and what it names is hidden"


def test_a_rejected_object_with_other_bytes_is_replaced_when_it_is_restored(archive: SandboxArchive) -> None:
    study, sop = new_uid(), new_uid()
    archive.stow(image(study, sop=sop, seed=1))
    archive.reject(f"/studies/{study}")
    archive.stow(image(study, sop=sop, seed=2))
    (ds,) = objects(archive.get(f"/studies/{study}", AS_STORED))
    assert ds.PixelData == pydicom.dcmread(io.BytesIO(image(study, sop=sop, seed=2))).PixelData


def test_what_expired_is_deleted_by_itself_after_a_day_and_nothing_else_is(archive: SandboxArchive) -> None:
    only_the_sandbox("sets its clock")
    expired, _one = rejected_study(archive, EXPIRED)
    poor, _one = rejected_study(archive, QUALITY)
    archive.http.put(f"{archive.part.control}/clock", json={"advance_s": 86_390})
    assert archive.visible(expired, "AS_RECEIVED") == 2
    archive.http.put(f"{archive.part.control}/clock", json={"advance_s": 310})
    until(lambda: archive.get(f"/studies?StudyInstanceUID={expired}").status_code == 204)
    assert archive.visible(poor, "IOCM_QUALITY") == 1


def test_a_page_is_filled_up_past_hidden_studies_so_pages_can_overlap(archive: SandboxArchive) -> None:
    uids = studies(archive, 6)
    for hidden in uids[1:3]:
        archive.reject(f"/studies/{hidden}")
    pages = [archive.get(f"/studies?limit=2&offset={offset}") for offset in range(0, 6, 2)]
    seen = [value(one, "0020000D") for page in pages if page.status_code == 200 for one in page.json()]
    assert set(seen) == {uids[0], *uids[3:]}
    assert len(archive.get("/studies").json()) == 4


def test_names_match_with_their_case_unless_the_query_is_all_capitals_and_wildcards_work(
    archive: SandboxArchive,
) -> None:
    archive.stow(image(new_uid(), PatientName="Adams^John", PatientID="A1", StudyDate="20240105"))
    archive.stow(image(new_uid(), PatientName="Berg^Jane", PatientID="B[2]", StudyDate="20250607"))
    for query, count in {
        "PatientName=adams*": 0,
        "PatientName=Adams*": 1,
        "PatientName=ADAMS*": 1,
        "00100010=ADAMS^JOHN": 1,
        "PatientID=B[2]": 1,
        "PatientID=B[2*": 1,
        "StudyDate=20240101-20241231": 1,
        "StudyDate=20240101-": 2,
        "ModalitiesInStudy=CT": 2,
        "ModalitiesInStudy=MR": 0,
        "orderby=-StudyDate&limit=1": 1,
    }.items():
        answer = archive.get(f"/studies?{query.replace('^', '%5E').replace('[', '%5B').replace(']', '%5D')}")
        assert (len(answer.json()) if answer.content else 0) == count, query
    first = archive.get("/studies?orderby=-StudyDate&limit=1").json()[0]
    assert value(first, "00100020") == "B[2]"


def test_a_lenient_client_reads_error_bodies_that_are_no_json(archive: SandboxArchive) -> None:
    answer = archive.stow(image(new_uid()), aet='A"B')
    assert answer.status_code in (400, 404)
    with pytest.raises(json.JSONDecodeError):
        answer.json()


def test_lists_and_metadata_are_compressed_for_whoever_accepts_that(archive: SandboxArchive) -> None:
    (study,) = studies(archive, 1)
    for path in ("/studies", f"/studies/{study}/series", f"/studies/{study}/metadata"):
        answer = archive.get(path, headers={"Accept-Encoding": "gzip"})
        assert answer.headers["Content-Encoding"] == "gzip"
        plain = archive.get(path, headers={"Accept-Encoding": "identity"})
        assert plain.headers.get("Content-Encoding", "identity") == "identity"
        assert answer.json() == plain.json()
    assert "Content-Encoding" not in archive.get(f"/studies/{study}", AS_STORED).headers


def test_an_answer_can_be_made_to_depend_on_what_the_client_has(archive: SandboxArchive) -> None:
    (study,) = studies(archive, 1)
    path, past = f"/studies/{study}", "Mon, 01 Jan 2001 00:00:00 GMT"
    modified = archive.get(path, AS_STORED).headers["Last-Modified"]
    for header, text, status in (
        ("If-Modified-Since", modified, 304),
        ("If-Modified-Since", past, 200),
        ("If-Unmodified-Since", modified, 200),
        ("If-Unmodified-Since", past, 412),
        ("If-Match", '"another"', 412),
        ("If-Match", "*", 200),
    ):
        assert archive.get(path, AS_STORED, headers={header: text}).status_code == status, (header, text)


def test_a_secured_archive_hides_all_but_wildfly_s_health(archive: SandboxArchive) -> None:
    archive.part.set_fault("dcm4chee", "*", bearer=True)
    for path in ("/ctrl/status", "/queue/Export/count", "/storage", "/reject"):
        assert archive.get(archive.arc + path).status_code == 401
    assert archive.get(archive.arc.removesuffix("/dcm4chee-arc") + "/health").status_code == 200


def test_sixteen_clients_at_once_lose_nothing(archive: SandboxArchive) -> None:
    study = new_uid()
    content = [image(study, side=8) for _ in range(64)]
    statuses: list[int] = []

    def send(some: Sequence[bytes]) -> None:
        with requests.Session() as http:
            own = SandboxArchive(archive.part, archive.files, http)
            statuses.extend(own.stow(one).status_code for one in some)

    senders = [threading.Thread(target=send, args=(content[at::16],)) for at in range(16)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert statuses == [200] * 64
    assert archive.visible(study) == 64
