"""What the ledger writes in one step was two before: each half refuses what it refused, and nothing is half done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest
import redis

from courier.errors import Cancelled
from courier.ledger.jobs import (
    NO_INTENT,
    PREFIX,
    IntentState,
    LeaseLost,
    Ledger,
    PushIntent,
    Receipt,
    StoredCheckpoint,
)
from worker.jobs.attempt import Attempt, Heartbeat

STUDY, SERIES = "1.2", "1.2.1"
SOP = {"j1": "1.2.1.1", "j2": "1.2.1.2", "other": "1.2.1.3"}
JOB = {"image_url": "http://host/a.dcm"}


@pytest.fixture
def client() -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield client


@pytest.fixture
def ledger(client: fakeredis.FakeRedis) -> Ledger:
    return Ledger(client, lease_s=10, grace_s=60)


def begun(ledger: Ledger, job_id: str = "j1") -> int:
    fence = ledger.take(job_id, task="pacs.upload", job=JOB).fence
    ledger.lock_image(SOP[job_id], job_id=job_id, fence=fence, into=(STUDY, SERIES))
    return fence


def taken_over(client: fakeredis.FakeRedis, ledger: Ledger, job_id: str = "j1") -> int:
    client.hset(f"{PREFIX}job:{job_id}", "lease_ms", 0)
    return ledger.take(job_id, task="pacs.upload", job=JOB).fence


def intent(fence: int, server: str = "a", **checkpoint: Any) -> PushIntent:
    return PushIntent(fence, {"server": server, **checkpoint}, {"server": server}, server, "00aa")


def memo(ledger: Ledger, job_id: str = "j1") -> str | None:
    return ledger.read_record(job_id).get("memo")


def claim(ledger: Ledger, with_intent: PushIntent | None, server: str = "a", job_id: str = "j1", **more: Any) -> Any:
    return ledger.claim_study(STUDY, server=server, job_id=job_id, among=["a", "b"], intent=with_intent, **more)


# --- the claim of a study, and what is intended -----------------------------------------------------------------------


def test_the_first_claim_of_a_study_writes_down_what_is_about_to_be_pushed(ledger: Ledger) -> None:
    fence = begun(ledger)
    ledger.stored(SOP["j1"], STUDY, Receipt("before", "a", "00", 1))
    made = claim(ledger, intent(fence))
    assert (made.server, made.first, made.intended.state) == ("a", True, IntentState.WRITTEN)
    assert memo(ledger) == '{"server":"a"}'
    assert ledger.receipt(SOP["j1"]) is None, "every server has said that it has none"
    assert [event.event for event in ledger.uid_record(SOP["j1"]).history] == ["stored", "routed"]
    assert [event.event for event in ledger.uid_record(STUDY).history] == ["claimed"]


@pytest.mark.parametrize("asked_for", [False, True])
def test_an_intent_for_one_server_is_not_written_where_another_job_has_claimed_the_study_for_another(
    ledger: Ledger, asked_for: bool
) -> None:
    other = begun(ledger, "other")
    claim(ledger, intent(other, "b"), "b", "other")
    ledger.write_intent("other", other, {"uncertain": True})
    made = claim(ledger, intent(begun(ledger)), asked_for=asked_for)
    assert (made.server, made.first, made.intended) == ("b", False, NO_INTENT)
    assert memo(ledger) is None


@pytest.mark.parametrize(("asked_for", "state"), [(False, IntentState.UNTRIED), (True, IntentState.WRITTEN)])
def test_the_second_claim_for_the_same_server_writes_what_was_asked_for_and_leaves_the_rest_to_its_reason(
    ledger: Ledger, asked_for: bool, state: IntentState
) -> None:
    claim(ledger, intent(begun(ledger, "other")), job_id="other")
    made = claim(ledger, intent(begun(ledger)), asked_for=asked_for)
    assert (made.server, made.first, made.intended.state) == ("a", False, state)
    assert (memo(ledger) is not None) is asked_for


def test_an_attempt_that_was_overtaken_claims_nothing_and_intends_nothing(
    client: fakeredis.FakeRedis, ledger: Ledger
) -> None:
    late = begun(ledger)
    taken_over(client, ledger)
    with pytest.raises(LeaseLost):
        claim(ledger, intent(late))
    with pytest.raises(LeaseLost):
        ledger.intend_push("j1", intent(late))
    assert (ledger.claimed_server(STUDY), memo(ledger), ledger.placed()) == (None, None, {})


def test_a_cancelled_job_claims_nothing_and_intends_nothing(ledger: Ledger) -> None:
    fence = begun(ledger)
    ledger.cancel("j1")
    made = claim(ledger, intent(fence))
    attempt = Attempt("j1", fence, 1, last=False, ledger=ledger)
    assert made.intended.state is IntentState.CANCELLED
    with pytest.raises(Cancelled):
        attempt.intended(intent(fence), made.intended)
    with pytest.raises(Cancelled):
        attempt.intend_push(intent(fence))
    assert (ledger.claimed_server(STUDY), memo(ledger), attempt.noted) == (None, None, None)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_push_to_a_server_that_has_hung_at_this_file_is_not_intended_before_that_is_judged(
    ledger: Ledger, at_once: bool
) -> None:
    fence = begun(ledger)
    ledger.note_hang("a", ["00aa"])
    attempt = Attempt("j1", fence, 1, last=False, ledger=ledger)
    found = claim(ledger, intent(fence)).intended if at_once else attempt.intend_push(intent(fence))
    assert (found.state, found.troubled) == (IntentState.HUNG, True)
    assert (memo(ledger), attempt.noted) == (None, None)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_server_that_has_hung_at_another_file_is_known_to_be_troubled(ledger: Ledger, at_once: bool) -> None:
    fence = begun(ledger)
    ledger.note_hang("a", ["ffff"])
    found = claim(ledger, intent(fence)).intended if at_once else ledger.intend_push("j1", intent(fence))
    assert (found.state, found.troubled) == (IntentState.WRITTEN, True)
    assert memo(ledger) == '{"server":"a"}'


def test_a_server_that_hung_elsewhere_does_not_keep_a_push_to_this_one_waiting(ledger: Ledger) -> None:
    fence = begun(ledger)
    ledger.note_hang("b", ["00aa"])
    found = ledger.intend_push("j1", intent(fence))
    assert (found.state, found.troubled) == (IntentState.WRITTEN, False)


# --- the receipt, and the checkpoint that it is stored ----------------------------------------------------------------


def store(ledger: Ledger, fence: int, job_id: str = "j1") -> bool:
    checkpoint = StoredCheckpoint(fence, {"action": "created"}, {"action": "updated"})
    receipt = Receipt(job_id, "a", "00", 1)
    return ledger.stored(SOP[job_id], STUDY, receipt, series_instance_uid=SERIES, checkpoint=checkpoint)


def test_a_receipt_comes_with_the_checkpoint_that_says_who_opened_the_study(ledger: Ledger) -> None:
    for job_id, action in (("j1", "created"), ("j2", "updated")):
        fence = begun(ledger, job_id)
        claim(ledger, intent(fence), job_id=job_id)
        assert store(ledger, fence, job_id) is (action == "created")
        assert memo(ledger, job_id) == f'{{"action":"{action}"}}'
        assert ledger.receipt(SOP[job_id]) is not None


def test_what_a_late_attempt_has_stored_has_a_receipt_and_leaves_the_next_ones_checkpoint_alone(
    client: fakeredis.FakeRedis, ledger: Ledger
) -> None:
    late = begun(ledger)
    ledger.write_intent("j1", taken_over(client, ledger), {"by": "the next"})
    with pytest.raises(LeaseLost):
        store(ledger, late)
    assert ledger.receipt(SOP["j1"]) is not None
    assert memo(ledger) == '{"by":"the next"}'


def test_it_is_too_late_to_cancel_what_is_stored(ledger: Ledger) -> None:
    fence = begun(ledger)
    ledger.write_intent("j1", fence, {"uncertain": True})
    ledger.cancel("j1")
    store(ledger, fence)
    assert ledger.receipt(SOP["j1"]) is not None
    assert memo(ledger) == '{"uncertain":true}'


# --- whose outcomes are published -------------------------------------------------------------------------------------


def ended(ledger: Ledger, job_id: str, *, dead: bool = False) -> None:
    fence = ledger.take(job_id, task="t", job={"n": job_id}).fence
    end = ledger.end_as_dead_letter if dead else ledger.finish
    end(job_id, fence, outcome={"error": {}} if dead else {"payload": {}}, code="c", task="t", job={"n": job_id})


def due(client: fakeredis.FakeRedis) -> list[Any]:
    return list(client.zrange(f"{PREFIX}due", 0, -1))


def test_the_outcomes_of_many_jobs_are_noted_as_published_in_one_step(
    client: fakeredis.FakeRedis, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeat = Heartbeat(ledger, lambda *_: None)
    for job_id in ("j1", "j2", "j3"):
        ended(ledger, job_id)
    heartbeat.published("j1")
    heartbeat.published("j2")
    assert due(client) == ["j1", "j2", "j3"], "a worker that is killed now leaves the rest to another one"
    calls = []
    published = ledger.published_before
    monkeypatch.setattr(ledger, "published_before", lambda ages: (calls.append(sorted(ages)), published(ages)))
    heartbeat.round(Heartbeat._renew, {})
    heartbeat.round(Heartbeat._renew, {})
    assert (due(client), calls) == (["j3"], [["j1", "j2"]])


def test_an_outcome_that_came_after_another_ones_publication_is_still_to_be_published(
    client: fakeredis.FakeRedis, ledger: Ledger
) -> None:
    heartbeat = Heartbeat(ledger, lambda *_: None)
    ended(ledger, "j1", dead=True)
    heartbeat.published("j1")
    time.sleep(0.01)
    assert ledger.replay("j1")
    heartbeat.note_published()
    assert due(client) == ["j1"], "it is queued again"
    heartbeat.published("j1")
    heartbeat._published["j1"] -= 0.005
    time.sleep(0.01)
    ledger.wake_now("j1")
    ended(ledger, "j1")
    heartbeat.note_published()
    assert due(client) == ["j1"]
    heartbeat.published("j1")
    heartbeat.note_published()
    assert due(client) == []


def test_what_redis_could_not_be_told_is_told_with_a_later_beat(
    client: fakeredis.FakeRedis, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeat = Heartbeat(ledger, lambda *_: None)
    ended(ledger, "j1")
    heartbeat.published("j1")

    def away(ages: Any) -> None:
        raise redis.ConnectionError

    with monkeypatch.context() as while_away:
        while_away.setattr(ledger, "published_before", away)
        heartbeat.round(Heartbeat._renew, {})
    assert due(client) == ["j1"]
    heartbeat.round(Heartbeat._renew, {})
    assert due(client) == []
