"""What follows on a job is sent once, under its id, whichever message ends the job; as Celery would send it."""

from __future__ import annotations

import pytest

from producer import Courier
from sandbox.processes import poll
from tests.canvases import ALL, PRIMITIVES, WAIT_S, Stage, stage

MANY = {"max_attempts": 100}
ONE = {"max_attempts": 1}


def direct(stage: Stage) -> None:
    stage.canvases.send()
    stage.worker()


def parked(stage: Stage) -> None:
    stage.canvases.send()
    stage.sicken()
    stage.worker(jobs=MANY)
    stage.canvases.wait_until_all_are("waiting", "running")
    stage.sandbox.reset_faults()


def delivered_twice(stage: Stage) -> None:
    canvases = stage.canvases
    canvases.send()
    copies = canvases.copies()
    assert len(copies) == len(canvases.jobs)
    canvases.deliver(copies)
    stage.worker()
    canvases.wait_for_all(*ALL)
    canvases.deliver(copies)


def dead_letter(stage: Stage) -> None:
    """And replayed when the servers are well again. Of a chord Celery says that it has failed, for good."""
    canvases = stage.canvases
    canvases.send()
    stage.sicken()
    running = stage.worker(jobs=ONE)
    canvases.wait_until_all_are("dead")
    canvases.wait_for_all("link_error", "failed chord")
    assert set(canvases.calls()) == {"link_error", "failed chord"}
    assert [canvases.results[name].state for name in ("chain", "chord")] == ["FAILURE", "FAILURE"]
    stage.sandbox.reset_faults()
    running.stop(grace_s=15)
    with Courier(stage.settings) as courier:
        assert all(courier.dead.replay(job_id) for job_id in canvases.jobs.values())
        for due in courier.ledger.sweep():  # as a worker does, but all of them at once
            courier.dead.send(due)
    woken = canvases.headers()
    assert (woken["stamps"]["stamps"], woken["stamps"]["stamped_headers"]) == ({"order": "7"}, ["order"])
    group = canvases.results["group"]
    assert (woken["group b"]["group"], woken["group b"]["group_index"]) == (group.id, 1)
    stage.worker()


HAPPENS = {"direct": direct, "parked": parked, "delivered twice": delivered_twice, "dead letter": dead_letter}


@pytest.fixture(scope="module", params=HAPPENS)
def ended(request, redis_server, sandbox_server, tmp_path_factory):
    """What happens, and the canvases after it has happened to them all."""
    with stage(redis_server, sandbox_server, tmp_path_factory.mktemp("stage")) as made:
        HAPPENS[request.param](made)
        made.canvases.wait_for_all(*(tag for tag in ALL if (request.param, tag) != ("dead letter", "chord")))
        yield request.param, made.canvases


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_each_follow_up_is_sent_once_under_its_id(ended, primitive):
    happens, canvases = ended
    if (happens, primitive) == ("dead letter", "chord"):
        assert "chord" not in canvases.calls()
        assert canvases.results["chord"].state == "FAILURE"
    else:
        canvases.check(primitive, most=2 if (happens, primitive) == ("dead letter", "link_error") else 1)


def test_nothing_of_the_follow_ups_is_kept_once_they_are_sent(ended):
    assert poll(lambda: ended[1].kept() == {}, timeout_s=WAIT_S), ended[1].kept()
