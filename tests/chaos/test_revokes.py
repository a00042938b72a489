"""The only worker is killed right after a revoke: what a worker has answered holds, what none has heard does not."""

from __future__ import annotations

import time
import uuid

import pytest

from courier.settings import PREFIX
from producer import Courier
from producer.errors import Cancelled
from sandbox.processes import poll
from sandbox.synthetic import image, new_uid
from tests.stow import stow

WAIT_S = 90
AREA = "a revoke"
BREAKER = {"failures": 1000}


def waiting_deletions(courier, sandbox, count):
    """Deletions that MSDICOM refuses for now, by their handles, with their studies."""
    studies = [new_uid() for _ in range(count)]
    for study in studies:
        stow(sandbox.msdicom, image(study))
    sandbox.set_fault("msdicom", "delete", status=503)
    jobs = {courier.delete("study", study): study for study in studies}
    assert poll(lambda: all(one.status() == "waiting" for one in jobs), timeout_s=WAIT_S)
    return jobs


def outcomes(courier, sandbox, jobs):
    """How many of the jobs were cancelled, and how many done, once each study is there, or gone, as its job says."""
    reports = dict(courier.as_completed(jobs, timeout_s=WAIT_S))
    assert len(reports) == len(jobs)
    cancelled = {handle for handle, report in reports.items() if isinstance(report.error, Cancelled)}
    questions = {handle: courier.exists("study", study, mode="msdicom") for handle, study in jobs.items()}
    there = {handle for handle, one in questions.items() if not one_failed(one)}
    assert there == cancelled, "a deletion that was cancelled deletes nothing, and any other is done"
    client = courier.ledger.client
    left = [key for kind in ("hold", "gate", "storing") for key in client.scan_iter(f"{PREFIX}{kind}:*")]
    assert left == []
    return len(cancelled), len(jobs) - len(cancelled)


def one_failed(handle):
    return next(report for _, report in handle.courier.as_completed([handle])).error is not None


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["threads", pytest.param("processes", marks=pytest.mark.full)])
def test_a_revoke_that_a_worker_has_answered_holds_though_it_is_killed_at_once(
    crew, plain, sandbox, guarantee, full, pool
):
    worker = crew.start(pool=pool, concurrency=4, breaker=BREAKER)
    count = 40 if full else 12
    with Courier(crew.loaded(breaker=BREAKER)) as courier:
        jobs = waiting_deletions(courier, sandbox, count)
        unknown = [str(uuid.uuid4()) for _ in range(5)]
        told = plain.control.revoke([*(job.id for job in jobs), *unknown], reply=True, timeout=20, limit=1)
        worker.kill()
        assert "ok" in str(told)
        sandbox.reset_faults()
        spared = new_uid()
        stow(sandbox.msdicom, image(spared))
        for job_id in unknown:
            plain.send_task("pacs.delete", kwargs={"job": {"level": "study", "uid": spared}}, task_id=job_id)
        killed_s = time.monotonic()
        crew.start(pool=pool, concurrency=4, breaker=BREAKER)
        cancelled, _ = outcomes(courier, sandbox, jobs)
        took_s = time.monotonic() - killed_s
        late = dict(courier.as_completed([courier.handle(job_id) for job_id in unknown], timeout_s=WAIT_S))
        assert courier.exists("study", spared, mode="msdicom").result(timeout_s=WAIT_S)["exists"]
    assert cancelled == count
    assert [type(report.error) for report in late.values()] == [Cancelled] * 5
    guarantee.row(
        area=AREA,
        fault=f"the only worker is killed as soon as it has answered ({pool})",
        point=f"{count} waiting deletions, and 5 ids that are not known yet",
        outcome="all cancelled, nothing deleted",
        recovery_s=took_s,
    )


@pytest.mark.slow
def test_a_revoke_that_is_not_waited_for_may_be_lost_with_the_only_worker_and_no_job_ends_falsely(
    crew, plain, sandbox, guarantee, full
):
    worker = crew.start(concurrency=4, breaker=BREAKER)
    count = 40 if full else 12
    with Courier(crew.loaded(breaker=BREAKER)) as courier:
        jobs = waiting_deletions(courier, sandbox, count)
        for job in jobs:
            plain.control.revoke(job.id)
        worker.kill()
        sandbox.reset_faults()
        killed_s = time.monotonic()
        crew.start(concurrency=4, breaker=BREAKER)
        cancelled, done = outcomes(courier, sandbox, jobs)
        took_s = time.monotonic() - killed_s
    guarantee.row(
        area=AREA,
        fault="the only worker is killed as soon as the last revoke is sent, none answered",
        point=f"{count} waiting deletions, one revoke each",
        outcome=f"{cancelled} heard and cancelled, {done} not heard and done; none of them otherwise",
        recovery_s=took_s,
    )


@pytest.mark.slow
def test_a_cancellation_needs_no_worker(crew, plain, sandbox, guarantee, full):
    worker = crew.start(concurrency=4, breaker=BREAKER)
    count = 40 if full else 12
    with Courier(crew.loaded(breaker=BREAKER)) as courier:
        jobs = waiting_deletions(courier, sandbox, count)
        worker.kill()
        for number, job in enumerate(jobs):
            if number % 2:
                plain.control.revoke(job.id)
            else:
                assert job.cancel()
        sandbox.reset_faults()
        killed_s = time.monotonic()
        crew.start(concurrency=4, breaker=BREAKER)
        cancelled, done = outcomes(courier, sandbox, jobs)
        took_s = time.monotonic() - killed_s
    assert (cancelled, done) == (count // 2, count // 2)
    guarantee.row(
        area=AREA,
        fault="no worker is alive",
        point=f"{count} waiting deletions, half of them revoked, half cancelled (`pacs cancel`)",
        outcome="all cancellations hold; no revoke is heard",
        recovery_s=took_s,
    )
