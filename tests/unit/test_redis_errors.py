"""Redis fails in the middle of an attempt, or loses its keys: that is neither an attempt nor a death of the worker."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import fakeredis
import pytest
import redis
from redis import exceptions

from courier.errors import PacsUnavailable
from courier.ledger.jobs import PREFIX, HandedBack, LeaseLost, Ledger, passes, words_of
from courier.settings import Settings
from worker.jobs.attempt import Attempt, Heartbeat
from worker.jobs.runner import Deferred, Done, Failed, JobResult, NotTaken, execute
from worker.jobs.services import Services

TASK, JOB = "pacs.upload", {"image_url": "http://host/a.dcm"}
AWAY: list[redis.RedisError] = [
    redis.ConnectionError("Connection refused."),
    redis.TimeoutError("Timeout reading from socket"),
    exceptions.BusyLoadingError("Redis is loading the dataset in memory"),
    exceptions.ReadOnlyError("You can't write against a read only replica."),
    exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
    exceptions.MasterDownError("Link with MASTER is down and replica-serve-stale-data is set to 'no'."),
    exceptions.NoScriptError("No matching script."),
    exceptions.AuthenticationError("WRONGPASS invalid username-password pair"),
    redis.ResponseError("BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE."),
    redis.ResponseError("MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist."),
    redis.ResponseError("NOREPLICAS Not enough good replicas to write."),
    redis.ResponseError("OOM command not allowed when used memory > 'maxmemory'. script: 0c, on @user_script:3."),
    redis.ResponseError("READONLY You can't write against a read only replica. script: 0c, on @user_script:3."),
]
WRONG = redis.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")


@dataclass
class RedisErrorBench:
    client: fakeredis.FakeRedis
    ledger: Ledger
    settings: Settings = field(
        default_factory=lambda: Settings.model_validate({"jobs": {"max_attempts": 4, "max_deaths": 2}})
    )
    heartbeat: Heartbeat = field(init=False)

    def __post_init__(self) -> None:
        self.heartbeat = Heartbeat(self.ledger, lambda *_: None)

    def execute(self, ends: object, job_id: str = "j1", job: Mapping[str, Any] = JOB) -> JobResult:
        def work(job: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
            if isinstance(ends, BaseException):
                raise ends
            return cast(dict[str, Any], ends(attempt) if callable(ends) else ends)

        services = Services(
            settings=self.settings,
            ledger=self.ledger,
            sources=cast(Any, None),
            fleet=cast(Any, None),
            rng=random.Random(1),
        )
        return execute(work, task=TASK, job_id=job_id, message=job, services=services, heartbeat=self.heartbeat)

    def due(self, job_id: str = "j1") -> None:
        self.client.zadd(f"{PREFIX}due", {job_id: 0})

    def lapse(self, job_id: str = "j1") -> None:
        """Redis was away for longer than the lease."""
        self.client.hset(f"{PREFIX}job:{job_id}", "lease_ms", 0)
        self.due(job_id)


@pytest.fixture
def bench() -> Iterator[RedisErrorBench]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield RedisErrorBench(client, Ledger(client, worker="w1"))


def attempt(attempt: Attempt) -> dict[str, Any]:
    return {"attempt": attempt.number}


@pytest.mark.parametrize("error", AWAY, ids=lambda error: f"{type(error).__name__} {str(error)[:9]}")
def test_a_redis_that_is_away_costs_neither_an_attempt_nor_a_death(
    bench: RedisErrorBench, error: redis.RedisError
) -> None:
    for _ in range(6):
        assert isinstance(bench.execute(error), Deferred)
        bench.due()
    assert bench.execute(attempt) == Done({"attempt": 1})
    assert bench.ledger.read_record("j1")["deaths"] == "0"


def test_a_job_that_could_not_be_handed_back_is_as_soon_as_redis_is_there(
    bench: RedisErrorBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as away:
        away.setattr(bench.ledger, "_hand_back", raises(redis.ConnectionError("away")))
        assert isinstance(bench.execute(redis.ConnectionError("away")), Deferred)
        bench.heartbeat.round(Heartbeat._renew, {})
        assert bench.ledger.read_record("j1")["state"] == "running"
    bench.heartbeat.round(Heartbeat._renew, {})
    assert bench.ledger.read_record("j1")["state"] == "waiting"
    bench.due()
    assert bench.execute(attempt) == Done({"attempt": 1})


def raises(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_a_lease_that_ran_out_while_redis_was_away_is_no_death_though_another_worker_has_counted_one(
    bench: RedisErrorBench,
) -> None:
    other = Ledger(bench.client, worker="w2")

    def overtaken(attempt: Attempt) -> dict[str, Any]:
        bench.lapse()
        taken = other.take("j1", task=TASK, job=JOB)
        assert taken.crash_count == 1, "so far it looks like one"
        attempt.ledger.write_intent(attempt.job_id, attempt.fence, {})
        raise AssertionError

    for _ in range(3):
        assert isinstance(bench.execute(overtaken), Deferred)
        record = bench.ledger.read_record("j1")
        assert (record["state"], record["deaths"], record["attempts"]) == ("running", "0", "1")
        bench.ledger.hand_back("j1", int(record["fence"]), task=TASK, job=JOB, attempt=1)
        bench.due()
    assert bench.execute(attempt) == Done({"attempt": 1})


def test_a_worker_that_died_is_a_death_all_the_same(bench: RedisErrorBench) -> None:
    for _ in range(2):
        bench.ledger.take("j1", task=TASK, job=JOB)
        bench.lapse()
    result = bench.execute({})
    assert isinstance(result, Failed)
    assert "died 2 times" in result.error.message


def test_a_death_that_was_none_is_taken_back_once_for_all_jobs_of_one_content(bench: RedisErrorBench) -> None:
    other = Ledger(bench.client, worker="w2")
    fences = {name: bench.ledger.take(name, task=TASK, job=JOB).fence for name in ("j1", "j2")}
    for name in fences:
        bench.lapse(name)
        assert other.take(name, task=TASK, job=JOB).crash_count == 1
    for name, fence in fences.items():
        became = bench.ledger.hand_back(name, fence, task=TASK, job=JOB, attempt=1)
        assert became is HandedBack.OVERTAKEN
        assert bench.ledger.hand_back(name, fence, task=TASK, job=JOB, attempt=1) is HandedBack.SETTLED
    assert other.take("j3", task=TASK, job=JOB).crash_count == 0


def test_the_same_error_three_times_is_a_dead_letter_that_names_it(bench: RedisErrorBench) -> None:
    for _ in range(2):
        assert isinstance(bench.execute(WRONG), Deferred)
        bench.due()
    result = bench.execute(WRONG)
    assert isinstance(result, Failed)
    assert result.error.code == "poisoned"
    assert "WRONGTYPE" in result.error.message
    assert "died" not in result.error.message
    assert bench.ledger.read_record("j1")["state"] == "dead"


def test_other_errors_between_and_those_that_pass_do_not_add_up(bench: RedisErrorBench) -> None:
    bench.settings = Settings.model_validate({"jobs": {"max_attempts": 50}})
    other = redis.ResponseError("ERR value is not an integer or out of range")
    for error in (WRONG, other, WRONG, other, AWAY[0], WRONG, PacsUnavailable("Away.")):
        assert isinstance(bench.execute(error), Deferred), error
        bench.due()
    assert isinstance(bench.execute(attempt), Done)


def test_an_error_of_redis_is_shown_without_what_it_quotes_of_the_command() -> None:
    quoting = redis.ResponseError("unknown command 'EVALSHA', with args beginning with: '0c' 'PATIENT'")
    assert words_of(quoting) == "ResponseError: unknown command 'EVALSHA'"
    assert (
        words_of(redis.ResponseError("WRONGTYPE No. script: 0c, on @user_script:3.")) == "ResponseError: WRONGTYPE No."
    )
    assert len(words_of(redis.ResponseError("x" * 9999 + "\n"))) < 200
    assert not passes(redis.DataError("Invalid input of type: 'NoneType'."))


def test_a_verdict_that_redis_refuses_to_write_three_times_is_a_dead_letter(
    bench: RedisErrorBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.ledger, "finish", raises(WRONG))
    for _ in range(2):
        assert isinstance(bench.execute({}), Deferred)
        bench.due()
    result = bench.execute({})
    assert isinstance(result, Failed)
    assert bench.ledger.read_record("j1")["code"] == "poisoned"


@pytest.mark.parametrize("ends", ["done", "refused", "parked"])
def test_a_record_that_redis_has_lost_is_written_again_whatever_the_attempt_ends_with(
    bench: RedisErrorBench, ends: str
) -> None:
    checkpoint = {"server": "a", "uncertain": True}
    job = {**JOB, "idempotency_key": "k", "requested_by": "me", "reason": "why"}

    def work(attempt: Attempt) -> dict[str, Any]:
        attempt.write_intent(checkpoint)
        bench.client.flushdb()
        if ends == "refused":
            raise PacsUnavailable("Away.")
        if ends == "parked":
            attempt.ledger.park(attempt.job_id, attempt.fence, delay_s=1, code="waiting", message="Later.")
        return {}

    assert isinstance(bench.execute(work, job=job), NotTaken), "its message is given back"
    record = bench.ledger.read_record("j1")
    assert (record["state"], json.loads(record["memo"]), record["attempts"]) == ("queued", checkpoint, "0")
    assert (record["requested_by"], record["reason"]) == ("me", "why")
    bench.due()
    (due,) = bench.ledger.sweep(queues=lambda tasks: dict.fromkeys(tasks, ("q", 0)))
    assert due.job == job, "should the message be lost as well"
    result = bench.execute(lambda run: {"memo": run.checkpoint, "attempt": run.number}, job=job)
    assert result == Done({"memo": checkpoint, "attempt": 1})


def test_what_was_pushed_before_redis_lost_the_record_is_known_to_the_next_attempt_though_no_memo_was_taken(
    bench: RedisErrorBench,
) -> None:
    def work(attempt: Attempt) -> dict[str, Any]:
        bench.client.flushdb()
        attempt.write_intent({"uncertain": True})
        raise AssertionError

    assert isinstance(bench.execute(work), NotTaken)
    assert json.loads(bench.ledger.read_record("j1")["memo"]) == {"uncertain": True}


def test_a_late_holder_whose_job_was_made_anew_and_ended_changes_nothing(bench: RedisErrorBench) -> None:
    def work(attempt: Attempt) -> dict[str, Any]:
        bench.client.flushdb()
        for _ in range(3):
            taken = bench.ledger.take("j1", task=TASK, job=JOB)
            bench.ledger.park("j1", taken.fence, delay_s=0, code="waiting", message="…")
        done = bench.ledger.take("j1", task=TASK, job=JOB)
        bench.ledger.finish("j1", done.fence, outcome={"payload": {"by": "other"}}, code="done", task=TASK, job=JOB)
        return {"by": "us"}

    assert isinstance(bench.execute(work), Deferred)
    assert bench.execute({}) == Done({"by": "other"})


def test_a_heartbeat_that_finds_no_record_does_not_end_the_job_for_good(bench: RedisErrorBench) -> None:
    def work(attempt: Attempt) -> dict[str, Any]:
        bench.client.flushdb()
        assert not bench.ledger.heartbeat(attempt.job_id, attempt.fence)
        attempt.lost = True
        attempt.check_ours()
        return {}

    assert isinstance(bench.execute(work), NotTaken)
    assert bench.execute(attempt) == Done({"attempt": 1})
    with pytest.raises(LeaseLost):
        bench.ledger.finish("j1", 1, outcome={}, code="done", task=TASK, job=JOB)


def test_a_record_that_is_written_again_only_later_is_due_at_once_because_its_message_is_gone(
    bench: RedisErrorBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as away:
        away.setattr(bench.ledger, "_hand_back", raises(redis.ConnectionError("away")))
        assert isinstance(bench.execute(redis.ConnectionError("away")), Deferred)
    bench.client.flushdb()
    bench.heartbeat.round(Heartbeat._renew, {})
    assert [due.job_id for due in bench.ledger.sweep()] == ["j1"]
    assert bench.execute(attempt) == Done({"attempt": 1})
