"""Many studies deleted, with copies that bring them back, and many downloaded; a real worker, both sandbox PACS."""

from __future__ import annotations

import json
import time
import zipfile

import pytest
import requests

from producer import Courier
from producer.errors import ConfirmationRequired, InvalidRequest
from sandbox.synthetic import image, new_uid
from tests.stow import stow

WAIT_S = 60
QUICK = {"max_attempts": 8, "backoff_base_s": 0.1, "sweep_s": 0.1, "lease_s": 1.5, "grace_s": 2}


def put(url, study, images=2):
    stow(url, *(image(study, seed=seed, side=8) for seed in range(images)))


def images_on(url, study):
    answer = requests.get(f"{url}/studies/{study}/instances", headers={"Accept": "application/dicom+json"}, timeout=10)
    return {one["00080018"]["Value"][0] for one in answer.json()} if answer.status_code == 200 else set()


def totals(answer, which=None):
    told = answer["passes"][which]["totals"] if which else answer["totals"]
    return {status: count for status, count in told.items() if count}


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def ward(worker, sandbox, out):
    """A courier with a worker that may write to ``out``, and where the studies are."""
    running = worker(jobs=QUICK, downloads={"folders": [str(out)]})
    with Courier(running.settings) as courier:
        yield courier


def test_deleted_studies_come_back_from_the_copies_that_were_kept(ward, sandbox, out):
    both, on_first, on_second, nowhere = new_uid(), new_uid(), new_uid(), new_uid()
    for url in (sandbox.msdicom, sandbox.dcm4chee):
        put(url, both)
    put(sandbox.msdicom, on_first, 3)
    put(sandbox.dcm4chee, on_second)
    before = {
        (url, study): images_on(url, study)
        for url in (sandbox.msdicom, sandbox.dcm4chee)
        for study in (both, on_first, on_second)
    }
    studies = [both, on_first, on_second, nowhere]

    handle = ward.batch.delete(studies, backup=out.as_uri(), name="ward 7")
    done = handle.result(timeout_s=WAIT_S)
    assert totals(done) == {"deleted": 3, "not_there": 1}
    assert totals(done, "verify") == {"verified": 4}
    assert not any(images_on(url, study) for url, study in before)
    archives = sorted(out.rglob("*.zip"))
    assert len(archives) == 4
    with zipfile.ZipFile(archives[0]) as archive:
        assert json.loads(archive.read("manifest.json"))["study_uid"] in studies

    undone = ward.batch.undo(handle.id).result(timeout_s=WAIT_S)
    assert (undone["state"], totals(undone, "undo")) == ("undone", {"undone": 3, "not_there": 1})
    assert {(url, study): images_on(url, study) for url, study in before} == before


