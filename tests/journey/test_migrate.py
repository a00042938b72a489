"""Studies migrated as a batch, over a real broker and real workers that get killed."""

from __future__ import annotations

import time

import pytest
import requests
from click.testing import CliRunner

from producer import Courier
from producer.cli import main
from producer.errors import InvalidRequest
from sandbox.synthetic import image, new_uid
from tests.stow import stow

WAIT_S = 60
QUICK = {"max_attempts": 6, "backoff_base_s": 0.1, "sweep_s": 0.1, "lease_s": 1.5, "grace_s": 2, "max_deaths": 5}


def put(url, study, number=1, **more):
    """``number`` images of the study, all in one request; their UIDs."""
    uids = [new_uid() for _ in range(number)]
    side = more.get("side", 16)
    stow(url, *(image(study, sop=uid, side=side, seed=n) for n, uid in enumerate(uids)))
    return set(uids)


def images_on(url, study):
    headers = {"Accept": "application/dicom+json"}
    answer = requests.get(f"{url}/studies/{study}/instances?limit=200", headers=headers, timeout=10)
    return {one["00080018"]["Value"][0] for one in answer.json()} if answer.status_code == 200 else set()


def until(condition, timeout_s=WAIT_S):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def orthanc_too(sandbox, orthanc):
    return [*sandbox.servers(), {"name": "orthanc", "type": "orthanc", "url": orthanc}]


def test_studies_go_from_one_server_to_the_other_and_back(worker, sandbox, orthanc):
    studies = [new_uid() for _ in range(12)]
    there = {study: put(sandbox.msdicom, study, 3) for study in studies}
    gone, whole = new_uid(), new_uid()
    alike = image(whole, side=16)
    for url in (sandbox.msdicom, sandbox.dcm4chee):
        requests.post(
            f"{url}/studies",
            data=b"--b\r\nContent-Type: application/dicom\r\n\r\n" + alike + b"\r\n--b--\r\n",
            headers={
                "Accept": "application/dicom+json",
                "Content-Type": 'multipart/related; type="application/dicom"; boundary=b',
            },
            timeout=30,
        )
    with Courier(worker(jobs=QUICK, servers=orthanc_too(sandbox, orthanc)).settings) as courier:
        # copied to the archive
        handle = courier.batch.migrate([*studies, gone, whole], source="msdicom", target="dcm4chee")
        done = handle.result(timeout_s=WAIT_S)
        assert done["state"] == "done"
        assert done["totals"] == {"copied": 12, "refused": 1, "already_there": 1}
        assert done["passes"]["verify"]["totals"] == {"verified": 13}
        assert [one["code"] for one in done["failures"]] == ["not_found"]
        assert {study: images_on(sandbox.dcm4chee, study) for study in studies} == there
        rows = {row["item"]: row for row in courier.batch.report(handle.id)}
        assert "whole" in rows[whole]["survey"]["message"]
        assert "3 images were compared element by element" in rows[studies[0]]["verify"]["message"]

        # moved from there to Orthanc
        moving = courier.batch.migrate(studies, source="dcm4chee", target="orthanc", delete_source=True)
        assert moving.result(timeout_s=WAIT_S)["passes"]["verify"]["totals"] == {"verified": 12}
        assert {study: images_on(orthanc, study) for study in studies} == there
        assert not any(images_on(sandbox.dcm4chee, study) for study in studies)

        # and all of it taken back
        undone = courier.batch.undo(moving.id).result(timeout_s=WAIT_S)
        assert (undone["state"], undone["passes"]["undo"]["totals"]) == ("undone", {"undone": 12})
        assert {study: images_on(sandbox.dcm4chee, study) for study in studies} == there
        assert not any(images_on(orthanc, study) for study in studies)
        courier.batch.undo(handle.id).result(timeout_s=WAIT_S)
        assert not any(images_on(sandbox.dcm4chee, study) for study in studies)
        assert len(images_on(sandbox.dcm4chee, whole)) == 1, "that was there before"
        assert {study: images_on(sandbox.msdicom, study) for study in studies} == there


