"""A revoke cancels in the ledger, whatever it looks like; Celery's own list of revoked ids ends no job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import fakeredis
import pytest
import redis
from celery.worker import state
from celery.worker.control import Panel

from courier.batches.store import Batches
from courier.errors import PacsUnavailable
from courier.ledger.jobs import Ledger, TakeState
from courier.settings import PREFIX
from producer.errors import Cancelled
from producer.handle import read_result
from tests.unit.test_carry import JOB, JobBench
from worker.jobs.attempt import Postpone
from worker.jobs.runner import Deferred, Failed
from worker.runtime import revokes

TASK = "pacs.upload"


@dataclass
class FakeCanceller:
    """Notes what it is asked for; answers, or is away."""

    answer: str = ""
    away: bool = False
    asked: list[tuple[object, ...]] = field(default_factory=list)

    def job(self, job_id: str, *, unless_taken: bool = False) -> str:
        self._ask("job", job_id, unless_taken)
        return self.answer

    def stamps(self, header: str, values: Any) -> None:
        self._ask("stamps", header, tuple(values))

    def _ask(self, *what: object) -> None:
        if self.away:
            raise redis.ConnectionError("away")
        self.asked.append(what)


@dataclass
class TakenRequest:
    """What a worker has in hand."""

    id: str = "j1"
    expires: datetime | None = None
    stamped_headers: list[str] = field(default_factory=list)
    stamps: dict[str, Any] = field(default_factory=dict)
    given_back: int = 0

    def __hash__(self) -> int:
        return hash(self.id)

    def reject(self, *, requeue: bool) -> None:
        assert requeue
        self.given_back += 1


@pytest.fixture
def canceller(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCanceller]:
    there = FakeCanceller()
    monkeypatch.setattr(revokes, "_canceller", there)
    monkeypatch.setattr(revokes, "PAUSE_S", 0)
    yield there
    state.reset_state()


@pytest.fixture
def bench() -> Iterator[JobBench]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield JobBench(client, Ledger(client))


def test_celerys_commands_are_ours() -> None:
    import worker.app  # noqa: F401, PLC0415  # installs them

    mine = {name: Panel.data[name] for name in ("revoke", "terminate", "revoke_by_stamped_headers")}
    assert mine == {name: getattr(revokes, name) for name in mine}
    assert Panel.meta["revoke"].variadic == "task_id"


@pytest.mark.parametrize(
    ("task_id", "job_ids"),
    [
        ("j1", ["j1"]),
        (["j1", "j2", "j1"], ["j1", "j2"]),
        ("Bestellung-ü", ["Bestellung-ü"]),
        (None, []),
        (7, []),
        ({"a": 1}, []),
        (["j1", 5, None, "!mark", "line\nbreak", "x" * 256, ""], ["j1"]),
    ],
)
def test_ids_are_taken_as_celery_takes_them_and_what_is_none_is_left_out(
    canceller: FakeCanceller, task_id: object, job_ids: list[str]
) -> None:
    assert "ok" in revokes.revoke(None, task_id)
    assert canceller.asked == [("job", job_id, False) for job_id in job_ids]
    assert len(state.revoked) == 0


def test_terminate_says_that_it_kills_nothing(canceller: FakeCanceller, caplog: pytest.LogCaptureFixture) -> None:
    revokes.terminate(None, "SIGKILL", ["j1"])
    assert canceller.asked == [("job", "j1", False)]
    assert "not killed" in caplog.text


def test_a_revoke_that_the_ledger_does_not_take_is_refused_and_done_when_its_message_is_seen(
    canceller: FakeCanceller,
) -> None:
    canceller.away = True
    assert "send it again" in revokes.revoke(None, "j1")["error"]
    request = TakenRequest()
    assert revokes.heed(cast(Any, request))
    assert request.given_back == 1, "it might begin before the ledger is there"
    canceller.away = False
    assert not revokes.heed(cast(Any, request))
    assert canceller.asked == [("job", "j1", False)]
    assert not revokes.heed(cast(Any, request)), "a job that is sent again later is not cancelled anew"
    assert len(canceller.asked) == 1


def test_an_expired_message_cancels_a_job_that_no_worker_has_begun(canceller: FakeCanceller) -> None:
    now = datetime.now(UTC)
    assert not revokes.heed(cast(Any, TakenRequest(expires=now + timedelta(hours=1))))
    assert canceller.asked == []
    assert not revokes.heed(cast(Any, TakenRequest(expires=now - timedelta(seconds=1))))
    assert canceller.asked == [("job", "j1", True)]
    assert len(state.revoked) == 0


@pytest.mark.parametrize("headers", [{"order": "7"}, {"order": ["7", "8"]}, {"order": 7}, ["order=7"]])
def test_stamps_are_cancelled_here_and_wherever_they_come(canceller: FakeCanceller, headers: Any) -> None:
    mine = TakenRequest("mine", stamped_headers=["order"], stamps={"order": ["7"]})
    other = TakenRequest("other", stamped_headers=["order"], stamps={"order": "9"})
    bare = TakenRequest("bare")
    state.requests.update({one.id: one for one in (mine, other, bare)})
    revokes.revoke_by_stamped_headers(None, headers)
    assert canceller.asked[0][:2] == ("stamps", "order")
    assert canceller.asked[1:] == [("job", "mine", False)]


@pytest.mark.parametrize("headers", [None, 5, "order=7", [5], {"order": None}, {"order": {}}, {5: "x"}])
def test_stamps_of_the_wrong_kind_are_left_out(canceller: FakeCanceller, headers: object) -> None:
    revokes.revoke_by_stamped_headers(None, headers)
    assert canceller.asked == []
    assert revokes.stamps_of(SimpleNamespace(stamped_headers=headers, stamps=headers)) == []


# --- in the ledger --------------------------------------------------------------------------------------------------


def test_an_unknown_id_is_marked_and_ends_when_its_message_comes(bench: JobBench) -> None:
    assert bench.ledger.cancel("j1", mark=True) == ""
    assert 5 * 3600 < bench.client.ttl(f"{PREFIX}cancelled:j1") <= 86_400
    ended = bench.execute(AssertionError("it must not be done"))
    assert isinstance(ended, Failed)
    assert ended.error.code == "cancelled"
    assert bench.client.keys(f"{PREFIX}cancelled:*") == []
    again = bench.execute(AssertionError("it must not be done"))
    assert isinstance(again, Failed)
    assert again.error.payload == ended.error.payload


def test_a_job_that_is_written_down_after_its_revoke_ends_too(bench: JobBench) -> None:
    bench.ledger.cancel("j1", mark=True)
    bench.ledger.submit("j1", task=TASK, job=JOB)
    assert isinstance(bench.execute(AssertionError("it must not be done")), Failed)


def test_without_a_mark_an_unknown_id_leaves_nothing(bench: JobBench) -> None:
    assert bench.ledger.cancel("j1") == ""
    assert bench.client.keys() == []


def test_many_workers_that_hear_the_same_cause_one_message(bench: JobBench) -> None:
    bench.execute(PacsUnavailable("Later."))
    sent = []
    for _ in range(48):
        assert bench.ledger.cancel("j1", mark=True) == "waiting"
        sent += bench.ledger.sweep()
    assert len(sent) == 1


@pytest.mark.parametrize("ends", [PacsUnavailable("Later."), Postpone("job j2 is at it", delay_s=8, owner="j2")])
def test_a_job_that_is_cancelled_in_an_attempt_which_has_begun_nothing_ends_at_once(
    bench: JobBench, ends: BaseException
) -> None:
    def cancelled(job: object, run: object) -> dict[str, Any]:
        bench.ledger.cancel("j1")
        raise ends

    assert isinstance(bench.execute(cancelled), Deferred)
    assert [due.job_id for due in bench.ledger.sweep()] == ["j1"]
    assert isinstance(bench.execute(AssertionError("it must not be done")), Failed)


def test_a_dead_letter_is_not_touched_and_can_be_replayed(bench: JobBench) -> None:
    taken = bench.ledger.take("j1", task=TASK, job=JOB)
    error = {"code": "poisoned", "message": "…"}
    bench.ledger.end_as_dead_letter("j1", taken.fence, outcome={"error": error}, code="poisoned", task=TASK, job=JOB)
    assert bench.ledger.cancel("j1", mark=True) == "dead"
    assert bench.client.keys(f"{PREFIX}cancelled:*") == []
    assert bench.ledger.replay("j1") is not None
    assert not bench.ledger.take("j1", task=TASK, job=JOB).cancelled


def test_a_replay_takes_a_revoke_back_as_it_takes_a_cancellation_back(bench: JobBench) -> None:
    taken = bench.ledger.take("j1", task=TASK, job=JOB)
    bench.ledger.cancel("j1", mark=True)
    bench.ledger.end_as_dead_letter("j1", taken.fence, outcome={"error": {}}, code="poisoned", task=TASK, job=JOB)
    bench.ledger.replay("j1")
    assert not bench.ledger.take("j1", task=TASK, job=JOB).cancelled


def test_stamps_are_known_for_as_long_as_results_are_kept(bench: JobBench) -> None:
    bench.ledger.cancel_stamped("order", ["7", "8"])
    known = bench.ledger.is_cancelled_by_stamp
    assert known([("other", "7"), ("order", "8")])
    assert not known([("order", "9"), ("orde", "r7")])
    assert not known([])
    key = f"{PREFIX}cancelled_stamps"
    for member in cast(list[str], bench.client.zrange(key, 0, -1)):
        bench.client.zincrby(key, -90_000_000, member)
    assert not known([("order", "7")])
    bench.ledger.cancel_stamped("order", ["10"])
    assert bench.client.zcard(key) == 1


def test_a_batch_is_never_cancelled_by_halves(bench: JobBench) -> None:
    batches = Batches(bench.ledger)
    batches.open("B", kind="delete", order={}, concurrency=1)
    bench.ledger.take("B", task="pacs.batch.delete", job={})
    batches.take("B", "B")
    chunk = {"batch_id": "B", "pass": "apply", "chunk": 0}
    bench.ledger.take("B.apply.0", task="pacs.batch.chunk", job=chunk)
    assert batches.cancel_job("B.apply.0", mark=True) == "running"
    assert batches.state("B") == "cancelled"
    assert "cancel" not in bench.ledger.read_record("B.apply.0"), "the piece sees for itself that its batch is over"
    assert batches.cancel_job("B") == "running"


@pytest.mark.parametrize("job_id", ["B:plan:x", "order/7", "B.apply.0", "B"])
def test_a_job_that_is_called_like_a_part_of_a_batch_is_cancelled_alone(bench: JobBench, job_id: str) -> None:
    batches = Batches(bench.ledger)
    bench.ledger.submit(job_id, task=TASK, job={**JOB, "batch_id": "none"})
    assert batches.cancel_job(job_id) == "queued"
    assert bench.ledger.take(job_id, task=TASK, job={**JOB, "batch_id": "none"}).cancelled


def test_a_later_job_of_a_batch_that_has_not_begun_is_cancelled_alone(bench: JobBench) -> None:
    batches = Batches(bench.ledger)
    batches.open("B", kind="delete", order={}, concurrency=1)
    bench.ledger.take("B", task="pacs.batch.delete", job={})
    batches.take("B", "B")
    bench.ledger.submit("later", task="pacs.batch.verify", job={"batch_id": "B"})
    assert batches.cancel_job("later") == "queued"
    assert batches.state("B") != "cancelled"
    assert bench.ledger.take("later", task="pacs.batch.verify", job={"batch_id": "B"}).state is TakeState.YOURS


def test_what_another_celery_worker_wrote_is_asked_of_the_ledger() -> None:
    report = read_result({"status": "REVOKED", "result": {"exc_type": "TaskRevokedError", "exc_message": ["revoked"]}})
    assert report.revoked
    assert isinstance(report.error, Cancelled)
