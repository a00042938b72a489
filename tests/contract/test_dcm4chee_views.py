"""Where images of DCM4CHEE are read: what was rejected stays dead, and what was corrected travels."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom
import pytest
import requests

from courier.errors import NotFound, PacsMisanswered
from courier.settings import ServerSettings
from sandbox.processes import SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import BatchSite, payload
from worker.batches import deletions, study_copy
from worker.batches.backups import back_up
from worker.batches.coordinator import Coordinator
from worker.batches.study_copy import Transfer
from worker.pacs.protocol import Found, Pacs, View
from worker.pacs.registry import connect

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
#: Quality, patient safety, wrong worklist entry. DCM4CHEE shows their notes, and AS_RECEIVED the images too.
CODES = ["113001", "113037", "113038"]
KEY_OBJECT = "1.2.840.10008.5.1.4.1.1.88.59"
Noted = Callable[..., tuple[str, set[str], str]]


@pytest.fixture
def site(batch_site: Callable[..., BatchSite], sandbox: SandboxPart, tmp_path: Path) -> BatchSite:
    return batch_site(sandbox.servers(), downloads={"folders": [str(tmp_path)]})


@pytest.fixture
def open_site(batch_site: Callable[..., BatchSite], sandbox: SandboxPart, tmp_path: Path) -> Callable[..., BatchSite]:
    """``open_site(retrieve_aet=…)``: DCM4CHEE with such a setting."""

    def opened(**more: Any) -> BatchSite:
        servers = [one | (more if one["type"] == "dcm4chee" else {}) for one in sandbox.servers()]
        return batch_site(servers, downloads={"folders": [str(tmp_path)]})

    return opened


@pytest.fixture
def open_pacs(sandbox: SandboxPart) -> Callable[..., Pacs]:
    return lambda **more: connect(ServerSettings(name="dcm4chee", type="dcm4chee", url=sandbox.dcm4chee, **more))


def reject(sandbox: SandboxPart, study: str, sop: str, code: str = "113037") -> None:
    url = f"{sandbox.dcm4chee}/studies/{study}/series/{study}.1/instances/{sop}/reject/{code}%5EDCM"
    assert requests.post(url, timeout=60).status_code == 200


def put_corrected(sandbox: SandboxPart, content: bytes, **values: str) -> None:
    """Store an image, and correct what the archive's database says of it in the same breath."""
    body = b"--b\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n--b--\r\n"
    headers = {
        "Accept": "application/dicom+json",
        "Content-Type": 'multipart/related; type="application/dicom"; boundary=b',
    }
    answer = requests.post(f"{sandbox.dcm4chee}/studies", params=values, data=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text


def retrieved(pacs: Pacs, found: Found, view: View = "as_set") -> dict[str, pydicom.Dataset]:
    with pacs.retrieve(found, view=view) as parts:
        read = [pydicom.dcmread(io.BytesIO(b"".join(part.chunks))) for part in parts]
    return {str(ds.SOPInstanceUID): ds for ds in read}


def images_of(pacs: Pacs, study: str, view: View = "as_set") -> dict[str, pydicom.Dataset]:
    """Without the notes of rejections."""
    found = retrieved(pacs, Found("study", study), view)
    return {uid: ds for uid, ds in found.items() if ds.SOPClassUID != KEY_OBJECT}


def kept(folder: Path) -> dict[str, pydicom.Dataset]:
    """The images in the one backup below a folder."""
    (path,) = folder.rglob("*.zip")
    with zipfile.ZipFile(path) as archive:
        read = [pydicom.dcmread(io.BytesIO(archive.read(name))) for name in archive.namelist() if name.endswith("dcm")]
    return {str(ds.SOPInstanceUID): ds for ds in read}


# What is read


@pytest.mark.parametrize("view", ["as_set", "as_shown", "to_return"])
@pytest.mark.parametrize("aet", [None, "AS_RECEIVED", "IOCM_REGULAR_USE"])
def test_no_image_is_read_that_is_not_listed(
    open_pacs: Callable[..., Pacs], sandbox: SandboxPart, site: BatchSite, aet: str | None, view: View
) -> None:
    study, pacs = new_uid(), open_pacs(retrieve_aet=aet)
    uids = sorted(site.put("dcm4chee", study, 4))
    for uid, code in zip(uids, CODES, strict=False):
        reject(sandbox, study, uid, code)
    assert images_of(pacs, study, view).keys() == {uids[3]}
    assert retrieved(pacs, Found("study", study), view).keys() == {
        str(one.sop_instance_uid) for one in pacs.instances(Found("study", study))
    }
    assert retrieved(pacs, Found("series", study, f"{study}.1"), view).keys() == {uids[3]}
    assert retrieved(pacs, Found("image", study, f"{study}.1", uids[3]), view).keys() == {uids[3]}
    for uid in uids[:3]:
        with pytest.raises(NotFound):
            retrieved(pacs, Found("image", study, f"{study}.1", uid), view)


def test_listed_images_are_read_where_the_setting_says_and_else_as_they_are_shown(
    open_pacs: Callable[..., Pacs], sandbox: SandboxPart
) -> None:
    study = new_uid()
    put_corrected(sandbox, image(study, side=8, PatientID="OLD"), PatientID="NEW")

    def patient(view: View = "as_set", **more: Any) -> str:
        (ds,) = images_of(open_pacs(**more), study, view).values()
        return str(ds.PatientID)

    assert [patient(), patient("to_return")] == ["NEW", "NEW"]
    assert [patient(view, retrieve_aet="AS_RECEIVED") for view in ("as_set", "as_shown", "to_return")] == [
        "OLD",
        "NEW",
        "NEW",
    ]


@pytest.mark.parametrize("aet", ["NOPE", "WORKLIST", "IOCM_PAT_SAFETY"])
def test_an_application_entity_that_does_not_give_what_is_listed_is_named(
    open_pacs: Callable[..., Pacs], site: BatchSite, aet: str
) -> None:
    study, pacs = new_uid(), open_pacs(retrieve_aet=aet)
    uids = site.put("dcm4chee", study)
    with pytest.raises(PacsMisanswered, match=f"entity {aet} does not give.*retrieve_aet"):
        images_of(pacs, study)
    assert images_of(pacs, study, "to_return").keys() == uids, "a backup is read where the images are shown"


@pytest.mark.parametrize(
    ("aet", "ready"), [("AS_RECEIVED", True), ("IOCM_QUALITY", True), ("NOPE", False), ("WORKLIST", False)]
)
def test_the_state_tells_of_an_application_entity_that_gives_no_images(
    open_pacs: Callable[..., Pacs], aet: str, ready: bool
) -> None:
    state = open_pacs(retrieve_aet=aet).state()
    assert (state.ready, "check the server's retrieve_aet" in state.note) == (ready, not ready)


# Migrations


@pytest.mark.parametrize("aet", [None, "AS_RECEIVED"])
@pytest.mark.parametrize("code", CODES)
def test_a_rejected_image_does_not_come_back_to_life_through_a_move(
    open_site: Callable[..., BatchSite], sandbox: SandboxPart, code: str, aet: str | None
) -> None:
    site, study = open_site(retrieve_aet=aet), new_uid()
    dead, *alive = sorted(site.put("dcm4chee", study, 3))
    reject(sandbox, study, dead, code)
    (note,) = notes_of(site, "dcm4chee", study)
    payload(site.order(study, from_server="dcm4chee", to_server="msdicom", delete_source=True))
    assert (site.ends(), site.ends("verify")) == (["copied"], ["verified"])
    for told in (site.rows[0].outcome, site.rows[0].passes["verify"]):
        assert f"1 rejection note of dcm4chee is left out, {note} for one" in told.message
    assert site.on("msdicom", study) == set(alive), "the note of the archive is no image"
    assert site.on("dcm4chee", study) == set()

    payload(site.go_on(Coordinator.undo, "undo"))
    assert site.ends("undo") == ["undone"]
    assert site.on("dcm4chee", study) == set(alive)
    row = site.rows[0].passes["undo"]
    assert (row.result["left_out"], row.message) == (0, "")
    with pytest.raises(NotFound):
        retrieved(site.fleet["dcm4chee"], Found("image", study, f"{study}.1", dead))


def notes_of(site: BatchSite, server: str, study: str) -> dict[str, bytes]:
    """The notes of rejections that a server shows."""
    with site.fleet[server].retrieve(Found("study", study)) as parts:
        contents = [b"".join(part.chunks) for part in parts]
    read = [(pydicom.dcmread(io.BytesIO(content)), content) for content in contents]
    return {str(ds.SOPInstanceUID): content for ds, content in read if ds.SOPClassUID == KEY_OBJECT}


@pytest.fixture
def noted(
    site: BatchSite, sandbox: SandboxPart, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, set[str], str]]:
    """A study that version 0.1.0 has taken from DCM4CHEE to MSDICOM, with the note of a rejection; its images."""

    def made(code: str = "113037", *, moves: bool = True) -> tuple[str, set[str], str]:
        study = new_uid()
        dead, *alive = sorted(site.put("dcm4chee", study, 3))
        reject(sandbox, study, dead, code)
        (note,) = notes_of(site, "dcm4chee", study)
        with monkeypatch.context() as before:
            before.setattr(Transfer, "leaves_notes", False)
            payload(site.order(study, from_server="dcm4chee", to_server="msdicom", delete_source=moves))
        assert site.on("msdicom", study) == {*alive, note}
        return study, set(alive), note

    return made


