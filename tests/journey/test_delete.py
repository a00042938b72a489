"""Deleting over a real broker and a real worker, on both PACS of the sandbox."""

from __future__ import annotations

import json

import pytest
import requests
from click.testing import CliRunner

from courier.ledger.jobs import Ledger
from producer import Courier
from producer.cli import main
from producer.errors import InvalidRequest, InvalidUid, NotFound, PacsRejected, PacsUnavailable
from sandbox.processes import poll
from sandbox.synthetic import image, new_uid
from tests.stow import stow

WAIT_S = 30
QUICK = {"max_attempts": 3, "backoff_base_s": 0.1, "sweep_s": 0.1, "lease_s": 1.5, "grace_s": 2}


@pytest.fixture
def courier(worker):
    running = worker(jobs=QUICK, breaker={"failures": 1000})  # attempts are counted here
    with Courier(running.settings) as courier:
        yield courier


def images_on(url, study):
    answer = requests.get(f"{url}/studies/{study}/instances", headers={"Accept": "application/dicom+json"}, timeout=10)
    return len(answer.json()) if answer.status_code == 200 else 0


def statuses(answer):
    return {entry["server_name"]: entry["status"] for entry in answer["servers"]}


def test_what_is_deleted_is_gone_from_every_server_at_each_level(courier, sandbox):
    study, other, sop = new_uid(), new_uid(), new_uid()
    for url in (sandbox.msdicom, sandbox.dcm4chee):
        stow(url, image(study, sop=sop), image(study), image(study, series=f"{study}.2"), image(other))

    foretold = courier.delete("study", study, dry_run=True).result(timeout_s=WAIT_S)
    assert statuses(foretold) == {"msdicom": "would_delete", "dcm4chee": "would_delete"}
    assert [entry["images"] for entry in foretold["servers"]] == [3, 3]
    assert images_on(sandbox.msdicom, study) == 3

    one = courier.delete("image", sop).result(timeout_s=WAIT_S)
    assert (one["operation"], one["level"], one["uid"]) == ("delete", "image", sop)
    assert statuses(one) == {"msdicom": "deleted", "dcm4chee": "hidden"}
    assert one["servers"][0]["study_uid"] == study
    assert "one day" in one["servers"][1]["note"]
    assert images_on(sandbox.dcm4chee, study) == 2

    series = courier.delete("series", f"{study}.2", servers=["msdicom"]).result(timeout_s=WAIT_S)
    assert statuses(series) == {"msdicom": "deleted"}
    assert (images_on(sandbox.msdicom, study), images_on(sandbox.dcm4chee, study)) == (1, 2)

    assert statuses(courier.delete("study", study).result(timeout_s=WAIT_S)) == {
        "msdicom": "deleted",
        "dcm4chee": "deleted",
    }
    assert images_on(sandbox.msdicom, study) == images_on(sandbox.dcm4chee, study) == 0
    assert images_on(sandbox.msdicom, other) == images_on(sandbox.dcm4chee, other) == 1
    with pytest.raises(NotFound) as caught:
        courier.delete("study", study).result(timeout_s=WAIT_S)
    assert statuses(caught.value.details) == {"msdicom": "not_there", "dcm4chee": "not_there"}

    with pytest.raises(InvalidUid):
        courier.delete("study", "1.2.*")
    with pytest.raises(InvalidRequest, match="level"):
        courier.delete("patient", "1.2")
    with pytest.raises(InvalidRequest, match="msdicom, dcm4chee"):
        courier.delete("study", study, servers=["elsewhere"]).result(timeout_s=WAIT_S)


def test_a_deletion_that_can_be_taken_back_is_hidden_or_refused(courier, sandbox):
    study = new_uid()
    stow(sandbox.msdicom, image(study))
    with pytest.raises(PacsRejected, match="for good"):
        courier.delete("study", study, permanent=False).result(timeout_s=WAIT_S)
    stow(sandbox.dcm4chee, image(study))
    kept = courier.delete("study", study, permanent=False).result(timeout_s=WAIT_S)
    assert statuses(kept) == {"msdicom": "refused", "dcm4chee": "hidden"}
    assert (images_on(sandbox.msdicom, study), images_on(sandbox.dcm4chee, study)) == (1, 0)


