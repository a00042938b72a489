"""Follow-ups of jobs that end otherwise than done at their first message: refused, cancelled, sent again."""

from __future__ import annotations

import json
import uuid

import pytest
from celery import chain, chord, signature
from redis import Redis

from courier import celery_settings
from courier.ledger.jobs import job_id_for
from producer import Courier
from sandbox.processes import poll
from tests.canvases import WAIT_S, stage

QUEUE = celery_settings.task_default_queue


@pytest.fixture(scope="module")
def running(redis_server, sandbox_server, tmp_path_factory):
    with stage(redis_server, sandbox_server, tmp_path_factory.mktemp("stage")) as made:
        made.worker(jobs={"max_attempts": 100})
        yield made


@pytest.fixture
def canvases(running):
    running.sandbox.reset_faults()
    return running.canvases


def publish(canvases, message):
    """As it is, past everything that Celery's client does."""
    Redis.from_url(canvases.broker_url).lpush(QUEUE, json.dumps(message))


def forged(canvases, **headers):
    """A message for `publish`: with an errback and a chained task, and with something wrong."""
    name = str(uuid.uuid4())
    found = signature("pacs.upload", kwargs={"job": {}}, app=canvases.plain, immutable=True)
    found.set(task_id=name, queue="aside")
    found.link_error(canvases.after(f"error of {name}"))
    chain(found, canvases.after(f"never {name}")).apply_async()
    raw = Redis.from_url(canvases.broker_url).rpop("aside")
    message = json.loads(raw)
    message["headers"] |= headers
    message["properties"]["delivery_info"]["routing_key"] = QUEUE
    return name, message


def once(canvases, tag):
    assert poll(lambda: tag in canvases.calls(), timeout_s=WAIT_S), sorted(canvases.calls())
    (call,) = canvases.calls()[tag]
    assert call["id"] == canvases.ids[tag]
    return call


@pytest.mark.parametrize(
    "headers",
    [
        {"shadow": 5},
        {"stamped_headers": -1},
        {"task": "pacs.nothing"},
        {"task": "celery.map"},
        {},  # its job has no image_url
    ],
)
def test_an_errback_follows_on_a_message_that_is_refused(canvases, headers):
    name, message = forged(canvases, **headers)
    publish(canvases, message)
    assert once(canvases, f"error of {name}")["args"] == [name]
    chained = canvases.plain.AsyncResult(canvases.ids[f"never {name}"])
    assert poll(lambda: chained.state == "FAILURE", timeout_s=WAIT_S)
    assert f"never {name}" not in canvases.calls()


def test_an_errback_follows_on_a_batch_whose_id_cannot_be_one(canvases):
    name = f"order/{uuid.uuid4()}"
    order = signature("pacs.batch.upload", kwargs={"job": {}}, app=canvases.plain, immutable=True)
    order.apply_async(task_id=name, queue=QUEUE, link_error=canvases.after(f"error of {name}"))
    assert once(canvases, f"error of {name}")["args"] == [name]


def test_a_chord_fails_with_a_member_that_is_refused_and_not_before_it_is_complete(canvases):
    body = canvases.after("body of the refused")
    body.link_error(canvases.after("a member was refused"))
    wrong = signature("pacs.nothing", kwargs={"job": {}}, app=canvases.plain, immutable=True, queue=QUEUE)
    result = chord([canvases.upload(), wrong, canvases.upload()])(body)
    once(canvases, "a member was refused")
    assert [one.state for one in result.parent] == ["SUCCESS", "FAILURE", "SUCCESS"]
    assert poll(lambda: result.state == "FAILURE", timeout_s=WAIT_S)


