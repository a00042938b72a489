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
from worker.jobs.attempt import Pulse, Run
from worker.jobs.idempotency import follow
from worker.jobs.runner import Done, Failed, Parked, Verdict, carry
from worker.jobs.services import Tools

TASK, KEY = "pacs.upload", "order-7"
ID = job_id_for(KEY)


def wish(signature: str = "old", **more: Any) -> dict[str, Any]:
    return {"image_url": f"http://host/a.dcm?sig={signature}", "idempotency_key": KEY, **more}


class Desk:
    def __init__(self, client: fakeredis.FakeRedis) -> None:
        self.client, self.ledger = client, Ledger(client)

    def submit(self, *, again: bool = True, **more: Any) -> bool:
        return self.ledger.submit(ID, task=TASK, job=wish(**more), again=again)

    def carry(self, ends: object, job_id: str = ID, job: Mapping[str, Any] | None = None) -> Verdict:
        def work(job: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
            if isinstance(ends, CourierError):
                raise ends
            return cast(Any, ends)(job, run, tools) if callable(ends) else cast(dict[str, Any], ends)

        tools = Tools(
            settings=Settings.model_validate({"jobs": {"max_deaths": 1}}),
            ledger=self.ledger,
            sources=cast(Any, None),
            fleet=cast(Any, None),
            rng=random.Random(1),
        )
        pulse = Pulse(self.ledger, lambda *_: None)
        return carry(work, task=TASK, job_id=job_id, message=job or wish(), tools=tools, pulse=pulse)


@pytest.fixture
def desk() -> Iterator[Desk]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        desk = Desk(client)
        desk.submit()
        yield desk


@pytest.mark.parametrize("error", [SourceNotFound("No."), SourceDenied("No."), PacsUnauthorized("Log in.")])
def test_what_can_pass_is_tried_again_under_the_same_id_with_the_url_as_it_is_signed_now(
    desk: Desk, error: CourierError
) -> None:
    assert isinstance(desk.carry(error), Failed)
    assert not desk.submit(again=False)
    assert desk.submit(signature="new", requested_by="me")
    record = desk.ledger.look(ID)
    assert (record["state"], record["attempts"], record["replays"], record["requested_by"]) == (
        "queued",
        "0",
        "1",
        "me",
    )
    assert "sig=new" in str(desk.client.hget(f"{PREFIX}job:{ID}", "job"))
    assert desk.client.ttl(f"{PREFIX}job:{ID}") == -1, "it must not expire before it has ended"
    assert list(desk.ledger.dead_letters()) == []
    assert desk.carry(lambda job, run, _: {"url": job["image_url"], "attempt": run.attempt}, job=wish("new")) == Done(
        {"url": "http://host/a.dcm?sig=new", "attempt": 1}
    )
    assert not desk.submit(), "what is done is done"


def test_a_job_that_killed_its_workers_is_tried_again_too(desk: Desk) -> None:
    desk.ledger.claim(ID, task=TASK, job=wish())
    desk.client.hset(f"{PREFIX}job:{ID}", "lease_ms", 0)
    assert isinstance(desk.carry({}), Failed)
    assert desk.submit()
    assert desk.carry({"ok": 1}) == Done({"ok": 1})


def test_a_dead_letter_that_was_purged_is_tried_again_when_its_key_is_used_again(desk: Desk) -> None:
    desk.carry(PacsUnauthorized("Log in."))
    assert desk.ledger.purge(ID)
    assert not desk.submit(again=False)
    with pytest.raises(InvalidRequest):
        desk.submit(metadata=False)
    assert desk.submit(signature="new")
    assert desk.client.ttl(f"{PREFIX}job:{ID}") == -1, "it must not expire before it has ended"
    assert isinstance(desk.carry(from_payload({"code": "not_dicom", "message": "No."})), Failed)
    assert not desk.submit(), "it has ended otherwise since"


@pytest.mark.parametrize(
    "code", ["not_dicom", "image_already_exists", "study_conflict", "cancelled", "source_too_large"]
)
def test_what_would_end_the_same_way_is_not_tried_again(desk: Desk, code: str) -> None:
    assert code not in REUSABLE
    assert isinstance(desk.carry(from_payload({"code": code, "message": "No."})), Failed)
    assert not desk.submit()
    assert isinstance(desk.carry({}), Failed)


def test_a_job_that_is_still_under_way_is_not_begun_anew(desk: Desk) -> None:
    assert not desk.submit()
    desk.ledger.claim(ID, task=TASK, job=wish())
    assert not desk.submit()
    assert desk.ledger.look(ID)["state"] == "running"


def test_a_key_of_a_failed_job_is_not_given_to_another_wish(desk: Desk) -> None:
    desk.carry(SourceDenied("No."))
    with pytest.raises(InvalidRequest):
        desk.submit(metadata=False)
    assert desk.ledger.look(ID)["state"] == "done"


def test_a_job_without_a_key_is_never_begun_anew(desk: Desk) -> None:
    job = {"image_url": "http://host/b.dcm"}
    desk.ledger.submit("plain", task=TASK, job=job)
    desk.carry(SourceDenied("No."), "plain", job)
    assert not desk.ledger.submit("plain", task=TASK, job=job, again=True)


def test_a_plain_clients_second_wish_has_it_tried_again_once(desk: Desk) -> None:
    work = partial(follow, TASK)
    assert isinstance(desk.carry(SourceNotFound("Not yet.")), Failed)
    desk.client.hincrby(f"{PREFIX}job:{ID}", "ended_ms", -1000)
    assert isinstance(desk.carry(work, "second"), Parked)
    assert desk.ledger.look(ID)["state"] == "queued"
    assert isinstance(desk.carry(SourceNotFound("Not yet.")), Failed)
    desk.client.zadd(f"{PREFIX}due", {"second": 0})
    verdict = desk.carry(work, "second")
    assert isinstance(verdict, Failed), "or it would go on for ever"
    assert verdict.error.code == "source_not_found"