def test_a_silent_server_is_never_said_to_be_rid_of_it(courier, sandbox):
    study = new_uid()
    stow(sandbox.msdicom, image(study))
    stow(sandbox.dcm4chee, image(study))
    sandbox.set_fault("dcm4chee", "*", refuse=True)
    with pytest.raises(PacsUnavailable, match=r"msdicom \(deleted\)") as caught:
        courier.delete("study", study).result(timeout_s=WAIT_S)
    assert caught.value.server_name == "dcm4chee"
    assert statuses(caught.value.details) == {"msdicom": "deleted", "dcm4chee": "unavailable"}
    assert images_on(sandbox.msdicom, study) == 0
    sandbox.reset_faults()
    assert images_on(sandbox.dcm4chee, study) == 1

    sandbox.set_fault("dcm4chee", "query", status=503, times=1)
    done = courier.delete("study", study).result(timeout_s=WAIT_S)
    assert statuses(done) == {"msdicom": "not_there", "dcm4chee": "deleted"}
    assert done["attempts"] == 2


def test_a_delete_whose_answer_was_lost_is_reported_as_deleted(courier, sandbox):
    for server, operation in (("msdicom", "delete"), ("dcm4chee", "reject"), ("dcm4chee", "delete")):
        study = new_uid()
        stow(getattr(sandbox, server), image(study))
        sandbox.set_fault(server, operation, commit_then_drop=True, times=1)
        done = courier.delete("study", study).result(timeout_s=WAIT_S)
        assert statuses(done)[server] == "deleted"
        assert done["attempts"] == 2


def test_the_command_shows_what_came_of_it_and_ends_with_a_status_for_scripts(worker, sandbox, monkeypatch):
    monkeypatch.setenv("PACS_CONFIG", str(worker(jobs=QUICK).config))
    study = new_uid()
    stow(sandbox.dcm4chee, image(study))

    def pacs(*words):
        return CliRunner().invoke(main, ["delete", "study", *words])

    shown = pacs(study, "--dry-run")
    assert (shown.exit_code, "would_delete" in shown.output) == (0, True)
    assert images_on(sandbox.dcm4chee, study) == 1
    for words in ([study], [study, "--json"]):  # nobody can be asked here
        asked = pacs(*words)
        assert (asked.exit_code, "--yes" in asked.stderr, asked.stdout) == (1, True, "")
    assert images_on(sandbox.dcm4chee, study) == 1
    answer = pacs(study, "--json", "--yes", "--reason", "wrong patient", "--requested-by", "Dr. Who")
    assert (answer.exit_code, statuses(json.loads(answer.stdout))["dcm4chee"]) == (0, "deleted")
    assert pacs(study, "--yes").exit_code == 1
    assert pacs("1.2.*").exit_code == 2
    sandbox.set_fault("msdicom", "*", refuse=True)
    assert pacs(study, "--yes", "--server", "msdicom").exit_code == 3


def test_a_worker_killed_while_deleting_is_followed_by_one_that_reports_the_same(worker, sandbox):
    study, sop = new_uid(), new_uid()
    stow(sandbox.dcm4chee, image(study, sop=sop))
    doomed = worker(jobs=QUICK)
    with Courier(doomed.settings) as courier:
        sandbox.set_fault("dcm4chee", "reject", latency_ms=2500)
        handle = courier.delete("image", sop)
        for _, report in courier.watch([handle], timeout_s=WAIT_S):
            if report.stage == "delete":
                doomed.kill()
                break
        sandbox.reset_faults()
        worker(jobs=QUICK)
        done = handle.result(timeout_s=WAIT_S)
        assert statuses(done) == {"msdicom": "not_there", "dcm4chee": "hidden"}
        assert done["attempts"] == 2
        courier._app.backend.forget(handle.id)
        job = {"level": "image", "uid": sop, "permanent": True, "dry_run": False}
        courier._app.send_task("pacs.delete", kwargs={"job": job}, task_id=handle.id)
        assert poll(
            lambda: courier._app.backend.get(courier._app.backend.get_key_for_task(handle.id)), timeout_s=WAIT_S
        )
        assert handle.result(timeout_s=WAIT_S) == done


def test_a_study_that_is_being_stored_is_deleted_after_it_has_been_stored(courier, image_server, sandbox, redis_url):
    study = new_uid()
    sandbox.set_fault("msdicom", "store", latency_ms=1500)
    upload = courier.upload(image_server.put("a.dcm", image(study)))
    for _, report in courier.watch([upload], timeout_s=WAIT_S):
        if report.stage == "push":
            break
    delete = courier.delete("study", study)
    assert statuses(delete.result(timeout_s=WAIT_S))["msdicom"] == "deleted"
    assert upload.status() == "done"
    assert images_on(sandbox.msdicom, study) == 0
    assert Ledger.connect(redis_url).claimed_server(study) is None

    sandbox.reset_faults()
    again = courier.upload(image_server.put("b.dcm", image(study)), server="dcm4chee").result(timeout_s=WAIT_S)
    assert (again["server_name"], again["study_action"]) == ("dcm4chee", "created")
