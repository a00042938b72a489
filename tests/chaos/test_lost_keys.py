"""Redis loses its keys, or is away longer than a lease, again and again: no job is lost, and no worker called dead."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from redis import Redis

from courier.ledger.jobs import PREFIX
from producer import Courier
from sandbox.processes import poll
from tests.chaos.crew import QUICK
from tests.chaos.judge import Picture, kept, stores

WAIT_S = 90
AREA = "Redis"


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["threads", pytest.param("processes", marks=pytest.mark.full)])
@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.full)])
def test_the_ledger_is_emptied_in_the_middle_of_30_jobs_and_all_of_them_end(
    crew, redis, sandbox, image_server, guarantee, times, pool
):
    sandbox.set_fault("msdicom", "*", latency_ms=[50, 300])
    crew.forgiven.append("or has lost the job")  # Celery's words on a message that is given back, with a traceback
    crew.start(pool=pool, concurrency=8)
    pictures = [Picture.new() for _ in range(30)]
    with Courier(crew.loaded()) as courier, Redis.from_url(redis.ledger_url, decode_responses=True) as ledger:
        handles = {
            courier.upload(image_server.put(f"{one.sop}.dcm", one.body), idempotency_key=one.sop): one
            for one in pictures
        }
        for _ in range(times):
            assert poll(lambda: running(ledger) >= 4, timeout_s=WAIT_S, every_s=0.02)
            ledger.flushdb()
        emptied_s = time.monotonic()
        poll(lambda: not still_open(courier, handles), timeout_s=WAIT_S)
        took_s = time.monotonic() - emptied_s
        assert still_open(courier, handles) == {}
        assert [handle.id for handle in handles if handle.report().status != "done"] == []
    assert {one.sop for one in kept(sandbox)} == {one.sop for one in pictures}
    assert [sop for sop, count in stores(sandbox).items() if count > 1] == [], "given an image twice"
    guarantee.row(
        area=AREA,
        fault="the ledger's database is emptied (`FLUSHDB`)" + (f" {times} times" if times > 1 else ""),
        point=f"in the middle of 30 uploads ({pool})",
        outcome="all stored once: those under way are written down again",
        recovery_s=took_s,
    )


def still_open(courier, handles):
    """Of a job that waits in a queue, and nowhere else, nothing is known until a worker takes it."""
    reports = courier.reports(handle.id for handle in handles)
    return {job_id: report.stage for job_id, report in reports.items() if report.status not in ("done", "failed")}


def running(ledger: Redis) -> int:
    keys = list(ledger.scan_iter(f"{PREFIX}job:*"))
    return sum(ledger.hget(key, "state") == "running" for key in keys)


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["threads", pytest.param("processes", marks=pytest.mark.full)])
def test_a_redis_that_stands_still_for_longer_than_a_lease_three_times_makes_no_dead_letter(
    crew, redis, sandbox, image_server, guarantee, pool
):
    sandbox.set_fault("msdicom", "store", latency_ms=14_000)
    workers = [crew.start(pool=pool, concurrency=2) for _ in range(2)]
    picture = Picture.new()
    crew.forgiven += ["TimeoutError", "ConnectionError"]
    with Courier(crew.loaded()) as courier:
        handle = courier.upload(image_server.put("a.dcm", picture.body))
        assert poll(lambda: courier.ledger.read_record(handle.id).get("state") == "running", timeout_s=WAIT_S)
        for _ in range(3):
            os.kill(redis.child.pid, signal.SIGSTOP)
            time.sleep(1.5 * QUICK["lease_s"])
            os.kill(redis.child.pid, signal.SIGCONT)
            time.sleep(0.5)
        stood_s = time.monotonic()
        payload = handle.result(timeout_s=WAIT_S)
        took_s = time.monotonic() - stood_s
        record = courier.ledger.read_record(handle.id)
        deaths = [key for key in courier.ledger.client.scan_iter(f"{PREFIX}died:*")]
        counted = [courier.ledger.client.hget(key, "count") for key in deaths]
    assert payload["status"] == "stored"
    assert (record["state"], record.get("deaths", "0"), json.loads(record["outcome"])["payload"]) == (
        "done",
        "0",
        payload,
    )
    assert [count for count in counted if count not in (None, "0")] == []
    assert [sop for sop, count in stores(sandbox).items() if count > 1] == []
    assert all(worker.alive for worker in workers)
    guarantee.row(
        area=AREA,
        fault="stands still for longer than a lease, three times",
        point=f"in the middle of an upload ({pool}), since the last time",
        outcome="stored once; no death of a worker is counted",
        recovery_s=took_s,
    )