@pytest.mark.parametrize("code", CODES)
def test_a_study_is_migrated_back_without_the_note_that_came_with_it(site: BatchSite, noted: Noted, code: str) -> None:
    study, alive, note = noted(code)
    site.batch = "BACK"
    payload(site.order(study, from_server="msdicom", to_server="dcm4chee"))
    assert (site.ends(), site.ends("verify"), site.on("dcm4chee", study)) == (["copied"], ["verified"], alive)
    for told in (site.rows[0].outcome, site.rows[0].passes["verify"]):
        assert f"1 rejection note of msdicom is left out, {note} for one" in told.message
    assert site.rows[0].outcome.result["notes"] == [note]


def test_a_study_keeps_its_copy_where_a_move_would_lose_a_note(site: BatchSite, noted: Noted) -> None:
    study, alive, note = noted()
    site.batch = "BACK"
    payload(site.order(study, from_server="msdicom", to_server="dcm4chee", delete_source=True))
    assert (site.ends(), site.ends("verify")) == (["copied"], ["pacs_rejected"])
    assert "msdicom keeps its copy, which is whole on both. 1 rejection note" in site.rows[0].passes["verify"].message
    assert (site.on("dcm4chee", study), site.on("msdicom", study)) == (alive, {*alive, note})


@pytest.mark.parametrize("moves", [False, True], ids=["copied", "moved"])
def test_what_version_0_1_0_has_taken_away_is_undone(
    site: BatchSite, sandbox: SandboxPart, noted: Noted, moves: bool
) -> None:
    study, alive, note = noted(moves=moves)
    payload(site.go_on(Coordinator.undo, "undo"))
    assert site.ends("undo") == ["undone"]
    assert images_of(site.fleet["dcm4chee"], study).keys() == alive
    row = site.rows[0].passes["undo"]
    assert (site.on("msdicom", study), row.result["left_out"]) == (({note}, 1) if moves else (set(), 0))
    assert ("notes of rejections" in row.message) is moves


