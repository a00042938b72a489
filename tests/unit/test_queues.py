"""Queues of our own: each task is routed to one, and what is moved out of the old queues is ours, and no more."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest
from celery import Celery
from redis import ResponseError

from courier import queues, telemetry
from courier.queues import LOOK, NAMED, OLD_QUEUES, QUEUE_OF, QUEUES, OldQueues, count, left_by_killed_workers, task_of
from courier.settings import QueueSettings, Settings, SettingsError

ARGUMENTS = "SECRET-SIGNATURE"


class Channel:
    """What of kombu's channel is used."""

    priority_steps = (0, 3, 6, 9)
    sep = "\x06\x16"

    def __init__(self) -> None:
        self.client = fakeredis.FakeRedis()

    @classmethod
    def named(cls, queue: str, step: int) -> str:
        return f"{queue}{cls.sep}{step}" if step else queue

    def put(self, queue: str, *tasks: str, step: int = 0) -> list[bytes]:
        made = [message(task, f"{task}-{number}", queue) for number, task in enumerate(tasks)]
        for one in made:
            self.client.lpush(self.named(queue, step), one)
        return made

    def list(self, queue: str, step: int = 0) -> list[bytes]:
        """In the order in which they would be taken."""
        return list(reversed(self.client.lrange(self.named(queue, step), 0, -1)))


def message(task: str, job_id: str, queue: str, **headers: Any) -> bytes:
    body = base64.b64encode(json.dumps([[], {"job": {"image_url": ARGUMENTS}}, {}]).encode()).decode()
    properties = {"delivery_tag": job_id, "delivery_info": {"exchange": "", "routing_key": queue}, "priority": 0}
    document = {"body": body, "headers": {"task": task, "id": job_id, **headers}, "properties": properties}
    return json.dumps({**document, "content-type": "application/json"}).encode()


@pytest.fixture
def channel() -> Channel:
    return Channel()


@pytest.fixture
def counted() -> Iterator[list[str]]:
    seen: list[str] = []

    class CountWitness:
        def count(self, what: str, number: int) -> None:
            seen.extend([what] * number)

    telemetry.add_observer(CountWitness())  # type: ignore[arg-type]
    yield seen
    telemetry.remove_observers()


def app() -> Celery:
    made = Celery(broker="memory://", set_as_current=False)
    made.config_from_object("courier.celery_settings")
    return made


def routed(task: str, **options: Any) -> str:
    return str(app().amqp.router.route(options, task)["queue"].name)


def test_every_task_of_a_worker_has_a_queue_of_ours_and_no_other_task_has() -> None:
    from worker.app import app as workers  # noqa: PLC0415  # reads the settings

    workers.loader.import_default_modules()
    assert {name for name in workers.tasks if not name.startswith("celery.")} == set(QUEUE_OF)
    assert set(QUEUE_OF.values()) == set(NAMED) == set(OLD_QUEUES.values())
    assert {task: routed(task) for task in QUEUE_OF} == QUEUE_OF


def test_a_follow_up_of_another_application_goes_where_that_application_would_send_it() -> None:
    assert [routed(task) for task in ("reports.note", "pacs.tasks.sync", "celery.map")] == ["celery"] * 3
    assert routed("reports.note", queue="reports") == "reports"
    assert routed("pacs.upload", queue="urgent") == "urgent"


def test_a_worker_reads_our_queues_and_keeps_what_it_has_taken_under_names_of_its_own() -> None:
    ours = app()
    assert list(ours.amqp.queues.consume_from) == list(QUEUES)
    assert {queue.exchange.name for queue in ours.amqp.queues.consume_from.values()} == {"pacs"}
    options = ours.conf.broker_transport_options
    assert {options[f"unacked{part}_key"] for part in ("", "_index", "_mutex")} == {
        "pacs.unacked",
        "pacs.unacked_index",
        "pacs.unacked_mutex",
    }


def test_what_is_ours_is_moved_in_its_order_with_all_it_bears_but_its_address(channel: Channel) -> None:
    sent = {
        queue: channel.put(queue, *tasks)
        for queue, tasks in {
            "celery": ("pacs.upload", "pacs.delete", "pacs.batch.delete"),
            "batches": ("pacs.batch.chunk",),
            "admin": ("pacs.status",),
        }.items()
    }
    urgent = channel.put("celery", "pacs.upload", step=9)
    OldQueues(reads=True).report_and_move(channel)
    for queue, messages in sent.items():
        there = [json.loads(one) for one in channel.list(OLD_QUEUES[queue])]
        expected = [json.loads(one) for one in messages]
        for one in expected:
            one["properties"]["delivery_info"]["routing_key"] = OLD_QUEUES[queue]
        assert there == expected
        assert channel.list(queue) == []
    assert [task_of(json.loads(one)) for one in channel.list("pacs", step=9)] == [task_of(json.loads(urgent[0]))]


