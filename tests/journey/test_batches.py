"""Batches over a real broker and a real worker; their items take what time a test wants (``benchmarks/noop.py``)."""

from __future__ import annotations

import time
import uuid

import pytest
from celery import Celery

from benchmarks.listing import listed
from courier.batches.planner import Planned, Planner
from courier.batches.store import Batches
from courier.messages import BatchOrderJob
from courier.settings import Settings
from producer import Courier
from producer.errors import Cancelled, InvalidRequest
from sandbox import processes as parts
from sandbox.processes import Processes
from sandbox.synthetic import image, new_uid

WAIT_S = 60
QUICK = {"backoff_base_s": 0.1, "sweep_s": 0.1}


@pytest.fixture
def slow_worker(tmp_path, redis, sandbox):
    """A worker that is told how long a group of a hundred items takes."""
    with Processes(tmp_path / "children") as children:
        tree = {
            "servers": sandbox.servers(),
            "queue": parts.queue_settings(redis),
            "sources": {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True},
            "jobs": QUICK,
        }
        config = parts.write_settings(tmp_path / "pacs.toml", tree)

        def start(sleep_s, concurrency=8):
            environ = {"NOOP_SLEEP_S": str(sleep_s)}
            options = ["-I", "benchmarks.noop"]
            worker = parts.worker(children, config, concurrency=concurrency, options=options, environ=environ)
            worker.wait_ready()
            return Settings.load({"PACS_CONFIG": str(config)})

        yield start


def begin(courier, items, *, concurrency=4, **order):
    batch_id = str(uuid.uuid4())
    batches = Batches(courier.ledger)
    batches.open(
        batch_id, kind="noop", order={"verify": False, **order}, concurrency=concurrency, name=f"{items} times nothing"
    )
    with Planner(batches, batch_id) as planner:
        planner.add_all(Planned(listed(number)) for number in range(items))
        planner.freeze()
    return courier.enqueue("pacs.batch.noop", BatchOrderJob, {"planned": True}, job_id=batch_id)


def until(condition):
    assert parts.poll(condition, timeout_s=WAIT_S)


def test_a_single_upload_is_done_at_once_while_a_batch_of_a_hundred_thousand_runs(slow_worker, image_server):
    with Courier(slow_worker(4)) as courier:
        batch = begin(courier, 100_000, concurrency=16)  # twice what the worker has slots, and four seconds each
        until(lambda: courier.batch.get(batch.id).of("apply").begun == 16)
        time.sleep(1)
        took_s = []
        for number in range(5):
            url = image_server.put(f"{number}.dcm", image(new_uid(), side=8))
            begun_s = time.monotonic()
            assert courier.upload(url).result(timeout_s=WAIT_S)["status"] == "stored"
            took_s.append(time.monotonic() - begun_s)
        control = Celery(broker=courier.settings.queue.broker_url).control

        def only_the_batch_is_shown():  # an upload's result is there before its task has ended
            running = control.inspect(timeout=WAIT_S, limit=1).active() or {}
            shown = [task["kwargs"] for tasks in running.values() for task in tasks]
            return bool(shown) and all('"name": "100000 times nothing"' in job and '"chunk": ' in job for job in shown)

        until(only_the_batch_is_shown)
        small = begin(courier, 100)
        assert small.result(timeout_s=WAIT_S)["totals"] == {"stored": 100}  # batches take turns
        shown = courier.batch.get(batch.id)
        assert (shown.state, shown.items) == ("running", 100_000)
        courier.batch.cancel(batch.id)
    assert sorted(took_s)[2] < 2, took_s


def test_chunks_follow_each_other_without_a_pause_for_the_sweeper(slow_worker):
    with Courier(slow_worker(0)) as courier:
        begun_s = time.monotonic()
        batch = begin(courier, 10_000, concurrency=1)  # a hundred chunks, one after the other
        assert batch.result(timeout_s=WAIT_S)["totals"] == {"stored": 10_000}
        assert time.monotonic() - begun_s < 30  # what is not sent at once waits a minute to be swept up
        until(lambda: courier.ledger.load(overdue_s=0).open == 0)
        left = courier.ledger.client.keys("courier:job:*.apply.*")
        assert {courier.ledger.client.ttl(key) <= 300 for key in left} == {True}


def test_a_batch_keeps_to_its_rate_can_be_paused_and_cancelled_and_says_where_it_is(slow_worker):
    with Courier(slow_worker(0)) as courier:
        batch = begin(courier, 1_200, requests_per_s=200)
        begun_s = time.monotonic()
        until(lambda: courier.batch.get(batch.id).settled >= 500)
        assert time.monotonic() - begun_s > 1.2
        courier.batch.pause(batch.id)
        time.sleep(0.5)  # a group of a hundred may just be under way
        paused = courier.batch.get(batch.id)
        assert (paused.state, paused.current) == ("paused", "apply")
        time.sleep(1)
        assert courier.batch.get(batch.id).settled == paused.settled < 1_200
        courier.batch.resume(batch.id)
        until(lambda: courier.batch.get(batch.id).settled > paused.settled)
        courier.batch.cancel(batch.id)
        with pytest.raises(Cancelled) as caught:
            batch.result(timeout_s=WAIT_S)
        assert paused.settled < caught.value.details["settled"] < 1_200
        end = courier.batch.retry(batch.id).result(timeout_s=WAIT_S)
        assert (end["state"], end["totals"]) == ("done", {"stored": 1_200})


def test_a_batch_without_items_is_refused_and_a_closed_window_keeps_one_waiting(slow_worker):
    with Courier(slow_worker(0)) as courier:
        empty = courier.enqueue("pacs.batch.noop", BatchOrderJob, {})
        with pytest.raises(InvalidRequest, match="nothing to do"):
            empty.result(timeout_s=WAIT_S)
        hour = time.gmtime().tm_hour
        batch = begin(courier, 10, window=f"{(hour + 3) % 24:02}:00-{(hour + 4) % 24:02}:00")
        until(lambda: courier.batch.get(batch.id).of("apply").begun == 1)
        time.sleep(1)
        assert courier.batch.get(batch.id).settled == 0
        courier.batch.cancel(batch.id)
        with pytest.raises(Cancelled):
            batch.result(timeout_s=WAIT_S)
