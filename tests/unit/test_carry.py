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
from courier.ledger.jobs import PREFIX, ClaimState, DueJob, LeaseLost, Ledger, job_id_for
from courier.messages import MESSAGE_BYTES
from courier.settings import JobSettings, Settings
from sandbox.processes import poll
from worker.jobs.attempt import NotYet, Pulse, Run
from worker.jobs.idempotency import follow
from worker.jobs.runner import Done, Failed, NotTaken, Parked, Starved, Verdict, backoff_s, carry
from worker.jobs.services import Tools
from worker.runtime.shortage import MAX_RETURNS

JOB = {"image_url": "http://host/a.dcm?sig=SECRET"}


@dataclass
class Desk:
    """A worker's desk: what it works on, and what watchers were shown."""

    client: fakeredis.FakeRedis
    ledger: Ledger
    shown: list[dict[str, Any]] = field(default_factory=list)
    settings: Settings = field(
        default_factory=lambda: Settings.model_validate({"jobs": {"max_attempts": 3, "max_deaths": 2}})
    )

    def carry(
        self, ends: object, job_id: str = "j1", job: Mapping[str, Any] = JOB, task: str = "pacs.upload"
    ) -> Verdict:
        def work(job: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
            if isinstance(ends, BaseException):
                raise ends
            return cast(dict[str, Any], ends(job, run) if callable(ends) else ends)

        tools = Tools(
            settings=self.settings,
            ledger=self.ledger,
            sources=cast(Any, None),
            fleet=cast(Any, None),
            rng=random.Random(1),
        )
        pulse = Pulse(self.ledger, lambda _, meta: self.shown.append(meta))
        return carry(work, task=task, job_id=job_id, message=job, tools=tools, pulse=pulse)

    def state(self, job_id: str = "j1") -> str:
        return self.ledger.look(job_id)["state"]

    def make_due(self, job_id: str = "j1") -> None:
        self.client.zadd(f"{PREFIX}due", {job_id: 0})
        self.ledger.sweep()

    def die(self, job_id: str = "j1") -> None:
        """The worker is killed in the middle of the job."""
        self.ledger.claim(job_id, task="pacs.upload", job=JOB)
        self.client.hset(f"{PREFIX}job:{job_id}", "lease_ms", 0)


@pytest.fixture
def desk() -> Iterator[Desk]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield Desk(client, Ledger(client))


def test_what_is_done_is_done_once(desk: Desk) -> None:
    assert desk.carry({"status": "stored"}) == Done({"status": "stored"})
    assert desk.carry(AssertionError("the work must not run again")) == Done({"status": "stored"})


def test_a_refusal_ends_the_job_and_is_given_again(desk: Desk) -> None:
    refused = desk.carry(NotDicom("No."))
    again = desk.carry({"status": "stored"})
    assert isinstance(refused, Failed)
    assert isinstance(again, Failed)
    assert again.error.payload == refused.error.payload
    assert desk.state() == "done"


def test_what_may_be_cured_by_time_is_parked_then_buried(desk: Desk) -> None:
    assert isinstance(desk.carry(PacsUnavailable("Later.")), Parked)
    assert desk.state() == "waiting"
    (shown,) = desk.shown
    assert {name: shown[name] for name in ("stage", "attempt", "code", "message", "server_name")} == {
        "stage": "waiting",
        "attempt": 1,
        "code": "pacs_unavailable",
        "message": "Later.",
        "server_name": None,
    }
    desk.make_due()
    assert isinstance(desk.carry(PacsUnavailable("Later.")), Parked)
    desk.make_due()
    last = desk.carry(PacsUnavailable("Later."))
    assert isinstance(last, Failed)
    assert last.error.code == "pacs_unavailable"
    assert desk.state() == "dead"


def test_what_needs_a_person_is_a_dead_letter_at_once(desk: Desk) -> None:
    assert isinstance(desk.carry(PacsUnauthorized("Log in.")), Failed)
    assert desk.state() == "dead"


def test_waiting_for_another_job_is_no_attempt(desk: Desk) -> None:
    for _ in range(5):
        assert isinstance(desk.carry(NotYet("j2 is at it", delay_s=0)), Parked)
        desk.make_due()
    assert desk.carry(lambda job, run: {"attempt": run.attempt}) == Done({"attempt": 1})


def test_a_fault_of_ours_is_tried_again_and_says_neither_url_nor_patient(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        verdict = desk.carry(ValueError(f"bad {JOB['image_url']}"))
        desk.make_due()
    assert isinstance(verdict, Failed)
    assert verdict.error.code == "poisoned"
    assert "SECRET" not in caplog.text + str(verdict.error.payload)
    assert "ValueError" in caplog.text


def test_work_that_kills_its_worker_is_poison(desk: Desk) -> None:
    desk.die()
    desk.die()
    verdict = desk.carry({"status": "stored"})
    assert isinstance(verdict, Failed)
    assert (verdict.error.code, desk.state()) == ("poisoned", "dead")


def test_a_holder_that_comes_late_ends_in_silence(desk: Desk) -> None:
    def overtaken(job: Mapping[str, Any], run: Run) -> dict[str, Any]:
        desk.client.hset(f"{PREFIX}job:j1", "lease_ms", 0)
        desk.ledger.claim("j1", task="pacs.upload", job=JOB)
        return {"by": "the late one"}

    assert desk.carry(overtaken) == Parked()
    assert desk.state() == "running"
    assert desk.carry(LeaseLost(), "j9") == Parked()


def body_of_a_wake_up(due: DueJob) -> bytes:
    with Celery(broker="memory://", set_as_current=False) as app, app.connection_for_write() as connection:
        app.send_task(due.task, kwargs={"job": due.job}, task_id=due.job_id, queue="q", connection=connection)
        return bytes(connection.SimpleQueue("q").get(timeout=5).body)


def test_a_job_that_could_not_be_woken_is_refused_before_it_begins_and_one_that_just_can_is_not(desk: Desk) -> None:
    def job(characters: int) -> dict[str, Any]:
        return {**JOB, "note": "ä" * characters}

    most = (MESSAGE_BYTES - 128 - len(json.dumps(job(0)))) // len(json.dumps("ä")[1:-1])
    assert isinstance(desk.carry(PacsUnavailable("Later."), "fits", job(most)), Parked)
    desk.client.zadd(f"{PREFIX}due", {"fits": 0})
    (due,) = desk.ledger.sweep()
    assert MESSAGE_BYTES - 100 < len(body_of_a_wake_up(due)) <= MESSAGE_BYTES
    verdict = desk.carry(AssertionError("the work must not run"), "does not", job(most + 1))
    assert isinstance(verdict, Failed)
    assert (verdict.error.code, desk.state("does not")) == ("invalid_request", "done")


def test_a_cancelled_job_does_no_work(desk: Desk) -> None:
    desk.ledger.submit("j1", task="pacs.upload", job=JOB)
    desk.ledger.cancel("j1")
    verdict = desk.carry(AssertionError("the work must not run"))
    assert isinstance(verdict, Failed)
    assert verdict.error.code == "cancelled"


def test_a_job_whose_push_may_have_arrived_is_not_called_cancelled(desk: Desk) -> None:
    fence = desk.ledger.claim("j1", task="pacs.upload", job=JOB).fence
    desk.ledger.intend("j1", fence, {"uncertain": True})
    desk.client.hset(f"{PREFIX}job:j1", "lease_ms", 0)
    desk.ledger.cancel("j1")
    assert desk.carry(lambda job, run: run.memo) == Done({"uncertain": True})


def test_a_second_wish_under_one_key_fails_when_the_first_is_a_dead_letter(desk: Desk) -> None:
    first, wish = job_id_for("order-7"), {**JOB, "idempotency_key": "order-7"}
    desk.ledger.submit("j2", task="pacs.upload", job=JOB)  # before the first has ended: later, it is tried again
    for _ in range(3):
        desk.carry(PacsUnavailable("Later."), first, wish)
        desk.make_due(first)
    tools = cast(Tools, SimpleNamespace(ledger=desk.ledger))
    verdict = desk.carry(lambda _, run: follow("pacs.upload", wish, run, tools), "j2")
    assert isinstance(verdict, Failed)
    assert verdict.error.code == "pacs_unavailable"


@pytest.mark.parametrize(
    ("task", "other"),
    [("pacs.delete", {}), ("pacs.upload", {"image_url": "http://host/b.dcm"}), ("pacs.upload", {"server": "a"})],
)
def test_another_wish_under_one_key_is_refused_and_not_answered_with_the_outcome_of_the_first(
    desk: Desk, task: str, other: dict[str, Any]
) -> None:
    first, wish = job_id_for("order-7"), {**JOB, "idempotency_key": "order-7"}
    desk.ledger.submit(first, task="pacs.upload", job=wish)
    assert desk.carry({"status": "stored"}, first, wish) == Done({"status": "stored"})
    tools = cast(Tools, SimpleNamespace(ledger=desk.ledger))

    def ask(task: str, job_id: str, **other: Any) -> Verdict:
        return desk.carry(lambda _, run: follow(task, {**wish, **other}, run, tools), job_id)

    verdict = ask(task, "j2", **other)
    assert isinstance(verdict, Failed)
    assert verdict.error.code == "invalid_request"
    assert first in verdict.error.message
    resigned = {"version": 1, "server": None, "image_url": "http://host/a.dcm?sig=ANEW"}
    assert ask("pacs.upload", "j3", **resigned) == Done({"status": "stored"})


@pytest.mark.parametrize(
    "pattern",
    ["s3://imgs/order?{}.dcm", "az://imgs/order#{}.dcm", "zip+https://host/all.zip?sig=x!/{}.dcm"],
)
def test_an_object_is_never_answered_with_the_outcome_of_another_one_whose_url_begins_alike(
    desk: Desk, pattern: str
) -> None:
    one, two = ({"image_url": pattern.format(number), "idempotency_key": "order-7"} for number in (1, 2))
    first = job_id_for("order-7")
    desk.ledger.submit(first, task="pacs.upload", job=one)
    assert desk.carry({"status": "stored"}, first, one) == Done({"status": "stored"})
    tools = cast(Tools, SimpleNamespace(ledger=desk.ledger))
    verdict = desk.carry(lambda _, run: follow("pacs.upload", two, run, tools), "j2")
    assert isinstance(verdict, Failed)
    assert verdict.error.code == "invalid_request"


def test_a_message_is_given_back_when_the_ledger_cannot_be_asked(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise redis.ConnectionError

    monkeypatch.setattr(desk.ledger, "claim", unreachable)
    assert desk.carry(AssertionError("the work must not run")) == NotTaken()


def test_an_overtaken_attempt_shows_nothing_over_its_successors_result(desk: Desk) -> None:
    def overtaken(job: Mapping[str, Any], run: Run) -> dict[str, Any]:
        desk.client.hset(f"{PREFIX}job:j1", "lease_ms", 0)
        assert isinstance(desk.carry(NotDicom("No.")), Failed)
        raise PacsUnavailable("Later.")

    assert desk.carry(overtaken) == Parked()
    assert desk.shown == []


def a_run(ledger: Ledger) -> Run:
    claim = ledger.claim("j1", task="pacs.upload", job=JOB)
    return Run("j1", claim.fence, claim.attempt, last=False, ledger=ledger, stage="push")


def test_two_attempts_at_one_job_in_one_process_do_not_end_each_others_pulse(desk: Desk) -> None:
    pulse = Pulse(desk.ledger, lambda *_: None)
    with contextlib.ExitStack() as second, pulse.beating(a_run(desk.ledger)):
        desk.client.hset(f"{PREFIX}job:j1", "lease_ms", 0)
        second.enter_context(pulse.beating(a_run(desk.ledger)))


def test_a_result_backend_that_hangs_costs_no_lease(desk: Desk) -> None:
    ledger, back = Ledger(desk.client, lease_s=0.3), threading.Event()
    run = a_run(ledger)
    until_ms = int(ledger.look("j1")["lease_ms"])
    with Pulse(ledger, lambda *_: cast(None, back.wait(10)), beat_s=0.01).beating(run):
        try:
            assert poll(lambda: int(ledger.look("j1")["lease_ms"]) > until_ms + 300, timeout_s=5)
        finally:
            back.set()


def test_a_stage_that_cannot_be_shown_leaves_the_next_one_to_be_shown(desk: Desk) -> None:
    shown: list[str] = []

    def publish(_: str, meta: dict[str, Any]) -> None:
        shown.append(meta["stage"])
        raise OSError(len(shown))

    run = a_run(desk.ledger)
    with Pulse(desk.ledger, publish, beat_s=0.01).beating(run):
        assert poll(lambda: shown == ["push"], timeout_s=5)
        run.stage = "describe"
        assert poll(lambda: shown == ["push", "describe"], timeout_s=5)


def test_what_the_other_side_asked_for_is_waited_for(desk: Desk) -> None:
    desk.carry(PacsUnavailable("Busy.", retry_after_s=500))
    due, now_s = desk.client.zscore(f"{PREFIX}due", "j1"), desk.ledger.clock_s()
    assert due is not None
    assert 490 < due / 1000 - now_s <= 501


def too_fast(after_s: float | None) -> PacsUnavailable:
    error = PacsUnavailable("a asks for fewer requests.", server_name="a", retry_after_s=after_s)
    error.slow_down = True
    return error


@pytest.mark.parametrize("task", ["pacs.upload", "pacs.exists", "pacs.metadata", "pacs.list_studies", "pacs.delete"])
def test_a_request_to_slow_down_costs_no_attempt_however_often_it_comes(desk: Desk, task: str) -> None:
    for _ in range(desk.settings.jobs.max_attempts + 3):
        desk.carry(too_fast(30), task=task)
        record = desk.ledger.look("j1")
        assert (record["state"], record["attempts"], record["code"]) == ("waiting", "0", "pacs_unavailable")
        assert record["server"] == "a"
        desk.make_due()
    due = desk.client.zscore(f"{PREFIX}due", "j1")
    assert due is not None


@pytest.mark.parametrize(
    ("after_s", "delay_s"), [(30, 30), (None, 1), (0, 0), (math.inf, 660)], ids=["30", "none", "0", "endless"]
)
def test_the_job_waits_as_long_as_was_decided_for_its_server(desk: Desk, after_s: float | None, delay_s: float) -> None:
    desk.carry(too_fast(after_s))
    due = desk.client.zscore(f"{PREFIX}due", "j1")
    assert due is not None
    assert due / 1000 - desk.ledger.clock_s() == pytest.approx(delay_s, abs=1)


def test_waiting_for_a_slow_server_has_an_end(desk: Desk) -> None:
    desk.carry(too_fast(30))
    desk.client.hincrby(f"{PREFIX}job:j1", "parked_ms", -int((desk.settings.jobs.max_wait_s - 5) * 1000))
    desk.make_due()
    desk.carry(too_fast(30))
    due = desk.client.zscore(f"{PREFIX}due", "j1")
    assert due is not None
    assert due / 1000 - desk.ledger.clock_s() < 6, "it looks once more when the time is over"
    desk.client.hincrby(f"{PREFIX}job:j1", "parked_ms", -6000)
    desk.make_due()
    verdict = desk.carry(too_fast(30))
    assert isinstance(verdict, Failed)
    assert (verdict.error.code, desk.state()) == ("pacs_unavailable", "dead")


def test_the_wait_for_a_slow_server_says_so_with_the_server_and_the_next_try(desk: Desk) -> None:
    desk.carry(too_fast(30))
    wait = desk.ledger.standing(["j1"])["j1"].waiting
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


def test_a_shutdown_that_cannot_wait_leaves_the_job_to_others_at_once_and_counts_no_death(desk: Desk) -> None:
    pulse = Pulse(desk.ledger, lambda _, meta: desk.shown.append(meta))
    tools = Tools(desk.settings, desk.ledger, sources=cast(Any, None), fleet=cast(Any, None))

    def work(job: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
        assert pulse.let_go() == 1
        return {"status": "too late"}

    assert carry(work, task="pacs.upload", job_id="j1", message=JOB, tools=tools, pulse=pulse) == Parked()
    assert desk.state() == "waiting"
    assert [due.job_id for due in desk.ledger.sweep()] == ["j1"]
    claim = desk.ledger.claim("j1", task="pacs.upload", job=JOB, max_deaths=2)
    assert (claim.state, claim.attempt, claim.deaths) == (ClaimState.YOURS, 1, 0)
    assert pulse.let_go() == 0


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
    desk: Desk, state: str, other: dict[str, Any]
) -> None:
    if state in ("queued", "held"):
        desk.ledger.submit("order/7", task="pacs.upload", job=JOB)
    if state == "held":
        desk.ledger.claim("order/7", task="pacs.upload", job=JOB)
    if state in ("done", "dead", "waiting"):
        ends = {"done": {"status": "stored"}, "dead": PacsUnauthorized("No."), "waiting": PacsUnavailable("Later.")}
        desk.carry(ends[state], "order/7")
    before = desk.ledger.look("order/7")
    verdict = desk.carry(AssertionError("the work must not run"), "order/7", other)
    assert isinstance(verdict, Failed)
    assert verdict.error.code == "invalid_request"
    assert "order/7" in verdict.error.message
    assert desk.ledger.look("order/7") == before


def test_the_message_that_has_an_outcome_told_bears_nothing_of_the_job_and_is_no_other_one(desk: Desk) -> None:
    desk.carry({"status": "stored"})
    desk.client.zadd(f"{PREFIX}due", {"j1": 0})
    (due,) = desk.ledger.sweep()
    assert due.job == {}
    assert desk.carry(AssertionError("the work must not run"), "j1", due.job) == Done({"status": "stored"})


def test_the_same_job_under_one_id_ends_as_it_ended_also_when_its_url_is_signed_anew(desk: Desk) -> None:
    assert desk.carry({"status": "stored"}, "order/7") == Done({"status": "stored"})
    again = {"version": 1, "server": None, "image_url": "http://host/a.dcm?sig=ANEW"}
    assert desk.carry(AssertionError("the work must not run"), "order/7", again) == Done({"status": "stored"})


SHORTAGES = {
    "no thread": RuntimeError("can't start new thread"),
    "no memory": MemoryError(),
    "no file": OSError(24, "Too many open files"),
}


@pytest.mark.parametrize("error", SHORTAGES.values(), ids=SHORTAGES)
def test_a_worker_without_threads_or_memory_takes_none_of_a_jobs_attempts(desk: Desk, error: Exception) -> None:
    for _ in range(5):
        assert isinstance(desk.carry(error), Starved)
        assert (desk.state(), desk.ledger.look("j1")["attempts"]) == ("waiting", "0")
        desk.make_due()
    assert desk.carry({"status": "stored"}) == Done({"status": "stored"})


def test_a_job_that_starves_while_others_are_done_is_a_dead_letter(desk: Desk) -> None:
    for number in range(MAX_RETURNS - 1):
        desk.carry({"status": "stored"}, f"other-{number}")
        assert isinstance(desk.carry(MemoryError()), Starved)
        desk.make_due()
    desk.carry({"status": "stored"}, "one more")
    verdict = desk.carry(MemoryError())
    assert isinstance(verdict, Failed)
    assert (verdict.error.code, desk.state()) == ("poisoned", "dead")


def test_a_fault_that_is_no_shortage_takes_an_attempt_as_before(desk: Desk) -> None:
    assert not isinstance(desk.carry(RuntimeError("dictionary changed size")), Starved)
    assert desk.ledger.look("j1")["attempts"] == "1"


def refused_credential(breaker: str = "credential:sources.s3") -> SourceUnauthorized:
    error = SourceUnauthorized("The store refuses the worker's credentials (ExpiredToken).")
    error.resting = breaker
    return error


def test_a_job_whose_credential_is_refused_waits_without_using_up_attempts_then_is_a_dead_letter(desk: Desk) -> None:
    Breakers(desk.client).failed("credential:sources.s3", at_once=True, reason="ExpiredToken")
    for _ in range(desk.settings.jobs.max_attempts + 2):
        assert isinstance(desk.carry(refused_credential()), Parked)
        desk.make_due()
    assert desk.shown[-1]["code"] == "source_unauthorized"
    assert "ExpiredToken" in desk.shown[-1]["message"]
    assert desk.carry(lambda job, run: {"attempt": run.attempt}, job_id="other") == Done({"attempt": 1})
    desk.client.hset(f"{PREFIX}job:j1", "parked_ms", 0)
    last = desk.carry(refused_credential())
    assert isinstance(last, Failed)
    assert (last.error.code, desk.state()) == ("source_unauthorized", "dead")
    assert desk.ledger.replay("j1")
    assert desk.carry(lambda job, run: {"attempt": run.attempt}) == Done({"attempt": 1})


@pytest.mark.parametrize("kind", [SourceUnauthorized, PacsUnauthorized])
def test_a_job_that_waits_for_a_credential_goes_on_when_it_is_accepted(
    desk: Desk, kind: type[SourceUnauthorized | PacsUnauthorized]
) -> None:
    breakers = Breakers(desk.client)
    breakers.failed("a:credential", at_once=True)
    error = kind("The credential is refused.", server_name="a")
    error.resting = "a:credential"
    assert isinstance(desk.carry(error), Parked)
    assert desk.ledger.parked() == {"a": 1}
    assert desk.ledger.wake_parked() == 0
    desk.client.delete(f"{PREFIX}breaker:a:credential")
    assert desk.ledger.wake_parked() == 1
    assert desk.carry({"status": "stored"}) == Done({"status": "stored"})


def test_a_question_does_not_wait_for_a_credential(desk: Desk) -> None:
    def ask(job: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
        raise refused_credential("a:credential")

    tools = Tools(settings=desk.settings, ledger=desk.ledger, sources=cast(Any, None), fleet=cast(Any, None))
    pulse = Pulse(desk.ledger, lambda *_: None)
    verdict = carry(ask, task="pacs.exists", job_id="q", message={}, tools=tools, pulse=pulse)
    assert isinstance(verdict, Failed)