def test_a_note_hides_nothing_on_the_server_that_its_study_is_migrated_to(
    site: BatchSite, sandbox: SandboxPart
) -> None:
    study = new_uid()
    uids = site.put("dcm4chee", study, 2)
    reject(sandbox, study, min(uids))
    (note,) = notes_of(site, "dcm4chee", study).values()
    url = sandbox.dcm4chee.replace("/aets/DCM4CHEE/", "/aets/AS_RECEIVED/")
    revoke = f"{url}/studies/{study}/reject/REVOKE_REJECTION%5E99DCM4CHEE"
    assert requests.post(revoke, timeout=60).status_code == 200
    assert site.on("dcm4chee", study) > uids, "images and note are shown"
    payload(site.order(study, from_server="dcm4chee", to_server="msdicom", delete_source=True))
    assert (site.ends("verify"), site.on("msdicom", study)) == (["verified"], uids)
    site.put_file("msdicom", note)
    site.batch = "BACK"
    payload(site.order(study, from_server="msdicom", to_server="dcm4chee"))
    assert (site.ends(), site.on("dcm4chee", study)) == (["copied"], uids)


def key_object(study: str, note: bytes | None = None, **values: Any) -> bytes:
    ds = pydicom.dcmread(io.BytesIO(note or image(study, side=8)))
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = KEY_OBJECT
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    file = io.BytesIO()
    ds.save_as(file)
    return file.getvalue()


