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

from sandbox.processes import SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import Site, payload
from worker.errors import NotFound, PacsMisanswered
from worker.jobs import bulk_deletions
from worker.jobs.batches import Conductor
from worker.jobs.kept import keep
from worker.pacs.protocol import Found, Pacs, View
from worker.pacs.registry import connect
from worker.settings import ServerSettings

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
#: Quality, patient safety, wrong worklist entry. DCM4CHEE shows their notes, and AS_RECEIVED the images too.
CODES = ["113001", "113037", "113038"]
KEY_OBJECT = "1.2.840.10008.5.1.4.1.1.88.59"


@pytest.fixture
def site(batch_site: Callable[..., Site], sandbox: SandboxPart, tmp_path: Path) -> Site:
    return batch_site(sandbox.servers(), downloads={"folders": [str(tmp_path)]})


@pytest.fixture
def open_site(batch_site: Callable[..., Site], sandbox: SandboxPart, tmp_path: Path) -> Callable[..., Site]:
    """``open_site(retrieve_aet=…)``: DCM4CHEE with such a setting."""

    def opened(**more: Any) -> Site:
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
    open_pacs: Callable[..., Pacs], sandbox: SandboxPart, site: Site, aet: str | None, view: View
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
    open_pacs: Callable[..., Pacs], site: Site, aet: str
) -> None:
    study, pacs = new_uid(), open_pacs(retrieve_aet=aet)
    uids = site.put("dcm4chee", study)
    with pytest.raises(PacsMisanswered, match=f"entity {aet} does not give.*retrieve_aet"):
        images_of(pacs, study)
    assert images_of(pacs, study, "to_return").keys() == uids, "a backup is read where the images are shown"


@pytest.mark.parametrize(("aet", "ready"), [("AS_RECEIVED", True), ("IOCM_QUALITY", True), ("NOPE", False)])
def test_the_state_tells_of_an_application_entity_that_there_is_not(
    open_pacs: Callable[..., Pacs], aet: str, ready: bool
) -> None:
    state = open_pacs(retrieve_aet=aet).state()
    assert (state.ready, "check the server's retrieve_aet" in state.note) == (ready, not ready)


# Migrations


@pytest.mark.parametrize("aet", [None, "AS_RECEIVED"])
@pytest.mark.parametrize("code", CODES)
def test_a_rejected_image_does_not_come_back_to_life_through_a_move(
    open_site: Callable[..., Site], sandbox: SandboxPart, code: str, aet: str | None
) -> None:
    site, study = open_site(retrieve_aet=aet), new_uid()
    dead, *alive = sorted(site.put("dcm4chee", study, 3))
    reject(sandbox, study, dead, code)
    payload(site.order(study, from_server="dcm4chee", to_server="msdicom", delete_source=True))
    assert site.told("verify") == ["verified"]
    assert images_of(site.fleet["msdicom"], study).keys() == set(alive)
    assert site.on("dcm4chee", study) == set()

    payload(site.go_on(Conductor.undo, "undo"))
    assert site.told("undo") == ["undone"]
    assert images_of(site.fleet["dcm4chee"], study).keys() == set(alive)
    row = site.rows[0].passes["undo"]
    assert row.result["left_out"] == 1, "the note, which the archive does not take without the image"
    assert "notes of rejections" in row.message
    with pytest.raises(NotFound):
        retrieved(site.fleet["dcm4chee"], Found("image", study, f"{study}.1", dead))


@pytest.mark.parametrize("code", CODES)
def test_a_rejected_image_does_not_come_back_to_life_when_its_study_is_migrated_back(
    open_site: Callable[..., Site], sandbox: SandboxPart, code: str
) -> None:
    site, study = open_site(), new_uid()
    dead, *alive = sorted(site.put("dcm4chee", study, 3))
    reject(sandbox, study, dead, code)
    payload(site.order(study, from_server="dcm4chee", to_server="msdicom", delete_source=True))
    site.batch = "BACK"
    payload(site.order(study, from_server="msdicom", to_server="dcm4chee"))
    assert images_of(site.fleet["dcm4chee"], study).keys() == set(alive)
    assert site.told() == ["pacs_rejected"]
    assert "The rejection note names" in site.rows[0].settled.message


@pytest.mark.parametrize(
    "values",
    [{"PatientID": "NEW"}, {"PatientName": "New^Name"}, {"AccessionNumber": "A2"}],
    ids=lambda one: next(iter(one)),
)
@pytest.mark.parametrize("moves", [False, True], ids=["copied", "moved"])
def test_what_was_corrected_in_the_archive_survives_a_migration_and_the_way_back(
    site: Site, sandbox: SandboxPart, moves: bool, values: dict[str, str]
) -> None:
    study, (keyword, value) = new_uid(), next(iter(values.items()))
    put_corrected(sandbox, image(study, side=8), **values)
    payload(site.order(study, from_server="dcm4chee", to_server="msdicom", delete_source=moves))
    assert site.told("verify") == ["verified"]
    (there,) = images_of(site.fleet["msdicom"], study).values()
    assert str(there[keyword].value) == value
    payload(site.go_on(Conductor.undo, "undo"))
    assert (site.told("undo"), site.on("msdicom", study)) == (["undone"], set())
    (back,) = images_of(site.fleet["dcm4chee"], study).values()
    assert str(back[keyword].value) == value


