"""Redis dies, is cut off, is full, or loses its results while images are uploaded; nobody has to help."""

from __future__ import annotations

import time
from contextlib import ExitStack

import pytest
from celery import Celery
from redis import Redis

from producer import Courier
from producer.errors import BrokerUnavailable
from sandbox import processes as parts
from sandbox.processes import Processes, poll
from tests.chaos.cable import Cable
from tests.chaos.crew import Crew, control_url
from tests.chaos.judge import Picture, check_invariant

WAIT_S = 60
JOBS = 40
#: What Celery and redis-py say of a broker that is gone, with the traceback; the worker goes on.
GONE = ("ConnectionError", "TimeoutError", "ConnectionRefusedError", "Connection to broker lost", "OperationalError")
GONE += ("the ledger cannot be reached",)  # the message is given back
AREA = "Redis"


@pytest.fixture
def house(tmp_path):
    """Children of this test alone, and what else is to be closed."""
    with ExitStack() as stack:
        stack.processes = stack.enter_context(Processes(tmp_path / "house"))
        yield stack


def crew_on(house, tmp_path, redis, sandbox, **urls):
    crew = Crew(
        tmp_path / "crew",
        queue={**parts.queue_settings(redis), **urls},
        servers=sandbox.servers(),
        control=control_url(redis),
    )
    crew.forgiven += GONE
    house.enter_context(crew.processes)
    return crew


def upload(courier, image_server, orders, *, count=JOBS):
    for _ in range(count):
        picture = Picture.new()
        orders[courier.upload(image_server.put(f"{picture.sop}.dcm", picture.body))] = picture


def some_ended(courier, orders, *, least=3):
    def ended():
        return sum(report.over for report in courier.reports(handle.id for handle in orders).values()) >= least

    return poll(ended, timeout_s=WAIT_S, every_s=0.05)


@pytest.mark.slow
def test_redis_is_killed_and_comes_back_with_its_file_while_images_are_uploaded(
    house, tmp_path, sandbox, image_server, guarantee
):
    redis = parts.redis(house.processes, name="mortal")
    crew = crew_on(house, tmp_path, redis, sandbox)
    sandbox.set_fault("msdicom", "*", latency_ms=[20, 200])
    workers = [crew.start(pool=pool, concurrency=4) for pool in ("threads", "processes")]
    orders = {}
    with Courier(crew.loaded()) as courier:
        upload(courier, image_server, orders)
        assert some_ended(courier, orders)
        time.sleep(1.2)  # Redis writes its file once a second: what is older is kept
        redis.child.kill()
        with pytest.raises(BrokerUnavailable):
            courier.upload(image_server.url("nobody-hears.dcm"))
        time.sleep(3)
        parts.redis(house.processes, name="mortal", port=redis.port)
        back_s = time.monotonic()
        upload(courier, image_server, orders, count=5)
        check_invariant(orders, courier, sandbox, timeout_s=WAIT_S)
        took_s = time.monotonic() - back_s
    assert all(worker.alive for worker in workers)
    assert crew.faults() == []
    guarantee.row(
        area=AREA,
        fault="killed, and back after 3 s with its append-only file",
        point=f"{len(orders)} uploads, since it is back",
        outcome="all stored once; meanwhile programs are told `broker_unavailable`",
        recovery_s=took_s,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(("cut", 8), id="silent-8-s"),
        pytest.param(("cut", 30), id="silent-30-s", marks=pytest.mark.full),
        pytest.param(("snap", 30), id="closed-30-s", marks=pytest.mark.full),
    ],
)
def test_the_way_to_redis_is_cut_for_one_worker_and_the_others_do_its_jobs(
    house, tmp_path, redis, sandbox, image_server, guarantee, cut
):
    way, cut_s = cut
    cable = house.enter_context(Cable(redis.port))
    through = {
        f"{name}": f"redis://{parts.HOST}:{cable.port}/{n}" for n, name in enumerate(parts.queue_settings(redis))
    }
    near = crew_on(house, tmp_path, redis, sandbox)
    far = crew_on(house, tmp_path / "far", redis, sandbox, **through)
    sandbox.set_fault("msdicom", "*", latency_ms=[20, 200])
    orders = {}
    with Courier(near.loaded()) as courier:
        cut_off = far.start(concurrency=4)
        upload(courier, image_server, orders)
        assert some_ended(courier, orders)
        getattr(cable, way)()
        cut_at_s = time.monotonic()
        near.start(concurrency=4)
        upload(courier, image_server, orders, count=5)
        check_invariant(orders, courier, sandbox, timeout_s=WAIT_S)
        others_s = time.monotonic() - cut_at_s
        time.sleep(max(0, cut_s - others_s))
        cable.mend()
        mended_s = time.monotonic()
        for worker in near.processes.children:
            worker.stop()
        later = {}
        upload(courier, image_server, later, count=5)
        check_invariant(later, courier, sandbox, timeout_s=WAIT_S)
        alone_s = time.monotonic() - mended_s
    assert cut_off.alive
    assert near.faults() == far.faults() == []
    said = "says nothing" if way == "cut" else "is closed"
    fault = f"the connection of one worker {said} for {cut_s} s"
    guarantee.row(area=AREA, fault=fault, point="another worker is there", outcome="all stored", recovery_s=others_s)
    guarantee.row(
        area=AREA, fault=fault, point="it is there alone, since the mend", outcome="all stored", recovery_s=alone_s
    )


