"""Workers are killed while studies are deleted and jobs cancelled: each deletion, and no other, has its audit line."""

from __future__ import annotations

import json
import signal
import time

import pytest
from click.testing import CliRunner

from producer import Courier
from producer.cli import main
from producer.errors import Cancelled
from producer.handle import Handle
from sandbox.processes import Child, SandboxPart, poll
from sandbox.synthetic import image, new_uid
from tests.chaos.crew import Crew, send
from tests.chaos.measured import Book
from tests.stow import stow

WAIT_S = 120
AREA = "a revoke"


def audited(*workers: Child) -> list[dict[str, str]]:
    lines = [line for worker in workers for line in worker.log.splitlines() if '"courier.audit"' in line]
    return [json.loads(line)["audit"] for line in lines]


@pytest.mark.slow
def test_each_deletion_has_an_audit_line_though_its_worker_was_killed_and_a_cancelled_one_has_none(
    crew: Crew, sandbox: SandboxPart, guarantee: Book, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 40 if full else 16
    studies = [new_uid() for _ in range(count)]
    for study in studies:
        stow(sandbox.msdicom, image(study, side=8))
    sandbox.set_fault("msdicom", "delete", latency_ms=400)
    how = {"breaker": {"failures": 1000}, "logs": {"format": "json"}}
    first = crew.start(concurrency=2, **how)
    monkeypatch.setenv("PACS_CONFIG", str(crew.settings(**how)))
    with Courier(crew.loaded(**how)) as courier:
        jobs = {courier.delete("study", study, requested_by="r.lee"): study for study in studies}
        assert poll(lambda: len(audited(first)) >= 2, timeout_s=WAIT_S, every_s=0.02)
        waiting = [row.job_id for row in courier.jobs(states=("queued",), limit=1000).rows][: count // 4]
        assert waiting, "no job is left to cancel"
        cancelled_ids = cancelled_by_command(waiting)
        send(first.pid, signal.SIGKILL)
        killed_s = time.monotonic()
        second = crew.start(concurrency=4, **how)
        reports = dict(courier.as_completed(jobs, timeout_s=WAIT_S))
        took_s = time.monotonic() - killed_s
        sandbox.reset_faults()
        there = {study for study in studies if is_there(courier, study)}
    assert len(reports) == count
    cancelled = {jobs[handle] for handle, report in reports.items() if isinstance(report.error, Cancelled)}
    assert {jobs[handle] for handle in jobs if handle.id in cancelled_ids} <= cancelled
    assert there == cancelled, "a cancelled deletion deletes nothing, and any other is done"
    lines = audited(first, second)
    assert {line["study_uid"] for line in lines} == set(studies) - cancelled
    assert {line["requested_by"] for line in lines} == {"r.lee"}
    assert {line["outcome"] for line in lines} <= {"deleted", "not_there"}
    for line in lines:
        assert line["outcome"] == "deleted" or int(line["attempt"]) > 1, "an earlier attempt has deleted it"
    guarantee.row(
        area=AREA,
        fault="the only worker is killed, another one starts",
        point=f"{count} deletions under way or queued, some of them cancelled (`pacs cancel`)",
        outcome="cancelled ones delete nothing; each study that is gone has an audit line, no other has one",
        recovery_s=took_s,
    )


def cancelled_by_command(job_ids: list[str]) -> set[str]:
    """Those of the jobs that `pacs cancel` says it has cancelled."""
    ended = CliRunner().invoke(main, ["cancel", "-", "--json"], input="\n".join(job_ids))
    told = json.loads(ended.stdout)
    return {entry["job_id"] for entry in (told if isinstance(told, list) else [told]) if entry["cancelled"]}


def is_there(courier: Courier, study: str) -> bool:
    handle: Handle = courier.exists("study", study, mode="msdicom")
    return next(report for _, report in courier.as_completed([handle], timeout_s=WAIT_S)).error is None
