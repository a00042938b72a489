"""A worker that lacks threads or memory throws nothing away: it gives back what it took, and ends itself."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from producer import Courier
from sandbox.processes import poll
from tests.chaos.crew import children_of
from tests.chaos.judge import Picture, check_invariant
from worker.runtime.shortage import EXIT_STATUS, MAX_RETURNS

WAIT_S = 90
AREA = "a worker lacks threads or memory"
STARVING = ("-I", "tests.chaos.starving")


def limit(pid: int, megabytes: int) -> None:
    """Of address space: what a container's limits of pids and memory do, without being root."""
    subprocess.run(["prlimit", "--pid", str(pid), f"--as={megabytes * 1024 * 1024}"], check=True)


def megabytes_of(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmSize")) // 1024


def send(courier: Courier, plain: Celery, image_server: Any, *, count: int) -> dict[Any, Picture]:
    """Jobs of a plain client: a message is all there is of each."""
    orders = {}
    for _ in range(count):
        picture = Picture.new()
        url = image_server.put(f"{picture.sop}.dcm", picture.body)
        orders[courier.handle(plain.send_task("pacs.upload", kwargs={"job": {"image_url": url}}).id)] = picture
    return orders


def check_invariant_of_all(orders: dict[Any, Picture], courier: Courier, sandbox: Any) -> None:
    """As `judge`; but a job of a plain client is in the ledger only once a worker has begun it."""
    assert poll(lambda: all(has_ended(handle) for handle in orders), timeout_s=WAIT_S, every_s=0.2)
    check_invariant(orders, courier, sandbox, timeout_s=WAIT_S)


def has_ended(handle: Any) -> bool:
    return handle.status() in ("done", "failed")


def is_empty(redis: Any) -> bool:
    with Redis.from_url(redis.broker_url) as broker:
        return broker.llen("pacs") + broker.hlen("pacs.unacked") == 0


def test_a_worker_that_cannot_start_its_threads_takes_no_message(crew, plain, redis, sandbox, image_server, guarantee):
    poor = crew.start(wait=False)
    limit(poor.pid, 600)
    with Courier(crew.loaded()) as courier:
        orders = send(courier, plain, image_server, count=100)
        assert poll(lambda: not poor.alive, timeout_s=WAIT_S)
        assert poor.stop() == EXIT_STATUS
        assert poor.log.count("This worker gets no more threads, although it has taken no message yet") == 1
        with Redis.from_url(redis.broker_url) as broker:
            assert broker.llen("pacs") == len(orders)
        crew.start()
        check_invariant_of_all(orders, courier, sandbox)
    guarantee.row(area=AREA, fault="no threads at the start", outcome="the worker ends, status 71; all jobs stored")


def test_a_worker_whose_processes_get_no_threads_gives_all_back_and_ends_itself(
    crew, plain, redis, sandbox, image_server, guarantee
):
    poor = crew.start(pool="processes", concurrency=4)
    for pid in (poor.pid, *children_of(poor.pid)):
        limit(pid, megabytes_of(pid) + 40)
    crew.start(concurrency=2)
    with Courier(crew.loaded()) as courier:
        begun_s = time.monotonic()
        orders = send(courier, plain, image_server, count=100)
        check_invariant_of_all(orders, courier, sandbox)
        took_s = time.monotonic() - begun_s
        while poor.alive and time.monotonic() - begun_s < 2 * WAIT_S:  # until some of them have come to it
            orders |= send(courier, plain, image_server, count=2)
            time.sleep(0.3)
        check_invariant_of_all(orders, courier, sandbox)
        assert poor.stop() == EXIT_STATUS
        assert "Threw" not in poor.log
        assert "messages back in a row" in poor.log
        assert poll(lambda: is_empty(redis), timeout_s=WAIT_S)
        assert list(courier.dead.list()) == []
    guarantee.row(
        area=AREA,
        fault="no threads in the middle, beside a healthy worker",
        outcome="the worker ends, status 71; all jobs stored",
        recovery_s=took_s,
    )


@pytest.mark.parametrize(
    ("pool", "where"),
    [
        ("threads", "hand over"),
        ("processes", "begin"),
        pytest.param("threads", "decode", marks=pytest.mark.full),
        pytest.param("threads", "begin", marks=pytest.mark.full),
        pytest.param("processes", "decode", marks=pytest.mark.full),
        pytest.param("processes", "hand over", marks=pytest.mark.full),
    ],
)
def test_a_worker_that_can_begin_nothing_gives_all_back_and_ends_itself(
    crew, plain, redis, sandbox, image_server, pool, where
):
    poor = crew.start(pool=pool, concurrency=2, options=STARVING, environ={"STARVE": where, "STARVE_ALL": "1"})
    with Courier(crew.loaded()) as courier:
        orders = send(courier, plain, image_server, count=10)
        assert poll(lambda: not poor.alive, timeout_s=WAIT_S)
        assert poor.stop() == EXIT_STATUS
        assert "Threw" not in poor.log
        with Redis.from_url(redis.broker_url) as broker:
            assert broker.llen("pacs") == len(orders)
        crew.start()
        check_invariant_of_all(orders, courier, sandbox)


@pytest.mark.parametrize(
    ("pool", "where"),
    [
        ("threads", "attempt"),
        ("processes", "hand over"),
        pytest.param("threads", "decode", marks=pytest.mark.full),
        pytest.param("threads", "hand over", marks=pytest.mark.full),
        pytest.param("processes", "decode", marks=pytest.mark.full),
        pytest.param("processes", "attempt", marks=pytest.mark.full),
    ],
)
def test_a_job_that_starves_while_others_are_done_is_a_dead_letter(
    crew, plain, redis, sandbox, image_server, guarantee, pool, where
):
    running = crew.start(pool=pool, concurrency=2, options=STARVING, environ={"STARVE": where})
    with Courier(crew.loaded()) as courier:
        url = image_server.put("starve.dcm", Picture.new().body)
        starving = courier.handle(plain.send_task("pacs.upload", kwargs={"job": {"image_url": url}}).id)
        begun_s, orders = time.monotonic(), {}
        while not has_ended(starving) and time.monotonic() - begun_s < WAIT_S:
            orders |= send(courier, plain, image_server, count=1)
            time.sleep(0.3)
        took_s = time.monotonic() - begun_s
        error = starving.report().error
        assert error is not None
        assert error.payload["code"] == "poisoned"
        assert f"given back {MAX_RETURNS} times while other jobs were done" in error.message
        (letter,) = courier.dead.list()
        assert (letter.job_id, letter.task) == (starving.id, "pacs.upload")
        check_invariant_of_all(orders, courier, sandbox)
        assert running.alive
        assert poll(lambda: is_empty(redis), timeout_s=WAIT_S)
    guarantee.row(
        area=AREA,
        fault=f"for one job alone ({pool})",
        point=where,
        outcome="dead letter; all others stored",
        recovery_s=took_s,
    )