def test_nothing_is_moved_unless_the_setting_says_so(channel: Channel, caplog: pytest.LogCaptureFixture) -> None:
    sent = channel.put("celery", "pacs.upload", "pacs.upload")
    with caplog.at_level(logging.INFO):
        old = OldQueues(reads=False)
        old.report_and_move(channel)
        assert old.idle
    assert channel.list("celery") == sent
    (said,) = caplog.messages
    assert "2 messages for tasks of PACS Courier wait in celery" in said
    assert "set queue.read_old_queues" in said
    assert "name the queue pacs;" in said


@pytest.mark.parametrize(
    "foreign",
    [
        message("reports.build", "1", "celery"),
        message("pacs.tasks.sync", "1", "celery"),
        message("celery.backend_cleanup", "1", "celery"),
        message("", "1", "celery"),
        b"no JSON",
        b"[]",
        b"[" * 100_000,
        b'{"headers": {}, "body": "%%%"}',
    ],
    ids=["another's", "another's that is called pacs, too", "Celery's", "nameless", "text", "list", "deep", "no body"],
)
def test_the_first_message_that_is_not_ours_stays_as_it_is_and_ends_the_reading_of_its_queue(
    channel: Channel, counted: list[str], caplog: pytest.LogCaptureFixture, foreign: bytes
) -> None:
    channel.put("celery", "pacs.upload")
    channel.client.lpush("celery", foreign)
    behind = channel.put("celery", "pacs.upload")
    old = OldQueues(reads=True)
    for _ in range(3):
        old.report_and_move(channel)
        channel.put("batches", "pacs.batch.chunk")
    old.report_and_move(channel)
    assert channel.list("celery") == [foreign, *behind]
    assert (len(channel.list("pacs")), len(channel.list("pacs.batches"))) == (1, 3)
    assert (old.stopped, old.idle, counted) == (["celery"], False, ["old_queue_stopped"])
    (said,) = [line for line in caplog.messages if "stays there" in line]
    assert "does not read the queue again until it is restarted" in said
    assert ARGUMENTS not in caplog.text
    channel.client.rpop("celery")  # its own worker took it
    old.report_and_move(channel)
    assert channel.list("celery") == behind, "not before a restart"
    OldQueues(reads=True).report_and_move(channel)
    assert channel.list("celery") == []


def test_a_message_with_a_lower_priority_that_is_not_ours_ends_the_reading_too(channel: Channel) -> None:
    channel.put("celery", "pacs.upload")
    (foreign,) = channel.put("celery", "reports.build", step=3)
    rest = channel.put("celery", "pacs.upload", step=9)
    old = OldQueues(reads=True)
    old.report_and_move(channel)
    assert (channel.list("celery"), channel.list("celery", 3), channel.list("celery", 9)) == ([], [foreign], rest)