def title(value: str, scheme: str = "DCM") -> list[pydicom.Dataset]:
    code = pydicom.Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, "Title"
    return [code]


@pytest.mark.parametrize("values", [{}, {"113000": "DCM"}, {"113037": "99LOCAL"}], ids=["none", "113000", "local"])
def test_a_key_object_with_another_title_is_copied_as_an_image(site: BatchSite, values: dict[str, str]) -> None:
    study = new_uid()
    titles = {"ConceptNameCodeSequence": title(*next(iter(values.items())))} if values else {}
    site.put_file("msdicom", key_object(study, **titles))
    payload(site.order(study))
    assert (site.ends(), site.ends("verify")) == (["copied"], ["verified"])
    assert len(site.on("dcm4chee", study)) == 1


def test_a_key_object_whose_title_cannot_be_told_is_not_sent_to_an_archive_that_heeds_notes(
    site: BatchSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = new_uid()
    uids = site.put("msdicom", study, 1)
    site.put_file("msdicom", key_object(study, ConceptNameCodeSequence=title("113000")))
    monkeypatch.setattr(study_copy, "NOTE_BYTES", 100)
    payload(site.order(study))
    assert (site.ends(), site.on("dcm4chee", study)) == (["pacs_rejected"], uids)
    assert "Whether it is a rejection note cannot be told" in site.rows[0].outcome.message


def test_a_plan_counts_no_notes(site: BatchSite, sandbox: SandboxPart) -> None:
    study = new_uid()
    uids = site.put("dcm4chee", study, 3)
    reject(sandbox, study, min(uids))
    payload(site.order(study, from_server="dcm4chee", to_server="msdicom", dry_run=True))
    row = site.rows[0].passes["survey"]
    assert (row.result["images"], row.result["missing"]) == (2, 2)
    assert "1 rejection note of dcm4chee is left out" in row.message


@pytest.mark.parametrize(
    "values",
    [{"PatientID": "NEW"}, {"PatientName": "New^Name"}, {"AccessionNumber": "A2"}],
    ids=lambda one: next(iter(one)),
)
@pytest.mark.parametrize("moves", [False, True], ids=["copied", "moved"])
def test_what_was_corrected_in_the_archive_survives_a_migration_and_the_way_back(
    site: BatchSite, sandbox: SandboxPart, moves: bool, values: dict[str, str]
) -> None:
    study, (keyword, value) = new_uid(), next(iter(values.items()))
    put_corrected(sandbox, image(study, side=8), **values)
    payload(site.order(study, from_server="dcm4chee", to_server="msdicom", delete_source=moves))
    assert site.ends("verify") == ["verified"]
    (there,) = images_of(site.fleet["msdicom"], study).values()
    assert str(there[keyword].value) == value
    payload(site.go_on(Coordinator.undo, "undo"))
    assert (site.ends("undo"), site.on("msdicom", study)) == (["undone"], set())
    (back,) = images_of(site.fleet["dcm4chee"], study).values()
    assert str(back[keyword].value) == value


@pytest.mark.parametrize("corrected", [True, False])
def test_a_source_whose_corrections_the_setting_leaves_behind_stays(
    open_site: Callable[..., BatchSite], sandbox: SandboxPart, corrected: bool
) -> None:
    site, study = open_site(retrieve_aet="AS_RECEIVED"), new_uid()
    put_corrected(sandbox, image(study, side=8, PatientID="OLD"), **({"PatientID": "NEW"} if corrected else {}))
    payload(site.order(study, from_server="dcm4chee", to_server="msdicom", delete_source=True))
    (there,) = images_of(site.fleet["msdicom"], study).values()
    assert (str(there.PatientID), "IssuerOfPatientID" in there) == ("OLD", False)
    assert site.ends("verify") == (["study_conflict"] if corrected else ["verified"])
    assert bool(site.on("dcm4chee", study)) is corrected
    if corrected:
        assert "PatientID (0010,0020)" in site.rows[0].passes["verify"].message


# Backups


@pytest.mark.parametrize("code", CODES)
def test_a_rejected_image_does_not_come_back_to_life_by_a_backup(
    site: BatchSite, sandbox: SandboxPart, tmp_path: Path, code: str
) -> None:
    study = new_uid()
    dead, *alive = sorted(site.put("dcm4chee", study, 3))
    reject(sandbox, study, dead, code)
    payload(site.delete(study, servers=["dcm4chee"], backup=tmp_path.as_uri()))
    assert {uid for uid, ds in kept(tmp_path).items() if ds.SOPClassUID != KEY_OBJECT} == set(alive)
    payload(site.go_on(Coordinator.undo, "undo"))
    assert site.ends("undo") == ["undone"]
    assert images_of(site.fleet["dcm4chee"], study).keys() == set(alive)
    told = site.rows[0].passes["undo"].result["servers"]["dcm4chee"]
    assert (told["restored"], len(told["left_out"])) == (2, 1)


def test_a_backup_holds_what_was_stored_and_not_what_the_archive_adds(site: BatchSite, tmp_path: Path) -> None:
    study, sop = new_uid(), new_uid()
    site.put_file("dcm4chee", image(study, sop=sop, side=8))
    assert "IssuerOfPatientID" in retrieved(site.fleet["dcm4chee"], Found("study", study))[sop]
    payload(site.delete(study, servers=["dcm4chee"], backup=tmp_path.as_uri()))
    assert site.ends() == ["deleted"]
    assert "IssuerOfPatientID" not in kept(tmp_path)[sop]
    payload(site.go_on(Coordinator.undo, "undo"))
    assert (site.ends("undo"), site.on("dcm4chee", study)) == (["undone"], {sop})


@pytest.mark.parametrize(
    ("own", "corrected"),
    [
        ({"PatientID": "OLD"}, {"PatientID": "NEW"}),
        ({"AccessionNumber": "A1"}, {"AccessionNumber": "A2"}),
        ({"PatientID": ""}, {}),
    ],
    ids=["PatientID", "AccessionNumber", "a PatientID that the archive made up"],
)
def test_what_was_corrected_in_the_archive_comes_back_with_a_backup(
    site: BatchSite, sandbox: SandboxPart, tmp_path: Path, own: dict[str, str], corrected: dict[str, str]
) -> None:
    study, sop, keyword = new_uid(), new_uid(), next(iter(own))
    put_corrected(sandbox, image(study, sop=sop, side=8, **own), **corrected)
    study_of = Found("study", study)
    shown = str(retrieved(site.fleet["dcm4chee"], study_of)[sop][keyword].value)
    assert shown == corrected.get(keyword, shown) != own[keyword]
    payload(site.delete(study, servers=["dcm4chee"], backup=tmp_path.as_uri()))
    assert site.ends() == ["deleted"]
    payload(site.go_on(Coordinator.undo, "undo"))
    assert site.ends("undo") == ["undone"]
    assert str(retrieved(site.fleet["dcm4chee"], study_of)[sop][keyword].value) == shown


def test_a_correction_between_a_backup_and_the_deletion_keeps_the_study(
    site: BatchSite, sandbox: SandboxPart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, sop = new_uid(), new_uid()
    site.put_file("dcm4chee", image(study, sop=sop, side=8, PatientID="OLD"))

    def kept_and_corrected(*args: Any) -> Any:
        told = back_up(*args)
        site.fleet["dcm4chee"].delete(Found("study", study), permanent=True)
        put_corrected(sandbox, image(study, sop=sop, side=8, PatientID="OLD"), PatientID="NEW")
        return told

    monkeypatch.setattr(deletions, "back_up", kept_and_corrected)
    payload(site.delete(study, servers=["dcm4chee"], backup=tmp_path.as_uri()))
    assert site.ends() == ["study_conflict"]
    assert "PatientID (0010,0020)" in site.rows[0].outcome.message
    assert site.on("dcm4chee", study) == {sop}
