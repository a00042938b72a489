"""Whatever makes many jobs due at once, they are released in line, a few at a time: on a real Redis.

A worker is a `Ledger` here, with the line that a sweeper gives it; its slots are the jobs that a test takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest
from redis import Redis

from courier.ledger.breakers import BREAKER, CREDENTIAL, SUSPENDED
from courier.ledger.jobs import PREFIX, DueJob, Ledger, TakeState
from courier.ledger.line import Line
from courier.queues import DUE, IN_LINE
from producer.dead_letters import DeadLetterClient

TASK, JOB = "pacs.upload", {"image_url": "http://host/a.dcm"}
ROOM, MANY = 6, 300


class LineSite:
    """One worker's sweeper and its slots. ``queue`` are the messages that it has sent out of the line."""

    def __init__(self, url: str, name: str = "w1", *, settle_s: float = 60) -> None:
        self.ledger = Ledger.connect(url, worker=name, grace_s=60)
        self.client: Redis = self.ledger.client
        self.queue: list[str] = []
        self.settle_s = settle_s

    def sweep(self, *, room: int = ROOM, depth: int | None = None) -> list[str]:
        """What is sent, to whatever queue."""
        self.ledger.wake_parked()
        line = Line(DUE, IN_LINE, room, depth)
        sent = self.ledger.sweep(queues=lambda names: {name: (name, len(self.queue)) for name in names},
                                 settle_s=self.settle_s, line=line)  # fmt: skip
        self.queue += [job.job_id for job in sent if job.queue == DUE]
        return [job.job_id for job in sent]

    def sweep_all(self) -> None:
        """Until nothing is due that does not stand in line: a sweep looks at 200 jobs."""
        for _ in range(MANY // 200 + 1):
            self.sweep()

    def take(self, job_id: str = "", task: str = TASK) -> int:
        """The first message, or that of a job, has begun the job."""
        job_id = job_id or self.queue.pop(0)
        taken = self.ledger.take(job_id, task=task, job=JOB, queue=DUE)
        assert taken.state is TakeState.YOURS
        return taken.fence

    def end(self, job_id: str, fence: int) -> None:
        self.ledger.finish(job_id, fence, outcome={"payload": {}}, code="done", task=TASK, job=JOB)
        self.ledger.published(job_id)

    def drain(self, *, sweeps: int = 10 * MANY) -> list[str]:
        """Do what is released, one after another; the jobs in the order in which they were begun."""
        done = []
        for _ in range(sweeps):
            self.sweep()
            if not self.queue and not self.ledger.waiting_in_line():
                return done
            assert len(self.queue) <= ROOM
            if self.queue:
                done.append(self.queue[0])
                self.end(self.queue[0], self.take())
        raise AssertionError(f"{self.ledger.waiting_in_line()} jobs still stand in line")


@pytest.fixture
def site(redis_url: str) -> Iterator[LineSite]:
    site = LineSite(redis_url)
    yield site
    site.ledger.close()


def names(count: int = MANY) -> list[str]:
    return [f"j{number:03}" for number in range(count)]


def wait_for_breaker(site: LineSite, breaker: str) -> None:
    site.client.hset(f"{PREFIX}{BREAKER}{breaker}", "until_ms", "99999999999999")
    for job_id in names():
        fence = site.take(job_id)
        site.ledger.park_for(breaker, job_id, fence, max_wait_s=900, code="pacs_unavailable", message="…")
    site.client.delete(f"{PREFIX}{BREAKER}{breaker}")


def wait(site: LineSite, how: str, code: str) -> None:
    for job_id in names():
        site.ledger.park(job_id, site.take(job_id), delay_s=0, code=code, message="…", wait=how)  # type: ignore[arg-type]


def lose_messages(site: LineSite) -> None:
    for job_id in names():
        site.ledger.submit(job_id, task=TASK, job=JOB)
    site.client.zadd(f"{PREFIX}due", dict.fromkeys(names(), 0))
    site.settle_s = 0


def replay_dead_letters(site: LineSite) -> None:
    sent: list[DueJob] = []
    for job_id in names():
        fence = site.take(job_id)
        outcome = {"error": {"code": "poisoned", "message": "…"}}
        site.ledger.end_as_dead_letter(job_id, fence, outcome=outcome, code="poisoned", task=TASK, job=JOB)
        DeadLetterClient(site.ledger, forget=lambda _: None, send=sent.append).replay(job_id)
    assert sent == []


def lose_leases(site: LineSite) -> None:
    for job_id in names():
        site.take(job_id)
        site.client.hset(f"{PREFIX}job:{job_id}", "lease_ms", 0)
    site.client.zadd(f"{PREFIX}due", dict.fromkeys(names(), 0))


def leave_outcomes_untold(site: LineSite) -> None:
    for job_id in names():
        outcome: dict[str, Any] = {"payload": {}}
        site.ledger.finish(job_id, site.take(job_id), outcome=outcome, code="done", task=TASK, job=JOB)
    site.client.zadd(f"{PREFIX}due", dict.fromkeys(names(), 0))


FLOODS: dict[str, Callable[[LineSite], None]] = {
    "a server answers again": lambda site: wait_for_breaker(site, "orthanc"),
    "a server stores again": lambda site: wait_for_breaker(site, "orthanc:changes"),
    "a credential is accepted": lambda site: wait_for_breaker(site, "orthanc" + CREDENTIAL),
    "a server's maintenance has ended": lambda site: wait_for_breaker(site, "orthanc" + SUSPENDED),
    "Retry-After is over": lambda site: wait(site, "server", "pacs_unavailable"),
    "the job that held the image has ended": lambda site: wait(site, "growing", "other_job"),
    "the pause before another attempt is over": lambda site: wait(site, "counts", "source_unavailable"),
    "the broker has lost its messages": lose_messages,
    "dead letters are replayed": replay_dead_letters,
    "workers have died": lose_leases,
    "outcomes were not told": leave_outcomes_untold,
}


@pytest.mark.parametrize("flood", FLOODS)
def test_no_more_jobs_are_released_than_a_worker_has_room_for(site: LineSite, flood: str) -> None:
    FLOODS[flood](site)
    for _ in range(5):
        site.sweep()
        assert len(site.queue) <= ROOM
    assert len(site.queue) == ROOM
    assert site.ledger.waiting_in_line() == MANY - ROOM
    assert site.ledger.load(overdue_s=1).open == MANY


@pytest.mark.parametrize("flood", ["a server answers again", "Retry-After is over", "dead letters are replayed"])
def test_all_are_released_once_the_oldest_first(site: LineSite, flood: str) -> None:
    FLOODS[flood](site)
    assert site.drain() == names()
    assert site.client.zcard(f"{PREFIX}due") == 0


def test_the_next_one_is_released_when_one_has_ended_and_not_when_it_is_begun(site: LineSite) -> None:
    wait(site, "server", "pacs_unavailable")
    site.sweep_all()
    first, fence = site.queue[0], site.take()
    assert site.sweep() == []
    site.end(first, fence)
    assert site.sweep() == [names()[ROOM]]


def test_the_next_one_is_released_when_one_was_put_aside_again(site: LineSite) -> None:
    wait(site, "server", "pacs_unavailable")
    site.sweep_all()
    site.ledger.park(site.queue[0], site.take(), delay_s=60, code="waiting", message="…")
    assert site.sweep() == [names()[ROOM]]


def test_a_job_that_is_begun_by_another_message_of_it_is_not_released_any_more(site: LineSite) -> None:
    wait(site, "server", "pacs_unavailable")
    site.sweep_all()
    late = names()[ROOM]
    site.client.hset(f"{PREFIX}job:{late}", "woken", 1)
    fence = site.take(late)
    site.end(site.queue[0], site.take())
    assert site.sweep() == [names()[ROOM + 1]]
    site.end(late, fence)
    assert late not in site.drain()


def test_a_job_that_was_cancelled_in_line_ends_in_its_turn(site: LineSite) -> None:
    wait(site, "server", "pacs_unavailable")
    site.sweep_all()
    assert site.ledger.cancel(names()[-1]) == "waiting"
    assert site.drain() == names()


def wait_for_a_server_that_is_away(site: LineSite, *, max_wait_s: float) -> None:
    site.client.hset(f"{PREFIX}{BREAKER}orthanc", "until_ms", "99999999999999")
    for job_id in names():
        site.ledger.park_for("orthanc", job_id, site.take(job_id), max_wait_s=max_wait_s, code="c", message="…")


def test_a_job_that_is_cancelled_while_its_server_is_away_ends_at_once(site: LineSite) -> None:
    wait_for_a_server_that_is_away(site, max_wait_s=900)
    assert site.ledger.cancel(names()[-1]) == "waiting"
    assert site.sweep() == [names()[-1]]


def test_jobs_whose_server_was_away_for_as_long_as_they_may_wait_end_all(site: LineSite) -> None:
    wait_for_a_server_that_is_away(site, max_wait_s=0)
    assert sorted(site.drain()) == sorted(names())


def test_a_job_in_line_that_another_message_put_aside_is_not_released(site: LineSite) -> None:
    lose_messages(site)
    site.sweep(room=0)
    late = names()[0]
    site.client.hset(f"{PREFIX}{BREAKER}orthanc", "until_ms", "99999999999999")
    site.ledger.park_for("orthanc", late, site.take(late), max_wait_s=900, code="c", message="…")
    assert site.sweep() == names()[1 : ROOM + 1]


def test_lookups_and_pieces_of_batches_do_not_stand_in_line(site: LineSite) -> None:
    wait(site, "server", "pacs_unavailable")
    others = {"pacs.exists": "look", "pacs.metadata": "read", "pacs.batch.chunk": "b.apply.0", "pacs.batch.upload": "b"}
    for task, job_id in others.items():
        site.ledger.park(job_id, site.take(job_id, task), delay_s=0, code="waiting", message="…")
    site.sweep_all()
    assert site.ledger.dispatched() == {}
    for job_id in others.values():
        assert site.ledger.read_record(job_id)["sent"] == "1", "to its own queue"
    assert {site.ledger.read_record(job_id)["sent"] for job_id in site.queue} == {DUE}


def test_the_probe_of_a_server_is_released_before_those_that_wait_for_nothing_more(site: LineSite) -> None:
    wait(site, "server", "pacs_unavailable")
    site.sweep_all()
    site.client.hset(f"{PREFIX}{BREAKER}other", "until_ms", "99999999999999")
    site.ledger.park_for("other", "probe", site.take("probe"), max_wait_s=900, code="pacs_unavailable", message="…")
    site.client.hset(f"{PREFIX}{BREAKER}other", "until_ms", 1)
    site.end(site.queue[0], site.take())
    assert site.sweep() == ["probe"]


def test_what_was_released_and_lost_does_not_hold_the_line_up(site: LineSite) -> None:
    """The worker's messages have gone with its broker, or it was killed before it could send them."""
    wait(site, "server", "pacs_unavailable")
    site.sweep_all()
    site.queue.clear()
    assert site.sweep() == [], "they may be on their way"
    site.settle_s = 0
    time.sleep(0.01)
    assert site.sweep(depth=0) == names()[ROOM : 2 * ROOM]
    assert site.ledger.waiting_in_line() == MANY - 2 * ROOM


def test_what_was_lost_is_released_once_more_and_in_line(site: LineSite) -> None:
    wait(site, "server", "pacs_unavailable")
    site.sweep_all()
    lost, site.queue = site.queue, []
    site.settle_s = 0
    time.sleep(0.01)
    assert site.ledger.dispatched() == {}
    site.client.zadd(f"{PREFIX}unanswered", dict.fromkeys(lost, 0))
    assert set(site.ledger.dispatched().values()) == {DUE}
    site.ledger.requeue_lost(lost)
    site.sweep(depth=0)
    assert set(site.drain()) == set(names())


def test_messages_that_lie_in_the_queue_fill_the_room_however_long_they_do(site: LineSite) -> None:
    wait(site, "server", "pacs_unavailable")
    site.sweep_all()
    site.settle_s = 0
    time.sleep(0.01)
    assert [site.sweep(depth=ROOM) for _ in range(3)] == [[], [], []], (
        "all slots are busy, or no worker reads the queue"
    )


def test_workers_share_one_line_and_each_has_room_of_its_own(site: LineSite, redis_url: str) -> None:
    wait(site, "server", "pacs_unavailable")
    site.sweep_all()
    other = LineSite(redis_url, "w2")
    assert other.sweep() == names()[ROOM : 2 * ROOM]
    assert site.sweep() == other.sweep() == []
    site.end(other.queue[0], site.take(other.queue.pop(0)))
    assert (site.sweep(), other.sweep()) == ([], [names()[2 * ROOM]])
    other.ledger.close()


def test_a_worker_that_has_died_keeps_no_room(site: LineSite, redis_url: str) -> None:
    wait(site, "server", "pacs_unavailable")
    site.sweep_all()
    for job_id in list(site.queue):
        site.take(job_id)
    assert site.sweep() == []
    for job_id in site.queue:
        site.client.hset(f"{PREFIX}job:{job_id}", "lease_ms", 0)
    other = LineSite(redis_url, "w2")
    assert other.sweep(room=ROOM) == names()[ROOM : 2 * ROOM]
    assert site.sweep() == names()[2 * ROOM : 3 * ROOM], "its own leases have run out"
    other.ledger.close()


def test_a_job_in_line_says_what_it_waits_for_and_that_it_is_tried_next(site: LineSite) -> None:
    wait(site, "server", "pacs_unavailable")
    site.sweep_all()
    last = names()[-1]
    waiting = site.ledger.standing([last])[last].waiting
    assert waiting is not None
    assert (waiting["code"], waiting["next_try"] is not None) == ("pacs_unavailable", True)
    assert datetime.fromisoformat(waiting["next_try"]).timestamp() < time.time() + 5


def test_a_worker_of_a_release_that_knows_no_line_finds_them_due_after_the_grace_period(site: LineSite) -> None:
    wait(site, "server", "pacs_unavailable")
    site.sweep_all()
    due = dict(site.client.zrange(f"{PREFIX}due", 0, -1, withscores=True))
    assert len(due) == MANY
    assert max(due.values()) < time.time() * 1000 + 61_000
    site.client.zadd(f"{PREFIX}due", dict.fromkeys(due, 0))
    assert len(site.ledger.sweep(1000)) == MANY - ROOM
    for job_id in list(site.queue):
        site.end(job_id, site.take(job_id))
    assert (site.sweep(), site.sweep()) == ([], []), "what it has sent is not sent twice"
    assert site.ledger.waiting_in_line() == 0
