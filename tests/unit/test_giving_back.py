"""What a worker throws away, what it gives back, and when it ends itself. Celery's own parts are stood in for."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import redis
from billiard.einfo import ExceptionInfo
from celery.exceptions import Ignore, Reject
from celery.worker import state
from celery.worker.consumer import Consumer
from kombu.asynchronous.hub import Hub
from kombu.exceptions import DecodeError
from kombu.transport import redis as redis_transport
from kombu.transport.redis import Transport

from courier.errors import CourierError, NotDicom
from worker import app as product
from worker.runtime import celery_internals, consumer, request, shortage
from worker.runtime.consumer import PacsConsumer
from worker.runtime.kombu_internals import PacsChannel, PacsQoS

OURS = (
    RuntimeError("can't start new thread"),
    MemoryError(),
    DecodeError(MemoryError()),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OSError(errno.EMFILE, "Too many open files"),
    shortage.Escaped(MemoryError()),
)
NOT_OURS = (
    RuntimeError("dictionary changed size during iteration"),
    ValueError("no JSON"),
    KeyError("task"),
    DecodeError(ValueError("no JSON")),
    RecursionError(),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    TimeoutError(),
)


@pytest.mark.parametrize("error", OURS, ids=repr)
def test_a_lack_of_threads_memory_or_files_is_known(error: Exception) -> None:
    assert shortage.is_shortage(error)
    assert shortage.why(error).startswith(shortage.STARVED)


@pytest.mark.parametrize("error", NOT_OURS, ids=repr)
def test_what_is_no_lack_of_anything_is_not_taken_for_one(error: Exception) -> None:
    assert not shortage.is_shortage(error)
    assert "dictionary" not in shortage.why(error)


def test_a_pool_starts_all_its_threads_at_once() -> None:
    with ThreadPoolExecutor(7) as executor:
        shortage.start_threads(executor, 7)
        assert len(executor._threads) == 7


def test_a_pool_that_gets_too_few_threads_says_so_and_keeps_none_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with ThreadPoolExecutor(7) as executor, pytest.raises(RuntimeError, match="can't start new thread"):
        shortage.start_threads(executor, 7)


def test_a_return_is_held_against_a_message_only_when_others_succeeded_before_it() -> None:
    returns, counted = shortage.Returns(), iter(range(1, 100))
    assert returns.given_back(lambda: next(counted)) == 0
    returns.succeeded()
    assert returns.given_back(lambda: next(counted)) == 1
    assert returns.given_back(lambda: next(counted)) == 0
    assert returns.in_a_row == 2


@dataclass
class Message:
    """What a consumer needs of kombu's."""

    headers: Any = field(default_factory=lambda: {"task": "pacs.upload", "id": "order/7"})
    content: Any = field(default_factory=lambda: [[], {"job": {"image_url": "http://h/a"}}, {}])
    raises: Exception | None = None
    ended: list[str] = field(default_factory=list)
    body: bytes = b"{}"
    content_type: str = "application/json"
    content_encoding: str = "utf-8"
    properties: dict[str, Any] = field(default_factory=dict)
    delivery_info: dict[str, Any] = field(default_factory=dict)
    _decoded_cache: Any = None

    @property
    def payload(self) -> Any:
        if self.raises is not None:
            raise self.raises
        self._decoded_cache = self.content
        return self.content

    @property
    def acknowledged(self) -> bool:
        return bool(self.ended)

    def reject_log_error(self, *_: Any, requeue: bool = False) -> None:
        self.ended.append("given back" if requeue else "thrown away")


