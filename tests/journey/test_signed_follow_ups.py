"""Follow-ups where messages are signed: they are sent under the worker's signature, so their own has to be good."""

from __future__ import annotations

import json
import uuid

import pytest
from celery import Celery, signature
from kombu.serialization import registry
from redis import Redis

from courier import celery_settings
from producer import Courier
from sandbox.processes import poll
from tests.canvases import WAIT_S, stage
from tests.journey.test_signing import make_pair

QUEUE = celery_settings.task_default_queue


@pytest.fixture(scope="module")
def signed(redis_server, sandbox_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    (folder / "trusted").mkdir()
    for name in ("worker", "stranger"):
        _, certificate = make_pair(folder, name)
        if name == "worker":
            (folder / "trusted" / certificate.name).write_bytes(certificate.read_bytes())
    signing = {
        "key_file": str(folder / "worker.key"),
        "certificate_file": str(folder / "worker.crt"),
        "trusted_folder": str(folder / "trusted"),
    }
    with stage(redis_server, sandbox_server, tmp_path_factory.mktemp("stage"), signing=signing) as made:
        made.worker(jobs={"max_attempts": 100})
        with Courier(made.settings) as courier:
            yield made, courier
    registry.unregister("auth")


def test_nothing_follows_on_a_message_that_is_not_signed(signed):
    stage, _ = signed
    name = str(uuid.uuid4())
    plain: Celery = stage.canvases.plain
    plain.send_task(
        "pacs.upload",
        kwargs={"job": {}},
        task_id=name,
        queue=QUEUE,
        serializer="json",
        link_error=signature("mine.after", kwargs={"tag": "unsigned"}, app=plain, queue="aside"),
    )
    assert poll(lambda: plain.AsyncResult(name).state == "FAILURE", timeout_s=WAIT_S)
    assert Redis.from_url(stage.canvases.broker_url).llen("aside") == 0


def test_a_signed_job_that_is_parked_is_followed_by_signed_messages(signed):
    stage, courier = signed
    stage.sicken()
    first, second = stage.canvases.upload(), stage.canvases.upload()
    app: Celery = courier._app
    name, job = first.options["task_id"], first.kwargs["job"]
    app.send_task("pacs.upload", kwargs={"job": job}, task_id=name, link=dict(second))
    assert poll(lambda: stage.canvases.ledger.read_record(name).get("state") == "waiting", timeout_s=WAIT_S)
    stage.sandbox.reset_faults()
    assert app.AsyncResult(second.options["task_id"]).get(timeout=WAIT_S)["status"] == "stored"


def test_a_signed_message_that_is_moved_to_another_id_sends_none_of_its_follow_ups(signed):
    stage, courier = signed
    broker = Redis.from_url(stage.canvases.broker_url)
    name, other = str(uuid.uuid4()), str(uuid.uuid4())
    note = signature("mine.after", kwargs={"tag": "moved"}, app=courier._app, queue="noted")
    courier._app.send_task("pacs.upload", kwargs={"job": {}}, task_id=name, queue="aside", link_error=note)
    message = json.loads(broker.rpop("aside"))
    message["headers"] |= {"id": other, "shadow": 5}
    message["properties"]["delivery_info"]["routing_key"] = QUEUE
    broker.lpush(QUEUE, json.dumps(message))
    assert poll(lambda: stage.canvases.plain.AsyncResult(other).state == "FAILURE", timeout_s=WAIT_S)
    assert broker.llen("noted") == 0
