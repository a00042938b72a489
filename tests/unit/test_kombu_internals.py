"""The parts of kombu that its manual does not name do what our connections to Redis take them to do.

A test that fails with a new version of kombu names the function of ours that has to be looked at, in
``worker/runtime/kombu_internals.py`` unless another module is named.
"""

from __future__ import annotations

import base64
import inspect
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import fakeredis
import kombu
import pytest
from kombu.compression import compress
from kombu.serialization import registry
from kombu.transport import get_transport_cls, virtual
from kombu.transport import redis as redis_transport
from redis.exceptions import OutOfMemoryError

from courier import queues
from worker.runtime import kombu_internals
from worker.runtime.kombu_internals import (
    PacsChannel,
    PacsMessage,
    PacsQoS,
    PacsTransport,
    decoded_body,
    is_compressed,
    knows_serializer,
)


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A channel of ours on a Redis in this process."""
    monkeypatch.setattr(PacsChannel, "connection_class", fakeredis.FakeRedis().connection_pool.connection_class)
    monkeypatch.setattr(PacsChannel, "adrift", [])
    monkeypatch.setattr(PacsChannel, "unreturned", set())
    with kombu.Connection("redis://kombu-internals.invalid:1/0", transport=PacsTransport) as connection:
        channel: Any = connection.default_channel
        with channel.conn_or_acquire() as client:
            client.flushdb()
        yield channel
        channel.qos._delivered.clear()


def waiting(channel: Any, name: str = "one") -> list[bytes]:
    with channel.conn_or_acquire() as client:
        return list(client.lrange(name, 0, -1))


def put(channel: Any, name: str = "one") -> None:
    channel.queue_declare(name)
    with kombu.Producer(channel) as producer:
        producer.publish({"job": 1}, routing_key=name, headers={"task": "pacs.upload"})


# --- the transport ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_install_depends_on_where_kombu_looks_for_the_transport_of_a_url(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr(kombu.transport, "TRANSPORT_ALIASES", dict(kombu.transport.TRANSPORT_ALIASES))
    monkeypatch.setattr(kombu_internals, "TRANSPORT_ALIASES", kombu.transport.TRANSPORT_ALIASES)
    monkeypatch.setattr(kombu.transport, "_transport_cache", {})
    kombu_internals.install()
    assert get_transport_cls(scheme) is PacsTransport


def test_pacs_transport_depends_on_where_a_connection_finds_its_parts(channel: Any) -> None:
    assert type(channel) is PacsChannel
    assert type(channel.qos) is PacsQoS
    assert OutOfMemoryError in channel.connection.client.connection_errors
    put(channel)
    assert type(channel.basic_get("one")) is PacsMessage


# --- what is taken and not yet acknowledged ---------------------------------------------------------------------------


def test_pacs_qos_depends_on_these_methods_and_their_parameters() -> None:
    assert parameters(redis_transport.QoS.append) == ["self", "message", "delivery_tag"]
    assert parameters(redis_transport.QoS.restore_unacked) == ["self", "client"]
    assert parameters(redis_transport.QoS.ack) == ["self", "delivery_tag"]
    assert parameters(redis_transport.QoS.reject) == ["self", "delivery_tag", "requeue"]
    assert parameters(redis_transport.QoS.restore_by_tag)[:2] == ["self", "tag"]


def test_pacs_qos_depends_on_where_a_message_and_its_tag_are_kept(channel: Any) -> None:
    put(channel)
    raw = json.loads(waiting(channel)[0])
    message = channel.basic_get("one")
    assert message._raw.keys() == raw.keys(), "PacsQoS.append keeps something else than the message of the queue"
    assert message._raw["body"] == raw["body"]
    assert {"exchange", "routing_key"} <= message.delivery_info.keys()
    assert list(channel.qos._delivered) == [message.delivery_tag], "PacsQoS.restore_unacked reads the tags elsewhere"


@pytest.mark.parametrize("how", ["ack", "reject", "restore_unacked"])
def test_pacs_qos_depends_on_the_error_of_a_connection_that_has_gone(channel: Any, how: str) -> None:
    """kombu looks for the connection that it has closed: were it another error, a worker would end of it."""
    put(channel)
    message = channel.basic_get("one")
    given = () if how == "restore_unacked" else (message.delivery_tag,)
    qos, connection = channel.qos, channel.connection
    channel.connection = channel._pool = channel._for_commands = None
    try:
        with pytest.raises(AttributeError):
            getattr(redis_transport.QoS, how)(qos, *given)
        getattr(qos, how)(*given)
    finally:
        channel.connection = connection


def test_pacs_qos_depends_on_messages_being_restored_by_their_tags(channel: Any) -> None:
    put(channel)
    message = channel.basic_get("one")
    assert waiting(channel) == []
    channel.qos.restore_by_tag(message.delivery_tag)
    assert len(waiting(channel)) == 1


# --- messages ---------------------------------------------------------------------------------------------------------


def compressed() -> dict[str, Any]:
    body, content_type = compress(b"x" * 100_000, "gzip")
    properties = {"delivery_tag": "1", "delivery_info": {}, "body_encoding": "base64"}
    return {"body": base64.b64encode(body), "headers": {"compression": content_type}, "properties": properties}


def test_pacs_message_depends_on_the_header_that_has_a_body_unpacked(channel: Any) -> None:
    unpacked = virtual.Message(compressed(), channel=channel)
    assert len(unpacked.body) == 100_000, "kombu does not unpack a body by itself: PacsMessage is needless now"
    message = PacsMessage(compressed(), channel=channel)
    assert len(message.body) < 1_000
    assert is_compressed(message.headers)


def test_decoded_body_depends_on_where_a_message_keeps_it(channel: Any) -> None:
    put(channel)
    message = channel.basic_get("one")
    assert decoded_body(message) is None
    assert message.payload == {"job": 1}
    assert decoded_body(message) == {"job": 1}


# --- the channel ------------------------------------------------------------------------------------------------------


def test_pacs_channel_depends_on_these_methods_and_their_parameters() -> None:
    kombus = redis_transport.Channel
    assert parameters(kombus._create_client) == ["self", "asynchronous"]
    assert parameters(kombus._brpop_start) == ["self", "timeout"]
    assert parameters(kombus._brpop_read) == ["self", "options"]
    assert parameters(kombus._do_restore_message) == [
        *("self", "payload", "exchange", "routing_key", "pipe", "leftmost"),
    ]


def test_pacs_channel_depends_on_who_makes_the_client_of_each_command(channel: Any) -> None:
    with channel.conn_or_acquire() as first, channel.conn_or_acquire() as second:
        assert first is second
    with redis_transport.Channel.conn_or_acquire(channel) as third:
        assert third is first, "kombu does not ask _create_client any more"
    assert channel.client is not first, "what waits for messages has the client of the commands"
    assert first.connection_pool is channel.pool


def test_pacs_channel_depends_on_who_asks_for_the_next_message(channel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(PacsChannel, "unreturned", {"a tag"})
    monkeypatch.setattr(PacsChannel, "_give_back", lambda _: calls.append("gave back"))
    cycle = redis_transport.MultiChannelPoller()
    monkeypatch.setattr(cycle, "_client_registered", lambda *_: True)
    channel._in_poll = None
    cycle._register_BRPOP(channel)
    assert calls == ["gave back"], "PacsChannel._brpop_start is not asked"


def test_pacs_channel_depends_on_who_reads_what_was_in_a_queue(channel: Any) -> None:
    assert channel.handlers["BRPOP"] == channel._brpop_read
    channel.__dict__["client"] = SimpleNamespace(
        connection=MagicMock(_re_auth_token=None), parse_response=lambda *_, **__: [b"one", b"no message"]
    )
    with pytest.raises(ValueError, match="Expecting value"):
        redis_transport.Channel._brpop_read(channel)
    assert channel._brpop_read() is True, "what a reader returns who has taken something"


def test_pacs_channel_depends_on_who_puts_a_message_back(channel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[Any] = []
    whole = PacsChannel._do_restore_message

    def noting(self: Any, payload: Any, exchange: Any, routing_key: Any, *rest: Any) -> None:
        restored.append((payload["headers"]["task"], exchange, routing_key))
        whole(self, payload, exchange, routing_key, *rest)

    monkeypatch.setattr(PacsChannel, "_do_restore_message", noting)
    put(channel)
    channel.basic_get("one").reject(requeue=True)
    assert restored[0] == ("pacs.upload", "", "one")
    assert len(waiting(channel)) == 1


@pytest.mark.parametrize("step", [0, 3, 6, 9])
def test_the_old_queues_depend_on_the_names_of_the_lists(channel: Any, step: int) -> None:
    """`courier.queues` names them as Celery's manual has it."""
    assert channel.priority_steps == [0, 3, 6, 9]
    assert queues._list_name(channel, "one", step) == channel._q_for_pri("one", step)


