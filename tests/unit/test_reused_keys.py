"""An idempotency key whose job failed for a reason that can pass may be used again: it is the same job, begun anew."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

import fakeredis
import pytest

from courier.errors import CourierError, InvalidRequest, PacsUnauthorized, SourceDenied, SourceNotFound, from_payload
from courier.ledger.jobs import PREFIX, REUSABLE, Ledger, job_id_for
from courier.settings import Settings
from worker.jobs.attempt import Attempt, Heartbeat
from worker.jobs.idempotency import outcome_of_first
from worker.jobs.runner import Deferred, Done, Failed, JobResult, execute
from worker.jobs.services import Services

TASK, KEY = "pacs.upload", "order-7"
ID = job_id_for(KEY)


def order(signature: str = "old", **more: Any) -> dict[str, Any]:
    return {"image_url": f"http://host/a.dcm?sig={signature}", "idempotency_key": KEY, **more}


class ReusedKeyBench:
    def __init__(self, client: fakeredis.FakeRedis) -> None:
        self.client, self.ledger = client, Ledger(client)

    def submit(self, *, again: bool = True, **more: Any) -> bool:
        return self.ledger.submit(ID, task=TASK, job=order(**more), again=again)

    def execute(self, ends: object, job_id: str = ID, job: Mapping[str, Any] | None = None) -> JobResult:
        def work(job: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
            if isinstance(ends, CourierError):
                raise ends
            return cast(Any, ends)(job, attempt, services) if callable(ends) else cast(dict[str, Any], ends)

        services = Services(
            settings=Settings.model_validate({"jobs": {"max_deaths": 1}}),
            ledger=self.ledger,
            sources=cast(Any, None),
            fleet=cast(Any, None),
            rng=random.Random(1),
        )
        heartbeat = Heartbeat(self.ledger, lambda *_: None)
        return execute(work, task=TASK, job_id=job_id, message=job or order(), services=services, heartbeat=heartbeat)


@pytest.fixture
def bench() -> Iterator[ReusedKeyBench]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        bench = ReusedKeyBench(client)
        bench.submit()
        yield bench


@pytest.mark.parametrize("error", [SourceNotFound("No."), SourceDenied("No."), PacsUnauthorized("Log in.")])
def test_what_can_pass_is_tried_again_under_the_same_id_with_the_url_as_it_is_signed_now(
    bench: ReusedKeyBench, error: CourierError
) -> None:
    assert isinstance(bench.execute(error), Failed)
    assert not bench.submit(again=False)
    assert bench.submit(signature="new", requested_by="me")
    record = bench.ledger.read_record(ID)
    assert (record["state"], record["attempts"], record["replays"], record["requested_by"]) == (
        "queued",
        "0",
        "1",
        "me",
    )
    assert "sig=new" in str(bench.client.hget(f"{PREFIX}job:{ID}", "job"))
    assert bench.client.ttl(f"{PREFIX}job:{ID}") == -1, "it must not expire before it has ended"
    assert list(bench.ledger.dead_letters()) == []
    assert bench.execute(
        lambda job, run, _: {"url": job["image_url"], "attempt": run.number}, job=order("new")
    ) == Done({"url": "http://host/a.dcm?sig=new", "attempt": 1})
    assert not bench.submit(), "what is done is done"


def test_a_job_that_killed_its_workers_is_tried_again_too(bench: ReusedKeyBench) -> None:
    bench.ledger.take(ID, task=TASK, job=order())
    bench.client.hset(f"{PREFIX}job:{ID}", "lease_ms", 0)
    assert isinstance(bench.execute({}), Failed)
    assert bench.submit()
    assert bench.execute({"ok": 1}) == Done({"ok": 1})


def test_a_dead_letter_that_was_purged_is_tried_again_when_its_key_is_used_again(bench: ReusedKeyBench) -> None:
    bench.execute(PacsUnauthorized("Log in."))
    assert bench.ledger.purge(ID)
    assert not bench.submit(again=False)
    with pytest.raises(InvalidRequest):
        bench.submit(metadata=False)
    assert bench.submit(signature="new")
    assert bench.client.ttl(f"{PREFIX}job:{ID}") == -1, "it must not expire before it has ended"
    assert isinstance(bench.execute(from_payload({"code": "not_dicom", "message": "No."})), Failed)
    assert not bench.submit(), "it has ended otherwise since"


@pytest.mark.parametrize(
    "code", ["not_dicom", "image_already_exists", "study_conflict", "cancelled", "source_too_large"]
)
def test_what_would_end_the_same_way_is_not_tried_again(bench: ReusedKeyBench, code: str) -> None:
    assert code not in REUSABLE
    assert isinstance(bench.execute(from_payload({"code": code, "message": "No."})), Failed)
    assert not bench.submit()
    assert isinstance(bench.execute({}), Failed)


def test_a_job_that_is_still_under_way_is_not_begun_anew(bench: ReusedKeyBench) -> None:
    assert not bench.submit()
    bench.ledger.take(ID, task=TASK, job=order())
    assert not bench.submit()
    assert bench.ledger.read_record(ID)["state"] == "running"


def test_a_key_of_a_failed_job_is_not_given_to_another_order(bench: ReusedKeyBench) -> None:
    bench.execute(SourceDenied("No."))
    with pytest.raises(InvalidRequest):
        bench.submit(metadata=False)
    assert bench.ledger.read_record(ID)["state"] == "done"


def test_a_job_without_a_key_is_never_begun_anew(bench: ReusedKeyBench) -> None:
    job = {"image_url": "http://host/b.dcm"}
    bench.ledger.submit("plain", task=TASK, job=job)
    bench.execute(SourceDenied("No."), "plain", job)
    assert not bench.ledger.submit("plain", task=TASK, job=job, again=True)


def test_a_plain_clients_second_order_has_it_tried_again_once(bench: ReusedKeyBench) -> None:
    work = partial(outcome_of_first, TASK)
    assert isinstance(bench.execute(SourceNotFound("Not yet.")), Failed)
    bench.client.hincrby(f"{PREFIX}job:{ID}", "ended_ms", -1000)
    assert isinstance(bench.execute(work, "second"), Deferred)
    assert bench.ledger.read_record(ID)["state"] == "queued"
    assert isinstance(bench.execute(SourceNotFound("Not yet.")), Failed)
    bench.client.zadd(f"{PREFIX}due", {"second": 0})
    result = bench.execute(work, "second")
    assert isinstance(result, Failed), "or it would go on for ever"
    assert result.error.code == "source_not_found"