def test_an_errback_follows_on_a_job_whose_id_is_taken_and_the_owner_of_the_id_goes_on(canvases):
    first, other = canvases.upload(), canvases.upload()
    name = first.options["task_id"]
    first.apply_async(link=canvases.after("owner"))
    assert poll(lambda: bool(canvases.ledger.read_record(name).get("state")), timeout_s=WAIT_S)  # a worker has it
    other.apply_async(task_id=name, link_error=canvases.after("taken"), link=canvases.after("never 2"))
    assert once(canvases, "taken")["args"] == [name]
    assert once(canvases, "owner")["args"][0]["job_id"] == name
    assert "never 2" not in canvases.calls()


def cancelled(canvases, running, name):
    with Courier(running.settings) as courier:
        assert courier.cancel(name)


def revoked(canvases, running, name):
    canvases.plain.control.revoke(name)


def revoked_by_stamp(canvases, running, name):
    canvases.plain.control.revoke_by_stamped_headers({"order": name})


@pytest.mark.parametrize("end", [cancelled, revoked, revoked_by_stamp])
def test_an_errback_follows_on_a_cancelled_job_and_its_chord_fails(canvases, running, end):
    running.sicken()
    tag = end.__name__
    job, body = canvases.upload(), canvases.after(f"never {tag}")
    body.link_error(canvases.after(f"chord of {tag}"))
    name = job.options["task_id"]
    job.stamp(order=name)
    job.link_error(canvases.after(tag))
    result = chord([job, canvases.upload()])(body)
    assert poll(lambda: canvases.ledger.read_record(name).get("state") == "waiting", timeout_s=WAIT_S)
    end(canvases, running, name)
    assert once(canvases, tag)["args"] == [name]
    running.sandbox.reset_faults()
    once(canvases, f"chord of {tag}")
    assert poll(lambda: result.state == "FAILURE", timeout_s=WAIT_S)
    assert canvases.plain.AsyncResult(name).state == "FAILURE"
    assert f"never {tag}" not in canvases.calls()


def test_the_same_job_sent_again_with_other_follow_ups_is_done_once_and_all_of_them_follow(canvases):
    job = canvases.upload()
    name = job.options["task_id"]
    for number in (1, 2):
        job.clone().apply_async(link=canvases.after(f"link {number}"))
    body = canvases.after("body")
    chord([job.clone(), canvases.upload()])(body)
    payloads = [once(canvases, f"link {number}")["args"][0] for number in (1, 2)]
    assert [payload["attempts"] for payload in payloads] == [1, 1]
    assert once(canvases, "body")["args"][0][0] == payloads[0]
    job.clone().apply_async(link=canvases.after("long after its end"))
    assert once(canvases, "long after its end")["args"] == [payloads[0]]
    assert canvases.ledger.client.hget(canvases.ledger.key("job", name), "follow_ups") is None


def test_jobs_under_one_idempotency_key_are_each_followed_by_their_own(canvases):
    job = canvases.upload()
    job["kwargs"]["job"]["idempotency_key"] = key = str(uuid.uuid4())
    for number in (1, 2):
        job.clone().set(task_id=str(uuid.uuid4())).apply_async(link=canvases.after(f"key {number}"))
    first, second = (once(canvases, f"key {number}")["args"][0] for number in (1, 2))
    assert first == second
    assert first["job_id"] == job_id_for(key)


def test_a_worker_takes_nothing_from_the_queue_that_it_sends_a_follow_up_to(canvases, running):
    job = canvases.upload()
    job.apply_async(link=signature("theirs.note", app=canvases.plain, queue="theirs"))
    broker = Redis.from_url(canvases.broker_url)
    assert poll(lambda: broker.llen("theirs") == 1, timeout_s=WAIT_S)
    worker = running.processes.children[-1]
    connected = worker.log.count("Connected to redis")
    broker.client_kill_filter(_type="normal", skipme=True)
    assert poll(lambda: worker.log.count("Connected to redis") > connected, timeout_s=WAIT_S)
    canvases.upload().apply_async(link=canvases.after("after the reconnection"))
    once(canvases, "after the reconnection")
    assert broker.llen("theirs") == 1
