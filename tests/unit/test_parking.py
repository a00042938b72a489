"""Jobs that wait for a server that is left alone: they cost no attempt, block nobody, and all come to an end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import fakeredis
import pytest

from courier.errors import Cancelled, CourierError, PacsUnavailable
from courier.ledger.breakers import BREAKER, CHANGES
from courier.ledger.jobs import PREFIX, Ledger
from courier.settings import Settings
from worker.jobs.attempt import Pulse, Run
from worker.jobs.runner import Done, Failed, Parked, Verdict, carry
from worker.jobs.services import Tools

JOB = {"image_url": "http://host/a.dcm"}
SETTINGS = Settings.model_validate({"jobs": {"max_attempts": 2, "max_wait_s": 1000}})


def resting(breaker: str = "a") -> PacsUnavailable:
    error = PacsUnavailable("It is left alone.", server_name="a")
    error.resting, error.is_attempt = breaker, False
    return error


@dataclass
class Desk:
    client: fakeredis.FakeRedis
    ledger: Ledger
    shown: list[dict[str, Any]] = field(default_factory=list)

    def carry(self, ends: CourierError | dict[str, Any], job_id: str = "j1", task: str = "pacs.upload") -> Verdict:
        def work(job: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
            if isinstance(ends, CourierError):
                raise ends
            return {**ends, "attempt": run.attempt, "last": run.last, "cancelled": run.cancelled}

        tools = Tools(settings=SETTINGS, ledger=self.ledger, sources=cast(Any, None), fleet=cast(Any, None))
        pulse = Pulse(self.ledger, lambda _, meta: self.shown.append(meta))
        return carry(work, task=task, job_id=job_id, message=JOB, tools=tools, pulse=pulse)

    def breaker(self, *, until_in_ms: int, name: str = "a") -> None:
        """Open, or half-open if its pause is over."""
        self.client.hset(f"{PREFIX}{BREAKER}{name}", "until_ms", self.now_ms() + until_in_ms)

    def close(self, name: str = "a") -> None:
        self.client.delete(f"{PREFIX}{BREAKER}{name}")

    def now_ms(self) -> int:
        return int(self.client.time()[0]) * 1000

    def woken(self) -> list[str]:
        self.ledger.wake_parked()
        self.client.zadd(f"{PREFIX}due", {"unknown": 0})
        later = self.now_ms() + 10_000  # those that are woken a little apart
        ids = cast(list[str], self.client.zrangebyscore(f"{PREFIX}due", 1, later))
        for job_id in ids:
            self.client.zadd(f"{PREFIX}due", {job_id: 0})
        return sorted(job.job_id for job in self.ledger.sweep())

    def due_in_s(self, job_id: str = "j1") -> float:
        return (cast(float, self.client.zscore(f"{PREFIX}due", job_id)) - self.now_ms()) / 1000


@pytest.fixture
def desk() -> Iterator[Desk]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield Desk(client, Ledger(client))


def test_being_kept_from_asking_is_no_attempt(desk: Desk) -> None:
    desk.breaker(until_in_ms=5000)
    for _ in range(5):
        assert isinstance(desk.carry(resting()), Parked)
        desk.close()
        assert desk.woken() == ["j1"]
        desk.breaker(until_in_ms=5000)
    verdict = desk.carry({})
    assert isinstance(verdict, Done)
    assert verdict.payload["attempt"] == 1


def test_the_attempt_that_opened_the_breaker_was_one(desk: Desk) -> None:
    desk.breaker(until_in_ms=5000)
    error = resting()
    error.is_attempt = True
    assert isinstance(desk.carry(error), Parked)
    assert desk.ledger.parked() == {"a": 1}
    desk.close()
    desk.woken()
    desk.breaker(until_in_ms=5000)
    verdict = desk.carry(error)
    assert isinstance(verdict, Failed)
    assert desk.ledger.look("j1")["attempts"] == "2"


def test_watchers_see_for_whom_it_waits(desk: Desk) -> None:
    desk.breaker(until_in_ms=5000)
    desk.carry(resting())
    assert [(meta["stage"], meta["code"], meta["server_name"]) for meta in desk.shown] == [
        ("waiting", "pacs_unavailable", "a")
    ]
    assert desk.ledger.look("j1")["state"] == "waiting"
    assert desk.ledger.parked() == {"a": 1}


def test_a_parked_job_is_not_woken_before_its_server_is_asked_again(desk: Desk) -> None:
    desk.breaker(until_in_ms=5000)
    desk.carry(resting())
    assert desk.woken() == []
    assert isinstance(desk.carry({}), Parked)  # a message that comes twice
    assert desk.due_in_s() > 900


def test_one_is_woken_to_be_the_probe_and_another_one_each_time(desk: Desk) -> None:
    desk.breaker(until_in_ms=5000)
    for number in range(3):
        desk.carry(resting(), f"j{number}")
        desk.client.zincrby(f"{PREFIX}parked:a", -100 + number, f"j{number}")
    desk.breaker(until_in_ms=-1)
    assert desk.woken() == ["j0"]
    assert desk.woken() == []
    desk.carry(resting(), "j0")  # its probe failed
    desk.breaker(until_in_ms=-1)
    desk.client.hdel(f"{PREFIX}{BREAKER}a", "woken_ms")
    assert desk.woken() == ["j1"]


def test_another_is_woken_if_nothing_comes_of_the_first(desk: Desk) -> None:
    desk.breaker(until_in_ms=5000)
    desk.carry(resting(), "j0")
    desk.carry(resting(), "j1")
    desk.breaker(until_in_ms=-1)
    first = desk.woken()
    desk.client.hincrby(f"{PREFIX}{BREAKER}a", "woken_ms", -6000)
    assert sorted(first + desk.woken()) == ["j0", "j1"]


def test_all_are_woken_a_little_apart_when_the_server_is_well(desk: Desk) -> None:
    desk.breaker(until_in_ms=5000)
    desk.breaker(until_in_ms=5000, name="b")
    for number in range(30):
        desk.carry(resting(), f"j{number}")
    desk.carry(resting("b"), "other")
    desk.close()
    assert desk.ledger.wake_parked() == 30
    due = sorted(desk.due_in_s(f"j{number}") for number in range(30))
    assert due[-1] - due[0] == pytest.approx(0.145)
    assert desk.ledger.parked() == {"b": 1}


def test_who_parks_while_the_breaker_closes_is_not_forgotten(desk: Desk) -> None:
    desk.carry(resting())
    assert desk.due_in_s() < 5
    assert desk.ledger.parked() == {}


def test_a_job_that_waited_too_long_is_a_dead_letter(desk: Desk) -> None:
    desk.breaker(until_in_ms=5000)
    desk.carry(resting())
    assert desk.due_in_s() == pytest.approx(1000, abs=3)
    desk.client.hincrby(f"{PREFIX}job:j1", "parked_ms", -1_000_000)
    desk.client.zadd(f"{PREFIX}due", {"j1": 0})
    assert [job.job_id for job in desk.ledger.sweep()] == ["j1"]
    verdict = desk.carry(resting())
    assert isinstance(verdict, Failed)
    assert (verdict.error.code, desk.ledger.look("j1")["state"]) == ("pacs_unavailable", "dead")
    assert desk.ledger.parked() == {}


def test_a_job_that_waited_too_long_knows_that_this_is_its_last_attempt(desk: Desk) -> None:
    desk.breaker(until_in_ms=5000)
    desk.carry(resting())
    desk.client.hincrby(f"{PREFIX}job:j1", "parked_ms", -1_000_000)
    desk.close()
    desk.woken()
    verdict = desk.carry({})
    assert isinstance(verdict, Done)
    assert verdict.payload["last"]


def test_a_replayed_job_may_wait_as_long_again(desk: Desk) -> None:
    desk.breaker(until_in_ms=5000)
    desk.carry(resting())
    desk.client.hincrby(f"{PREFIX}job:j1", "parked_ms", -1_000_000)
    desk.client.zadd(f"{PREFIX}due", {"j1": 0})
    desk.ledger.sweep()
    desk.carry(resting())
    assert desk.ledger.replay("j1")
    assert isinstance(desk.carry(resting()), Parked)
    assert desk.due_in_s() == pytest.approx(1000, abs=3)


def test_what_somebody_waits_for_does_not_sit_out_an_illness(desk: Desk) -> None:
    desk.breaker(until_in_ms=60_000)
    assert isinstance(desk.carry(resting(), task="pacs.exists"), Parked)
    assert desk.due_in_s() < 5
    desk.client.zadd(f"{PREFIX}due", {"j1": 0})
    desk.ledger.sweep()
    verdict = desk.carry(resting(), task="pacs.exists")
    assert isinstance(verdict, Failed)
    assert verdict.error.code == "pacs_unavailable"


def test_a_cancelled_job_stops_waiting_at_once(desk: Desk) -> None:
    desk.breaker(until_in_ms=60_000)
    desk.carry(resting())
    desk.ledger.cancel("j1")
    assert [job.job_id for job in desk.ledger.sweep()] == ["j1"]
    verdict = desk.carry(resting())
    assert isinstance(verdict, Failed)
    assert isinstance(verdict.error, Cancelled)
    assert desk.ledger.parked() == {}


def test_work_that_has_begun_is_told_that_it_is_cancelled(desk: Desk) -> None:
    fence = desk.ledger.claim("j1", task="pacs.upload", job=JOB).fence
    desk.ledger.intend("j1", fence, {"uncertain": False})
    desk.client.hset(f"{PREFIX}job:j1", "lease_ms", 0)
    desk.ledger.cancel("j1")
    verdict = desk.carry({})
    assert isinstance(verdict, Done)
    assert verdict.payload["cancelled"]


def test_both_breakers_of_a_server_count_for_it(desk: Desk) -> None:
    for breaker, job_id in (("a", "j1"), ("a" + CHANGES, "j2")):
        desk.breaker(until_in_ms=5000, name=breaker)
        desk.carry(resting(breaker), job_id)
    assert desk.ledger.parked() == {"a": 2}