@pytest.mark.parametrize("way", [("msdicom", "dcm4chee"), ("dcm4chee", "msdicom")], ids="-to-".join)
def test_a_worker_killed_in_the_middle_of_a_study_leaves_nothing_half_done(worker, sandbox, way):
    source, target = (getattr(sandbox, name) for name in way)
    studies = [new_uid() for _ in range(3)]
    there = {study: put(source, study, 20) for study in studies}
    before = {study: put(target, study, 1) for study in studies}
    doomed = worker(jobs=QUICK)
    with Courier(doomed.settings) as courier:
        sandbox.set_fault(way[0], "retrieve", drip_bytes_per_s=8_000)
        handle = courier.batch.migrate(studies, source=way[0], target=way[1], delete_source=True)
        until(lambda: (batch := courier.batch.get(handle.id)) and batch.state == "running")
        time.sleep(0.7)  # in the middle of a retrieve that takes two seconds
        doomed.kill()
        assert courier.batch.get(handle.id).settled == 0
        assert all(images_on(source, study) == there[study] for study in studies)
        sandbox.reset_faults()
        worker(jobs=QUICK)
        done = handle.result(timeout_s=WAIT_S)
        assert (done["totals"], done["passes"]["verify"]["totals"]) == ({"copied": 3}, {"verified": 3})
        assert all(images_on(target, study) == there[study] | before[study] for study in studies)
        assert not any(images_on(source, study) for study in studies)
        courier.batch.undo(handle.id).result(timeout_s=WAIT_S)
        assert all(images_on(source, study) == there[study] for study in studies)
        assert all(images_on(target, study) == before[study] for study in studies)


def test_uploads_into_a_study_that_is_being_moved_are_neither_lost_nor_apart(worker, sandbox, image_server):
    study = new_uid()
    there = put(sandbox.msdicom, study, 20)
    late = [new_uid() for _ in range(6)]
    urls = [image_server.put(f"/{n}.dcm", image(study, sop=uid, side=16)) for n, uid in enumerate(late)]
    with Courier(worker(jobs=QUICK).settings) as courier:
        sandbox.set_fault("msdicom", "retrieve", drip_bytes_per_s=20_000)
        uploads = [courier.upload(urls[0])]
        moving = courier.batch.migrate([study], source="msdicom", target="dcm4chee", delete_source=True)
        for url in urls[1:]:
            time.sleep(0.3)
            uploads.append(courier.upload(url))
        results = [upload.result(timeout_s=WAIT_S) for upload in uploads]
        done = moving.result(timeout_s=WAIT_S)
        assert done["passes"]["verify"]["totals"] == {"verified": 1}
        last = courier.upload(image_server.put("/last.dcm", image(study, sop=(after := new_uid()), side=16)))
        assert last.result(timeout_s=WAIT_S)["server_name"] == "dcm4chee"
    assert {result["status"] for result in results} == {"stored"}
    assert images_on(sandbox.dcm4chee, study) == there | set(late) | {after}
    assert images_on(sandbox.msdicom, study) == set()


def test_what_cannot_be_migrated_is_refused_before_anything_starts(worker, sandbox, monkeypatch):
    study = new_uid()
    put(sandbox.msdicom, study)
    steady = worker(jobs=QUICK)
    monkeypatch.setenv("PACS_CONFIG", str(steady.config))

    def refused(*words):
        answer = CliRunner().invoke(main, ["batch", "migrate", study, *words, "--json"])
        assert answer.exit_code == 2, answer.output
        return answer.output

    assert "are the same" in refused("--from", "msdicom", "--to", "msdicom")
    assert "configured are: msdicom, dcm4chee" in refused("--from", "msdicom", "--to", "elsewhere")
    with Courier() as courier:
        with pytest.raises(InvalidRequest, match="elsewhere"):
            courier.batch.migrate([study], source="elsewhere", target="msdicom").result(timeout_s=WAIT_S)
        with pytest.raises(InvalidRequest, match="same"):
            courier.batch.migrate([study], source="msdicom", target="msdicom")
    assert images_on(sandbox.dcm4chee, study) == set()
