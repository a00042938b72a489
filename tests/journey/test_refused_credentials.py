"""A store refuses the worker's own credential: real jobs wait for it, and are done when it is accepted."""

from __future__ import annotations

import pytest

from producer import Courier
from producer.errors import SourceUnauthorized
from sandbox.processes import poll
from sandbox.synthetic import image, new_uid

WAIT_S = 30
SECRET = "hush-hush-secret"
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>" + SECRET.encode() + b"</Message></Error>"
ENVIRON = {"AWS_ACCESS_KEY_ID": "COURIERTESTS", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}


def settings(image_server, **jobs):
    s3 = {"buckets": ["scans"], "endpoint_url": image_server.base, "region": "us-east-1"}
    return {"sources": {"s3": s3}, "breaker": {"pause_s": 0.5, "pause_cap_s": 1}, "jobs": jobs, "environ": ENVIRON}


def test_jobs_and_items_wait_for_a_credential_and_are_done_when_it_is_accepted(worker, image_server):
    study = new_uid()
    names = [f"scans/{number}.dcm" for number in range(12)]
    for name in names:
        image_server.put(name, EXPIRED, status=400)
    running = worker(**settings(image_server))
    with Courier(running.settings) as courier:
        alone = courier.upload(f"s3://{names[0]}", server="msdicom")
        batch = courier.batch.upload([f"s3://{name}" for name in names[1:]], server="msdicom")
        assert poll(lambda: alone.status() == "waiting", timeout_s=WAIT_S)
        waiting = alone.waiting()
        assert "ExpiredToken" in waiting["message"]
        for name in names:
            image_server.put(name, image(study, sop=new_uid(), side=8))
        payload = alone.result(timeout_s=WAIT_S)
        assert (payload["status"], payload["attempts"]) == ("stored", 1)
        batch.result(timeout_s=WAIT_S)
        assert {row["status"] for row in courier.batch.report(batch.batch_id)} == {"stored"}
    assert SECRET not in running.log


def test_a_job_that_waited_in_vain_is_a_dead_letter_that_can_be_replayed(worker, image_server):
    image_server.put("scans/a.dcm", EXPIRED, status=400)
    running = worker(**settings(image_server, max_wait_s=2))
    with Courier(running.settings) as courier:
        handle = courier.upload("s3://scans/a.dcm")
        with pytest.raises(SourceUnauthorized, match="ExpiredToken"):
            handle.result(timeout_s=WAIT_S)
        assert [letter.job_id for letter in courier.dead.list()] == [handle.id]
        image_server.put("scans/a.dcm", image(new_uid(), side=8))
        assert courier.dead.replay(handle.id)
        assert handle.result(timeout_s=WAIT_S)["status"] == "stored"
