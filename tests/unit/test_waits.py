"""A job that waits says why, since when and until when: every cause of waiting, to each of those who ask."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import fakeredis
import pytest

from courier import waits
from courier.errors import PacsUnavailable, SourceUnreachable
from courier.ledger.breakers import BREAKER, CHANGES, Breakers
from courier.ledger.jobs import Ledger
from courier.ledger.slots import Slots
from courier.results import Waiting
from courier.settings import PREFIX, ServerSettings, Settings
from courier.waits import Meanwhile, WaitReason, noted_in, sentence, utc, waiting_in
from producer.cli.tables import upload_row
from producer.handle import Report, newer, read_result
from sandbox.processes import poll
from worker.jobs.attempt import Attempt, Heartbeat, Postpone
from worker.jobs.runner import Deferred, JobResult, execute
from worker.jobs.services import Services
from worker.pacs.guard import Guard, circuit_open_error

JOBS = (Path(__file__).parents[2] / "docs" / "jobs.md").read_text(encoding="utf-8")
JOB = {"image_url": "http://host/a.dcm"}
SERVER = ServerSettings(name="a", type="dicomweb", url="http://127.0.0.1:1", max_concurrency=1)
NAMES = ["code", "message", "server_name", "since", "next_try"]


@dataclass
class WaitBench:
    client: fakeredis.FakeRedis
    ledger: Ledger
    shown: list[dict[str, Any]] = field(default_factory=list)
    settings: Settings = field(default_factory=lambda: Settings.model_validate({"jobs": {"max_deaths": 2}}))

    def execute(self, ends: BaseException | Callable[[Attempt], Any], job_id: str = "j1") -> JobResult:
        def work(job: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
            if isinstance(ends, BaseException):
                raise ends
            return cast(dict[str, Any], ends(attempt))

        fleet = cast(Any, None)
        services = Services(self.settings, self.ledger, cast(Any, None), fleet, rng=random.Random(1))
        heartbeat = Heartbeat(self.ledger, lambda _, meta: self.shown.append(meta), beat_s=0.01)
        return execute(work, task="pacs.upload", job_id=job_id, message=JOB, services=services, heartbeat=heartbeat)

    def waits(self, job_id: str = "j1") -> dict[str, Any] | None:
        return self.ledger.standing([job_id])[job_id].waiting

    def at_s(self, moment: str) -> float:
        return datetime.fromisoformat(moment).timestamp() - self.ledger.clock_s()

    def wake(self, job_id: str = "j1") -> None:
        self.client.zadd(f"{PREFIX}due", {job_id: 0})
        assert [due.job_id for due in self.ledger.sweep()] == [job_id]


@pytest.fixture
def bench() -> Iterator[WaitBench]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield WaitBench(client, Ledger(client))


CAUSES: dict[str, tuple[BaseException, str, str | None]] = {
    "another job": (Postpone("job j2 is storing the same image", delay_s=1, owner="j2"), "other_job", None),
    "a silent server": (PacsUnavailable("a did not answer.", server_name="a"), "pacs_unavailable", "a"),
    "its source": (SourceUnreachable("The source does not answer."), "source_unreachable", None),
    "a full spool": (SourceUnreachable("The spool is full."), "source_unreachable", None),
    "a paused batch": (Postpone("the batch is paused", delay_s=1, code="batch_paused"), "batch_paused", None),
    "a breaker": (circuit_open_error(SERVER, "a", 8), "pacs_unavailable", "a"),
    "a breaker for changes": (circuit_open_error(SERVER, f"a{CHANGES}", 8), "pacs_unavailable", "a"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_is_told_to_watchers_and_kept_in_the_ledger(bench: WaitBench, cause: str) -> None:
    error, code, server = CAUSES[cause]
    result = bench.execute(error)
    shown, kept = bench.shown[-1], bench.waits()
    assert shown["stage"] == "waiting"
    assert (shown["code"], shown["server_name"], shown["message"]) == (code, server, cast(Any, error).message)
    assert list(Waiting.model_validate(kept).model_dump()) == NAMES
    assert kept is not None
    assert [kept[name] for name in NAMES[:3]] == [shown[name] for name in NAMES[:3]]
    assert abs(bench.at_s(kept["since"])) < 5
    assert isinstance(result, Deferred)
    assert result.waiting == waiting_in(shown)
    assert shown["message"].rstrip(".") in sentence(result.waiting)


def test_no_beat_shows_a_stage_over_why_the_job_waits(bench: WaitBench, monkeypatch: pytest.MonkeyPatch) -> None:
    show = Heartbeat.show

    def shown_and_beaten(self: Heartbeat, attempt: Attempt, meta: dict[str, Any]) -> None:
        show(self, attempt, meta)
        Heartbeat._show_stage(self, attempt, 0, {})

    monkeypatch.setattr(Heartbeat, "show", shown_and_beaten)
    bench.execute(CAUSES["another job"][0])
    assert bench.shown[-1]["stage"] == "waiting"


def test_the_next_try_of_a_job_that_waits_for_a_server_is_the_end_of_its_pause(bench: WaitBench) -> None:
    bench.client.hset(f"{PREFIX}{BREAKER}a", "until_ms", int((bench.ledger.clock_s() + 8) * 1000))
    bench.execute(circuit_open_error(SERVER, "a", 8))
    for told in (bench.shown[-1], bench.waits()):
        assert told is not None
        assert 6 < bench.at_s(told["next_try"]) < 9
    bench.client.hset(
        f"{PREFIX}{BREAKER}a", "until_ms", int((bench.ledger.clock_s() + 30) * 1000)
    )  # another job has tested it
    assert 28 < bench.at_s((bench.waits() or {})["next_try"]) < 31
    bench.client.delete(f"{PREFIX}{BREAKER}a")
    assert abs(bench.at_s((bench.waits() or {})["next_try"])) < 5, "its server is well: it goes on now"


def test_it_waits_since_the_first_time_as_long_as_the_cause_is_the_same(bench: WaitBench) -> None:
    def since() -> str:
        return str((bench.waits() or {})["since"])

    bench.execute(Postpone("job j2 is at it", delay_s=0, owner="j2"))
    bench.client.hset(f"{PREFIX}job:j1", "since_ms", 1_000_000)
    first = since()
    for _ in range(2):
        bench.wake()
        bench.execute(Postpone("job j2 is at it still", delay_s=0, owner="j2"))
    assert since() == bench.shown[-1]["since"] == first == utc(1_000_000)
    bench.wake()
    bench.execute(Postpone("job j3 is at it", delay_s=0, owner="j3"))
    assert since() != first
    assert abs(bench.at_s(bench.shown[-1]["since"])) < 5


def test_waits_that_get_longer_are_foretold(bench: WaitBench) -> None:
    for _ in range(3):
        bench.execute(Postpone("job j2 is at it", delay_s=1, owner="j2"))
        bench.wake()
    bench.execute(Postpone("job j2 is at it", delay_s=1, owner="j2"))
    foretold, kept = bench.shown[-1], bench.waits()
    assert kept is not None
    assert 6 < bench.at_s(foretold["next_try"]) < 9
    assert abs(bench.at_s(foretold["next_try"]) - bench.at_s(kept["next_try"])) < 1


def test_a_job_in_its_queue_waits_for_a_worker(bench: WaitBench) -> None:
    bench.ledger.submit("j1", task="pacs.upload", job=JOB)
    assert [(bench.waits() or {})[name] for name in ("code", "next_try")] == ["queued", None]
    bench.execute(PacsUnavailable("Later."))
    assert (bench.waits() or {})["code"] == "pacs_unavailable"
    bench.wake()
    assert (bench.waits() or {})["code"] == "queued"


def test_a_job_whose_worker_is_silent_waits_for_another_one(bench: WaitBench) -> None:
    bench.ledger.take("j1", task="pacs.upload", job=JOB)
    assert bench.waits() is None
    bench.client.hset(f"{PREFIX}job:j1", "lease_ms", 1000)
    assert (bench.waits() or {})["code"] == "worker_lost"


def test_a_job_beside_one_that_crashed_a_worker_says_which(bench: WaitBench) -> None:
    for job_id in ("j1", "j2"):
        bench.ledger.take(job_id, task="pacs.upload", job={**JOB, "server": job_id})
        bench.client.hset(f"{PREFIX}job:{job_id}", "lease_ms", 0)
    bench.ledger.take("j1", task="pacs.upload", job={**JOB, "server": "j1"}, max_deaths=2)
    bench.ledger.take("j2", task="pacs.upload", job={**JOB, "server": "j2"}, max_deaths=2)
    waits = bench.waits("j2") or {}
    assert waits["code"] == "crash_suspect"
    assert waits["message"].endswith("job j1")


def test_a_job_that_has_ended_or_runs_does_not_wait(bench: WaitBench) -> None:
    assert bench.execute(lambda run: {"waits": bench.waits()}) is not None
    assert bench.waits() is None
    bench.execute(PacsUnavailable("Later."), "j2")
    bench.wake("j2")
    bench.execute(lambda run: {"done": True}, "j2")
    assert bench.waits("j2") is None
    assert not {"cause", "since_ms", "server", "message"} & bench.ledger.read_record("j2").keys()


def test_a_full_server_is_named_while_a_running_job_waits_for_a_slot(bench: WaitBench) -> None:
    guard = Guard(Breakers(bench.client), Slots(bench.client), [SERVER])
    holds, lets_go = threading.Event(), threading.Event()

    def hold() -> None:
        with guard.call(SERVER, changes=False):
            holds.set()
            lets_go.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    assert holds.wait(10)

    def work(attempt: Attempt) -> dict[str, Any]:
        with attempt.step("check"), guard.call(SERVER, changes=False):
            poll(lambda: bench.shown[-1]["stage"] == "check", timeout_s=10, every_s=0.01)
        return {}

    job = threading.Thread(target=bench.execute, args=(work,))
    job.start()
    assert poll(lambda: bool(bench.shown), timeout_s=10, every_s=0.01)
    first = bench.shown[-1]
    lets_go.set()
    holder.join()
    job.join()
    assert (first["stage"], first["code"], first["server_name"]) == ("waiting", "server_busy", "a")
    assert "1 requests in flight" in first["message"]
    assert bench.shown[-1]["stage"] == "check", "it waits no longer"


def test_what_waits_on_several_threads_is_told_as_the_first_of_them() -> None:
    meanwhile = Meanwhile()
    with noted_in(meanwhile):
        assert meanwhile.now() is None
    with meanwhile.waits(WaitReason("a", "A")), meanwhile.waits(WaitReason("b", "B")):
        now = meanwhile.now()
        assert now is not None
        assert now[0] == WaitReason("a", "A")
    assert meanwhile.now() is None


# --- what a program and a person read -------------------------------------------------------------------------------

OLD = {"status": "PROGRESS", "result": {"stage": "waiting", "attempt": 1, "code": "pacs_unavailable", "message": "No."}}


def test_the_entry_of_a_worker_of_version_0_1_can_be_read() -> None:
    report = read_result(OLD)
    assert (report.status, report.stage) == ("waiting", "waiting")
    waits = {"code": "pacs_unavailable", "message": "No.", "server_name": None, "since": None, "next_try": None}
    assert report.waiting == waits
    assert upload_row("", "j1", report).waits == "waiting: No"


def test_an_entry_is_what_version_0_1_reads_too(bench: WaitBench) -> None:
    bench.execute(Postpone("job j2 is at it", delay_s=1, owner="j2"))
    shown = bench.shown[-1]
    assert (str(shown["stage"]), shown["attempt"]) == ("waiting", 1)
    assert {"code", "message"} <= shown.keys()


@pytest.mark.parametrize(
    ("left_s", "then"),
    [(8, "; next try in 8 s"), (0.2, "; next try in 1 s"), (-3, "; next try is due"), (None, "")],
)
def test_a_person_reads_for_whom_since_when_why_and_until_when(left_s: float | None, then: str) -> None:
    now_s = time.mktime((2026, 1, 2, 12, 30, 0, 0, 0, -1))
    reason = WaitReason("pacs_unavailable", "dcm4chee failed on its last requests (circuit breaker open).", "dcm4chee")
    next_ms = None if left_s is None else (now_s + left_s) * 1000
    waiting = reason.as_json(since_ms=(now_s - 27 * 60) * 1000, next_ms=next_ms)
    why = "dcm4chee failed on its last requests (circuit breaker open)"
    assert sentence(waiting, now_s=now_s) == f"waiting for dcm4chee since 12:03: {why}{then}"


def test_a_long_wait_is_told_with_its_date() -> None:
    now_s = time.mktime((2026, 1, 2, 12, 30, 0, 0, 0, -1))
    waiting = WaitReason("batch_window", "closed").as_json(
        since_ms=(now_s - 86_400) * 1000, next_ms=(now_s + 7200) * 1000
    )
    assert sentence(waiting, now_s=now_s) == "waiting since 2026-01-01 12:30: closed; next try at 14:30"


def test_without_a_clock_times_stay_as_they_are() -> None:
    waiting = WaitReason("other_job", "job j2 is at it").as_json(since_ms=0, next_ms=1000)
    assert sentence(waiting) == (
        "waiting since 1970-01-01T00:00:00.000Z: job j2 is at it; next try at 1970-01-01T00:00:01.000Z"
    )
    assert utc(datetime(2026, 1, 1, tzinfo=UTC).timestamp() * 1000) == "2026-01-01T00:00:00.000Z"


QUEUED = Report("queued", "queued", waiting={"code": "queued"})
RUNNING = Report("running", "started")
FETCHES = Report("running", "fetch")
WAITED = Report("waiting", "waiting", waiting={"code": "other_job"})
BUSY = Report("waiting", "waiting", waiting={"code": "server_busy"})
UNKNOWN = Report("unknown", "unknown")


@pytest.mark.parametrize(
    ("stored", "known", "told"),
    [
        (None, QUEUED, QUEUED),
        (None, UNKNOWN, UNKNOWN),
        (WAITED, UNKNOWN, WAITED),
        (WAITED, QUEUED, QUEUED),
        (WAITED, RUNNING, RUNNING),
        (FETCHES, RUNNING, FETCHES),
        (BUSY, RUNNING, BUSY),
        (FETCHES, WAITED, WAITED),
    ],
)
def test_the_ledger_tells_whether_an_entry_is_outdated(stored: Report | None, known: Report, told: Report) -> None:
    assert newer(stored, known) is told


def test_every_code_is_told_in_the_docs() -> None:
    codes = {value for name, value in vars(waits).items() if name.isupper() and isinstance(value, str)} - {waits.WOKEN}
    assert {code for code in codes if f"`{code}`" not in JOBS} == set()


def test_every_code_of_a_wait_is_listed() -> None:
    codes = {value for name, value in vars(waits).items() if name.isupper() and isinstance(value, str)} - {waits.WOKEN}
    assert codes == waits.WAIT_CODES
