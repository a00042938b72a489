"""Workers whose ``[[servers]]`` differ, as in a rolling change: no study is split, no image is stored twice."""

from __future__ import annotations

import json
import random
import time

import pytest
from redis import Redis

from courier.ledger.jobs import PREFIX
from courier.waits import SERVER_UNKNOWN
from producer import Courier
from sandbox.processes import poll
from sandbox.synthetic import new_uid
from tests.chaos.judge import Picture, check_invariant, kept, stores

WAIT_S = 120
AREA = "workers that differ in their servers"
STUDIES, IMAGES = 20, 4
#: Which servers each of two workers knows: what a rolling change leaves beside one another for a while.
ROLLOUTS = {
    "a server is taken out": (("msdicom", "dcm4chee"), ("dcm4chee",)),
    "a server is added": (("msdicom",), ("msdicom", "dcm4chee")),
    "the order changes": (("msdicom", "dcm4chee"), ("dcm4chee", "msdicom")),
}


@pytest.fixture
def begin(crew, sandbox):
    known = {server["name"]: server for server in sandbox.servers()}

    def start(names, **more):
        crew.servers = [known[name] for name in names]
        return crew.start(**more)

    return start


def pictures(seed):
    rng = random.Random(seed)
    found = [Picture.new(study, side=16) for study in (new_uid() for _ in range(STUDIES)) for _ in range(IMAGES)]
    rng.shuffle(found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rollout", ROLLOUTS)
@pytest.mark.parametrize("pool", ["threads", pytest.param("processes", marks=pytest.mark.full)])
def test_uploads_of_a_mixed_fleet_split_no_study_and_store_nothing_twice(
    begin, crew, sandbox, image_server, guarantee, seed, rollout, pool
):
    sandbox.set_fault("msdicom", "*", latency_ms=[5, 60])
    sandbox.set_fault("dcm4chee", "*", latency_ms=[5, 60])
    for names in ROLLOUTS[rollout]:
        begin(names, pool=pool)
    with Courier(crew.loaded()) as courier:
        begun_s = time.monotonic()
        orders = {courier.upload(image_server.put(f"{one.sop}.dcm", one.body)): one for one in pictures(seed)}
        check_invariant(orders, courier, sandbox, timeout_s=WAIT_S)
        took_s = time.monotonic() - begun_s
    assert len(kept(sandbox)) == STUDIES * IMAGES
    row(guarantee, rollout, f"{STUDIES * IMAGES} uploads of {STUDIES} studies ({pool})", took_s)


@pytest.mark.slow
@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_a_batch_of_a_mixed_fleet_splits_no_study_and_stores_nothing_twice(
    begin, crew, sandbox, image_server, guarantee, seed, rollout
):
    for names in ROLLOUTS[rollout]:
        begin(names)
    wanted = pictures(seed)
    urls = [image_server.put(f"{one.sop}.dcm", one.body) for one in wanted]
    with Courier(crew.loaded()) as courier:
        begun_s = time.monotonic()
        half = len(urls) // 2
        handles = [courier.batch.upload(some) for some in (urls[:half], urls[half:])]
        for handle in handles:
            assert handle.result(timeout_s=WAIT_S)["totals"] == {"stored": half}
        took_s = time.monotonic() - begun_s
    there = kept(sandbox)
    assert sorted(one.sop for one in there) == sorted(one.sop for one in wanted), "once each"
    assert len({(one.study, one.server) for one in there}) == STUDIES, "no study is split"
    assert [sop for sop, count in stores(sandbox).items() if count > 1] == []
    row(guarantee, rollout, f"two batches of {half} images of the same {STUDIES} studies", took_s)


@pytest.mark.slow
def test_jobs_wait_where_no_worker_knows_all_servers_and_say_so(begin, crew, sandbox, image_server, guarantee, seed):
    for names in (("msdicom",), ("dcm4chee",)):
        begin(names)
    wanted = pictures(seed)[:6]
    with Courier(crew.loaded()) as courier:
        orders = {courier.upload(image_server.put(f"{one.sop}.dcm", one.body)): one for one in wanted}
        asked = courier.exists("study", new_uid())
        named = courier.exists("study", new_uid(), mode="msdicom")
        waiting = [handle.id for handle in (*orders, asked)]
        assert poll(lambda: codes(courier, waiting) == {SERVER_UNKNOWN}, timeout_s=WAIT_S), codes(courier, waiting)
        assert poll(lambda: named.status() == "failed", timeout_s=WAIT_S), "it is about the one server that is named"
        assert kept(sandbox) == []
        log = "".join(child.log for child in crew.processes.children)
        assert "The [[servers]] of workers differ in names, types or URLs" in log
        begun_s = time.monotonic()
        begin(("msdicom", "dcm4chee"))
        check_invariant(orders, courier, sandbox, timeout_s=WAIT_S)
        assert poll(lambda: asked.status() == "failed", timeout_s=WAIT_S)
        took_s = time.monotonic() - begun_s
    assert len(kept(sandbox)) == len(wanted)
    row(guarantee, "no worker knows both servers", f"{len(wanted)} uploads, from the start of one that does", took_s)


@pytest.mark.slow
def test_what_the_only_worker_that_knew_a_server_pushed_when_it_was_killed_is_stored_on_no_other(
    begin, crew, redis, sandbox, image_server, guarantee, seed
):
    """Its server counts for 60 s more. Then the jobs end as dead letters, to be replayed when a worker knows it."""
    only = begin(("msdicom", "dcm4chee"))
    sandbox.set_fault("msdicom", "store", latency_ms=30_000)
    wanted = pictures(seed)[:4]
    urls = [image_server.put(f"{one.sop}.dcm", one.body) for one in wanted]
    with Courier(crew.loaded()) as courier, Redis.from_url(redis.ledger_url, decode_responses=True) as ledger:
        jobs = [courier.upload(url, server="msdicom") for url in urls[:2]]
        batch = courier.batch.upload(urls[2:], server="msdicom")
        pushing = [*(job.id for job in jobs), f"{batch.id}.apply.0"]
        assert poll(lambda: all(is_pushing(ledger, job_id) for job_id in pushing), timeout_s=WAIT_S)
        only.kill()
        sandbox.reset_faults()
        begin(("dcm4chee",))
        assert poll(lambda: [job.status() for job in (*jobs, batch)] == ["failed", "failed", "done"], timeout_s=WAIT_S)
        assert {job.report().error.code for job in jobs} == {"pacs_unavailable"}
        assert batch.result()["totals"] == {"failed": 2}
        begun_s = time.monotonic()
        begin(("msdicom", "dcm4chee"))
        assert all(courier.dead.replay(job.id) for job in jobs)
        again = courier.batch.retry(batch.id)
        assert [job.result(timeout_s=WAIT_S)["server_name"] for job in jobs] == ["msdicom"] * 2
        assert again.result(timeout_s=WAIT_S)["totals"] == {"stored": 2}
        took_s = time.monotonic() - begun_s
    assert sorted((one.server, one.sop) for one in kept(sandbox)) == sorted(("msdicom", one.sop) for one in wanted)
    assert [sop for sop, count in stores(sandbox).items() if count > 1] == []
    fault = "the only worker that knows a server is killed, and begun without that server"
    guarantee.row(
        area=AREA,
        fault=fault,
        point="2 uploads and a batch are being pushed to it",
        outcome="dead letters and failed items; stored once when the server is back and they are tried again",
        recovery_s=took_s,
    )


def is_pushing(ledger, job_id):
    checkpoint = json.loads(ledger.hget(f"{PREFIX}job:{job_id}", "memo") or "{}")
    return any(one.get("uncertain") for one in (checkpoint, *checkpoint.get("kind", {}).get("pushed", {}).values()))


def codes(courier, job_ids):
    return {(report.meta or {}).get("code") for report in courier.reports(job_ids).values()}


def row(guarantee, fault, point, took_s):
    guarantee.row(area=AREA, fault=fault, point=point, outcome="all stored once; no study split", recovery_s=took_s)
