"""How many messages the jobs of a long queue become: one each, whatever the queue waits for."""

from __future__ import annotations

import time

import pytest
from redis import Redis

from courier.ledger.jobs import PREFIX
from producer import Courier
from sandbox import processes as parts
from sandbox.synthetic import image, new_uid

WAIT_S = 60
JOBS = 40
#: A message is thought lost after half a second: these queues are many times as long.
QUICK = {"lease_s": 5, "grace_s": 0.5, "sweep_s": 0.1, "backoff_base_s": 0.1}


def messages(redis):
    """How many have been taken from all queues."""
    with Redis.from_url(redis.ledger_url, decode_responses=True) as client:
        return sum(int(count) for count in client.hvals(f"{PREFIX}taken"))


def orders(image_server, count=JOBS):
    study = new_uid()
    return [image_server.put(f"{number}.dcm", image(study)) for number in range(count)]


def test_a_queue_that_is_many_times_as_long_as_the_grace_period_gets_one_message_a_job(
    worker, redis, image_server, sandbox
):
    sandbox.set_fault("msdicom", "store", latency_ms=100)
    running = worker(jobs=QUICK, concurrency=2)
    with Courier(running.settings) as courier:
        begun_s = time.monotonic()
        handles = [courier.upload(url) for url in orders(image_server)]
        assert len(dict(courier.as_completed(handles, timeout_s=WAIT_S))) == JOBS
        assert time.monotonic() - begun_s > 3 * QUICK["grace_s"]
    assert messages(redis) == JOBS


def test_a_rate_limit_of_celery_makes_no_messages(worker, redis, image_server, sandbox):
    running = worker(jobs=QUICK, concurrency=4)
    with Courier(running.settings) as courier:
        courier._app.control.rate_limit("pacs.upload", "10/s", reply=True)
        handles = [courier.upload(url) for url in orders(image_server)]
        assert len(dict(courier.as_completed(handles, timeout_s=WAIT_S))) == JOBS
    assert messages(redis) == JOBS


@pytest.mark.parametrize("left", [0, 10])
def test_messages_that_a_broker_has_lost_are_sent_again_once_each(worker, redis, image_server, sandbox, left):
    running = worker(jobs=QUICK)
    with Courier(running.settings) as courier:
        running.stop()
        handles = [courier.upload(url) for url in orders(image_server, 20)]
        with Redis.from_url(redis.broker_url) as broker:
            queue = courier._app.conf.task_default_queue
            assert broker.llen(queue) == 20
            broker.ltrim(queue, 0, left - 1) if left else broker.delete(queue)
        time.sleep(2 * QUICK["grace_s"])
        worker(jobs=QUICK, concurrency=2)
        assert len(dict(courier.as_completed(handles, timeout_s=WAIT_S))) == 20
    assert messages(redis) == 20


def test_a_message_in_the_hands_of_a_worker_that_is_killed_is_sent_again(worker, redis, image_server, sandbox):
    sandbox.set_fault("msdicom", "store", latency_ms=2000)
    doomed = worker(jobs=QUICK, concurrency=2)
    with Courier(doomed.settings) as courier:
        handles = [courier.upload(url) for url in orders(image_server, 4)]  # two at work, two in hand
        assert parts.poll(lambda: messages(redis) == 2, timeout_s=WAIT_S)
        time.sleep(3 * QUICK["grace_s"])
        doomed.kill()
        sandbox.reset_faults()
        worker(jobs=QUICK)
        assert len(dict(courier.as_completed(handles, timeout_s=WAIT_S))) == 4
    assert messages(redis) <= 2 + 4 + 1
