"""Every kind of event that the ledger can write on a trail, as `pacs trace` tells it."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import fakeredis
import pytest

import courier.ledger.jobs
from courier.ledger.jobs import ORDER, Ledger, Receipt, Wait
from courier.settings import Settings
from worker.jobs.attempt import Heartbeat
from worker.jobs.runner import Done, execute
from worker.jobs.services import Services
from worker.jobs.trace import trace
from worker.pacs.fleet import Fleet

TASK, JOB = "pacs.upload", {"image_url": "http://host/a.dcm"}
UID, STUDY = "1.2.3", "1.2"
AWAY = {"error": {"code": "pacs_unavailable", "message": "Away.", "server_name": "a"}}


def claimed(ledger: Ledger, fence: int) -> None:
    ledger.claim_study(STUDY, server="a", job_id="j")


def moved(ledger: Ledger, fence: int) -> None:
    claimed(ledger, fence)
    ledger.move_claim(STUDY, server="b", job_id="j")


def routed(reason: str) -> Callable[[Ledger, int], None]:
    def write(ledger: Ledger, fence: int) -> None:
        decision = {"server": "a", "study_uid": STUDY, "reason": reason, "study_on": [], "candidates": ["a"]}
        ledger.write_intent("j", fence, {"server": "a"}, decision=decision)

    return write


def stored(ledger: Ledger, fence: int) -> None:
    ledger.stored(UID, STUDY, Receipt("j", "a", "00", 1), series_instance_uid=f"{STUDY}.1")


def parked(wait: Wait) -> Callable[[Ledger, int], None]:
    return lambda ledger, fence: ledger.park("j", fence, delay_s=2, code="waiting", message="Later.", wait=wait)


def parked_for(breaker: str) -> Callable[[Ledger, int], None]:
    def write(ledger: Ledger, fence: int) -> None:
        ledger.park_for(breaker, "j", fence, max_wait_s=10, code="pacs_unavailable", message="Away.")

    return write


def ended(outcome: dict[str, Any], code: str) -> Callable[[Ledger, int], None]:
    return lambda ledger, fence: ledger.finish("j", fence, outcome=outcome, code=code, task=TASK, job=JOB)


def dead_lettered(ledger: Ledger, fence: int) -> None:
    ledger.end_as_dead_letter("j", fence, outcome=AWAY, code="pacs_unavailable", task=TASK, job=JOB)


def replayed(ledger: Ledger, fence: int) -> None:
    dead_lettered(ledger, fence)
    ledger.replay("j")


def purged(ledger: Ledger, fence: int) -> None:
    dead_lettered(ledger, fence)
    ledger.purge("j")


#: What is written, which event comes of it last, and what its sentence says.
EVENTS: dict[str, tuple[Callable[[Ledger, int], None], str, str]] = {
    "claimed": (claimed, "claimed", "now belongs to a"),
    "claimed by a move": (moved, "claimed", "now belongs to b"),
    **{f"routed, {reason}": (routed(reason), "routed", reason) for reason in ("new_study", "claimed", "requested")},
    "stored": (stored, "stored", "Stored on a."),
    "waiting for a time": (parked("counts"), "waiting", "Put aside for 2 s"),
    "waiting for a server": (parked_for("a"), "waiting", "until its circuit breaker closes (pacs_unavailable): Away."),
    "waiting for a server's changes": (parked_for("a:changes"), "waiting", "until its circuit breaker closes"),
    "done": (ended({"payload": {"server_name": "a"}}, "done"), "ended", "pacs.upload is done."),
    "refused": (ended(AWAY, "study_conflict"), "ended", "was refused (study_conflict): Away."),
    "refused without a word": (ended({"error": {}}, "cancelled"), "ended", "was refused (cancelled)"),
    "a dead letter": (dead_lettered, "ended", "ended as a dead letter (pacs_unavailable): Away."),
    "replayed": (replayed, "replayed", "queued again"),
    "purged": (purged, "purged", "Dropped"),
}


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield Ledger(client)


def traced(ledger: Ledger, uid: str) -> dict[str, Any]:
    """The answer of `pacs.trace`, which no server has anything to say to."""
    services = Services(
        settings=Settings(), ledger=ledger, sources=cast(Any, None), fleet=Fleet([]), rng=random.Random(1)
    )
    heartbeat = Heartbeat(ledger, lambda *_: None)
    result = execute(
        trace, task="pacs.trace", job_id=f"t{uid}", message={"uid": uid}, services=services, heartbeat=heartbeat
    )
    assert isinstance(result, Done), result
    return result.payload


@pytest.mark.parametrize("kind", EVENTS)
def test_a_trace_tells_every_kind_of_event_in_a_sentence(kind: str, ledger: Ledger) -> None:
    write, event, said = EVENTS[kind]
    job = ledger.take("j", task=TASK, job=JOB)
    ledger.lock_image(UID, job_id="j", fence=job.fence, into=(STUDY, f"{STUDY}.1"))
    write(ledger, job.fence)
    told = [one for uid in (UID, STUDY) if ledger.uid_record(uid).history for one in traced(ledger, uid)["timeline"]]
    assert said in next(one for one in reversed(told) if one["event"] == event)["text"]


def test_the_events_above_are_all_that_the_ledger_writes() -> None:
    written = set(re.findall(r'_event\(\s*"(\w+)"', inspect.getsource(courier.ledger.jobs)))
    assert written == set(ORDER) == {event for _, event, _ in EVENTS.values()}


def test_a_note_of_another_version_that_says_less_does_not_end_the_trace(ledger: Ledger) -> None:
    for event in (*ORDER, "of a later version"):
        ledger.client.rpush(f"{courier.ledger.jobs.PREFIX}trail:{UID}", f'1 {{"event":"{event}","job_id":"j"}}')
    assert [one["event"] for one in traced(ledger, UID)["timeline"]][:2] == ["claimed", "of a later version"]


@pytest.mark.parametrize("job_id", ["order 7", "my order", "order 7 b", " ", "a\nb", "a:b|c", "ä" * 255, "[/b]"])
def test_a_trace_names_jobs_as_they_are_called_whatever_their_ids_hold(job_id: str, ledger: Ledger) -> None:
    job = ledger.take(job_id, task=TASK, job=JOB)
    ledger.lock_image(UID, job_id=job_id, fence=job.fence, into=(STUDY, f"{STUDY}.1"))
    ledger.claim_study(STUDY, server="a", job_id=job_id)
    ledger.stored(UID, STUDY, Receipt(job_id, "a", "00", 1), series_instance_uid=f"{STUDY}.1")
    ledger.copying("b", STUDY, job_id=job_id)
    ledger.copying("c", STUDY, job_id=job_id)
    ledger.copied("c", STUDY, job_id=job_id, images=3)
    ledger.void("a", STUDY, None, None, job_id=job_id)
    for uid in (UID, STUDY):
        told = traced(ledger, uid)
        pushes = {(one["kind"], one["server_name"]): (one["job_id"], one["images"]) for one in told["pushes"]}
        assert pushes == {("upload", "a"): (job_id, None), ("copy", "b"): (job_id, None), ("copy", "c"): (job_id, 3)}
        assert {one["job_id"] for one in told["jobs"]} == {job_id}


def test_two_decisions_of_one_job_in_the_same_millisecond_are_both_told(ledger: Ledger) -> None:
    for server in "aab":
        note = f'1 {{"event":"claimed","job_id":"j","server":"{server}"}}'
        ledger.client.rpush(f"{courier.ledger.jobs.PREFIX}trail:{STUDY}", note)
    assert [one["details"]["server"] for one in traced(ledger, STUDY)["timeline"]] == ["a", "b"]