# --- serializers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["json", "pickle", "nothing-is-called-so"])
def test_knows_serializer_depends_on_where_serializers_are_kept(name: str) -> None:
    try:
        registry.dumps({}, serializer=name)
        known = True
    except kombu.exceptions.SerializerNotInstalled:
        known = False
    assert knows_serializer(name) is known


def test_shown_result_depends_on_who_makes_json_of_it() -> None:
    """`worker.app.ShownResult` is no dict, and stored like one."""

    class Result:
        def __json__(self) -> dict[str, int]:
            return {"a": 1}

    assert kombu.utils.json.dumps(Result()) == '{"a": 1}'


def test_a_worker_takes_from_each_of_its_queues_in_turn(channel: Any) -> None:
    """`courier.queues.DUE`: released jobs and those that were enqueued just now do not wait for each other's end."""
    cycle = channel._queue_cycle
    cycle.update([queues.JOBS, queues.DUE])
    taken = []
    for _ in range(4):
        taken.append(cycle.consume(2)[0])
        cycle.rotate(taken[-1])
    assert taken == [queues.JOBS, queues.DUE] * 2
    assert "_queue_cycle.rotate(dest)" in inspect.getsource(redis_transport.Channel._brpop_read)
    assert "for pri in self.priority_steps" in inspect.getsource(redis_transport.Channel._brpop_start)
