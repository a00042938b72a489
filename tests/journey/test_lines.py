"""What a real worker writes into its log: one JSON object per line, and all of a job's lines say which job it is."""

from __future__ import annotations

import json

from celery import Celery

from producer import Courier
from sandbox.synthetic import image, new_uid

WAIT_S = 30
SIGNATURE, PATIENT = "SIGNATURE-77aa", "PLANTED-PATIENT"


def test_every_line_is_json_and_a_jobs_lines_bear_all_that_is_known_of_it(worker, redis, sandbox, image_server):
    running = worker(logs={"format": "json"}, jobs={"max_attempts": 2, "backoff_base_s": 0.1, "sweep_s": 0.1})
    study = new_uid()
    urls = [image_server.put(f"{number}.dcm", image(study, PatientID=PATIENT)) for number in range(2)]
    with Courier(running.settings) as courier:
        stored = courier.upload(f"{urls[0]}?sig={SIGNATURE}")
        assert stored.result(timeout_s=WAIT_S)["status"] == "stored"
        sandbox.set_fault("msdicom", "store", status=503, times=1)
        parked = courier.upload(f"{urls[1]}?sig={SIGNATURE}")
        assert parked.result(timeout_s=WAIT_S)["attempts"] == 2
        refused = courier.upload(image_server.put("page.html", b"<html>") + f"?sig={SIGNATURE}")
        for _ in courier.as_completed([refused], timeout_s=WAIT_S):
            pass
    plain = Celery(broker=redis.broker_url, set_as_current=False)
    plain.conf.task_default_queue = "pacs"
    plain.send_task("no.such.task", kwargs={"job": SIGNATURE})
    running.stop()
    lines = [json.loads(line) for line in running.log.splitlines() if line.startswith("{")]
    others = [line for line in running.log.splitlines() if line.strip() and not line.startswith("{")]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert [line for line in others if " INFO " in line or " ERROR " in line or "pacs." in line] == []
    of_job = {job.id: [line for line in lines if job.id in str(line)] for job in (stored, parked, refused)}
    for job_id, about in of_job.items():
        assert len(about) >= 3, "received, done or refused, and what Celery says of it"
        assert {(line.get("job_id"), line.get("task")) for line in about} == {(job_id, "pacs.upload")}
    (done,) = [line for line in of_job[stored.id] if line["message"].startswith("Done")]
    known = {"study_uid": study, "server_name": "msdicom", "stage": "describe", "attempt": 1}
    assert {name: done.get(name) for name in known} == known
    attempts = {line["attempt"] for line in of_job[parked.id] if "attempt" in line}
    assert attempts == {1, 2}
    assert any(line["logger"].startswith("celery.") and line.get("study_uid") == study for line in of_job[stored.id])
    assert SIGNATURE not in running.log
    assert PATIENT not in running.log
