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
from worker.jobs.attempt import Attempt, Heartbeat
from worker.jobs.runner import Deferred, Done, Failed, JobResult, execute
from worker.jobs.services import Services

JOB = {"image_url": "http://host/a.dcm"}
SETTINGS = Settings.model_validate({"jobs": {"max_attempts": 2, "max_wait_s": 1000}})


def open_circuit_error(breaker: str = "a") -> PacsUnavailable:
    error = PacsUnavailable("It is left alone.", server_name="a")
    error.open_circuit, error.is_attempt = breaker, False
    return error


@dataclass
class DeferralBench:
    client: fakeredis.FakeRedis
    ledger: Ledger
    shown: list[dict[str, Any]] = field(default_factory=list)

    def execute(self, ends: CourierError | dict[str, Any], job_id: str = "j1", task: str = "pacs.upload") -> JobResult:
        def work(job: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
            if isinstance(ends, CourierError):
                raise ends
            return {**ends, "attempt": attempt.number, "last": attempt.last, "cancelled": attempt.cancelled}

        services = Services(settings=SETTINGS, ledger=self.ledger, sources=cast(Any, None), fleet=cast(Any, None))
        heartbeat = Heartbeat(self.ledger, lambda _, meta: self.shown.append(meta))
        return execute(work, task=task, job_id=job_id, message=JOB, services=services, heartbeat=heartbeat)

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
def bench() -> Iterator[DeferralBench]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield DeferralBench(client, Ledger(client))


def test_being_kept_from_asking_is_no_attempt(bench: DeferralBench) -> None:
    bench.breaker(until_in_ms=5000)
    for _ in range(5):
        assert isinstance(bench.execute(open_circuit_error()), Deferred)
        bench.close()
        assert bench.woken() == ["j1"]
        bench.breaker(until_in_ms=5000)
    result = bench.execute({})
    assert isinstance(result, Done)
    assert result.payload["attempt"] == 1


def test_the_attempt_that_opened_the_breaker_was_one(bench: DeferralBench) -> None:
    bench.breaker(until_in_ms=5000)
    error = open_circuit_error()
    error.is_attempt = True
    assert isinstance(bench.execute(error), Deferred)
    assert bench.ledger.parked() == {"a": 1}
    bench.close()
    bench.woken()
    bench.breaker(until_in_ms=5000)
    result = bench.execute(error)
    assert isinstance(result, Failed)
    assert bench.ledger.read_record("j1")["attempts"] == "2"


def test_watchers_see_for_whom_it_waits(bench: DeferralBench) -> None:
    bench.breaker(until_in_ms=5000)
    bench.execute(open_circuit_error())
    assert [(meta["stage"], meta["code"], meta["server_name"]) for meta in bench.shown] == [
        ("waiting", "pacs_unavailable", "a")
    ]
    assert bench.ledger.read_record("j1")["state"] == "waiting"
    assert bench.ledger.parked() == {"a": 1}


def test_a_parked_job_is_not_woken_before_its_server_is_asked_again(bench: DeferralBench) -> None:
    bench.breaker(until_in_ms=5000)
    bench.execute(open_circuit_error())
    assert bench.woken() == []
    assert isinstance(bench.execute({}), Deferred)  # a message that comes twice
    assert bench.due_in_s() > 900


def test_one_is_woken_to_be_the_probe_and_another_one_each_time(bench: DeferralBench) -> None:
    bench.breaker(until_in_ms=5000)
    for number in range(3):
        bench.execute(open_circuit_error(), f"j{number}")
        bench.client.zincrby(f"{PREFIX}parked:a", -100 + number, f"j{number}")
    bench.breaker(until_in_ms=-1)
    assert bench.woken() == ["j0"]
    assert bench.woken() == []
    bench.execute(open_circuit_error(), "j0")  # its probe failed
    bench.breaker(until_in_ms=-1)
    bench.client.hdel(f"{PREFIX}{BREAKER}a", "woken_ms")
    assert bench.woken() == ["j1"]


def test_another_is_woken_if_nothing_comes_of_the_first(bench: DeferralBench) -> None:
    bench.breaker(until_in_ms=5000)
    bench.execute(open_circuit_error(), "j0")
    bench.execute(open_circuit_error(), "j1")
    bench.breaker(until_in_ms=-1)
    first = bench.woken()
    bench.client.hincrby(f"{PREFIX}{BREAKER}a", "woken_ms", -6000)
    assert sorted(first + bench.woken()) == ["j0", "j1"]


def test_all_are_due_in_the_order_in_which_they_began_to_wait_when_the_server_is_well(bench: DeferralBench) -> None:
    bench.breaker(until_in_ms=5000)
    bench.breaker(until_in_ms=5000, name="b")
    for number in range(30):
        bench.execute(open_circuit_error(), f"j{number:02}")
        bench.client.zincrby(f"{PREFIX}parked:a", -100 + number, f"j{number:02}")
    bench.execute(open_circuit_error("b"), "other")
    bench.close()
    assert bench.ledger.wake_parked() == 30
    due = bench.client.zrangebyscore(f"{PREFIX}due", 0, bench.now_ms() + 2000)
    assert due == [f"j{number:02}" for number in range(30)]
    assert bench.ledger.parked() == {"b": 1}


def test_who_parks_while_the_breaker_closes_is_not_forgotten(bench: DeferralBench) -> None:
    bench.execute(open_circuit_error())
    assert bench.due_in_s() < 5
    assert bench.ledger.parked() == {}


def test_a_job_that_waited_too_long_is_a_dead_letter(bench: DeferralBench) -> None:
    bench.breaker(until_in_ms=5000)
    bench.execute(open_circuit_error())
    assert bench.due_in_s() == pytest.approx(1000, abs=3)
    bench.client.hincrby(f"{PREFIX}job:j1", "parked_ms", -1_000_000)
    bench.client.zadd(f"{PREFIX}due", {"j1": 0})
    assert [job.job_id for job in bench.ledger.sweep()] == ["j1"]
    result = bench.execute(open_circuit_error())
    assert isinstance(result, Failed)
    assert (result.error.code, bench.ledger.read_record("j1")["state"]) == ("pacs_unavailable", "dead")
    assert bench.ledger.parked() == {}


def test_a_job_that_waited_too_long_knows_that_this_is_its_last_attempt(bench: DeferralBench) -> None:
    bench.breaker(until_in_ms=5000)
    bench.execute(open_circuit_error())
    bench.client.hincrby(f"{PREFIX}job:j1", "parked_ms", -1_000_000)
    bench.close()
    bench.woken()
    result = bench.execute({})
    assert isinstance(result, Done)
    assert result.payload["last"]


def test_a_replayed_job_may_wait_as_long_again(bench: DeferralBench) -> None:
    bench.breaker(until_in_ms=5000)
    bench.execute(open_circuit_error())
    bench.client.hincrby(f"{PREFIX}job:j1", "parked_ms", -1_000_000)
    bench.client.zadd(f"{PREFIX}due", {"j1": 0})
    bench.ledger.sweep()
    bench.execute(open_circuit_error())
    assert bench.ledger.replay("j1")
    assert isinstance(bench.execute(open_circuit_error()), Deferred)
    assert bench.due_in_s() == pytest.approx(1000, abs=3)


def test_what_somebody_waits_for_does_not_sit_out_an_illness(bench: DeferralBench) -> None:
    bench.breaker(until_in_ms=60_000)
    assert isinstance(bench.execute(open_circuit_error(), task="pacs.exists"), Deferred)
    assert bench.due_in_s() < 5
    bench.client.zadd(f"{PREFIX}due", {"j1": 0})
    bench.ledger.sweep()
    result = bench.execute(open_circuit_error(), task="pacs.exists")
    assert isinstance(result, Failed)
    assert result.error.code == "pacs_unavailable"


def test_a_cancelled_job_stops_waiting_at_once(bench: DeferralBench) -> None:
    bench.breaker(until_in_ms=60_000)
    bench.execute(open_circuit_error())
    bench.ledger.cancel("j1")
    assert [job.job_id for job in bench.ledger.sweep()] == ["j1"]
    result = bench.execute(open_circuit_error())
    assert isinstance(result, Failed)
    assert isinstance(result.error, Cancelled)
    assert bench.ledger.parked() == {}


def test_work_that_has_begun_is_told_that_it_is_cancelled(bench: DeferralBench) -> None:
    fence = bench.ledger.take("j1", task="pacs.upload", job=JOB).fence
    bench.ledger.write_intent("j1", fence, {"uncertain": False})
    bench.client.hset(f"{PREFIX}job:j1", "lease_ms", 0)
    bench.ledger.cancel("j1")
    result = bench.execute({})
    assert isinstance(result, Done)
    assert result.payload["cancelled"]


def test_both_breakers_of_a_server_count_for_it(bench: DeferralBench) -> None:
    for breaker, job_id in (("a", "j1"), ("a" + CHANGES, "j2")):
        bench.breaker(until_in_ms=5000, name=breaker)
        bench.execute(open_circuit_error(breaker), job_id)
    assert bench.ledger.parked() == {"a": 2}