def test_a_study_that_has_changed_since_its_copy_was_kept_is_not_deleted(ward, sandbox, out):
    study = new_uid()
    put(sandbox.msdicom, study)
    sandbox.set_fault("msdicom", "delete", status=503)
    handle = ward.batch.delete([study], backup=out.as_uri())
    deadline = time.monotonic() + WAIT_S
    while not list(out.rglob("*.zip")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    put(sandbox.msdicom, study)  # by somebody else, who knows nothing of our gates
    sandbox.reset_faults()
    done = handle.result(timeout_s=WAIT_S)
    assert totals(done) == {"refused": 1}
    assert len(images_on(sandbox.msdicom, study)) == 4
    assert "other images" in done["failures"][0]["message"]


def test_a_worker_killed_between_keeping_and_deleting_loses_no_study(worker, sandbox, out):
    studies = [new_uid() for _ in range(12)]
    for study in studies:
        put(sandbox.msdicom, study)
    before = {study: images_on(sandbox.msdicom, study) for study in studies}
    doomed = worker(jobs=QUICK, downloads={"folders": [str(out)]})
    sandbox.set_fault("msdicom", "delete", latency_ms=200)
    with Courier(doomed.settings) as courier:
        handle = courier.batch.delete(studies, servers=["msdicom"], backup=out.as_uri())
        deadline = time.monotonic() + WAIT_S
        while all(images_on(sandbox.msdicom, study) for study in studies):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        doomed.kill()
        sandbox.reset_faults()
        worker(jobs=QUICK, downloads={"folders": [str(out)]})
        assert totals(handle.result(timeout_s=WAIT_S)) == {"deleted": 12}
        assert not any(images_on(sandbox.msdicom, study) for study in studies)
        undone = courier.batch.undo(handle.id).result(timeout_s=WAIT_S)
        assert totals(undone, "undo") == {"undone": 12}
    assert {study: images_on(sandbox.msdicom, study) for study in studies} == before


def test_a_copy_that_was_damaged_brings_nothing_back(ward, sandbox, out):
    study = new_uid()
    put(sandbox.msdicom, study)
    handle = ward.batch.delete([study], servers=["msdicom"], backup=out.as_uri())
    assert totals(handle.result(timeout_s=WAIT_S)) == {"deleted": 1}
    (archive,) = out.rglob("*.zip")
    archive.write_bytes(archive.read_bytes()[:-200])
    undone = ward.batch.undo(handle.id).result(timeout_s=WAIT_S)
    assert totals(undone, "undo") == {"refused": 1}
    assert images_on(sandbox.msdicom, study) == set()


def test_what_comes_back_does_not_split_a_study_that_has_begun_anew_elsewhere(ward, sandbox, out):
    study = new_uid()
    put(sandbox.msdicom, study)
    before = images_on(sandbox.msdicom, study)
    handle = ward.batch.delete([study], servers=["msdicom"], backup=out.as_uri())
    assert totals(handle.result(timeout_s=WAIT_S)) == {"deleted": 1}
    put(sandbox.dcm4chee, study, 1)
    undone = ward.batch.undo(handle.id).result(timeout_s=WAIT_S)
    assert (totals(undone, "undo"), undone["failures"][-1]["code"]) == ({"refused": 1}, "study_conflict")
    assert (len(images_on(sandbox.dcm4chee, study)), images_on(sandbox.msdicom, study)) == (1, set())
    assert ward.delete("study", study).result(timeout_s=WAIT_S)
    undone = ward.batch.undo(handle.id).result(timeout_s=WAIT_S)
    assert (totals(undone, "undo"), images_on(sandbox.msdicom, study)) == ({"undone": 1}, before)


def test_what_was_not_kept_cannot_be_taken_back(ward, sandbox):
    study = new_uid()
    put(sandbox.msdicom, study)
    handle = ward.batch.delete([study])
    assert totals(handle.result(timeout_s=WAIT_S)) == {"deleted": 1}
    undone = ward.batch.undo(handle.id).result(timeout_s=WAIT_S)
    assert totals(undone, "undo") == {"refused": 1}
    assert "keep" in undone["failures"][0]["message"]


def test_nothing_is_deleted_when_its_copy_cannot_be_kept_or_everything_is_not_confirmed(ward, sandbox, out):
    study = new_uid()
    put(sandbox.msdicom, study)
    with pytest.raises(InvalidRequest, match=r"downloads\.folders"):
        ward.batch.delete([study], backup="file:///elsewhere").result(timeout_s=WAIT_S)
    with pytest.raises(ConfirmationRequired, match="delete all studies"):
        ward.batch.delete(everything=True).result(timeout_s=WAIT_S)
    with pytest.raises(InvalidRequest, match="nobody"):
        ward.batch.delete([study], servers=["nobody"]).result(timeout_s=WAIT_S)
    assert len(images_on(sandbox.msdicom, study)) == 2


def test_many_studies_are_downloaded_each_from_who_has_it(ward, sandbox, out):
    ours, theirs, nowhere = [new_uid() for _ in range(3)], new_uid(), new_uid()
    for study in ours:
        put(sandbox.msdicom, study)
    put(sandbox.dcm4chee, theirs, 3)
    handle = ward.batch.download([*ours, theirs, nowhere], destination=f"{out.as_uri()}/march")
    done = handle.result(timeout_s=WAIT_S)
    assert totals(done) == {"downloaded": 4, "refused": 1}
    assert totals(done, "verify") == {"verified": 4}
    assert {path.stem for path in (out / "march").glob("*.zip")} == {*ours, theirs}
    assert done["passes"]["apply"]["bytes"] > 0
    rows = {row["item"]: row for row in ward.batch.report(handle.id)}
    assert (rows[theirs]["server_name"], rows[theirs]["result"]["instances"]) == ("dcm4chee", 3)
    assert rows[nowhere]["code"] == "not_found"

    again = ward.batch.download(ours, destination=f"{out.as_uri()}/march", verify=False).result(timeout_s=WAIT_S)
    assert totals(again) == {"already_there": 3}


def test_all_studies_of_a_query_are_downloaded_as_folders(ward, sandbox, out):
    studies = [new_uid() for _ in range(2)]
    for study in studies:
        put(sandbox.msdicom, study)
    put(sandbox.dcm4chee, new_uid())
    handle = ward.batch.download(
        filters={"StudyInstanceUID": studies[0]}, destination=out.as_uri(), format="files", servers=["msdicom"]
    )
    assert totals(handle.result(timeout_s=WAIT_S)) == {"downloaded": 1}
    assert (out / studies[0] / "manifest.json").exists()
    assert [path.name for path in out.iterdir()] == [studies[0]]