class ConsumerBench:
    """A consumer whose pool does as ``take`` says, with what it told and buried."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.published: dict[str, CourierError] = {}
        self.dead_letters: list[tuple[Any, ...]] = []
        self.returned: dict[str, int] = {}
        self.known: set[str] = set()
        self.take: Callable[[Any], None] = lambda _: None
        monkeypatch.setattr(Consumer, "create_task_handler", lambda *_, **__: self.take)
        monkeypatch.setattr("worker.runtime.consumer.time.sleep", lambda _: None)
        monkeypatch.setattr(PacsConsumer, "is_written_down", staticmethod(self.is_known))
        monkeypatch.setattr(PacsConsumer, "count_return", staticmethod(self.count))
        monkeypatch.setattr(PacsConsumer, "dead_letter", staticmethod(self.dead_letter))
        monkeypatch.setattr(state, "should_stop", None)
        self.consumer = PacsConsumer.__new__(PacsConsumer)
        self.consumer.returns = shortage.Returns()
        self.consumer.connection_errors, self.consumer.channel_errors = (
            Transport.connection_errors,
            Transport.channel_errors,
        )
        self.consumer.event_dispatcher = None
        self.consumer.app = SimpleNamespace(
            conf=SimpleNamespace(task_serializer="json"), backend=SimpleNamespace(store_result=self.publish)
        )

    def is_known(self, job_id: str) -> bool:
        return job_id in self.known

    def count(self, job_id: str) -> int:
        self.returned[job_id] = self.returned.get(job_id, 0) + 1
        return self.returned[job_id]

    def dead_letter(self, *letter: Any) -> bool:
        self.dead_letters.append(letter)
        return True

    def publish(self, job_id: str, error: CourierError, _: str) -> None:
        self.published[job_id] = error

    def receive(self, message: Message) -> str:
        self.consumer.create_task_handler()(message)
        return message.ended[-1] if message.ended else "taken"


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> ConsumerBench:
    return ConsumerBench(monkeypatch)


def failing(error: Exception) -> Callable[[Any], None]:
    def take(_: Any) -> None:
        raise error

    return take


@pytest.mark.parametrize(
    "error", [*OURS, RuntimeError("bug"), KeyError("bug"), TypeError("bug"), AttributeError("bug")], ids=repr
)
def test_a_good_message_is_given_back_whatever_becomes_of_it(worker: ConsumerBench, error: Exception) -> None:
    worker.take = failing(error)
    assert worker.receive(Message()) == "given back"
    assert worker.published == {}


@pytest.mark.parametrize("error", OURS, ids=repr)
def test_a_message_that_cannot_be_read_for_want_of_memory_is_given_back(
    worker: ConsumerBench, error: Exception
) -> None:
    assert worker.receive(Message(raises=error)) == "given back"
    assert worker.published == {}


@pytest.mark.parametrize(
    "error",
    [ValueError(), KeyError(), LookupError(), TypeError(), RecursionError(), DecodeError(ValueError())],
    ids=repr,
)
def test_a_message_that_cannot_be_read_is_thrown_away_and_its_sender_told(
    worker: ConsumerBench, error: Exception
) -> None:
    assert worker.receive(Message(raises=error)) == "thrown away"
    assert worker.published["order/7"].payload["code"] == "invalid_request"


@pytest.mark.parametrize("error", [redis.ConnectionError(), redis.TimeoutError(), BrokenPipeError()], ids=repr)
def test_a_broker_that_has_gone_is_connected_to_anew(worker: ConsumerBench, error: Exception) -> None:
    worker.take = failing(error)
    message = Message()
    with pytest.raises(type(error)):
        worker.receive(message)
    assert message.ended == []


def test_a_message_that_is_no_job_does_not_end_one_that_the_ledger_knows(worker: ConsumerBench) -> None:
    worker.known.add("order/7")
    assert worker.receive(Message(headers={"task": "pacs.upload", "id": "order/7", "shadow": 5})) == "thrown away"
    assert worker.published == {}


def test_a_message_is_given_back_while_the_ledger_does_not_say_whether_it_ends_a_job(
    worker: ConsumerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: str) -> bool:
        raise redis.ConnectionError

    monkeypatch.setattr(PacsConsumer, "is_written_down", staticmethod(away))
    assert worker.receive(Message(headers={"task": "pacs.upload", "id": "order/7", "shadow": 5})) == "given back"


def test_a_few_returns_in_a_row_end_the_worker_with_a_status_of_its_own(
    worker: ConsumerBench, caplog: pytest.LogCaptureFixture
) -> None:
    worker.take = failing(RuntimeError("can't start new thread"))
    for number in range(shortage.IN_A_ROW):
        assert state.should_stop is None
        worker.receive(Message(headers={"task": "pacs.upload", "id": f"job-{number}"}))
    assert state.should_stop == shortage.EXIT_STATUS
    worker.receive(Message())
    assert sum(record.levelname == "CRITICAL" for record in caplog.records) == 1
    assert worker.dead_letters == []


def test_a_worker_in_which_others_succeed_goes_on_and_the_message_becomes_a_dead_letter(worker: ConsumerBench) -> None:
    worker.take = failing(RuntimeError("can't start new thread"))
    for _ in range(shortage.MAX_RETURNS - 1):
        worker.consumer.returns.succeeded()
        assert worker.receive(Message()) == "given back"
    worker.consumer.returns.succeeded()
    assert worker.receive(Message()) == "thrown away"
    assert state.should_stop is None
    ((job_id, task, job, _, error),) = worker.dead_letters
    assert (job_id, task, job) == ("order/7", "pacs.upload", {"image_url": "http://h/a"})
    assert worker.published == {"order/7": error}
    assert error.payload["code"] == "poisoned"


def test_a_job_that_has_ended_meanwhile_is_told_no_other_end(
    worker: ConsumerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PacsConsumer, "dead_letter", staticmethod(lambda *_: False))
    worker.take = failing(RuntimeError("can't start new thread"))
    for _ in range(shortage.MAX_RETURNS):
        worker.consumer.returns.succeeded()
        worker.receive(Message())
    assert worker.published == {}


@pytest.mark.parametrize("job_id", ["\ud800", "", None, 5, ["a"]])
def test_an_id_under_which_nothing_can_be_stored_does_not_stop_the_worker(worker: ConsumerBench, job_id: Any) -> None:
    assert worker.receive(Message(headers={"task": "pacs.upload", "id": job_id})) == "thrown away"
    assert worker.published == {}


def test_an_id_of_another_program_is_told_although_no_log_would_show_it(worker: ConsumerBench) -> None:
    body = {"task": 5, "id": "order/8"}
    assert worker.receive(Message(headers={}, content=body)) == "thrown away"
    assert worker.published.keys() == {"order/8"}


@pytest.mark.parametrize(
    ("error", "advice"), [(MemoryError(), "raise the worker's limits"), (KeyError("bug"), "report the fault")]
)
def test_a_worker_that_ends_itself_says_what_to_do_about_the_cause(
    worker: ConsumerBench, caplog: pytest.LogCaptureFixture, error: Exception, advice: str
) -> None:
    worker.take = failing(error)
    for number in range(shortage.IN_A_ROW):
        worker.receive(Message(headers={"task": "pacs.upload", "id": f"job-{number}"}))
    (end,) = [record.getMessage() for record in caplog.records if record.levelname == "CRITICAL"]
    assert f"exit status {shortage.EXIT_STATUS}; {advice}" in end


# --- what comes out of the pool --------------------------------------------------------------------------------


def test_what_comes_out_of_celerys_own_code_around_a_job_is_caught() -> None:
    def trace(*_: Any) -> None:
        raise MemoryError

    failed, info, _ = celery_internals._caught(trace)
    assert failed
    assert isinstance(info.exception.exc, shortage.Escaped)
    assert shortage.is_shortage(info.exception.exc)
    assert celery_internals._caught(lambda *_: (0, "stored", 0.1)) == (0, "stored", 0.1)


def info_of(error: BaseException) -> ExceptionInfo:
    try:
        raise error
    except type(error):
        return ExceptionInfo()


@pytest.mark.parametrize(
    ("error", "return_ok", "comes_again"),
    [
        (shortage.Escaped(TypeError()), True, True),
        (MemoryError(), False, True),
        (TypeError(), False, True),
        (Ignore(request.NOT_BEGUN), True, True),
        (Ignore(), True, False),
        (Reject("the ledger cannot be reached", requeue=True), True, False),
        (NotDicom("No."), True, False),
        (SystemExit(), False, False),
    ],
    ids=repr,
)
def test_a_message_comes_again_when_the_worker_and_not_its_job_has_failed(
    error: BaseException, return_ok: bool, comes_again: bool
) -> None:
    assert (request._cause_of_return(error, return_ok=return_ok) is not None) == comes_again


def test_a_follow_up_that_is_wrong_is_named_in_the_result_without_its_value(worker: ConsumerBench) -> None:
    content = json.loads('[[], {"job": {}}, {"callbacks": [{"task": "PLANTED"}]}]')
    assert worker.receive(Message(content=content)) == "thrown away"
    assert "callbacks" in worker.published["order/7"].message
    assert "PLANTED" not in worker.published["order/7"].message


@pytest.mark.parametrize(
    ("exchange", "routing_key", "delivery_info", "headers"),
    [
        (["PLANTED"], "celery", {}, {}),
        ("", {"PLANTED": 1}, {}, {}),
        ("", "celery", ["PLANTED"], {}),
        ("", "celery", {}, ["PLANTED"]),
    ],
)
def test_a_message_that_cannot_be_put_back_is_not_quoted(
    caplog: pytest.LogCaptureFixture, exchange: Any, routing_key: Any, delivery_info: Any, headers: Any
) -> None:
    """A worker that is killed leaves what it took; the next one finds it after the visibility time-out."""
    channel = PacsChannel.__new__(PacsChannel)
    raw = {"body": "PLANTED", "headers": headers, "properties": {"delivery_info": delivery_info}}
    channel._do_restore_message(raw, exchange, routing_key, None)
    assert "cannot be put back" in caplog.text
    assert "PLANTED" not in caplog.text


def test_a_channel_has_one_client_for_its_commands_as_long_as_its_connections_are_the_same() -> None:
    channel = PacsChannel.__new__(PacsChannel)
    channel.Client = lambda connection_pool: SimpleNamespace(connection_pool=connection_pool)
    channel._pool, channel._async_pool = MagicMock(), MagicMock()
    for pool_of_it in (channel._pool, channel._async_pool):
        pool_of_it.connection_kwargs = {}
    with channel.conn_or_acquire() as first, channel.conn_or_acquire() as second:
        assert first is second
        assert first.connection_pool is channel._pool
    assert channel.client.connection_pool is channel._async_pool  # which waits for messages
    channel._pool = MagicMock(connection_kwargs={})  # the connection was lost
    with channel.conn_or_acquire() as third:
        assert third.connection_pool is channel._pool


def test_reading_the_metadata_of_an_image_does_not_make_a_worker_look_for_cycles() -> None:
    text = json.dumps([{f"{tag:08X}": {"vr": "LO", "Value": ["SYNTHETIC"]} for tag in range(1_000)}])
    thresholds, searches = gc.get_threshold(), []
    product._collect_less_often()
    gc.collect()
    gc.callbacks.append(lambda phase, told: searches.append((phase, told)))
    try:
        assert len(json.loads(text)[0]) == 1_000
        assert searches == []
        assert gc.get_threshold()[1:] == thresholds[1:]
    finally:
        gc.callbacks.pop()
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def test_a_signal_ends_the_wait_for_the_next_message_once_its_handler_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    handled: list[int] = []
    heard: list[int] = []
    monkeypatch.setattr(consumer, "_read_all", lambda told: heard.extend(os.read(told, 4096)))
    consumer._told_of_signals.cache_clear()
    with contextlib.ExitStack() as undone:
        hub = Hub()
        undone.callback(hub.close)
        undone.callback(signal.signal, signal.SIGUSR1, signal.getsignal(signal.SIGUSR1))
        undone.callback(consumer._told_of_signals.cache_clear)
        undone.callback(signal.set_wakeup_fd, -1)
        signal.signal(signal.SIGUSR1, lambda number, _: handled.append(number))
        consumer.wake_by_signals(hub)
        later = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
        later.start()
        undone.callback(later.join)
        events = hub.poller.poll(60)
        assert [number for number, _ in events] == list(hub.readers)
        assert handled == [signal.SIGUSR1], "a worker knows by now that it is to stop"
        wake, arguments = hub.readers[events[0][0]]
        wake(*arguments)
        assert heard == [signal.SIGUSR1]


def test_a_message_that_redis_did_not_note_as_taken_is_put_back_before_another_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []

    def refuse(*_: Any) -> None:
        raise redis.exceptions.OutOfMemoryError

    monkeypatch.setattr(redis_transport.QoS, "append", refuse)
    monkeypatch.setattr(redis_transport.Channel, "_do_restore_message", lambda *given: calls.append(given[1:4]))
    monkeypatch.setattr(redis_transport.Channel, "_brpop_start", lambda *_: calls.append("next"))
    monkeypatch.setattr(PacsChannel, "adrift", [])
    channel, client = PacsChannel.__new__(PacsChannel), MagicMock()
    monkeypatch.setattr(PacsChannel, "conn_or_acquire", lambda _: nullcontext(client))
    payload = {"headers": {}, "properties": {"delivery_info": {}}}
    message = SimpleNamespace(_raw=payload, delivery_info={"exchange": "", "routing_key": "celery"})
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        PacsQoS.__new__(PacsQoS).append(message, "tag")
    client.pipeline().__enter__().execute.side_effect = refuse
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        channel._brpop_start()
    assert "next" not in calls
    client.pipeline().__enter__().execute.side_effect = None
    calls.clear()
    channel._brpop_start()
    channel._brpop_start()
    assert calls == [(payload, "", "celery"), "next", "next"]


@pytest.mark.parametrize("error", [redis.DataError(), TypeError(), KeyError("exchange"), AttributeError()], ids=repr)
def test_a_message_that_no_redis_could_note_is_not_kept(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_: Any) -> None:
        raise error

    monkeypatch.setattr(redis_transport.QoS, "append", refuse)
    monkeypatch.setattr(PacsChannel, "adrift", [])
    message = SimpleNamespace(_raw={}, delivery_info={"exchange": "", "routing_key": "pacs"})
    with pytest.raises(type(error)):
        PacsQoS.__new__(PacsQoS).append(message, ["tag"])
    assert PacsChannel.adrift == []


def test_messages_that_could_not_be_given_back_are_when_redis_is_there_again(monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[str] = []

    def refuse(*_: Any) -> None:
        raise redis.exceptions.ReadOnlyError

    monkeypatch.setattr(PacsChannel, "unreturned", set())
    monkeypatch.setattr(redis_transport.Channel, "_brpop_start", lambda *_: None)
    qos = PacsQoS.__new__(PacsQoS)
    qos._delivered = {"tag": object()}
    monkeypatch.setattr(redis_transport.QoS, "restore_unacked", refuse)
    with pytest.raises(redis.exceptions.ReadOnlyError):
        qos.restore_unacked()
    channel = PacsChannel.__new__(PacsChannel)
    monkeypatch.setattr(PacsChannel, "qos", SimpleNamespace(restore_by_tag=restored.append))
    channel._brpop_start()
    channel._brpop_start()
    assert restored == ["tag"]


@pytest.mark.parametrize("given_back", [True, False])
def test_messages_that_were_given_back_are_not_looked_for_again(
    monkeypatch: pytest.MonkeyPatch, given_back: bool
) -> None:
    def restore(*_: Any) -> None:
        if not given_back:  # the connection of a Redis that has gone
            raise AttributeError

    monkeypatch.setattr(PacsChannel, "unreturned", set())
    monkeypatch.setattr(redis_transport.QoS, "restore_unacked", restore)
    qos = PacsQoS.__new__(PacsQoS)
    qos._delivered, qos.channel = {"tag": object()}, SimpleNamespace(connection=None)
    qos.restore_unacked()
    assert PacsChannel.unreturned == (set() if given_back else {"tag"})
    assert not qos._delivered
