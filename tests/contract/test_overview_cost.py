"""What `pacs jobs` asks of a real Redis: few commands, and none that takes long, however many jobs are open."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Connection

from courier.ledger.jobs import Ledger
from courier.overview import LOOKED_AT, JobQuery, Overview
from courier.settings import PREFIX
from producer.cli import completion
from sandbox.processes import RedisPart

JOBS = 20_000


@pytest.fixture(scope="module")
def ledger(redis_server: RedisPart) -> Iterator[Ledger]:
    """A ledger with 20,000 open jobs, of which every hundredth waits for a server."""
    redis_server.flush()
    ledger = Ledger.connect(redis_server.ledger_url)
    now_ms = int(time.time() * 1000)
    with ledger.client.pipeline(transaction=False) as pipe:
        for number in range(JOBS):
            job_id, waits = f"job-{number:05}", number % 100 == 0
            record = {"state": "waiting" if waits else "queued", "task": "pacs.upload", "attempts": 0}
            record |= {"job": '{"image_url":"http://host/a.dcm"}', "created_ms": now_ms - number}
            record |= {"code": "pacs_unavailable", "server": "msdicom", "message": "m"} if waits else {}
            pipe.hset(f"{PREFIX}job:{job_id}", mapping={name: str(value) for name, value in record.items()})
            pipe.zadd(f"{PREFIX}due", {job_id: now_ms + number % 7000})
            if number % 2000 == 0:
                pipe.execute()
        pipe.execute()
    yield ledger
    ledger.close()
    redis_server.flush()


def test_a_list_of_twenty_thousand_jobs_takes_few_requests_and_tells_what_was_looked_at(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, send = [], Connection.send_packed_command

    def counted(connection: Connection, command: Any, check_health: bool = True) -> None:
        sent.append(command)
        send(connection, command, check_health)  # type: ignore[no-untyped-call]

    overview = Overview(ledger)
    overview.jobs()  # loads the scripts
    monkeypatch.setattr(Connection, "send_packed_command", counted)
    found = overview.jobs()
    steps = found.open_jobs.looked_at / 500
    assert len(sent) < steps + 10
    assert LOOKED_AT <= found.open_jobs.looked_at < LOOKED_AT + 10  # jobs that are due together are looked at together
    assert (found.open_jobs.open, found.open_jobs.complete) == (JOBS, False)
    assert [row.state for row in found.rows] == ["waiting"] * 50


def test_a_filter_looks_at_all_of_twenty_thousand_jobs(ledger: Ledger) -> None:
    found = Overview(ledger).jobs(JobQuery(code="pacs_unavailable", server="msdicom"), limit=1000)
    assert (len(found.rows), found.open_jobs.looked_at, found.open_jobs.complete) == (JOBS // 100, JOBS, True)
    assert [row.age_s for row in found.rows] == sorted((row.age_s for row in found.rows), reverse=True)


def test_no_step_of_a_list_keeps_redis_from_others_for_long(ledger: Ledger) -> None:
    ledger.client.config_set("slowlog-log-slower-than", 0)
    ledger.client.slowlog_reset()
    try:
        Overview(ledger).jobs(JobQuery(server="msdicom"))
        slowest_us = max(entry["duration"] for entry in ledger.client.slowlog_get(200))
    finally:
        ledger.client.config_set("slowlog-log-slower-than", 10_000)
    assert slowest_us < 200_000  # measured: 3,000


def test_the_shell_is_offered_ids_of_open_jobs_and_batches(
    ledger: Ledger, redis_server: RedisPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEDGER_URL", redis_server.ledger_url)
    ledger.client.hset(f"{PREFIX}job:job-00000", "state", "done")  # its outcome is not published yet
    ledger.client.zadd(f"{PREFIX}batches", {"batch-1": 1, "batch-2": 2, "batch\n3": 3})
    offered = completion.LOOKED_UP["job"]("job-000")
    assert offered
    assert all(job_id.startswith("job-000") for job_id in offered)
    assert "job-00000" not in offered
    assert completion.LOOKED_UP["batch"]("batch") == ["batch-2", "batch-1"]
