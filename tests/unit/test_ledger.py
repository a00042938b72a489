"""The ledger's transitions, on fakeredis (with Lua) for speed; journeys repeat them on a real server."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest

from courier import celery_settings
from courier.errors import InvalidRequest
from courier.ledger.jobs import (
    PREFIX,
    TRAIL_LENGTH,
    LeaseLost,
    Ledger,
    Receipt,
    StoredImage,
    TakeState,
    content_digest,
    job_id_for,
)

TASK = "pacs.upload"
JOB = {"image_url": "http://host/a.dcm"}


@pytest.fixture
def client() -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield client


@pytest.fixture
def ledger(client: fakeredis.FakeRedis) -> Ledger:
    return Ledger(client, lease_s=10, grace_s=60)


def take_job(ledger: Ledger, job_id: str = "j1") -> Any:
    return ledger.take(job_id, task=TASK, job=JOB)


def finish(ledger: Ledger, fence: int, job_id: str = "j1", **payload: Any) -> None:
    ledger.finish(job_id, fence, outcome={"payload": payload}, code="done", task=TASK, job=JOB)


def expire_lease(client: fakeredis.FakeRedis, job_id: str = "j1") -> None:
    client.hset(f"{PREFIX}job:{job_id}", "lease_ms", 0)
    client.zadd(f"{PREFIX}due", {job_id: 0})


def test_the_same_id_is_submitted_once(ledger: Ledger) -> None:
    assert ledger.submit("j1", task=TASK, job=JOB)
    assert not ledger.submit("j1", task=TASK, job=JOB)


def test_an_idempotency_key_is_not_given_to_another_order_whoever_was_first_to_bear_it(ledger: Ledger) -> None:
    job = {**JOB, "idempotency_key": "order-7"}
    ledger.submit("submitted", task=TASK, job=job)
    ledger.take("claimed", task=TASK, job=job)
    for job_id in ("submitted", "claimed"):
        assert not ledger.submit(job_id, task=TASK, job=job)
        with pytest.raises(InvalidRequest, match=job_id):
            ledger.submit(job_id, task="pacs.delete", job=job)
        with pytest.raises(InvalidRequest, match=job_id):
            ledger.submit(job_id, task=TASK, job={**job, "metadata": False})


def test_a_job_nobody_submitted_gets_its_record_at_the_first_claim(ledger: Ledger) -> None:
    assert take_job(ledger).state is TakeState.YOURS
    assert ledger.read_record("j1")["state"] == "running"


def test_a_second_delivery_while_the_lease_lives_is_held(ledger: Ledger) -> None:
    take_job(ledger)
    assert take_job(ledger).state is TakeState.HELD


def test_a_delivery_after_the_end_gives_the_recorded_outcome(ledger: Ledger) -> None:
    finish(ledger, take_job(ledger).fence, status="stored")
    again = take_job(ledger)
    assert (again.state, again.outcome) == (TakeState.DONE, {"payload": {"status": "stored"}})


def test_a_dead_holder_is_replaced_and_counted_and_its_late_finish_refused(
    ledger: Ledger, client: fakeredis.FakeRedis
) -> None:
    first = take_job(ledger)
    expire_lease(client)
    second = take_job(ledger)
    assert (second.state, second.attempt, second.crash_count) == (TakeState.YOURS, 2, 1)
    with pytest.raises(LeaseLost):
        finish(ledger, first.fence)
    assert not ledger.heartbeat("j1", first.fence)
    finish(ledger, second.fence, by="second")
    assert take_job(ledger).outcome == {"payload": {"by": "second"}}


def test_deaths_are_counted_by_content_and_not_by_id(ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    take_job(ledger, "j1")
    expire_lease(client, "j1")
    assert take_job(ledger, "j1").crash_count == 1
    assert take_job(ledger, "j2").crash_count == 1
    expire_lease(client, "j2")
    assert take_job(ledger, "j2").crash_count == 2


def test_jobs_of_one_content_that_die_with_one_worker_are_one_death(client: fakeredis.FakeRedis) -> None:
    here, there = Ledger(client, worker="here"), Ledger(client, worker="there")
    names = ("j1", "j2", "j3")
    for name in names:
        assert take_job(here, name).state is TakeState.YOURS
    for name in names:
        expire_lease(client, name)
    assert [take_job(there, name).crash_count for name in names] == [1, 1, 1]
    for name in names:
        expire_lease(client, name)
    assert [take_job(here, name).crash_count for name in names] == [2, 2, 2]


def test_each_worker_that_dies_on_a_content_at_one_time_is_a_death(client: fakeredis.FakeRedis) -> None:
    for name in ("w1", "w2", "w3"):
        take_job(Ledger(client, worker=name), name)
    for name in ("w1", "w2", "w3"):
        expire_lease(client, name)
    assert [take_job(Ledger(client, worker="w4"), name).crash_count for name in ("w1", "w2", "w3")] == [1, 2, 3]


def test_deaths_are_counted_on_after_another_job_of_the_content_has_ended_well(
    ledger: Ledger, client: fakeredis.FakeRedis
) -> None:
    for _ in range(2):
        take_job(ledger, "killer")
        expire_lease(client, "killer")
    assert take_job(ledger, "killer").crash_count == 2
    finish(ledger, take_job(ledger, "lucky").fence, "lucky")
    counts = []
    for _ in range(4):
        expire_lease(client, "killer")
        counts.append(take_job(ledger, "killer").crash_count)
    assert counts == [1, 2, 3, 4]


def test_a_finished_job_keeps_no_message_and_a_dead_one_does(ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    finish(ledger, take_job(ledger).fence)
    assert client.hget(f"{PREFIX}job:j1", "job") is None
    dead = take_job(ledger, "j2")
    ledger.end_as_dead_letter("j2", dead.fence, outcome={"error": {}}, code="poisoned", task=TASK, job=JOB)
    assert client.hget(f"{PREFIX}job:j2", "job") is not None
    assert client.zscore(f"{PREFIX}dead", "j2") is not None
    assert "job" not in ledger.read_record("j2")


def test_an_outcome_that_nobody_was_told_waits_no_longer_than_a_lease(client: fakeredis.FakeRedis) -> None:
    for lease_s, grace_s, due_s in ((10, 60, 10), (60, 10, 10)):
        ledger = Ledger(client, lease_s=lease_s, grace_s=grace_s)
        finish(ledger, take_job(ledger, f"j{lease_s}").fence, f"j{lease_s}")
        due = client.zscore(f"{PREFIX}due", f"j{lease_s}")
        assert due is not None
        assert due / 1000 - ledger.clock_s() == pytest.approx(due_s, abs=1)


def test_the_record_of_an_ended_job_outlives_every_message_that_may_still_come(client: fakeredis.FakeRedis) -> None:
    ledger = Ledger(client, keep_s=60)
    finish(ledger, take_job(ledger).fence)
    visibility_s = celery_settings.broker_transport_options["visibility_timeout"]
    assert isinstance(visibility_s, int)
    assert client.ttl(f"{PREFIX}job:j1") > 2 * visibility_s


def empty(tasks: set[str]) -> dict[str, tuple[str, int]]:
    """Nothing waits in the queues of these tasks: what was in them is lost."""
    return dict.fromkeys(tasks, ("q", 0))


def test_a_message_that_is_known_to_be_lost_does_not_wait_its_turn_to_be_sent_again(
    ledger: Ledger, client: fakeredis.FakeRedis
) -> None:
    for name in ("lost", "taken"):
        ledger.submit(name, task=TASK, job=JOB)
        for _ in range(5):
            client.zadd(f"{PREFIX}due", {name: 0})
            ledger.sweep(queues=empty)
    assert ledger.dispatched() == {}, "it may be in the hands of a worker"
    client.zadd(f"{PREFIX}unanswered", dict.fromkeys(("lost", "taken"), 0))
    assert take_job(ledger, "taken").state is TakeState.YOURS
    assert ledger.dispatched() == {"lost": TASK}
    assert ledger.sweep(queues=empty) == [], "for a long time yet, or a long queue would grow by itself"
    ledger.requeue_lost(["lost", "taken"])
    assert [job.job_id for job in ledger.sweep(queues=empty)] == ["lost"]
    assert ledger.dispatched() == {}


def test_the_age_of_a_queue_is_that_of_the_oldest_message_that_no_worker_has_taken(
    ledger: Ledger, client: fakeredis.FakeRedis
) -> None:
    assert ledger.oldest_message_s() == 0
    now_ms = ledger.clock_s() * 1000
    for name, age_s in (("old", 600), ("new", 60)):
        ledger.submit(name, task=TASK, job=JOB)
        client.zadd(f"{PREFIX}unanswered", {name: now_ms - age_s * 1000})
    assert ledger.oldest_message_s() == pytest.approx(600, abs=5)
    assert take_job(ledger, "old").state is TakeState.YOURS
    assert ledger.oldest_message_s() == pytest.approx(60, abs=5)
    client.zadd(f"{PREFIX}unanswered", {"new": now_ms + 5000})
    assert ledger.oldest_message_s() == 0, "no age is below none"


def take_last(ledger: Ledger, name: str) -> Any:
    """Take a job that may have three deaths, with content of its own."""
    return ledger.take(name, task=TASK, job={"image_url": name}, max_deaths=3)


def test_jobs_that_may_not_have_another_death_take_turns_in_a_worker(
    ledger: Ledger, client: fakeredis.FakeRedis
) -> None:
    take = functools.partial(take_last, ledger)
    for _ in range(2):
        for name in ("killer", "neighbour"):
            assert take(name).state is TakeState.YOURS
            expire_lease(client, name)
    killer = take("killer")
    assert (killer.state, killer.crash_count) == (TakeState.YOURS, 2)
    assert take("neighbour").state is TakeState.EARLY, "or both would be blamed for the next death"
    assert take("another job").state is TakeState.YOURS
    assert ledger.read_record("neighbour")["deaths"] == "2"
    expire_lease(client, "killer")
    assert take("killer").crash_count == 3
    client.hset(f"{PREFIX}job:killer", "state", "dead")
    client.zadd(f"{PREFIX}due", {"neighbour": 0})
    ledger.sweep()
    neighbour = take("neighbour")
    assert (neighbour.state, neighbour.crash_count) == (TakeState.YOURS, 2), "waiting for a turn is no death"


def test_a_job_on_its_last_death_is_at_work_beside_none_that_a_worker_has_died_on(
    ledger: Ledger, client: fakeredis.FakeRedis
) -> None:
    take = functools.partial(take_last, ledger)
    for names in (("innocent", "killer"), ("innocent",)):
        for name in names:
            assert take(name).state is TakeState.YOURS
        for name in names:
            expire_lease(client, name)
    killer = take("killer")
    assert (killer.state, killer.crash_count) == (TakeState.YOURS, 1)
    assert take("innocent").state is TakeState.EARLY, "or it would be buried for what the other does"
    assert take("not suspected").state is TakeState.YOURS
    ledger.park("killer", killer.fence, delay_s=0, code="waiting", message="…")
    for name in ("killer", "innocent"):
        client.zadd(f"{PREFIX}due", {name: 0})
    assert take("innocent").state is TakeState.YOURS
    assert take("killer").state is TakeState.EARLY
    expire_lease(client, "innocent")
    assert take("innocent").crash_count == 3, "this one was its own"


def test_workers_that_die_apart_take_such_jobs_at_the_same_time(client: fakeredis.FakeRedis) -> None:
    here, there = Ledger(client, worker="here"), Ledger(client, worker="there")
    for name in ("one", "other"):
        for _ in range(2):
            take_last(here, name)
            expire_lease(client, name)
    assert take_last(here, "one").state is TakeState.YOURS
    assert take_last(here, "other").state is TakeState.EARLY
    client.zadd(f"{PREFIX}due", {"other": 0})
    assert take_last(there, "other").state is TakeState.YOURS


def test_the_content_of_a_killer_is_known_under_every_id(ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    for _ in range(3):
        take_job(ledger, "killer")
        expire_lease(client, "killer")
    assert take_job(ledger, "killer").crash_count == 3
    assert take_job(ledger, "another id").crash_count == 3, "it need not kill once more to be known"


def test_an_outcome_is_brought_again_until_it_is_told(ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    finish(ledger, take_job(ledger).fence, status="stored")
    assert ledger.sweep() == []
    client.zadd(f"{PREFIX}due", {"j1": 0})
    assert [(due.job_id, due.task, due.job) for due in ledger.sweep()] == [("j1", TASK, {})]
    assert take_job(ledger).outcome == {"payload": {"status": "stored"}}
    ledger.published("j1")
    assert client.zscore(f"{PREFIX}due", "j1") is None


def test_a_job_that_has_not_ended_stays_due_whatever_was_told_of_it(
    ledger: Ledger, client: fakeredis.FakeRedis
) -> None:
    ledger.submit("j1", task=TASK, job=JOB)
    ledger.published("j1")
    assert client.zscore(f"{PREFIX}due", "j1") is not None


def test_a_dead_letter_keeps_its_memo_so_that_a_replay_can_tell_what_is_ours(ledger: Ledger) -> None:
    fence = take_job(ledger).fence
    ledger.write_intent("j1", fence, {"server": "msdicom"})
    ledger.end_as_dead_letter("j1", fence, outcome={"error": {}}, code="pacs_unavailable", task=TASK, job=JOB)
    assert "memo" in ledger.read_record("j1")


def test_a_parked_job_is_not_claimed_before_it_is_due_and_is_woken_once(
    ledger: Ledger, client: fakeredis.FakeRedis
) -> None:
    ledger.park("j1", take_job(ledger).fence, delay_s=30, code="pacs_unavailable", message="…")
    assert take_job(ledger).state is TakeState.EARLY
    assert ledger.sweep() == []
    client.zadd(f"{PREFIX}due", {"j1": 0})
    assert [(due.job_id, due.task, due.job) for due in ledger.sweep()] == [("j1", TASK, JOB)]
    assert ledger.sweep() == []
    woken = take_job(ledger)
    assert (woken.state, woken.attempt, woken.crash_count) == (TakeState.YOURS, 2, 0)


def test_waiting_for_a_turn_costs_no_attempt(ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    ledger.park("j1", take_job(ledger).fence, delay_s=0, code="waiting", message="…", wait="growing")
    ledger.sweep()
    assert take_job(ledger).attempt == 1


def test_who_waits_for_long_looks_ever_more_rarely(ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    waits = []
    for _ in range(7):
        ledger.park("j1", take_job(ledger).fence, delay_s=1, code="waiting", message="…", wait="growing")
        seconds, microseconds = client.time()
        score = client.zscore(f"{PREFIX}due", "j1")
        assert score is not None
        waits.append(round(score / 1000 - seconds - microseconds / 1e6))
        client.zadd(f"{PREFIX}due", {"j1": 0})
        ledger.sweep()
    assert waits == [1, 2, 4, 8, 8, 8, 8]


def test_a_message_that_got_lost_is_sent_again_ever_more_rarely(ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    ledger.submit("j1", task=TASK, job=JOB)
    waits = []
    for _ in range(3):
        client.zadd(f"{PREFIX}due", {"j1": 0})
        seconds, microseconds = client.time()
        assert [due.job_id for due in ledger.sweep(queues=empty)] == ["j1"]
        score = client.zscore(f"{PREFIX}due", "j1")
        assert score is not None
        waits.append(score / 1000 - seconds - microseconds / 1e6)
    assert waits == [pytest.approx(60, abs=2), pytest.approx(120, abs=2), pytest.approx(240, abs=2)]


def test_one_job_at_a_time_may_store_an_image(ledger: Ledger) -> None:
    first, second = take_job(ledger, "j1"), take_job(ledger, "j2")
    assert ledger.lock_image("1.2.3", job_id="j1", fence=first.fence) is None
    assert ledger.lock_image("1.2.3", job_id="j1", fence=first.fence) is None
    assert ledger.lock_image("1.2.3", job_id="j2", fence=second.fence) == "j1"
    finish(ledger, first.fence)
    assert ledger.lock_image("1.2.3", job_id="j2", fence=second.fence) is None


def test_a_job_whose_source_gives_another_image_gives_up_the_one_it_held(ledger: Ledger) -> None:
    first, second = take_job(ledger, "j1"), take_job(ledger, "j2")
    for uid, study in (("1.2.3", "1.2"), ("1.4.3", "1.4")):
        assert ledger.lock_image(uid, job_id="j1", fence=first.fence, into=(study,)) is None
    assert ledger.lock_image("1.2.3", job_id="j2", fence=second.fence) is None
    assert ledger.lock_image("1.4.3", job_id="j2", fence=second.fence) == "j1"
    assert (ledger.uid_record("1.2").writers, ledger.uid_record("1.4").writers) == ([], ["j1"])


def test_a_late_holder_cannot_hold_an_image_or_announce_a_push(ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    late = take_job(ledger)
    expire_lease(client)
    take_job(ledger)
    with pytest.raises(LeaseLost):
        ledger.lock_image("1.2.3", job_id="j1", fence=late.fence)
    with pytest.raises(LeaseLost):
        ledger.write_intent("j1", late.fence, {"server": "msdicom"})


def test_the_memo_of_one_attempt_reaches_the_next(ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    assert ledger.write_intent("j1", take_job(ledger).fence, {"server": "msdicom"})
    expire_lease(client)
    assert take_job(ledger).checkpoint == {"server": "msdicom"}


def test_the_first_claim_of_a_study_decides_for_all(ledger: Ledger) -> None:
    assert ledger.claim_study("1.2", server="msdicom", job_id="j1").first
    follower = ledger.claim_study("1.2", server="dcm4chee", job_id="j2")
    assert (follower.server, follower.first) == ("msdicom", False)
    assert ledger.placed() == {"msdicom": 1}
    ledger.forget_study("1.2")
    assert ledger.claim_study("1.2", server="dcm4chee", job_id="j2").first


def at_an_image(ledger: Ledger, job_id: str, study: str = "1.2") -> int:
    fence = take_job(ledger, job_id).fence
    assert ledger.lock_image(f"{study}.{job_id}", job_id=job_id, fence=fence, into=(study,)) is None
    return fence


def claim_server(ledger: Ledger, job_id: str, server: str) -> str:
    return ledger.claim_study("1.2", server=server, job_id=job_id, asked_for=True).server


def test_what_was_stored_since_a_job_asked_the_servers_keeps_its_claim_from_it(ledger: Ledger) -> None:
    first, late = at_an_image(ledger, "j1"), at_an_image(ledger, "j2")
    assert ledger.claim_study("1.2", server="a", job_id="j1").first
    ledger.stored("1.2.j1", "1.2", Receipt("j1", "a", "aa", 1))
    finish(ledger, first)
    assert claim_server(ledger, "j2", "b") == "a"
    assert ledger.lock_image("1.2.j2", job_id="j2", fence=late, into=("1.2",)) is None  # and asks them again
    assert claim_server(ledger, "j2", "b") == "b"
    assert ledger.placed() == {"a": 0, "b": 1}


def test_of_two_servers_that_are_asked_for_the_first_one_holds_until_its_job_has_ended(ledger: Ledger) -> None:
    first, _ = at_an_image(ledger, "j1"), at_an_image(ledger, "j2")
    assert claim_server(ledger, "j1", "a") == "a"
    assert claim_server(ledger, "j2", "b") == "a"
    finish(ledger, first)
    assert ledger.claimed_server("1.2") is None
    assert claim_server(ledger, "j2", "b") == "b"


def test_a_batch_gives_up_the_claims_of_the_studies_that_it_lets_go_of_and_keeps_the_others(ledger: Ledger) -> None:
    fence = take_job(ledger, "c1").fence
    studies = ["1.1", "1.2", "1.3"]
    ledger.lock_images([(f"{study}.9", study, f"{study}.1") for study in studies], job_id="c1", fence=fence)
    for study in studies:
        ledger.claim_study(study, server="a", job_id="c1", in_history=False)
    ledger.stored_many("a", [StoredImage("1.1.9", "1.1", "1.1.1", "aa", 1)], job_id="c1")
    ledger.release_images(job_id="c1", fence=fence, but=["1.3.9"], following=["1.3"])
    assert [ledger.claimed_server(study) for study in studies] == ["a", None, "a"]
    assert ledger.placed() == {"a": 2}
    finish(ledger, fence, "c1")
    assert ledger.claimed_server("1.3") == "a", "it may still arrive"


def test_a_study_that_never_was_stored_is_not_counted_any_more_when_its_claim_is_forgotten(ledger: Ledger) -> None:
    for study in ("1.1", "1.2"):
        ledger.claim_study(study, server="a", job_id="j1")
    ledger.stored("1.2.3", "1.2", Receipt("j1", "a", "aa", 1))
    assert ledger.forget_study("1.1")
    assert ledger.forget_study("1.2")
    assert ledger.placed() == {"a": 1}


def test_exactly_one_job_opened_a_claimed_study_however_often_it_says_so(ledger: Ledger) -> None:
    ledger.claim_study("1.2", server="msdicom", job_id="j1")
    second = Receipt("j2", "msdicom", "aa", 1)
    assert ledger.stored("1.2.3", "1.2", second)
    assert not ledger.stored("1.2.4", "1.2", Receipt("j1", "msdicom", "bb", 1))
    assert ledger.stored("1.2.3", "1.2", second)
    assert ledger.receipt("1.2.3") == second
    assert ledger.receipt("9") is None


def test_a_cancelled_job_says_so_at_its_next_claim_and_before_its_push(ledger: Ledger) -> None:
    assert ledger.cancel("j1") == ""
    fence = take_job(ledger).fence
    assert ledger.cancel("j1") == "running"
    assert not ledger.write_intent("j1", fence, {})
    ledger.submit("j2", task=TASK, job=JOB)
    assert ledger.cancel("j2") == "queued"
    assert [due.job_id for due in ledger.sweep()] == ["j2"]
    assert take_job(ledger, "j2").cancelled


def test_an_idempotency_key_names_one_job_and_no_key_names_a_new_one() -> None:
    assert job_id_for("order-7") == job_id_for("order-7")
    assert job_id_for(None) != job_id_for(None)
    assert content_digest(TASK, {**JOB, "idempotency_key": "x"}) == content_digest(TASK, JOB)


def test_a_study_is_not_deleted_while_it_is_stored_into_nor_stored_into_while_it_is_deleted(ledger: Ledger) -> None:
    upload, late, delete = take_job(ledger, "j1"), take_job(ledger, "j2"), take_job(ledger, "j3")
    into = ("1.2", "1.2.1")
    assert ledger.lock_image("1.2.1.1", job_id="j1", fence=upload.fence, into=into) is None
    assert ledger.lock_for_delete("1.2", job_id="j3", fence=delete.fence) == "j1"
    assert ledger.lock_image("1.2.1.2", job_id="j2", fence=late.fence, into=into) == "j3"
    assert ledger.lock_image("1.2.1.1", job_id="j1", fence=upload.fence, into=into) is None  # it was there first
    assert not ledger.forget_study("1.2")
    finish(ledger, upload.fence)
    assert ledger.lock_for_delete("1.2", job_id="j3", fence=delete.fence) is None
    assert ledger.forget_study("1.2")
    ledger.release("j3", fence=delete.fence)
    assert ledger.lock_image("1.2.1.2", job_id="j2", fence=late.fence, into=into) is None
    assert ledger.lock_for_delete("1.2.1", job_id="j3", fence=delete.fence) == "j2"


def test_many_images_are_held_in_one_step_and_what_is_anothers_is_left_to_it(ledger: Ledger) -> None:
    single, batch, other = take_job(ledger, "j1"), take_job(ledger, "b1"), take_job(ledger, "b2")
    images = [(f"1.2.1.{number}", "1.2", "1.2.1") for number in range(3)]
    assert ledger.lock_image("1.2.1.1", job_id="j1", fence=single.fence, into=("1.2", "1.2.1")) is None
    assert ledger.lock_images(images, job_id="b1", fence=batch.fence) == [None, "j1", None]
    assert ledger.lock_images(images, job_id="b1", fence=batch.fence) == [None, "j1", None]
    assert ledger.lock_images(images, job_id="b2", fence=other.fence) == ["b1", "j1", "b1"]
    late = take_job(ledger, "j2")
    assert ledger.lock_image("1.2.1.0", job_id="j2", fence=late.fence) == "b1"
    assert ledger.uid_record("1.2.1").writers == ["b1", "j1"]
    ledger.release_images(job_id="b1", fence=batch.fence, but=["1.2.1.2"])
    assert ledger.lock_images(images, job_id="b2", fence=other.fence) == [None, "j1", "b1"]
    assert ledger.uid_record("1.2").writers == ["b1", "b2", "j1"]  # one of them may still arrive there
    ledger.release_images(job_id="b1", fence=batch.fence)
    assert ledger.lock_images(images[2:], job_id="b2", fence=other.fence) == [None]
    finish(ledger, single.fence)
    finish(ledger, other.fence, "b2")
    assert (ledger.uid_record("1.2").writers, ledger.uid_record("1.2.1").writers) == ([], [])
    assert ledger.lock_images(images, job_id="b1", fence=batch.fence) == [None, None, None]
    assert ledger.lock_images([], job_id="b1", fence=batch.fence) == []


def test_many_images_are_not_stored_into_what_is_being_deleted_unless_they_came_first(ledger: Ledger) -> None:
    batch, delete = take_job(ledger, "b1"), take_job(ledger, "j3")
    first, second = ("1.2.1.1", "1.2", "1.2.1"), ("1.2.1.2", "1.2", "1.2.1")
    assert ledger.lock_images([first], job_id="b1", fence=batch.fence) == [None]
    assert ledger.lock_for_delete("1.2.1", job_id="j3", fence=delete.fence) == "b1"
    assert ledger.lock_images([first, second], job_id="b1", fence=batch.fence) == [None, "j3"]
    ledger.release_images(job_id="b1", fence=batch.fence)
    assert ledger.lock_for_delete("1.2.1", job_id="j3", fence=delete.fence) is None
    assert ledger.lock_images([first], job_id="b1", fence=batch.fence) == ["j3"]


def test_a_late_holder_holds_no_images_and_lets_none_go(ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    late = take_job(ledger, "b1")
    expire_lease(client, "b1")
    again = take_job(ledger, "b1")
    other = take_job(ledger, "b2")
    image = ("1.2.1.1", "1.2", "1.2.1")
    with pytest.raises(LeaseLost):
        ledger.lock_images([image], job_id="b1", fence=late.fence)
    assert ledger.lock_images([image], job_id="b1", fence=again.fence) == [None]
    ledger.release_images(job_id="b1", fence=late.fence)
    assert ledger.lock_images([image], job_id="b2", fence=other.fence) == ["b1"]


def test_a_late_holder_opens_no_study_that_the_next_attempt_is_deleting(
    ledger: Ledger, client: fakeredis.FakeRedis
) -> None:
    late = take_job(ledger, "j3")
    assert ledger.lock_for_delete("1.2", job_id="j3", fence=late.fence) is None
    expire_lease(client, "j3")
    again, upload = take_job(ledger, "j3"), take_job(ledger, "j1")
    assert ledger.lock_for_delete("1.2", job_id="j3", fence=again.fence) is None
    ledger.release("j3", fence=late.fence)
    assert ledger.lock_image("1.2.1.1", job_id="j1", fence=upload.fence, into=("1.2",)) == "j3"
    ledger.release("j3", fence=again.fence)
    assert ledger.lock_image("1.2.1.1", job_id="j1", fence=upload.fence, into=("1.2",)) is None


def events(ledger: Ledger, uid: str) -> list[tuple[str, str]]:
    return [(event.event, event.job_id) for event in ledger.uid_record(uid).history]


def test_the_history_of_an_image_tells_its_way_and_that_of_its_study_who_claimed_it(ledger: Ledger) -> None:
    job = take_job(ledger)
    ledger.lock_image("1.3", job_id="j1", fence=job.fence, into=("1.2", "1.2.1"))
    ledger.claim_study("1.2", server="a", job_id="j1")
    ledger.write_intent("j1", job.fence, {"memo": 1}, decision={"server": "a", "reason": "new_study"})
    ledger.write_intent("j1", job.fence, {"memo": 2})
    ledger.stored("1.3", "1.2", Receipt("j1", "a", "f00", 7))
    finish(ledger, job.fence, server_name="a", metadata={"00100010": "secret"})
    record = ledger.uid_record("1.3")
    assert [event.event for event in record.history] == ["routed", "stored", "ended"]
    assert record.history[0].details == {"server": "a", "reason": "new_study"}
    assert record.history[-1].details == {"code": "done", "task": TASK, "server_name": "a"}
    assert record.history[0].at_ms <= record.history[-1].at_ms
    assert (record.receipt["server"], record.holder) == ("a", None)
    assert events(ledger, "1.2") == [("claimed", "j1")]
    assert ledger.uid_record("1.2").claim["opened_by"] == "j1"
    assert events(ledger, "1.2.1") == []


def test_trouble_is_told_on_the_trails_of_the_image_and_of_what_it_goes_into(
    ledger: Ledger, client: fakeredis.FakeRedis
) -> None:
    job = take_job(ledger)
    ledger.lock_image("1.3", job_id="j1", fence=job.fence, into=("1.2",))
    assert (ledger.uid_record("1.3").holder, ledger.uid_record("1.2").writers) == ("j1", ["j1"])
    ledger.park("j1", job.fence, delay_s=2.04, code="pacs_unavailable", message="silence")
    client.zadd(f"{PREFIX}due", {"j1": 0})
    ledger.sweep()
    again = take_job(ledger)
    ledger.end_as_dead_letter(
        "j1", again.fence, outcome={"error": {"message": "why"}}, code="poisoned", task=TASK, job=JOB
    )
    for uid in ("1.3", "1.2"):
        waiting, ended = ledger.uid_record(uid).history
        assert waiting.details == {"code": "pacs_unavailable", "message": "silence", "delay_s": 2.0}
        assert ended.details == {"code": "poisoned", "task": TASK, "dead": True, "message": "why"}


def test_taking_turns_leaves_no_trail_and_a_refused_holder_no_note(ledger: Ledger) -> None:
    job = take_job(ledger)
    ledger.lock_image("1.3", job_id="j1", fence=job.fence)
    ledger.park("j1", job.fence, delay_s=0, code="waiting", message="…", wait="growing")
    with pytest.raises(LeaseLost):
        finish(ledger, job.fence)
    assert events(ledger, "1.3") == []


def test_a_history_is_short_and_goes_by_itself(ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    job = take_job(ledger)
    ledger.lock_image("1.3", job_id="j1", fence=job.fence)
    for number in range(TRAIL_LENGTH + 5):
        ledger.write_intent("j1", job.fence, {}, decision={"number": number})
    history = ledger.uid_record("1.3").history
    assert [event.details["number"] for event in history] == list(range(5, TRAIL_LENGTH + 5))
    assert 0 < client.pttl(f"{PREFIX}trail:1.3") <= 86_400_000


# --- dead letters -------------------------------------------------------------------------------------------------


def dead_letter(ledger: Ledger, job_id: str, code: str = "pacs_unavailable", **job: Any) -> None:
    job = {**JOB, **job}
    fence = ledger.take(job_id, task=TASK, job=job).fence
    outcome = {"error": {"code": code, "message": "It is away.", "details": {}}}
    ledger.end_as_dead_letter(job_id, fence, outcome=outcome, code=code, task=TASK, job=job)


def died(client: fakeredis.FakeRedis, **at_s: float) -> None:
    client.zadd(f"{PREFIX}dead", {job_id: at * 1000 for job_id, at in at_s.items()})


def test_dead_letters_are_listed_by_code_and_time_the_latest_first(ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    for job_id, code in (("j1", "poisoned"), ("j2", "pacs_unavailable"), ("j3", "poisoned")):
        dead_letter(ledger, job_id, code)
    died(client, j1=100, j2=200, j3=300)

    def ids(**order: Any) -> list[str]:
        return [letter.job_id for letter in ledger.dead_letters(**order)]

    assert ids() == ["j3", "j2", "j1"]
    assert ids(code="poisoned") == ["j3", "j1"]
    assert ids(since_s=200) == ["j3", "j2"]
    assert ids(before_s=200) == ["j1"]
    assert ids(since_s=150, before_s=250, code="poisoned") == []


def test_more_dead_letters_than_a_page_are_all_listed(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("courier.ledger.jobs.PAGE", 2)
    for number in range(5):
        dead_letter(ledger, f"j{number}")
    assert {letter.job_id for letter in ledger.dead_letters()} == {f"j{number}" for number in range(5)}


@pytest.mark.parametrize("apart_s", [0, 1])
def test_no_dead_letter_is_passed_over_when_letters_go_while_they_are_listed(
    ledger: Ledger, client: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch, apart_s: int
) -> None:
    monkeypatch.setattr("courier.ledger.jobs.PAGE", 2)
    for number in range(9):
        dead_letter(ledger, f"j{number}")
    died(client, **{f"j{number}": 100 + number // 4 * apart_s for number in range(9)})
    purged = [letter.job_id for letter in ledger.dead_letters() if ledger.purge(letter.job_id)]
    assert sorted(purged) == [f"j{number}" for number in range(9)]
    assert list(ledger.dead_letters()) == []


def test_a_dead_letter_shows_what_it_was_about_and_no_credential(ledger: Ledger) -> None:
    dead_letter(ledger, "j1", image_url="http://me:word@host/a.dcm?sig=word")
    letter = ledger.dead_letter("j1")
    assert letter is not None
    assert (letter.task, letter.code, letter.message, letter.attempts) == (TASK, "pacs_unavailable", "It is away.", 1)
    assert "http://host/a.dcm" in letter.about
    assert "word" not in repr(letter)
    assert ledger.dead_letter("j2") is None


def test_a_replay_queues_the_job_with_its_memo_and_a_clean_count(ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    take_job(ledger)
    expire_lease(client)
    second = take_job(ledger)
    ledger.lock_image("1.2", job_id="j1", fence=second.fence, into=("1", "1.1"))
    ledger.write_intent("j1", second.fence, {"server": "msdicom"})
    ledger.end_as_dead_letter(
        "j1", second.fence, outcome={"error": {"code": "poisoned"}}, code="poisoned", task=TASK, job=JOB
    )
    letter = ledger.dead_letter("j1")
    assert letter is not None
    assert (letter.crash_count, letter.attempts, letter.begun, letter.uids) == (1, 2, True, ["1.2", "1", "1.1"])
    due = ledger.replay("j1")
    assert due is not None
    assert (due.job_id, due.task, due.job) == ("j1", TASK, JOB)
    assert ledger.dead_letter("j1") is None
    assert list(ledger.dead_letters()) == []
    assert client.zscore(f"{PREFIX}due", "j1") is not None
    assert [event.event for event in ledger.uid_record("1.2").history] == ["ended", "replayed"]
    again = take_job(ledger)
    assert (again.state, again.attempt, again.crash_count, again.checkpoint) == (
        TakeState.YOURS,
        1,
        0,
        {"server": "msdicom"},
    )
    expire_lease(client)
    assert take_job(ledger).crash_count == 1, "its deaths are counted anew"


def test_a_replayed_job_holds_nothing_from_its_former_life(ledger: Ledger) -> None:
    first = take_job(ledger)
    ledger.lock_image("1.2", job_id="j1", fence=first.fence, into=("1", "1.1"))
    ledger.end_as_dead_letter(
        "j1", first.fence, outcome={"error": {"code": "poisoned"}}, code="poisoned", task=TASK, job=JOB
    )
    deleter = take_job(ledger, "j2")
    assert ledger.lock_for_delete("1", job_id="j2", fence=deleter.fence) is None
    ledger.replay("j1")
    again = take_job(ledger)
    assert ledger.lock_image("1.2", job_id="j1", fence=again.fence, into=("1", "1.1")) == "j2"


def test_only_a_dead_letter_is_replayed_and_only_once(ledger: Ledger) -> None:
    assert ledger.replay("j0") is None
    running = take_job(ledger)
    assert ledger.replay("j1") is None
    finish(ledger, running.fence)
    assert ledger.replay("j1") is None
    dead_letter(ledger, "j2")
    assert ledger.replay("j2") is not None
    assert ledger.replay("j2") is None


def test_a_purged_letter_is_gone_and_a_late_message_does_not_begin_it_anew(
    ledger: Ledger, client: fakeredis.FakeRedis
) -> None:
    dead_letter(ledger, "j1")
    assert ledger.purge("j1")
    assert (ledger.dead_letter("j1"), list(ledger.dead_letters()), ledger.replay("j1")) == (None, [], None)
    assert not ledger.purge("j1")
    assert client.hget(f"{PREFIX}job:j1", "job") is None
    assert client.pttl(f"{PREFIX}job:j1") > 0
    late = take_job(ledger)
    assert (late.state, late.outcome["error"]["code"]) == (TakeState.DONE, "pacs_unavailable")


def test_the_events_of_a_dead_letter_are_its_own_each_once_and_in_order(ledger: Ledger) -> None:
    first = take_job(ledger)
    ledger.lock_image("1.2", job_id="j1", fence=first.fence, into=("1", "1.1"))
    ledger.claim_study("1", server="msdicom", job_id="j0")
    ledger.write_intent("j1", first.fence, {"server": "msdicom"}, decision={"server": "msdicom"})
    ledger.park("j1", first.fence, delay_s=0, code="pacs_unavailable", message="Away.")
    ledger.sweep()
    outcome = {"error": {"code": "pacs_unavailable", "message": "Away."}}
    ledger.end_as_dead_letter(
        "j1", take_job(ledger).fence, outcome=outcome, code="pacs_unavailable", task=TASK, job=JOB
    )
    letter = ledger.dead_letter("j1")
    assert letter is not None
    assert [event.event for event in ledger.events_of(letter)] == ["routed", "waiting", "ended"]


# --- receipts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("series", "image"), [(None, None), ("1.2.1", None), ("1.2.1", "1.2.1.1")])
def test_what_is_deleted_voids_the_receipts_below_it_on_its_server_and_no_later_ones(
    ledger: Ledger, series: str | None, image: str | None
) -> None:
    def push(server: str) -> None:
        ledger.stored("1.2.1.1", "1.2", Receipt("j1", server, "aa", 1), series_instance_uid="1.2.1")

    push("a")
    ledger.void("b", "1.2", series, image, job_id="d1")
    ledger.void("a", "1.3", series and "1.3.1", image and "1.3.1.1", job_id="d1")
    assert ledger.receipt("1.2.1.1") is not None
    ledger.void("a", "1.2", series, image, job_id="d2")
    assert ledger.receipt("1.2.1.1") is None
    voided = ledger.uid_record("1.2.1.1").voided
    assert voided is not None
    assert (voided.how, voided.job_id) == ("deleted", "d2")
    push("a")
    assert ledger.receipt("1.2.1.1") == Receipt("j1", "a", "aa", 1)


def test_the_deletion_of_a_series_leaves_the_receipts_of_its_neighbour(ledger: Ledger) -> None:
    for series in ("1.2.1", "1.2.2"):
        ledger.stored(f"{series}.9", "1.2", Receipt("j1", "a", "aa", 1), series_instance_uid=series)
    ledger.void("a", "1.2", "1.2.1", None, job_id="d")
    assert (ledger.receipt("1.2.1.9"), ledger.receipt("1.2.2.9")) == (None, Receipt("j1", "a", "aa", 1))


def test_what_no_job_has_pushed_leaves_nothing_when_it_is_deleted(ledger: Ledger, client: fakeredis.FakeRedis) -> None:
    for series, image in ((None, None), ("1.2.1", None), ("1.2.1", "1.2.1.1")):
        ledger.void("a", "1.2", series, image, job_id="d")
    assert client.keys("*") == []


def test_a_batch_renews_the_receipt_of_an_image_and_leaves_none_for_a_new_one(ledger: Ledger) -> None:
    ledger.stored("1.2.1.1", "1.2", Receipt("j1", "a", "aa", 1), series_instance_uid="1.2.1")
    ledger.void("a", "1.2", None, None, job_id="d")
    images = [StoredImage(f"1.2.1.{number}", "1.2", "1.2.1", "bb", 2) for number in (1, 2)]
    ledger.stored_many("b", images, job_id="B.apply.0")
    assert ledger.receipt("1.2.1.1") == Receipt("B.apply.0", "b", "bb", 2)
    assert ledger.receipt("1.2.1.2") is None
    pushes = {push.server: (push.kind, push.job_id, push.voided is None) for push in ledger.uid_record("1.2").pushes}
    assert pushes == {"a": ("upload", "j1", False), "b": ("upload", "B.apply.0", True)}


def test_receipts_go_with_the_results_and_what_voids_them_not_before(
    ledger: Ledger, client: fakeredis.FakeRedis
) -> None:
    ledger.stored("1.2.1.1", "1.2", Receipt("j1", "a", "aa", 1), series_instance_uid="1.2.1")
    client.pexpire(f"{PREFIX}pushes:1.2", 1000)
    ledger.void("a", "1.2", None, None, job_id="d")
    ledger.copied("b", "1.2", job_id="B", images=3)
    receipt, pushes = (client.pexpiretime(f"{PREFIX}{key}") for key in ("receipt:1.2.1.1", "pushes:1.2"))
    assert receipt <= pushes
    assert client.pttl(f"{PREFIX}pushes:1.2") <= ledger.keep_ms