@pytest.mark.slow
def test_a_redis_without_room_refuses_new_jobs_and_does_the_old_ones_when_there_is_room_again(
    house, tmp_path, sandbox, image_server, guarantee
):
    redis = parts.redis(house.processes, name="small")
    crew = crew_on(house, tmp_path, redis, sandbox)
    sandbox.set_fault("msdicom", "*", latency_ms=[20, 200])
    orders = {}
    crew.forgiven.append("OutOfMemoryError")
    with Courier(crew.loaded()) as courier, Redis(host=parts.HOST, port=redis.port) as client:
        worker = crew.start(concurrency=4)
        upload(courier, image_server, orders)
        assert some_ended(courier, orders)
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        picture = Picture.new()
        url = image_server.put("late.dcm", picture.body)
        with pytest.raises(BrokerUnavailable, match="no memory left"):
            courier.upload(url, idempotency_key="late")
        time.sleep(5)
        client.config_set("maxmemory", 0)
        room_s = time.monotonic()
        orders[courier.upload(url, idempotency_key="late")] = picture
        check_invariant(orders, courier, sandbox, timeout_s=WAIT_S)
        took_s = time.monotonic() - room_s
    assert worker.alive
    assert crew.faults() == []
    guarantee.row(
        area=AREA,
        fault="no memory left for 5 s (`noeviction`)",
        point=f"{len(orders)} uploads, since there is room",
        outcome="all stored once; meanwhile programs are told `broker_unavailable` and nothing of theirs is half done",
        recovery_s=took_s,
    )


REFUSALS = {
    "no memory": (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
    "read-only, as in a fail-over": (("REPLICAOF", parts.HOST, "1"), ("REPLICAOF", "NO", "ONE")),
    "no replicas": (("CONFIG", "SET", "min-replicas-to-write", "1"), ("CONFIG", "SET", "min-replicas-to-write", "0")),
}


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["threads", pytest.param("processes", marks=pytest.mark.full)])
@pytest.mark.parametrize("refusal", [*REFUSALS])
def test_a_redis_that_refuses_to_write_for_a_while_ends_no_worker_and_costs_a_plain_client_no_job(
    house, tmp_path, sandbox, image_server, guarantee, refusal, pool
):
    redis = parts.redis(house.processes, name="refusing")
    crew = crew_on(house, tmp_path, redis, sandbox)
    crew.forgiven += ["OutOfMemoryError", "ReadOnlyError", "NOREPLICAS", "ResponseError", "ExecAbortError"]
    sandbox.set_fault("msdicom", "*", latency_ms=[20, 200])
    plain = house.enter_context(Celery(broker=redis.broker_url, backend=redis.result_backend, set_as_current=False))
    refuse, allow = REFUSALS[refusal]
    orders = {}
    with Courier(crew.loaded()) as courier, Redis(host=parts.HOST, port=redis.port) as client:
        worker = crew.start(pool=pool, concurrency=4)
        for _ in range(JOBS):
            picture = Picture.new()
            job = {"image_url": image_server.put(f"{picture.sop}.dcm", picture.body)}
            orders[courier.handle(plain.send_task("pacs.upload", kwargs={"job": job}, queue="pacs").id)] = picture
        assert some_ended(courier, orders)
        client.execute_command(*refuse)
        time.sleep(5)
        client.execute_command(*allow)
        allowed_s = time.monotonic()
        assert poll(lambda: all(handle.status() == "done" for handle in orders), timeout_s=WAIT_S, every_s=0.2)
        check_invariant(orders, courier, sandbox, timeout_s=WAIT_S)
        took_s = time.monotonic() - allowed_s
        assert poll(lambda: client.hlen("pacs.unacked") == 0, timeout_s=WAIT_S), "a message is kept back for hours"
    assert worker.alive
    assert crew.faults() == []
    guarantee.row(
        area=AREA,
        fault=f"refuses to write for 5 s ({refusal})",
        point=f"{JOBS} uploads of a plain client ({pool}), since it writes again",
        outcome="all stored once, and no worker ended",
        recovery_s=took_s,
    )


@pytest.mark.slow
@pytest.mark.full
def test_results_are_told_when_the_redis_that_keeps_them_is_back(
    house, tmp_path, redis, sandbox, image_server, guarantee
):
    results = parts.redis(house.processes, name="results")
    crew = crew_on(house, tmp_path, redis, sandbox, result_backend=results.url(0))
    sandbox.set_fault("msdicom", "*", latency_ms=[20, 200])
    orders = {}
    with Courier(crew.loaded()) as courier:
        worker = crew.start(concurrency=4)
        upload(courier, image_server, orders)
        assert some_ended(courier, orders)
        time.sleep(1.2)
        results.child.kill()
        upload(courier, image_server, orders, count=5)
        time.sleep(12)
        parts.redis(house.processes, name="results", port=results.port)
        back_s = time.monotonic()
        check_invariant(orders, courier, sandbox, timeout_s=WAIT_S)
        took_s = time.monotonic() - back_s
    assert worker.alive
    assert crew.faults() == []
    guarantee.row(
        area=AREA,
        fault="the Redis of the results alone is killed, and back after 12 s",
        point=f"{len(orders)} uploads, since it is back",
        outcome="all stored once, all outcomes told; new jobs are taken all the time",
        recovery_s=took_s,
    )
