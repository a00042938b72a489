"""What `pacs jobs` and `pacs top` read of the ledger: bounded, sorted, filtered, and true to `pacs result`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest

from courier.batches.store import Batches
from courier.ledger.breakers import Breakers
from courier.ledger.jobs import RECENT, Ledger
from courier.ledger.slots import Slots
from courier.overview import JobQuery, JobRow, Overview
from courier.settings import PREFIX, BreakerSettings

UPLOAD = {"version": 1, "image_url": "http://host/a.dcm?sig=secret"}


@pytest.fixture
def client() -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield client


@pytest.fixture
def ledger(client: fakeredis.FakeRedis) -> Ledger:
    return Ledger(client, lease_s=10, grace_s=60)


@pytest.fixture
def overview(ledger: Ledger) -> Overview:
    return Overview(ledger)


def submit(ledger: Ledger, job_id: str, task: str = "pacs.upload", *, ago_s: float = 0, **job: Any) -> None:
    ledger.submit(job_id, task=task, job=job or UPLOAD)
    ledger.client.hset(f"{PREFIX}job:{job_id}", "created_ms", int((time.time() - ago_s) * 1000))


def take(ledger: Ledger, job_id: str, task: str = "pacs.upload", **job: Any) -> int:
    return ledger.take(job_id, task=task, job=job or UPLOAD).fence


def park(ledger: Ledger, job_id: str, *, code: str = "pacs_unavailable", server: str = "msdicom") -> None:
    fence = take(ledger, job_id)
    ledger.park(job_id, fence, delay_s=30, code=code, message="msdicom answered nothing", server_name=server)


def finish(ledger: Ledger, job_id: str, task: str = "pacs.upload", **error: Any) -> None:
    fence = take(ledger, job_id, task)
    outcome: dict[str, Any] = {"error": {"code": "not_found", **error}} if error else {"payload": stored()}
    ledger.finish(job_id, fence, outcome=outcome, code=error.get("code", "done"), task=task, job=UPLOAD)


def stored() -> dict[str, Any]:
    metadata = {"00100010": {"vr": "PN", "Value": [{"Alphabetic": 'DOE^"server_name":"evil"'}]}}
    return {"server_name": "msdicom", "study_uid": "1.2.3", "source": "http://host/a.dcm", "metadata": metadata}


def ids(rows: tuple[JobRow, ...]) -> list[str]:
    return [row.job_id for row in rows]


def test_an_empty_ledger_has_no_jobs(overview: Overview) -> None:
    found = overview.jobs()
    assert (found.rows, found.open_jobs.open, found.open_jobs.complete) == ((), 0, True)


def test_running_jobs_come_first_then_waiting_then_queued_ones_and_the_oldest_of_each(
    ledger: Ledger, overview: Overview
) -> None:
    for job_id, ago_s in (("q-young", 1), ("q-old", 900), ("w-young", 2), ("w-old", 800), ("r-young", 3), ("r-old", 7)):
        submit(ledger, job_id, ago_s=ago_s)
    for job_id in ("w-young", "w-old"):
        park(ledger, job_id)
    for job_id in ("r-young", "r-old"):
        take(ledger, job_id)
    finish(ledger, "ended")
    found = overview.jobs()
    assert ids(found.rows) == ["r-old", "r-young", "w-old", "w-young", "q-old", "q-young", "ended"]
    assert [row.state for row in found.rows] == ["running"] * 2 + ["waiting"] * 2 + ["queued"] * 2 + ["done"]
    assert 899 < found.rows[4].age_s < 910


def test_a_row_says_why_a_job_waits_as_its_result_does(ledger: Ledger, overview: Overview) -> None:
    submit(ledger, "j1")
    park(ledger, "j1")
    row, waiting = overview.jobs().rows[0], ledger.standing(["j1"])["j1"].waiting
    assert waiting is not None
    said = (row.code, row.message, row.servers, row.since, row.next_try)
    told = (waiting["code"], waiting["message"], (waiting["server_name"],), waiting["since"], waiting["next_try"])
    assert said == told


def test_a_job_whose_worker_is_gone_waits_for_another_worker(ledger: Ledger, overview: Overview) -> None:
    submit(ledger, "j1")
    take(ledger, "j1")
    ledger.client.hset(f"{PREFIX}job:j1", "lease_ms", 1)
    found = overview.jobs()
    assert [(row.state, row.code) for row in found.rows] == [("waiting", "worker_lost")]
    assert [(one.state, one.code) for one in found.open_jobs.by_reason] == [("waiting", "worker_lost")]


def test_a_row_has_neither_the_query_of_a_url_nor_what_nobody_knows(ledger: Ledger, overview: Overview) -> None:
    submit(ledger, "j1", image_url="http://user:pass@host/a.dcm?sig=secret", patient="DOE^JANE")
    text = json.dumps(overview.jobs().rows[0].as_json())
    assert "http://host/a.dcm" in text
    assert not any(word in text for word in ("secret", "pass@", "DOE"))


def test_filters_of_studies_are_named_without_their_values(ledger: Ledger, overview: Overview) -> None:
    submit(ledger, "j1", "pacs.list_studies", filters={"PatientName": "DOE*"})
    assert overview.jobs().rows[0].what == "list_studies with PatientName"


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        (JobQuery(states=("running",)), ["running"]),
        (JobQuery(states=("waiting", "queued")), ["waiting", "queued", "delete"]),
        (JobQuery(states=("done",)), ["done"]),
        (JobQuery(states=("failed",)), ["failed"]),
        (JobQuery(states=("dead",)), ["dead"]),
        (JobQuery(kind="delete"), ["delete"]),
        (JobQuery(kind="del"), []),
        (JobQuery(code="pacs_unavailable"), ["waiting"]),
        (JobQuery(code="not_found"), ["failed"]),
        (JobQuery(code="poisoned"), ["dead"]),
        (JobQuery(server="msdicom"), ["waiting", "done"]),
        (JobQuery(server="dcm4chee"), ["delete", "failed"]),
        (JobQuery(server="evil"), []),
        (JobQuery(server="msd"), []),
    ],
)
def test_jobs_are_filtered_by_state_kind_code_and_server(
    ledger: Ledger, overview: Overview, which: JobQuery, expected: list[str]
) -> None:
    for job_id in ("running", "waiting", "queued"):
        submit(ledger, job_id)
    submit(ledger, "delete", "pacs.delete", level="study", uid="1.2", servers=["orthanc", "dcm4chee"])
    take(ledger, "running")
    park(ledger, "waiting")
    finish(ledger, "done")
    finish(ledger, "failed", code="not_found", message="no such study", server_name="dcm4chee")
    fence = take(ledger, "dead")
    error = {"error": {"code": "poisoned", "message": "it kills workers"}}
    ledger.end_as_dead_letter("dead", fence, outcome=error, code="poisoned", task="pacs.upload", job=UPLOAD)
    assert sorted(ids(overview.jobs(which).rows)) == sorted(expected)


def test_jobs_are_filtered_by_when_they_were_enqueued(ledger: Ledger, overview: Overview) -> None:
    for job_id, ago_s in (("new", 5), ("old", 500)):
        submit(ledger, job_id, ago_s=ago_s)
    edge = time.time() - 60
    assert ids(overview.jobs(JobQuery(since_s=edge)).rows) == ["new"]
    assert ids(overview.jobs(JobQuery(before_s=edge)).rows) == ["old"]


def test_a_running_job_is_at_the_server_that_its_checkpoint_names(ledger: Ledger, overview: Overview) -> None:
    submit(ledger, "j1")
    ledger.write_intent("j1", take(ledger, "j1"), {"server": "dcm4chee", "route": {"candidates": ["msdicom"]}})
    assert overview.jobs().rows[0].servers == ("dcm4chee",)
    assert ids(overview.jobs(JobQuery(server="dcm4chee")).rows) == ["j1"]
    assert ids(overview.jobs(JobQuery(server="msdicom")).rows) == []


def test_the_limit_leaves_a_fifth_to_jobs_that_ended(ledger: Ledger, overview: Overview) -> None:
    for number in range(20):
        submit(ledger, f"open-{number}", ago_s=100 - number)
        finish(ledger, f"ended-{number}")
    rows = overview.jobs(limit=10).rows
    assert ids(rows) == [f"open-{number}" for number in range(8)] + ["ended-19", "ended-18"]
    assert overview.jobs(limit=10).open_jobs.count() == 20


def test_of_an_ended_job_stand_its_servers_study_and_source_and_no_metadata(ledger: Ledger, overview: Overview) -> None:
    finish(ledger, "j1")
    row = overview.jobs().rows[0]
    assert (row.what, row.servers, row.state) == ("upload http://host/a.dcm 1.2.3", ("msdicom",), "done")
    assert "DOE" not in json.dumps(row.as_json())


def test_a_replayed_dead_letter_is_an_open_job_once(ledger: Ledger, overview: Overview) -> None:
    submit(ledger, "j1", ago_s=5000)
    outcome = {"error": {"code": "poisoned", "message": "m"}}
    ledger.end_as_dead_letter(
        "j1", take(ledger, "j1"), outcome=outcome, code="poisoned", task="pacs.upload", job=UPLOAD
    )
    ledger.replay("j1")
    rows = overview.jobs().rows
    assert [(row.job_id, row.state) for row in rows] == [("j1", "queued")]
    assert rows[0].age_s < 60


def test_only_the_latest_ended_jobs_are_remembered(ledger: Ledger, overview: Overview) -> None:
    for number in range(RECENT + 5):
        ledger.client.hset(f"{PREFIX}job:{number}", mapping={"fence": 1, "state": "running", "task": "pacs.upload"})
        ledger.finish(str(number), 1, outcome={"payload": {}}, code="done", task="pacs.upload", job=UPLOAD)
    assert ledger.client.llen(f"{PREFIX}recent") == RECENT


def test_a_chunk_of_a_batch_is_shown_with_its_batch_while_it_is_open_and_not_after(
    ledger: Ledger, overview: Overview
) -> None:
    batches = Batches(ledger)
    batches.open("b1", kind="upload", order={}, concurrency=2, name="mammo")
    token = batches.begin_plan("b1")
    batches.plan_chunks("b1", token, {0: "-\t-\thttp://host/a.dcm"})
    batches.freeze("b1", token, items=1, planned={}, servers={})
    batches.take("b1", "b1")
    batches.begin("b1", "apply", job_id="b1", out_of=["planning"])
    batch = batches.get("b1")
    assert batch is not None
    due = batches.fill(batch, "apply")[0]
    row = next(row for row in overview.jobs().rows if row.job_id == due.job_id)
    assert (row.batch_id, row.what, row.kind) == ("b1", "batch.chunk apply 0 b1 mammo", "batch.chunk")
    fence = ledger.take(due.job_id, task=due.task, job=due.job).fence
    ledger.finish(due.job_id, fence, outcome={"payload": {}}, code="done", task=due.task, job=due.job)
    assert due.job_id not in ids(overview.jobs().rows)


def test_many_jobs_that_are_due_at_the_same_moment_are_all_looked_at(ledger: Ledger, overview: Overview) -> None:
    for number in range(1300):
        ledger.client.hset(f"{PREFIX}job:{number:04}", mapping={"state": "queued", "task": "pacs.upload", "job": "{}"})
    ledger.client.zadd(f"{PREFIX}due", {f"{number:04}": 7 for number in range(1250)})
    ledger.client.zadd(f"{PREFIX}due", {f"{number:04}": 8 for number in range(1250, 1300)})
    found = overview.open_jobs()
    assert (found.looked_at, found.count("queued"), found.complete) == (1300, 1300, True)
    assert overview.open_jobs(at_most=1300).complete
    partly = overview.open_jobs(at_most=500)
    assert (partly.complete, partly.open, partly.looked_at) == (False, 1300, 1250)


def test_what_jobs_wait_for_is_counted_by_reason_and_server(ledger: Ledger, overview: Overview) -> None:
    for job_id, code, server in (
        ("a", "pacs_unavailable", "msdicom"),
        ("b", "pacs_unavailable", "msdicom"),
        ("c", "study_busy", ""),
    ):
        submit(ledger, job_id)
        park(ledger, job_id, code=code, server=server)
    submit(ledger, "d")
    waiting = overview.open_jobs().waiting
    assert [(one.code, one.server_name, one.jobs) for one in waiting] == [
        ("pacs_unavailable", "msdicom", 2),
        ("study_busy", "", 1),
    ]


def test_a_server_shows_its_circuit_its_slots_and_the_jobs_that_wait_for_it(
    client: fakeredis.FakeRedis, ledger: Ledger, overview: Overview
) -> None:
    breakers = Breakers(client, BreakerSettings(failures=1))
    breakers.failed("msdicom")
    submit(ledger, "j1")
    fence = take(ledger, "j1")
    ledger.park_for("msdicom", "j1", fence, max_wait_s=60, code="pacs_unavailable", message="m", server_name="msdicom")
    ledger.report_health("w1", "{}", servers=["orthanc"])
    with Slots(client).slot("orthanc", limit=4, wait_s=1):
        found = {one.name: one for one in overview.servers({"msdicom": 8})}
    assert list(found) == ["msdicom", "orthanc"]
    assert (found["msdicom"].circuit.name, found["msdicom"].waiting, found["msdicom"].slots_limit) == ("open", 1, 8)
    assert (found["orthanc"].circuit.name, found["orthanc"].slots_used, found["orthanc"].slots_limit) == (
        "closed",
        1,
        None,
    )


def test_ids_for_completion_are_those_of_open_jobs(ledger: Ledger, overview: Overview) -> None:
    for job_id in ("abc-1", "abd-2", "x-3"):
        submit(ledger, job_id)
    finish(ledger, "abe-4")
    assert sorted(overview.job_ids("ab")) == ["abc-1", "abd-2"]
