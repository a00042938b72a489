"""The habits of Orthanc that docs/pacs-oddities.md calls *seen*, seen again: if one is gone, the page is out of date.

Raw requests, none of our dialects: what they make of these habits is shown elsewhere.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import urllib3

from courier.errors import PacsUnauthorized
from courier.settings import AuthSettings, ServerSettings
from sandbox import processes as parts
from sandbox.processes import Processes
from sandbox.synthetic import image, new_uid
from tests.poison import poisonous
from worker.pacs.registry import connect

ODDITIES = Path(__file__).parents[2] / "docs" / "pacs-oddities.md"
DICOM_JSON = {"Accept": "application/dicom+json"}
#: Takes a second network interface to see; takes an Orthanc of its own, see tests/journey/test_hangs.py.
NOT_SHOWN = {"It listens everywhere", "A file can keep Orthanc busy for a long time"}


class Raw:
    """Orthanc as it answers, status and body."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.rest = url.removesuffix("/dicom-web")
        self._pool = urllib3.PoolManager(retries=False)

    def call(
        self, method: str, path: str, *, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> urllib3.BaseHTTPResponse:
        url = path if path.startswith("http") else self._url + path
        return self._pool.request(method, url, body=body, headers=headers or DICOM_JSON, redirect=False)

    def stow(self, *contents: bytes, part_type: str = "application/dicom") -> tuple[int, dict[str, Any]]:
        parts = [b"--BB\r\nContent-Type: %s\r\n\r\n%s\r\n" % (part_type.encode(), content) for content in contents]
        content_type = 'multipart/related; type="application/dicom"; boundary=BB'
        headers = {**DICOM_JSON, "Content-Type": content_type}
        answer = self.call("POST", "/studies", body=b"".join(parts) + b"--BB--\r\n", headers=headers)
        return answer.status, answer.json()

    def archive(self, *contents: bytes, end: int | None = None) -> tuple[int, list[str]]:
        """Send files as an archive, up to ``end``; its status, and that of each file in the answer."""
        body = io.BytesIO()
        with zipfile.ZipFile(body, "w") as archive:
            for number, content in enumerate(contents):
                archive.writestr(str(number), content)
        headers = {"Content-Type": "application/zip"}
        answer = self.call("POST", f"{self.rest}/instances", body=body.getvalue()[:end], headers=headers)
        told = answer.json()
        return answer.status, [one["Status"] for one in told] if isinstance(told, list) else []

    def studies(self, query: str) -> list[str]:
        answer = self.call("GET", f"/studies?{query}")
        assert answer.status == 200
        return [ds["0020000D"]["Value"][0] for ds in answer.json()]


@pytest.fixture
def raw(orthanc: str) -> Raw:
    return Raw(orthanc)


def stored(answer: dict[str, Any]) -> int:
    return len(answer["00081199"].get("Value", []))


def test_orthanc_does_not_tell_a_duplicate(raw: Raw) -> None:
    study, sop = new_uid(), new_uid()
    first = image(study, sop=sop, PatientName="First")
    assert raw.stow(first)[0] == 200
    for again in (first, image(study, sop=sop, PatientName="Second")):
        status, answer = raw.stow(again)
        assert (status, stored(answer)) == (200, 1)
    assert raw.studies(f"StudyInstanceUID={study}&PatientName=First") == [study]


def test_an_archive_is_answered_file_by_file_in_order(raw: Raw) -> None:
    study, known = new_uid(), image(new_uid())
    assert raw.archive(known) == (200, ["Success"])
    assert raw.archive(image(study), known, image(study)) == (200, ["Success", "AlreadyStored", "Success"])
    assert raw.archive(b"garbage", image(study)) == (200, ["Success"])
    assert raw.archive(b"garbage") == (200, [])


def test_an_archive_that_is_cut_short_stores_nothing(raw: Raw) -> None:
    study = new_uid()
    assert raw.archive(image(study), image(study), end=-100) == (400, [])
    assert raw.studies(f"StudyInstanceUID={study}") == []


def test_one_file_can_make_orthanc_refuse_an_archive(raw: Raw) -> None:
    study = new_uid()
    assert raw.archive(image(study), poisonous(new_uid()), image(study)) == (400, [])
    assert raw.studies(f"StudyInstanceUID={study}") == [study]
    assert raw.archive(poisonous(new_uid())) == (400, [])


def test_a_file_alone_may_be_taken_for_an_archive(raw: Raw) -> None:
    study = new_uid()
    content = b"PK\3\4" + image(study)[4:]
    assert raw.call("POST", f"{raw.rest}/instances", body=content, headers={}).status == 400
    assert raw.archive(content) == (200, ["Success"])


def test_a_400_may_have_stored_the_good_ones(raw: Raw) -> None:
    study = new_uid()
    status, answer = raw.stow(b"garbage", image(study))
    assert (status, stored(answer), answer["00081198"].get("Value")) == (400, 1, None)
    assert raw.studies(f"StudyInstanceUID={study}") == [study]


def test_a_200_may_have_stored_nothing(raw: Raw) -> None:
    study = new_uid()
    status, answer = raw.stow(image(study), part_type="application/octet-stream")
    assert (status, stored(answer)) == (200, 0)
    assert raw.studies(f"StudyInstanceUID={study}") == []


def test_orthanc_can_do_without_a_preamble(raw: Raw) -> None:
    status, answer = raw.stow(image(new_uid())[132:])
    assert (status, stored(answer)) == (200, 1)


def test_unknown_keys_match_everything(raw: Raw) -> None:
    study = new_uid()
    raw.stow(image(study))
    assert study in raw.studies("NoSuchKey=1")
    assert study in raw.studies("%50atientID=nobody")


def test_values_of_a_query_are_not_decoded(raw: Raw) -> None:
    study, name = new_uid(), f"Hall^{new_uid()[-8:]}"
    raw.stow(image(study, PatientName=name))
    assert raw.studies(f"PatientName={quote(name)}") == []
    assert raw.studies(f"PatientName={name.replace('^', '?')}") == [study]
    assert raw.studies(f"StudyInstanceUID={study}%2C{study}") == [study]


def test_orthanc_matches_what_it_has_in_its_index(raw: Raw) -> None:
    undated, patient = new_uid(), new_uid()[-10:]
    raw.stow(image(undated, StudyDate="", PatientID=f"a{patient}", Modality="CT"))
    assert raw.studies(f"PatientID=A{patient}") == [undated]
    assert raw.studies(f"PatientID=A{patient}&StudyDate=-18991231") == [undated]
    assert raw.studies(f"PatientID=A{patient}&ModalitiesInStudy=CT") == [undated]
    assert raw.studies(f"PatientID=A{patient}&Modality=CT") == []


def test_lists_are_in_latin1(raw: Raw) -> None:
    study, other = new_uid(), new_uid()
    raw.stow(image(study, SpecificCharacterSet="ISO_IR 192", PatientName="Yamada=山田^太郎"))
    raw.stow(image(other, SpecificCharacterSet="ISO_IR 192", PatientName="Jo\u0308rg"))
    names = {
        uid: raw.call("GET", f"/studies?StudyInstanceUID={uid}").json()[0]["00100010"]["Value"][0]
        for uid in (study, other)
    }
    assert names == {study: {"Alphabetic": "Yamada", "Ideographic": "^"}, other: {"Alphabetic": "Jorg"}}
    question = {"Level": "Study", "Query": {"StudyInstanceUID": study}, "Expand": True}
    (found,) = raw.call("POST", f"{raw.rest}/tools/find", body=json.dumps(question).encode()).json()
    assert found["PatientMainDicomTags"]["PatientName"] == "Yamada=山田^太郎"


def test_a_limit_of_zero_has_no_limit(raw: Raw) -> None:
    raw.stow(image(new_uid()), image(new_uid()))
    assert len(raw.studies("limit=0")) >= 2
    assert raw.call("GET", "/studies?limit=-1").status == 500


def test_parts_do_not_name_their_transfer_syntax(raw: Raw) -> None:
    study = new_uid()
    raw.stow(image(study))
    many = 'multipart/related; type="application/dicom"; transfer-syntax=*'
    answer = raw.call("GET", f"/studies/{study}", headers={"Accept": many})
    assert answer.status == 200
    assert b"transfer-syntax" not in answer.data[:1000]
    assert raw.call("GET", f"/studies/{study}", headers={"Accept": "application/dicom"}).status == 400
    zipped = raw.call("GET", f"/studies/{study}", headers={"Accept": many, "Accept-Encoding": "gzip"})
    assert zipped.headers["Content-Encoding"] == "gzip"


def test_dicomweb_cannot_delete_rest_can(raw: Raw) -> None:
    study = new_uid()
    raw.stow(image(study))
    assert raw.call("DELETE", f"/studies/{study}").status == 405
    question = json.dumps({"Level": "Study", "Query": {"StudyInstanceUID": study}}).encode()
    (key,) = raw.call("POST", f"{raw.rest}/tools/find", body=question).json()
    statuses = [raw.call("DELETE", f"{raw.rest}/studies/{key}").status for _ in range(2)]
    assert statuses == [200, 404]


def test_connections_are_kept_for_one_second(raw: Raw) -> None:
    assert raw.call("GET", f"{raw.rest}/system").headers["Keep-Alive"] == "timeout=1"


def test_statistics_tell_what_is_used_as_text(raw: Raw) -> None:
    assert raw.call("GET", f"{raw.rest}/statistics").json()["TotalDiskSize"].isdigit()


def test_every_habit_that_was_seen_is_seen_here() -> None:
    sections = ODDITIES.read_text(encoding="utf-8").split("\n### ")[1:]
    told = {
        section.partition("\n")[0] for section in sections if re.match(r".*\nOrthanc [^.]*\.[^,]*,.* seen\.", section)
    }
    shown = {name.removeprefix("test_").replace("_", " ") for name in globals() if name.startswith("test_")}
    as_name = {re.sub(r"[^a-z0-9 ]", "", heading.lower()) for heading in told - NOT_SHOWN}
    assert as_name
    assert as_name <= shown


@pytest.mark.parametrize(("password", "is_let_in"), [("Grüße:ß€", True), ("Gruesse", False)])
def test_it_lets_in_a_user_whose_name_and_password_are_not_ascii(
    processes: Processes, tmp_path: Path, orthanc: str, password: str, is_let_in: bool
) -> None:
    name = f"orthanc-users-{is_let_in}"
    users = {"AuthenticationEnabled": True, "RegisteredUsers": {"Jürgen": "Grüße:ß€"}}
    part = parts.orthanc(processes, name=name, overrides=users)
    (tmp_path / "password").write_text(password, encoding="utf-8")
    auth = AuthSettings(type="basic", username="Jürgen", password_file=tmp_path / "password")
    ward = connect(ServerSettings(name="ward", type="orthanc", url=part.url, auth=auth))
    if is_let_in:
        assert ward.find("study", new_uid()) == []
        return
    with pytest.raises(PacsUnauthorized):
        ward.find("study", new_uid())
