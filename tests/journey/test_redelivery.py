"""At least once in, exactly once out: messages delivered twice, workers killed at each point of the push."""

from __future__ import annotations

import pytest
import requests

from producer import Courier
from sandbox.synthetic import image, new_uid

WAIT_S = 30
QUICK = {"lease_s": 1.5, "grace_s": 2, "sweep_s": 0.2, "backoff_base_s": 0.1}


def stored_once(sandbox, study):
    counts = []
    for url in (sandbox.msdicom, sandbox.dcm4chee):
        answer = requests.get(
            f"{url}/studies/{study}/instances", headers={"Accept": "application/dicom+json"}, timeout=10
        )
        counts.append(len(answer.json()) if answer.status_code == 200 else 0)
    return counts == [1, 0]


def deliver_again(courier, handle, url):
    courier._app.send_task("pacs.upload", kwargs={"job": {"image_url": url}}, task_id=handle.id)


def test_delivered_twice_before_anybody_took_it(worker, image_server, sandbox):
    study = new_uid()
    url = image_server.put("a.dcm", image(study))
    running = worker(jobs=QUICK)
    with Courier(running.settings) as courier:
        sandbox.set_mood("msdicom", "store", latency_ms=300)
        handle = courier.upload(url)
        deliver_again(courier, handle, url)
        payload = handle.result(timeout_s=WAIT_S)
        assert (payload["status"], payload["attempts"]) == ("stored", 1)
        assert stored_once(sandbox, study)


def test_delivered_again_while_it_is_pushed_and_after_it_has_ended(worker, image_server, sandbox):
    study = new_uid()
    url = image_server.put("a.dcm", image(study))
    running = worker(jobs=QUICK)
    with Courier(running.settings) as courier:
        sandbox.set_mood("msdicom", "store", latency_ms=1500)
        handle = courier.upload(url)
        for _, report in courier.watch([handle], timeout_s=WAIT_S):
            if report.stage == "push":
                deliver_again(courier, handle, url)
        payload = handle.result(timeout_s=WAIT_S)
        assert payload["attempts"] == 1
        courier._app.backend.forget(handle.id)
        deliver_again(courier, handle, url)
        assert handle.result(timeout_s=WAIT_S) == payload
        assert stored_once(sandbox, study)


@pytest.mark.parametrize(
    ("operation", "stage", "stored_before_the_kill"),
    [("query", "check", False), ("store", "push", False), ("metadata", "describe", True)],
)
def test_a_worker_killed_at_any_point_is_followed_by_one_that_ends_the_job_the_same_way(
    worker, image_server, sandbox, operation, stage, stored_before_the_kill
):
    study = new_uid()
    url = image_server.put("a.dcm", image(study))
    doomed = worker(jobs=QUICK)
    with Courier(doomed.settings) as courier:
        sandbox.set_mood("msdicom", operation, latency_ms=2500)
        handle = courier.upload(url)
        for _, report in courier.watch([handle], timeout_s=WAIT_S):
            if report.stage == stage:
                doomed.kill()
                break
        sandbox.calm()
        assert stored_once(sandbox, study) is stored_before_the_kill
        worker(jobs=QUICK)
        payload = handle.result(timeout_s=WAIT_S)
        assert (payload["status"], payload["study_action"], payload["attempts"]) == ("stored", "created", 2)
        assert payload["server_name"] == "msdicom"
        assert stored_once(sandbox, study)


@pytest.mark.parametrize("server", ["msdicom", "dcm4chee"])
def test_a_push_whose_answer_was_lost_ends_as_stored(worker, image_server, sandbox, server):
    study = new_uid()
    running = worker(jobs=QUICK)
    with Courier(running.settings) as courier:
        sandbox.set_mood(server, "store", commit_then_drop=True, times=1)
        payload = courier.upload(image_server.put("a.dcm", image(study)), server=server).result(timeout_s=WAIT_S)
    assert (payload["status"], payload["server_name"]) == ("stored", server)
    assert (payload["attempts"], payload["study_action"]) == (2, "created")


def test_a_job_whose_message_was_lost_is_woken_from_the_ledger(worker, redis, image_server, sandbox):
    study = new_uid()
    running = worker(jobs=QUICK)
    with Courier(running.settings) as courier:
        running.stop()
        handle = courier.upload(image_server.put("a.dcm", image(study)))
        courier._app.control.purge()
        worker(jobs=QUICK)
        assert handle.result(timeout_s=WAIT_S)["status"] == "stored"
