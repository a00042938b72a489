"""How many jobs of the line a worker has at a time, and where it sends their messages."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fakeredis
import kombu.exceptions
import pytest

from courier import queues
from courier.ledger.jobs import PREFIX, Ledger
from worker.runtime.consumer import PacsConsumer, note_message, quiet_s
from worker.runtime.room import IN_TIME, Room

JOB = {"image_url": "http://host/a.dcm"}
MANY = 40


def room_after(late_s: float, sleeps: int, *, room: Room) -> int:
    for _ in range(sleeps):
        room.slept(late_s, releasing=True)
    return room.size


def large_room() -> Room:
    room = Room(6)
    assert room_after(0.0001, 10 * IN_TIME, room=room) == 6, "and no more than that"
    return room


def test_room_grows_step_by_step_while_sleeps_end_in_time() -> None:
    room = Room(6)
    assert [room_after(0.0001, IN_TIME, room=room) for _ in range(5)] == [2, 3, 4, 5, 6]
    assert room_after(0.0001, 10 * IN_TIME, room=room) == 6


def test_a_worker_whose_threads_wait_for_each_other_has_room_for_one() -> None:
    room = large_room()
    assert [room_after(0.01, 1, room=room) for _ in range(6)] == [5, 4, 3, 2, 1, 1]


def test_what_is_usual_on_a_busy_machine_is_not_late() -> None:
    room = large_room()
    for _ in range(50):
        room.slept(0.02, releasing=False)
    assert room_after(0.03, 20, room=room) == 6
    assert room_after(0.05, 20, room=room) == 1


def test_released_jobs_that_are_alone_have_all_the_room_there_is_however_busy_the_worker_is() -> None:
    room = Room(6)
    for _ in range(10 * IN_TIME):
        room.slept(0.1, releasing=True, alone=True)
    assert room.size == 6


@pytest.mark.parametrize("most", [1, 2])
def test_a_small_worker_always_has_room_for_one(most: int) -> None:
    assert room_after(1.0, 100, room=Room(most)) == 1
    assert room_after(0.0, 100, room=Room(most)) == most


@pytest.mark.parametrize(
    ("queue", "counts"),
    [("pacs", True), ("pacs.admin", True), ("urgent", True), ("pacs.batches", False), ("pacs.due", False)],
)
def test_a_caller_may_wait_for_what_is_no_released_job_and_no_piece_of_a_batch(
    queue: str, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = SimpleNamespace(asked_at=None)
    monkeypatch.setattr(PacsConsumer, "running", seen)
    assert quiet_s() == math.inf
    note_message(seen, SimpleNamespace(delivery_info={"routing_key": queue}))
    assert (quiet_s() < 60) == counts


def test_a_sleep_ends_at_once_when_the_worker_is_to_stop() -> None:
    stop = threading.Event()
    assert Room(6).wait(stop, 0.001, releasing=True, alone=False) is False
    stop.set()
    assert Room(6).wait(stop, 60, releasing=False, alone=True) is True


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        ledger = Ledger(client, worker="w")
        for number in range(MANY):
            ledger.submit(f"j{number:02}", task="pacs.upload", job=JOB, due_in_s=0)
        client.zadd(f"{PREFIX}due", {f"j{number:02}": number for number in range(MANY)})
        yield ledger


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    from worker import app  # noqa: PLC0415  # reads the settings

    sent: list[tuple[str, str | None]] = []
    monkeypatch.setattr(
        app.app, "send_task", lambda _, task_id, queue=None, **__: sent.append((task_id, queue)), raising=False
    )
    monkeypatch.setattr(app, "_queues", lambda names: {name: (name, 0) for name in names})
    return sent


def test_a_sweep_sends_as_many_as_three_quarters_of_the_slots_and_to_the_queue_of_due_jobs(
    ledger: Ledger, sent: list[Any]
) -> None:
    from worker import app  # noqa: PLC0415

    room = app.batch_slots(8)
    assert app.release_line(ledger, app._line(room, None)) == room == 6
    assert sent == [(f"j{number:02}", "pacs.due") for number in range(6)]
    assert ledger.waiting_in_line() == MANY - 6


def test_a_worker_that_does_not_read_that_queue_sends_to_the_one_of_the_task(
    ledger: Ledger, sent: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker import app  # noqa: PLC0415

    monkeypatch.setattr(app.app.amqp.queues, "_consume_from", {queues.BATCHES: app.app.amqp.queues[queues.BATCHES]})
    app.release_line(ledger, app._line(2, None))
    assert sent == [("j00", "pacs"), ("j01", "pacs")]
    assert app.release_line(ledger, app._line(2, None)) == 0


@pytest.mark.parametrize(
    ("selected", "reads"),
    [
        ("pacs", ["pacs", "pacs.due"]),
        ("pacs,pacs.batches", ["pacs", "pacs.batches", "pacs.due"]),
        ("pacs.batches,pacs.admin", ["pacs.batches", "pacs.admin"]),
        ("urgent", ["urgent"]),
        ("", list(queues.QUEUES)),
    ],
)
def test_a_worker_that_reads_the_queue_of_single_jobs_reads_that_of_due_ones_too(
    selected: str, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker import app  # noqa: PLC0415

    known = app.app.amqp.Queues(app.app.conf.task_queues)
    monkeypatch.setitem(app.app.amqp.__dict__, "queues", known)
    known.select(selected.split(",") if selected else None)
    app._take_from_no_other_queue()
    assert sorted(known.consume_from) == sorted(reads)


def test_a_message_that_cannot_be_sent_is_sent_when_its_job_is_due_again(
    ledger: Ledger, sent: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker import app  # noqa: PLC0415

    def fail(*_: Any, **__: Any) -> None:
        raise kombu.exceptions.OperationalError

    with monkeypatch.context() as broken:
        broken.setattr(app.app, "send_task", fail)
        with pytest.raises(kombu.exceptions.OperationalError):
            app.release_line(ledger, app._line(3, None))
    assert app.release_line(ledger, app._line(3, None)) == 3, "those that were not sent take no room"
    ledger.client.zadd(f"{PREFIX}due", {f"j{number:02}": 0 for number in range(MANY)})
    app.release_line(ledger, app._line(MANY, None))
    assert {job_id for job_id, _ in sent} == {f"j{number:02}" for number in range(MANY)}
    assert len(sent) == MANY


def test_the_line_is_looked_at_often_while_jobs_stand_in_it() -> None:
    from worker import app  # noqa: PLC0415

    in_a_while = time.monotonic() + 1
    assert app._pause_s(in_a_while, in_line=0) == pytest.approx(1, abs=0.2)
    assert app._pause_s(in_a_while, in_line=1) == app.LINE_S
    assert app._pause_s(time.monotonic() - 5, in_line=1) == 0