def test_a_message_that_another_worker_has_just_taken_is_not_moved_a_second_time(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = channel.put("celery", "pacs.upload", "pacs.exists", "pacs.metadata")
    looked = channel.client.lrange
    taken: list[Any] = []

    def look(*args: Any) -> Any:
        found = looked(*args)
        if not taken:
            taken.append(channel.client.rpop("celery"))
        return found

    monkeypatch.setattr(channel.client, "lrange", look)
    monkeypatch.setattr(queues, "count", lambda _: [])
    OldQueues(reads=True).report_and_move(channel)
    assert taken == [first]
    assert [task_of(json.loads(one)) for one in channel.list("pacs")] == ["pacs.exists", "pacs.metadata"]


def test_many_are_moved_over_several_looks_and_none_is_lost(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "MOVED_AT_ONCE", 40)
    channel.put("celery", *["pacs.upload"] * 95)
    old = OldQueues(reads=True)
    counts = []
    for _ in range(3):
        old.report_and_move(channel)
        counts.append(len(channel.list("pacs")))
    assert counts == [40, 80, 95]
    assert [json.loads(one)["headers"]["id"] for one in channel.list("pacs")] == [f"pacs.upload-{n}" for n in range(95)]


def test_one_of_the_first_protocol_is_known_by_its_body_and_one_without_an_address_is_moved_as_it_is(
    channel: Channel,
) -> None:
    body = base64.b64encode(json.dumps({"task": "pacs.upload", "id": "1", "kwargs": {}}).encode()).decode()
    odd = json.dumps({"body": body, "headers": {}, "properties": []}).encode()
    channel.client.lpush("celery", odd)
    OldQueues(reads=True).report_and_move(channel)
    assert channel.list("pacs") == [odd]


def test_what_a_killed_worker_of_0_1_had_taken_is_taken_over_and_what_others_have_taken_is_not(
    channel: Channel,
) -> None:
    ours, theirs = (message(task, "1", "celery") for task in ("pacs.batch.chunk", "reports.build"))
    for tag, raw in {"a": ours, "b": theirs}.items():
        channel.client.hset("unacked", tag, json.dumps([json.loads(raw), "", "celery"]))
        channel.client.zadd("unacked_index", {tag: 1.0})
    channel.client.hset("unacked", "c", "nothing")
    assert left_by_killed_workers(channel) == 1
    OldQueues(reads=False).report_and_move(channel)
    assert channel.client.hlen("unacked") == 3
    OldQueues(reads=True).report_and_move(channel)
    assert sorted(channel.client.hkeys("unacked")) == [b"b", b"c"]
    assert channel.client.zrange("unacked_index", 0, -1) == [b"b"]
    (moved,) = channel.list("pacs.batches")
    assert json.loads(moved)["properties"]["delivery_info"]["routing_key"] == "pacs.batches"


def test_counting_looks_at_a_bounded_part_and_says_so(channel: Channel) -> None:
    channel.put("celery", *["pacs.upload"] * (LOOK + 1), "reports.build")
    channel.put("celery", "pacs.upload", "reports.build", "reports.clean", step=6)
    channel.put("admin", "pacs.status")
    many, one = count(channel)
    assert (many.ours, many.others, many.more, many.foreign) == (LOOK + 1, 2, True, "reports.build")
    assert str(many).startswith(f"at least {LOOK + 1} messages")
    assert "at least 2 of another application" in str(many)
    assert (str(one).split()[0], one.more, one.others) == ("1", False, 0)
    assert "pacs.admin" in one.advice(reads=False)
    assert "look again" in one.advice(reads=True)
    assert "reports.build" in many.advice(reads=True)


def test_a_queue_that_holds_others_messages_alone_is_no_business_of_ours(channel: Channel) -> None:
    channel.put("celery", *["reports.build"] * 3)
    assert count(channel) == []


def test_what_another_application_has_under_the_name_of_an_old_queue_keeps_no_other_queue_from_being_read(
    channel: Channel,
) -> None:
    channel.client.hset("batches", "a", "1")
    channel.client.sadd("admin", "b")
    channel.client.set("unacked", "c")
    channel.put("celery", "pacs.upload")
    channel.client.set("celery\x06\x163", "d")
    assert [(found.queue, found.ours) for found in count(channel)] == [("celery", 1)]
    assert left_by_killed_workers(channel) == 0
    old = OldQueues(reads=True)
    old.report_and_move(channel)
    assert (len(channel.list("pacs")), channel.list("celery"), old.stopped) == (1, [], [])
    assert [channel.client.type(key) for key in ("batches", "admin", "unacked")] == [b"hash", b"set", b"string"]


def test_a_message_is_not_lost_where_the_new_queue_takes_nothing(channel: Channel) -> None:
    (raw,) = channel.put("celery", "pacs.upload")
    taken = json.dumps([json.loads(message("pacs.upload", "j", "celery")), "", "celery"])
    channel.client.hset("unacked", "j", taken)
    channel.client.set("pacs", "of another application")
    for _ in range(2):
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            queues._take_over(channel.client)
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            queues._move(channel.client, "celery", "pacs", "pacs")
    assert channel.list("celery") == [raw]
    assert channel.client.hget("unacked", "j") == taken.encode()


def test_the_old_queues_can_be_read_on_redis_only() -> None:
    for url in ("redis://host/0", "rediss://host/0", "redis+socket:///run/redis.sock"):
        assert QueueSettings(broker_url=url, read_old_queues=True).read_old_queues
    with pytest.raises(SettingsError, match=r"^setting queue: read_old_queues needs a broker that is Redis"):
        Settings.load({"BROKER_URL": "amqp://host", "PACS__QUEUE__READ_OLD_QUEUES": "true"})
    assert not QueueSettings().read_old_queues
