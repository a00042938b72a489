"""What follows on a job: once, under its id, whatever message ends the job; as Celery would have it."""

from __future__ import annotations

import pytest

from producer import Courier
from sandbox.processes import Processes
from tests.canvases import ALL, PRIMITIVES, Canvases, Checks, foreign_worker

QUICK = {"lease_s": 2, "grace_s": 2, "sweep_s": 0.2, "backoff_base_s": 0.1, "backoff_cap_s": 0.5}
BREAKER = {"failures": 1000}


@pytest.fixture
def canvases(plain, redis, image_server, sandbox, tmp_path):
    made = Canvases(plain, redis, image_server, sandbox.dcm4chee)
    with Processes(tmp_path / "foreign") as running:
        child = foreign_worker(running, redis)
        yield made
        assert "Traceback" not in child.log
    made.close()


def sick(sandbox):
    for dialect in ("msdicom", "dcm4chee"):
        sandbox.set_mood(dialect, "query", status=503)


def direct(canvases, worker, sandbox):
    canvases.send()
    worker(jobs=QUICK)


def parked(canvases, worker, sandbox):
    canvases.send()
    sick(sandbox)
    worker(jobs={**QUICK, "max_attempts": 100}, breaker=BREAKER)
    canvases.wait_until_all_are("waiting", "running")
    sandbox.calm()


def delivered_twice(canvases, worker, sandbox):
    canvases.send()
    copies = canvases.copies()
    assert len(copies) == len(canvases.jobs)
    canvases.deliver(copies)
    worker(jobs=QUICK)
    canvases.wait_for_all(*ALL)
    canvases.deliver(copies)


def dead_letter(canvases, worker, sandbox):
    canvases.send()
    sick(sandbox)
    running = worker(jobs={**QUICK, "max_attempts": 1}, breaker=BREAKER)
    canvases.wait_until_all_are("dead")
    canvases.wait_for_all("link_error", "failed chord")
    assert set(canvases.calls()) == {"link_error", "failed chord"}
    assert canvases.results["chain"].state == "FAILURE", "what is chained never comes"
    assert canvases.results["chord"].state == "FAILURE"
    sandbox.calm()
    running.stop()
    with Courier(running.settings) as courier:
        assert all(courier.dead.replay(job_id) for job_id in canvases.jobs.values())
    woken = canvases.headers()
    assert (woken["stamps"]["stamps"], woken["stamps"]["stamped_headers"]) == ({"order": "7"}, ["order"])
    group = canvases.results["group"]
    assert (woken["group b"]["group"], woken["group b"]["group_index"]) == (group.id, 1)
    worker(jobs=QUICK)


@pytest.mark.parametrize("happens", [direct, parked, delivered_twice], ids=lambda one: one.__name__)
def test_each_follow_up_is_sent_once_under_its_id(happens, canvases, worker, sandbox):
    happens(canvases, worker, sandbox)
    canvases.wait_for_all(*ALL)
    for primitive in PRIMITIVES:
        Checks(canvases).check(primitive)
    assert canvases.kept() == {}


def test_what_follows_on_a_dead_letter_is_its_errback_and_after_a_replay_the_rest(canvases, worker, sandbox):
    dead_letter(canvases, worker, sandbox)
    replayed = [tag for tag in ALL if tag not in ("chord", "failed chord")]
    canvases.wait_for_all(*replayed)
    for primitive in ("link", "chain", "group", "stamps"):
        Checks(canvases).check(primitive)
    Checks(canvases, most=2).link_error()
    calls = canvases.calls()
    assert len(calls["failed chord"]) == 1
    assert "chord" not in calls, "it has failed, and a replay of its members does not begin it anew"
    kept = canvases.kept()
    assert kept == {}
