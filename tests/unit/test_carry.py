"""How a job is carried to its end, with work that does what the test says and a ledger on fakeredis."""

from __future__ import annotations

import contextlib
import json
import math
import random
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import fakeredis
import pytest
import redis
from celery import Celery

from courier.errors import NotDicom, PacsUnauthorized, PacsUnavailable, SourceUnauthorized
from courier.ledger.breakers import Breakers
from courier.ledger.jobs import PREFIX, DueJob, LeaseLost, Ledger, TakeState, job_id_for
from courier.messages import MESSAGE_BYTES
from courier.settings import JobSettings, Settings
from sandbox.processes import poll
from worker.jobs.attempt import Attempt, Heartbeat, Postpone
from worker.jobs.idempotency import outcome_of_first
from worker.jobs.runner import Deferred, Done, Failed, JobResult, NotTaken, Starved, backoff_s, execute
from worker.jobs.services import Services
from worker.runtime.shortage import MAX_RETURNS

JOB = {"image_url": "http://host/a.dcm?sig=SECRET"}


@dataclass
class JobBench:
    """A worker's desk: what it works on, and what watchers were shown."""

    client: fakeredis.FakeRedis
    ledger: Ledger
    shown: list[dict[str, Any]] = field(default_factory=list)
    settings: Settings = field(
        default_factory=lambda: Settings.model_validate({"jobs": {"max_attempts": 3, "max_deaths": 2}})
    )

    def execute(
        self, ends: object, job_id: str = "j1", job: Mapping[str, Any] = JOB, task: str = "pacs.upload"
    ) -> JobResult:
        def work(job: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
            if isinstance(ends, BaseException):
                raise ends
            return cast(dict[str, Any], ends(job, attempt) if callable(ends) else ends)

        services = Services(
            settings=self.settings,
            ledger=self.ledger,
            sources=cast(Any, None),
            fleet=cast(Any, None),
            rng=random.Random(1),
        )
        heartbeat = Heartbeat(self.ledger, lambda _, meta: self.shown.append(meta))
        return execute(work, task=task, job_id=job_id, message=job, services=services, heartbeat=heartbeat)

    def state(self, job_id: str = "j1") -> str:
        return self.ledger.read_record(job_id)["state"]

    def make_due(self, job_id: str = "j1") -> None:
        self.client.zadd(f"{PREFIX}due", {job_id: 0})
        self.ledger.sweep()

    def die(self, job_id: str = "j1") -> None:
        """The worker is killed in the middle of the job."""
        self.ledger.take(job_id, task="pacs.upload", job=JOB)
        self.client.hset(f"{PREFIX}job:{job_id}", "lease_ms", 0)


@pytest.fixture
def bench() -> Iterator[JobBench]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield JobBench(client, Ledger(client))


def test_what_is_done_is_done_once(bench: JobBench) -> None:
    assert bench.execute({"status": "stored"}) == Done({"status": "stored"})
    assert bench.execute(AssertionError("the work must not run again")) == Done({"status": "stored"})


def test_a_refusal_ends_the_job_and_is_given_again(bench: JobBench) -> None:
    refused = bench.execute(NotDicom("No."))
    again = bench.execute({"status": "stored"})
    assert isinstance(refused, Failed)
    assert isinstance(again, Failed)
    assert again.error.payload == refused.error.payload
    assert bench.state() == "done"


def test_what_may_be_cured_by_time_is_parked_then_buried(bench: JobBench) -> None:
    assert isinstance(bench.execute(PacsUnavailable("Later.")), Deferred)
    assert bench.state() == "waiting"
    (shown,) = bench.shown
    assert {name: shown[name] for name in ("stage", "attempt", "code", "message", "server_name")} == {
        "stage": "waiting",
        "attempt": 1,
        "code": "pacs_unavailable",
        "message": "Later.",
        "server_name": None,
    }
    bench.make_due()
    assert isinstance(bench.execute(PacsUnavailable("Later.")), Deferred)
    bench.make_due()
    last = bench.execute(PacsUnavailable("Later."))
    assert isinstance(last, Failed)
    assert last.error.code == "pacs_unavailable"
    assert bench.state() == "dead"


def test_what_needs_a_person_is_a_dead_letter_at_once(bench: JobBench) -> None:
    assert isinstance(bench.execute(PacsUnauthorized("Log in.")), Failed)
    assert bench.state() == "dead"


def test_waiting_for_another_job_is_no_attempt(bench: JobBench) -> None:
    for _ in range(5):
        assert isinstance(bench.execute(Postpone("j2 is at it", delay_s=0)), Deferred)
        bench.make_due()
    assert bench.execute(lambda job, run: {"attempt": run.number}) == Done({"attempt": 1})


def test_a_fault_of_ours_is_tried_again_and_says_neither_url_nor_patient(
    bench: JobBench, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        result = bench.execute(ValueError(f"bad {JOB['image_url']}"))
        bench.make_due()
    assert isinstance(result, Failed)
    assert result.error.code == "poisoned"
    assert "SECRET" not in caplog.text + str(result.error.payload)
    assert "ValueError" in caplog.text


def test_work_that_kills_its_worker_is_poison(bench: JobBench) -> None:
    bench.die()
    bench.die()
    result = bench.execute({"status": "stored"})
    assert isinstance(result, Failed)
    assert (result.error.code, bench.state()) == ("poisoned", "dead")


def test_a_holder_that_comes_late_ends_in_silence(bench: JobBench) -> None:
    def overtaken(job: Mapping[str, Any], attempt: Attempt) -> dict[str, Any]:
        bench.client.hset(f"{PREFIX}job:j1", "lease_ms", 0)
        bench.ledger.take("j1", task="pacs.upload", job=JOB)
        return {"by": "the late one"}

    assert bench.execute(overtaken) == Deferred()
    assert bench.state() == "running"
    assert bench.execute(LeaseLost(), "j9") == Deferred()


def body_of_a_wake_up(due: DueJob) -> bytes:
    with Celery(broker="memory://", set_as_current=False) as app, app.connection_for_write() as connection:
        app.send_task(due.task, kwargs={"job": due.job}, task_id=due.job_id, queue="q", connection=connection)
        return bytes(connection.SimpleQueue("q").get(timeout=5).body)


def test_a_job_that_could_not_be_woken_is_refused_before_it_begins_and_one_that_just_can_is_not(
    bench: JobBench,
) -> None:
    def job(characters: int) -> dict[str, Any]:
        return {**JOB, "note": "ä" * characters}

    most = (MESSAGE_BYTES - 128 - len(json.dumps(job(0)))) // len(json.dumps("ä")[1:-1])
    assert isinstance(bench.execute(PacsUnavailable("Later."), "fits", job(most)), Deferred)
    bench.client.zadd(f"{PREFIX}due", {"fits": 0})
    (due,) = bench.ledger.sweep()
    assert MESSAGE_BYTES - 100 < len(body_of_a_wake_up(due)) <= MESSAGE_BYTES
    result = bench.execute(AssertionError("the work must not run"), "does not", job(most + 1))
    assert isinstance(result, Failed)
    assert (result.error.code, bench.state("does not")) == ("invalid_request", "done")


def test_a_cancelled_job_does_no_work(bench: JobBench) -> None:
    bench.ledger.submit("j1", task="pacs.upload", job=JOB)
    bench.ledger.cancel("j1")
    result = bench.execute(AssertionError("the work must not run"))
    assert isinstance(result, Failed)
    assert result.error.code == "cancelled"


def test_a_job_whose_push_may_have_arrived_is_not_called_cancelled(bench: JobBench) -> None:
    fence = bench.ledger.take("j1", task="pacs.upload", job=JOB).fence
    bench.ledger.write_intent("j1", fence, {"uncertain": True})
    bench.client.hset(f"{PREFIX}job:j1", "lease_ms", 0)
    bench.ledger.cancel("j1")
    assert bench.execute(lambda job, run: run.checkpoint) == Done({"uncertain": True})


def test_a_second_order_under_one_key_fails_when_the_first_is_a_dead_letter(bench: JobBench) -> None:
    first, order = job_id_for("order-7"), {**JOB, "idempotency_key": "order-7"}
    bench.ledger.submit("j2", task="pacs.upload", job=JOB)  # before the first has ended: later, it is tried again
    for _ in range(3):
        bench.execute(PacsUnavailable("Later."), first, order)
        bench.make_due(first)
    services = cast(Services, SimpleNamespace(ledger=bench.ledger))
    result = bench.execute(lambda _, run: outcome_of_first("pacs.upload", order, run, services), "j2")
    assert isinstance(result, Failed)
    assert result.error.code == "pacs_unavailable"


@pytest.mark.parametrize(
    ("task", "other"),
    [("pacs.delete", {}), ("pacs.upload", {"image_url": "http://host/b.dcm"}), ("pacs.upload", {"server": "a"})],
)
def test_another_order_under_one_key_is_refused_and_not_answered_with_the_outcome_of_the_first(
    bench: JobBench, task: str, other: dict[str, Any]
) -> None:
    first, order = job_id_for("order-7"), {**JOB, "idempotency_key": "order-7"}
    bench.ledger.submit(first, task="pacs.upload", job=order)
    assert bench.execute({"status": "stored"}, first, order) == Done({"status": "stored"})
    services = cast(Services, SimpleNamespace(ledger=bench.ledger))

    def ask(task: str, job_id: str, **other: Any) -> JobResult:
        return bench.execute(lambda _, run: outcome_of_first(task, {**order, **other}, run, services), job_id)

    result = ask(task, "j2", **other)
    assert isinstance(result, Failed)
    assert result.error.code == "invalid_request"
    assert first in result.error.message
    resigned = {"version": 1, "server": None, "image_url": "http://host/a.dcm?sig=ANEW"}
    assert ask("pacs.upload", "j3", **resigned) == Done({"status": "stored"})


@pytest.mark.parametrize(
    "pattern",
    ["s3://imgs/order?{}.dcm", "az://imgs/order#{}.dcm", "zip+https://host/all.zip?sig=x!/{}.dcm"],
)
def test_an_object_is_never_answered_with_the_outcome_of_another_one_whose_url_begins_alike(
    bench: JobBench, pattern: str
) -> None:
    one, two = ({"image_url": pattern.format(number), "idempotency_key": "order-7"} for number in (1, 2))
    first = job_id_for("order-7")
    bench.ledger.submit(first, task="pacs.upload", job=one)
    assert bench.execute({"status": "stored"}, first, one) == Done({"status": "stored"})
    services = cast(Services, SimpleNamespace(ledger=bench.ledger))
    result = bench.execute(lambda _, run: outcome_of_first("pacs.upload", two, run, services), "j2")
    assert isinstance(result, Failed)
    assert result.error.code == "invalid_request"


def test_a_message_is_given_back_when_the_ledger_cannot_be_asked(
    bench: JobBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise redis.ConnectionError

    monkeypatch.setattr(bench.ledger, "take", unreachable)
    assert bench.execute(AssertionError("the work must not run")) == NotTaken()


def test_an_overtaken_attempt_shows_nothing_over_its_successors_result(bench: JobBench) -> None:
    def overtaken(job: Mapping[str, Any], attempt: Attempt) -> dict[str, Any]:
        bench.client.hset(f"{PREFIX}job:j1", "lease_ms", 0)
        assert isinstance(bench.execute(NotDicom("No.")), Failed)
        raise PacsUnavailable("Later.")

    assert bench.execute(overtaken) == Deferred()
    assert bench.shown == []


def an_attempt(ledger: Ledger) -> Attempt:
    taken = ledger.take("j1", task="pacs.upload", job=JOB)
    return Attempt("j1", taken.fence, taken.attempt, last=False, ledger=ledger, stage="push")


def test_two_attempts_at_one_job_in_one_process_do_not_end_each_others_pulse(bench: JobBench) -> None:
    heartbeat = Heartbeat(bench.ledger, lambda *_: None)
    with contextlib.ExitStack() as second, heartbeat.keep_alive(an_attempt(bench.ledger)):
        bench.client.hset(f"{PREFIX}job:j1", "lease_ms", 0)
        second.enter_context(heartbeat.keep_alive(an_attempt(bench.ledger)))


def test_a_result_backend_that_hangs_costs_no_lease(bench: JobBench) -> None:
    ledger, back = Ledger(bench.client, lease_s=0.3), threading.Event()
    attempt = an_attempt(ledger)
    until_ms = int(ledger.read_record("j1")["lease_ms"])
    with Heartbeat(ledger, lambda *_: cast(None, back.wait(10)), beat_s=0.01).keep_alive(attempt):
        try:
            assert poll(lambda: int(ledger.read_record("j1")["lease_ms"]) > until_ms + 300, timeout_s=5)
        finally:
            back.set()


def test_a_stage_that_cannot_be_shown_leaves_the_next_one_to_be_shown(bench: JobBench) -> None:
    shown: list[str] = []

    def publish(_: str, meta: dict[str, Any]) -> None:
        shown.append(meta["stage"])
        raise OSError(len(shown))

    attempt = an_attempt(bench.ledger)
    with Heartbeat(bench.ledger, publish, beat_s=0.01).keep_alive(attempt):
        assert poll(lambda: shown == ["push"], timeout_s=5)
        attempt.stage = "describe"
        assert poll(lambda: shown == ["push", "describe"], timeout_s=5)


def test_what_the_other_side_asked_for_is_waited_for(bench: JobBench) -> None:
    bench.execute(PacsUnavailable("Busy.", retry_after_s=500))
    due, now_s = bench.client.zscore(f"{PREFIX}due", "j1"), bench.ledger.clock_s()
    assert due is not None
    assert 490 < due / 1000 - now_s <= 501


def too_fast(after_s: float | None) -> PacsUnavailable:
    error = PacsUnavailable("a asks for fewer requests.", server_name="a", retry_after_s=after_s)
    error.slow_down = True
    return error


@pytest.mark.parametrize("task", ["pacs.upload", "pacs.exists", "pacs.metadata", "pacs.list_studies", "pacs.delete"])
def test_a_request_to_slow_down_costs_no_attempt_however_often_it_comes(bench: JobBench, task: str) -> None:
    for _ in range(bench.settings.jobs.max_attempts + 3):
        bench.execute(too_fast(30), task=task)
        record = bench.ledger.read_record("j1")
        assert (record["state"], record["attempts"], record["code"]) == ("waiting", "0", "pacs_unavailable")
        assert record["server"] == "a"
        bench.make_due()
    due = bench.client.zscore(f"{PREFIX}due", "j1")
    assert due is not None


@pytest.mark.parametrize(
    ("after_s", "delay_s"), [(30, 30), (None, 1), (0, 0), (math.inf, 660)], ids=["30", "none", "0", "endless"]
)
def test_the_job_waits_as_long_as_was_decided_for_its_server(
    bench: JobBench, after_s: float | None, delay_s: float
) -> None:
    bench.execute(too_fast(after_s))
    due = bench.client.zscore(f"{PREFIX}due", "j1")
    assert due is not None
    assert due / 1000 - bench.ledger.clock_s() == pytest.approx(delay_s, abs=1)


def test_waiting_for_a_slow_server_has_an_end(bench: JobBench) -> None:
    bench.execute(too_fast(30))
    bench.client.hincrby(f"{PREFIX}job:j1", "parked_ms", -int((bench.settings.jobs.max_wait_s - 5) * 1000))
    bench.make_due()
    bench.execute(too_fast(30))
    due = bench.client.zscore(f"{PREFIX}due", "j1")
    assert due is not None
    assert due / 1000 - bench.ledger.clock_s() < 6, "it looks once more when the time is over"
    bench.client.hincrby(f"{PREFIX}job:j1", "parked_ms", -6000)
    bench.make_due()
    result = bench.execute(too_fast(30))
    assert isinstance(result, Failed)
    assert (result.error.code, bench.state()) == ("pacs_unavailable", "dead")


def test_the_wait_for_a_slow_server_says_so_with_the_server_and_the_next_try(bench: JobBench) -> None:
    bench.execute(too_fast(30))
    wait = bench.ledger.standing(["j1"])["j1"].waiting
    assert wait is not None
    assert (wait["code"], wait["server_name"]) == ("pacs_unavailable", "a")
    assert "fewer requests" in wait["message"]
    assert wait["next_try"] > wait["since"]


def test_the_backoff_doubles_up_to_its_cap_with_full_jitter() -> None:
    limits = JobSettings(backoff_base_s=1, backoff_cap_s=60)
    rng = random.Random(3)
    highest = [max(backoff_s(attempt, limits, rng) for _ in range(400)) for attempt in (1, 2, 5, 9)]
    assert highest == [pytest.approx(ceiling, rel=0.05) for ceiling in (1, 2, 16, 60)]
    assert min(backoff_s(9, limits, rng) for _ in range(400)) < 3


def test_a_shutdown_that_cannot_wait_leaves_the_job_to_others_at_once_and_counts_no_death(bench: JobBench) -> None:
    heartbeat = Heartbeat(bench.ledger, lambda _, meta: bench.shown.append(meta))
    services = Services(bench.settings, bench.ledger, sources=cast(Any, None), fleet=cast(Any, None))

    def work(job: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
        assert heartbeat.release() == 1
        return {"status": "too late"}

    assert (
        execute(work, task="pacs.upload", job_id="j1", message=JOB, services=services, heartbeat=heartbeat)
        == Deferred()
    )
    assert bench.state() == "waiting"
    assert [due.job_id for due in bench.ledger.sweep()] == ["j1"]
    taken = bench.ledger.take("j1", task="pacs.upload", job=JOB, max_deaths=2)
    assert (taken.state, taken.attempt, taken.crash_count) == (TakeState.YOURS, 1, 0)
    assert heartbeat.release() == 0


@pytest.mark.parametrize(
    "other",
    [
        {"image_url": "http://host/b.dcm"},
        {**JOB, "server": "a"},
        {**JOB, "idempotency_key": "order-7"},
    ],
    ids=["another image", "another server", "a key"],
)
@pytest.mark.parametrize("state", ["done", "dead", "waiting", "queued", "held"])
def test_another_job_under_one_id_is_refused_whatever_became_of_the_first(
    bench: JobBench, state: str, other: dict[str, Any]
) -> None:
    if state in ("queued", "held"):
        bench.ledger.submit("order/7", task="pacs.upload", job=JOB)
    if state == "held":
        bench.ledger.take("order/7", task="pacs.upload", job=JOB)
    if state in ("done", "dead", "waiting"):
        ends = {"done": {"status": "stored"}, "dead": PacsUnauthorized("No."), "waiting": PacsUnavailable("Later.")}
        bench.execute(ends[state], "order/7")
    before = bench.ledger.read_record("order/7")
    result = bench.execute(AssertionError("the work must not run"), "order/7", other)
    assert isinstance(result, Failed)
    assert result.error.code == "invalid_request"
    assert "order/7" in result.error.message
    assert bench.ledger.read_record("order/7") == before


def test_the_message_that_has_an_outcome_told_bears_nothing_of_the_job_and_is_no_other_one(bench: JobBench) -> None:
    bench.execute({"status": "stored"})
    bench.client.zadd(f"{PREFIX}due", {"j1": 0})
    (due,) = bench.ledger.sweep()
    assert due.job == {}
    assert bench.execute(AssertionError("the work must not run"), "j1", due.job) == Done({"status": "stored"})


def test_the_same_job_under_one_id_ends_as_it_ended_also_when_its_url_is_signed_anew(bench: JobBench) -> None:
    assert bench.execute({"status": "stored"}, "order/7") == Done({"status": "stored"})
    again = {"version": 1, "server": None, "image_url": "http://host/a.dcm?sig=ANEW"}
    assert bench.execute(AssertionError("the work must not run"), "order/7", again) == Done({"status": "stored"})


SHORTAGES = {
    "no thread": RuntimeError("can't start new thread"),
    "no memory": MemoryError(),
    "no file": OSError(24, "Too many open files"),
}


@pytest.mark.parametrize("error", SHORTAGES.values(), ids=SHORTAGES)
def test_a_worker_without_threads_or_memory_takes_none_of_a_jobs_attempts(bench: JobBench, error: Exception) -> None:
    for _ in range(5):
        assert isinstance(bench.execute(error), Starved)
        assert (bench.state(), bench.ledger.read_record("j1")["attempts"]) == ("waiting", "0")
        bench.make_due()
    assert bench.execute({"status": "stored"}) == Done({"status": "stored"})


def test_a_job_that_starves_while_others_are_done_is_a_dead_letter(bench: JobBench) -> None:
    for number in range(MAX_RETURNS - 1):
        bench.execute({"status": "stored"}, f"other-{number}")
        assert isinstance(bench.execute(MemoryError()), Starved)
        bench.make_due()
    bench.execute({"status": "stored"}, "one more")
    result = bench.execute(MemoryError())
    assert isinstance(result, Failed)
    assert (result.error.code, bench.state()) == ("poisoned", "dead")


def test_a_fault_that_is_no_shortage_takes_an_attempt_as_before(bench: JobBench) -> None:
    assert not isinstance(bench.execute(RuntimeError("dictionary changed size")), Starved)
    assert bench.ledger.read_record("j1")["attempts"] == "1"


def refused_credential(breaker: str = "credential:sources.s3") -> SourceUnauthorized:
    error = SourceUnauthorized("The store refuses the worker's credentials (ExpiredToken).")
    error.open_circuit = breaker
    return error


def test_a_job_whose_credential_is_refused_waits_without_using_up_attempts_then_is_a_dead_letter(
    bench: JobBench,
) -> None:
    Breakers(bench.client).failed("credential:sources.s3", at_once=True, reason="ExpiredToken")
    for _ in range(bench.settings.jobs.max_attempts + 2):
        assert isinstance(bench.execute(refused_credential()), Deferred)
        bench.make_due()
    assert bench.shown[-1]["code"] == "source_unauthorized"
    assert "ExpiredToken" in bench.shown[-1]["message"]
    assert bench.execute(lambda job, run: {"attempt": run.number}, job_id="other") == Done({"attempt": 1})
    bench.client.hset(f"{PREFIX}job:j1", "parked_ms", 0)
    last = bench.execute(refused_credential())
    assert isinstance(last, Failed)
    assert (last.error.code, bench.state()) == ("source_unauthorized", "dead")
    assert bench.ledger.replay("j1")
    assert bench.execute(lambda job, run: {"attempt": run.number}) == Done({"attempt": 1})


@pytest.mark.parametrize("kind", [SourceUnauthorized, PacsUnauthorized])
def test_a_job_that_waits_for_a_credential_goes_on_when_it_is_accepted(
    bench: JobBench, kind: type[SourceUnauthorized | PacsUnauthorized]
) -> None:
    breakers = Breakers(bench.client)
    breakers.failed("a:credential", at_once=True)
    error = kind("The credential is refused.", server_name="a")
    error.open_circuit = "a:credential"
    assert isinstance(bench.execute(error), Deferred)
    assert bench.ledger.parked() == {"a": 1}
    assert bench.ledger.wake_parked() == 0
    bench.client.delete(f"{PREFIX}breaker:a:credential")
    assert bench.ledger.wake_parked() == 1
    assert bench.execute({"status": "stored"}) == Done({"status": "stored"})


def test_a_question_does_not_wait_for_a_credential(bench: JobBench) -> None:
    def ask(job: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
        raise refused_credential("a:credential")

    services = Services(settings=bench.settings, ledger=bench.ledger, sources=cast(Any, None), fleet=cast(Any, None))
    heartbeat = Heartbeat(bench.ledger, lambda *_: None)
    result = execute(ask, task="pacs.exists", job_id="q", message={}, services=services, heartbeat=heartbeat)
    assert isinstance(result, Failed)