@pytest.mark.parametrize("corrected", [True, False])
def test_a_source_whose_corrections_the_setting_leaves_behind_stays(
    open_site: Callable[..., Site], sandbox: SandboxPart, corrected: bool
) -> None:
    site, study = open_site(retrieve_aet="AS_RECEIVED"), new_uid()
    put_corrected(sandbox, image(study, side=8, PatientID="OLD"), **({"PatientID": "NEW"} if corrected else {}))
    payload(site.order(study, from_server="dcm4chee", to_server="msdicom", delete_source=True))
    (there,) = images_of(site.fleet["msdicom"], study).values()
    assert (str(there.PatientID), "IssuerOfPatientID" in there) == ("OLD", False)
    assert site.told("verify") == (["study_conflict"] if corrected else ["verified"])
    assert bool(site.on("dcm4chee", study)) is corrected
    if corrected:
        assert "PatientID (0010,0020)" in site.rows[0].passes["verify"].message


# Backups


@pytest.mark.parametrize("code", CODES)
def test_a_rejected_image_does_not_come_back_to_life_by_a_backup(
    site: Site, sandbox: SandboxPart, tmp_path: Path, code: str
) -> None:
    study = new_uid()
    dead, *alive = sorted(site.put("dcm4chee", study, 3))
    reject(sandbox, study, dead, code)
    payload(site.delete(study, servers=["dcm4chee"], backup=tmp_path.as_uri()))
    assert {uid for uid, ds in kept(tmp_path).items() if ds.SOPClassUID != KEY_OBJECT} == set(alive)
    payload(site.go_on(Conductor.undo, "undo"))
    assert site.told("undo") == ["undone"]
    assert images_of(site.fleet["dcm4chee"], study).keys() == set(alive)
    told = site.rows[0].passes["undo"].result["servers"]["dcm4chee"]
    assert (told["restored"], len(told["left_out"])) == (2, 1)


def test_a_backup_holds_what_was_stored_and_not_what_the_archive_adds(site: Site, tmp_path: Path) -> None:
    study, sop = new_uid(), new_uid()
    site.put_file("dcm4chee", image(study, sop=sop, side=8))
    assert "IssuerOfPatientID" in retrieved(site.fleet["dcm4chee"], Found("study", study))[sop]
    payload(site.delete(study, servers=["dcm4chee"], backup=tmp_path.as_uri()))
    assert site.told() == ["deleted"]
    assert "IssuerOfPatientID" not in kept(tmp_path)[sop]
    payload(site.go_on(Conductor.undo, "undo"))
    assert (site.told("undo"), site.on("dcm4chee", study)) == (["undone"], {sop})


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
    site: Site, sandbox: SandboxPart, tmp_path: Path, own: dict[str, str], corrected: dict[str, str]
) -> None:
    study, sop, keyword = new_uid(), new_uid(), next(iter(own))
    put_corrected(sandbox, image(study, sop=sop, side=8, **own), **corrected)
    study_of = Found("study", study)
    shown = str(retrieved(site.fleet["dcm4chee"], study_of)[sop][keyword].value)
    assert shown == corrected.get(keyword, shown) != own[keyword]
    payload(site.delete(study, servers=["dcm4chee"], backup=tmp_path.as_uri()))
    assert site.told() == ["deleted"]
    payload(site.go_on(Conductor.undo, "undo"))
    assert site.told("undo") == ["undone"]
    assert str(retrieved(site.fleet["dcm4chee"], study_of)[sop][keyword].value) == shown


def test_a_correction_between_a_backup_and_the_deletion_keeps_the_study(
    site: Site, sandbox: SandboxPart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, sop = new_uid(), new_uid()
    site.put_file("dcm4chee", image(study, sop=sop, side=8, PatientID="OLD"))

    def kept_and_corrected(*args: Any) -> Any:
        told = keep(*args)
        site.fleet["dcm4chee"].delete(Found("study", study), permanent=True)
        put_corrected(sandbox, image(study, sop=sop, side=8, PatientID="OLD"), PatientID="NEW")
        return told

    monkeypatch.setattr(bulk_deletions, "keep", kept_and_corrected)
    payload(site.delete(study, servers=["dcm4chee"], backup=tmp_path.as_uri()))
    assert site.told() == ["study_conflict"]
    assert "PatientID (0010,0020)" in site.rows[0].settled.message
    assert site.on("dcm4chee", study) == {sop}
