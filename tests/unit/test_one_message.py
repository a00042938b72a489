"""A job whose message waits in its queue gets no second one, and a lost message is sent again all the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
from celery.worker import state
from kombu.utils.limits import TokenBucket

from courier.ledger.jobs import IN_HAND, PREFIX, DueJob, Ledger, TakeState
from worker.runtime import celery_internals

TASK, JOB = "pacs.upload", {"image_url": "http://host/a.dcm"}


class Queue:
    """A broker's queue, and the sweeper of one worker; its clock stands still but for what a test makes due."""

    def __init__(self, client: fakeredis.FakeRedis) -> None:
        self.client = client
        self.ledger = Ledger(client, grace_s=60)
        self.messages: deque[str] = deque()
        self.sent: list[str] = []
        self.settle_s = 0.0

    def submit(self, *job_ids: str) -> None:
        for job_id in job_ids:
            assert self.ledger.submit(job_id, task=TASK, job=JOB)
            self.messages.append(job_id)

    def make_due(self) -> None:
        for job_id in self.client.zrange(f"{PREFIX}due", 0, -1):
            self.client.zadd(f"{PREFIX}due", {job_id: 0})

    def sweep(self) -> list[str]:
        """What is sent when everything is due."""
        self.make_due()
        woken: list[DueJob] = self.ledger.sweep(
            queues=lambda tasks: dict.fromkeys(tasks, ("q", len(self.messages))), settle_s=self.settle_s
        )
        ids = [job.job_id for job in woken]
        self.messages.extend(ids)
        self.sent += ids
        return ids

    def take(self) -> TakeState:
        """A worker takes the first message, and ends its job."""
        job_id = self.messages.popleft()
        taken = self.ledger.take(job_id, task=TASK, job=JOB, queue="q")
        if taken.state is TakeState.YOURS:
            self.ledger.finish(job_id, taken.fence, outcome={"payload": {}}, code="done", task=TASK, job=JOB)
        self.ledger.published(job_id)
        return taken.state


@pytest.fixture
def queue() -> Iterator[Queue]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield Queue(client)


def names(count: int, name: str = "j") -> list[str]:
    return [f"{name}{number}" for number in range(count)]


def test_a_long_queue_gets_no_second_message_however_often_its_jobs_are_due(queue: Queue) -> None:
    queue.submit(*names(40))
    while queue.messages:
        for _ in range(3):
            assert queue.sweep() == []
        assert queue.take() is TakeState.YOURS


def test_a_queue_that_grows_faster_than_it_is_taken_from_gets_none_either(queue: Queue) -> None:
    for number in range(60):
        queue.submit(*names(3, f"{number}-"))
        assert queue.sweep() == []
        assert queue.take() is TakeState.YOURS


def test_a_queue_that_nobody_reads_gets_none(queue: Queue) -> None:
    queue.submit(*names(5))
    assert [queue.sweep() for _ in range(20)] == [[]] * 20


def test_all_messages_of_a_broker_that_was_emptied_are_sent_again_once(queue: Queue) -> None:
    queue.submit(*names(10))
    assert queue.sweep() == []
    queue.messages.clear()
    assert sorted(queue.sweep()) == names(10)
    assert queue.sweep() == []
    assert [queue.take() for _ in range(10)] == [TakeState.YOURS] * 10


def test_a_message_that_is_lost_from_a_queue_that_never_runs_empty_is_sent_when_those_before_it_were_taken(
    queue: Queue,
) -> None:
    queue.submit(*names(5), "lost", *names(5, "k"))
    queue.messages.remove("lost")
    assert queue.sweep() == []
    for number in range(IN_HAND + 20):
        queue.submit(f"later{number}")
        queue.take()
        if queue.sweep():
            break
    assert queue.sent == ["lost"]
    assert number > IN_HAND


def test_an_empty_queue_is_looked_at_twice_because_a_worker_may_just_have_taken_the_message(queue: Queue) -> None:
    queue.settle_s = 30
    queue.submit("j")
    queue.messages.clear()
    assert queue.sweep() == []
    assert queue.sweep() == [], "not half a minute later"
    queue.client.hincrby(f"{PREFIX}job:j", "empty_ms", -31_000)
    assert queue.sweep() == ["j"]


def test_messages_in_the_hands_of_a_worker_are_not_sent_again_until_it_says_no_more_that_it_has_them(
    queue: Queue,
) -> None:
    queue.submit("limited")
    queue.messages.clear()
    for _ in range(3):
        queue.make_due()
        queue.ledger.in_hand(["limited", "no job"])
        assert queue.ledger.sweep(queues=lambda tasks: dict.fromkeys(tasks, ("q", 0))) == []
    assert queue.sweep() == ["limited"]


def test_what_a_worker_holds_moves_neither_a_lease_nor_a_wait(queue: Queue) -> None:
    ledger = queue.ledger
    running, waiting = (ledger.take(name, task=TASK, job=JOB) for name in ("running", "waiting"))
    ledger.park("waiting", waiting.fence, delay_s=5, code="waiting", message="…")
    before = queue.client.zrange(f"{PREFIX}due", 0, -1, withscores=True)
    ledger.in_hand(["running", "waiting"])
    assert queue.client.zrange(f"{PREFIX}due", 0, -1, withscores=True) == before
    assert running.state is TakeState.YOURS


@pytest.mark.parametrize("why", ["parked", "lease ran out", "no message was sent", "could not be sent", "cancelled"])
def test_a_job_that_no_message_is_under_way_for_gets_one_at_once_though_the_queue_is_long(
    queue: Queue, why: str
) -> None:
    ledger = queue.ledger
    queue.messages.extend(names(1000, "foreign"))
    if why in ("parked", "lease ran out"):
        taken = ledger.take("j", task=TASK, job=JOB)
        if why == "parked":
            ledger.park("j", taken.fence, delay_s=0, code="waiting", message="…")
        queue.client.hset(f"{PREFIX}job:j", "lease_ms", 0)
    else:
        ledger.submit("j", task=TASK, job=JOB, due_in_s=0 if why == "no message was sent" else None)
        if why == "could not be sent":
            ledger.unsent(["j"])
        if why == "cancelled":
            ledger.cancel("j")
    assert queue.sweep() == ["j"]
    assert queue.sweep() == []


def test_a_broker_that_does_not_say_what_is_in_its_queues_gets_nothing_twice(queue: Queue) -> None:
    queue.submit("j")
    queue.make_due()
    assert queue.ledger.sweep(queues=lambda _: {}) == []
    queue.make_due()
    assert queue.ledger.sweep() == []


def test_what_is_taken_is_counted_by_queue_whatever_becomes_of_it(queue: Queue) -> None:
    for name in ("a", "a", "b"):
        queue.ledger.take(name, task=TASK, job=JOB, queue="q")
    queue.ledger.take("c", task=TASK, job=JOB)
    assert queue.client.hgetall(f"{PREFIX}taken") == {"q": "3"}


def test_a_worker_has_in_hand_what_waits_for_a_slot_or_for_a_rate_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def request(name: str) -> Any:
        return SimpleNamespace(id=name)

    bucket = TokenBucket(1)  # type: ignore[no-untyped-call]
    bucket.add((request("limited"), 1))  # type: ignore[no-untyped-call]
    monkeypatch.setattr(state, "reserved_requests", [request("reserved")])
    worker = SimpleNamespace(consumer=SimpleNamespace(task_buckets={"pacs.upload": bucket, "pacs.exists": None}))
    assert celery_internals.in_hand(worker) == ["limited", "reserved"]
