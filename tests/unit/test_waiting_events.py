"""What monitors as Flower are told of a job that waits: a state of its own, and the way out of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery.events.state import State

from courier.errors import PacsUnavailable
from courier.waits import WOKEN, WaitReason
from worker import app as worker_app
from worker.runtime.request import ShownRequest, waiting_fields

WAITING = WaitReason("pacs_unavailable", "msdicom failed on its last requests.", "msdicom").as_json(
    since_ms=1_800_000_000_000, next_ms=1_800_000_020_000
)


class EventMonitor:
    """Celery's own reading of events, as Flower and `celery events` have it."""

    enabled = True

    def __init__(self) -> None:
        self.state = State()
        self.types: list[str] = []

    def send(self, type: str, **fields: Any) -> None:
        self.types.append(type)
        number = len(self.types)
        common = {"hostname": "w@h", "clock": number, "timestamp": number, "local_received": number, "utcoffset": 0}
        self.state.event({"type": type, **common, **fields})

    @property
    def task(self) -> Any:
        return self.state.tasks["j1"]


class SentMessage(ShownRequest):
    """Its headers alone: what a pool does with it is Celery's business."""

    def __init__(self, monitor: EventMonitor, **headers: Any) -> None:
        self.id, self._eventer, self._request_dict = "j1", monitor, headers
        self._task = SimpleNamespace(send_events=True)

    def begins(self) -> None:
        self.send_event("task-received", name="pacs.upload", args="()", kwargs="{}")
        self.send_event("task-started")


@pytest.fixture
def monitor() -> EventMonitor:
    return EventMonitor()


def test_a_job_that_never_waits_sends_celerys_own_events_and_no_other(monitor: EventMonitor) -> None:
    message = SentMessage(monitor)
    message.begins()
    message.send_event("task-succeeded", result="stored on msdicom", runtime=0.1)
    assert monitor.types == ["task-received", "task-started", "task-succeeded"]


def test_a_job_that_waits_is_shown_as_waiting_until_a_woken_message_begins(monitor: EventMonitor) -> None:
    first, second = SentMessage(monitor), SentMessage(monitor, **{WOKEN: True})
    first.begins()
    first.send_event("task-waiting", **waiting_fields(WAITING))
    assert monitor.task.state == "WAITING"
    assert monitor.task.result.startswith("waiting for msdicom since")
    assert monitor.task.result.endswith("(pacs_unavailable)")
    assert (monitor.task.exchange, monitor.task.routing_key) == ("pacs_unavailable", "msdicom")
    second.send_event("task-received", name="pacs.upload")
    assert monitor.task.state == "WAITING", "it is in its queue, and no worker has begun it"
    second.send_event("task-started")
    assert (monitor.task.state, monitor.task.result) == ("STARTED", "")
    second.send_event("task-waiting", **waiting_fields(WAITING))
    assert monitor.task.state == "WAITING"
    second.send_event("task-failed", exception="…")
    assert (monitor.task.state, monitor.task.result) == ("FAILURE", "")


def test_a_job_that_is_done_after_a_wait_ends_as_done(monitor: EventMonitor) -> None:
    SentMessage(monitor).send_event("task-waiting", **waiting_fields(WAITING))
    woken = SentMessage(monitor, **{WOKEN: True})
    woken.begins()
    woken.send_event("task-succeeded", result="stored on msdicom", runtime=0.1)
    assert (monitor.task.state, monitor.task.result) == ("SUCCESS", "stored on msdicom")


def test_a_wait_without_a_server_names_none() -> None:
    fields = waiting_fields(
        WaitReason("other_job", "job j2 is storing the same image").as_json(since_ms=0, next_ms=None)
    )
    assert (fields["exchange"], fields["routing_key"]) == ("other_job", "")
    assert set(fields) == {"result", "exchange", "routing_key"}, "Celery's monitors drop other fields"


def test_a_failed_job_says_how_it_failed_as_its_result(monitor: EventMonitor, monkeypatch: pytest.MonkeyPatch) -> None:
    message = SentMessage(monitor)
    monkeypatch.setattr(
        "celery.worker.request.Request.on_failure", lambda self, *_, **__: self.send_event("task-failed")
    )
    message.acknowledged = True
    error = PacsUnavailable("It kept silent.", server_name="msdicom")
    message.on_failure(SimpleNamespace(exception=error), return_ok=True)
    assert monitor.task.result == "dead letter (pacs_unavailable) on msdicom: It kept silent."


@pytest.mark.parametrize(
    ("task", "woken"), [("pacs.upload", True), ("pacs.batch.upload", True), ("pacs.batch.chunk", None)]
)
def test_messages_that_the_sweeper_sends_say_so_but_for_pieces_of_batches(
    monkeypatch: pytest.MonkeyPatch, task: str, woken: bool | None
) -> None:
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(worker_app.app, "send_task", lambda *_, **options: sent.append(options["headers"]))
    worker_app.wake([worker_app.DueJob("j1", task, {})])
    assert sent[0].get(WOKEN) is woken
