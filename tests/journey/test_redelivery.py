"""At least once in, exactly once out: messages delivered twice, workers killed at each point of the push."""

from __future__ import annotations

import pytest
import requests

from courier.ledger.jobs import Ledger
from producer import Courier
from producer.errors import ImageAlreadyExists
from sandbox import processes as parts
from sandbox.processes import Processes, poll
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
        sandbox.set_fault("msdicom", "store", latency_ms=300)
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
        sandbox.set_fault("msdicom", "store", latency_ms=1500)
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
        sandbox.set_fault("msdicom", operation, latency_ms=2500)
        handle = courier.upload(url)
        for _, report in courier.watch([handle], timeout_s=WAIT_S):
            if report.stage == stage:
                doomed.kill()
                break
        sandbox.reset_faults()
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
        sandbox.set_fault(server, "store", commit_then_drop=True, times=1)
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


def test_an_outcome_whose_holder_died_before_anybody_was_told_is_told_by_another(
    worker, redis, image_server, sandbox, tmp_path
):
    study, port = new_uid(), parts.free_port()
    queue = {**parts.queue_settings(redis), "result_backend": f"redis://{parts.HOST}:{port}/0"}
    doomed = worker(jobs=QUICK, queue=queue, may_show_tracebacks=True)
    ledger = Ledger.connect(redis.ledger_url)
    with Courier(doomed.settings) as courier, Processes(tmp_path / "results") as running:
        handle = courier.upload(image_server.put("a.dcm", image(study)))
        assert parts.poll(lambda: ledger.read_record(handle.id).get("state") == "done", timeout_s=WAIT_S)
        doomed.kill()
        parts.redis(running, port=port)
        assert handle.result(timeout_s=WAIT_S)["status"] == "stored"  # the ledger says so meanwhile
        worker(jobs=QUICK, queue=queue)
        assert parts.poll(lambda: courier._stored_reports([handle.id]), timeout_s=WAIT_S)
        payload = handle.result(timeout_s=WAIT_S)
        assert (payload["status"], payload["attempts"]) == ("stored", 1)
    assert stored_once(sandbox, study)


def test_a_plain_clients_message_outlives_a_ledger_that_cannot_be_reached(
    worker, redis, plain, image_server, sandbox, tmp_path
):
    study, port = new_uid(), parts.free_port()
    queue = {**parts.queue_settings(redis), "ledger_url": f"redis://{parts.HOST}:{port}/0"}
    running = worker(jobs=QUICK, queue=queue, may_show_tracebacks=True)
    url = image_server.put("a.dcm", image(study))
    with Processes(tmp_path / "ledger") as children:
        waiting = plain.send_task("pacs.upload", kwargs={"job": {"image_url": url}})
        assert parts.poll(lambda: "the message is given back" in running.log, timeout_s=WAIT_S)
        parts.redis(children, port=port)
        assert waiting.get(timeout=WAIT_S)["status"] == "stored"
        running.stop()
    assert stored_once(sandbox, study)


def test_what_was_pushed_of_one_file_says_nothing_of_another_that_the_source_gives_later(
    worker, image_server, sandbox, put
):
    first, other = image(new_uid()), image(new_uid())
    put(sandbox.msdicom, other)
    running = worker(jobs={**QUICK, "max_attempts": 50, "backoff_cap_s": 0.5})
    with Courier(running.settings) as courier:
        sandbox.set_fault("msdicom", "store", status=503)
        handle = courier.upload(image_server.put("latest.dcm", first), server="msdicom")
        for _, report in courier.watch([handle], timeout_s=WAIT_S):
            if report.stage == "waiting":
                break
        image_server.put("latest.dcm", other)
        with pytest.raises(ImageAlreadyExists):
            handle.result(timeout_s=WAIT_S)
        sandbox.reset_faults()
        late = courier.upload(image_server.put("first.dcm", first), server="msdicom")
        assert late.result(timeout_s=WAIT_S)["status"] == "stored"


@pytest.mark.parametrize("ended", ["in the middle of the push", "after it"])
def test_a_job_whose_process_a_time_limit_ends_has_not_failed_and_is_done_by_another(
    worker, image_server, sandbox, plain, ended
):
    operation = "store" if ended == "in the middle of the push" else "metadata"
    study = new_uid()
    url = image_server.put("a.dcm", image(study))
    # Celery itself shows a traceback of one line for a time limit.
    running = worker(concurrency=2, options=("--pool", "processes"), jobs=QUICK, may_show_tracebacks=True)
    sandbox.set_fault("msdicom", operation, latency_ms=4000, times=1)
    result = plain.send_task("pacs.upload", kwargs={"job": {"image_url": url}}, time_limit=1.5)
    seen = set()
    assert poll(lambda: seen.add(result.status) or result.status == "SUCCESS", timeout_s=WAIT_S)
    assert f"Hard time limit (1.5s) exceeded for pacs.upload[{result.id}]" in running.log
    assert "FAILURE" not in seen
    assert result.get(timeout=WAIT_S)["status"] == "stored"
    assert stored_once(sandbox, study)
