"""The parts of kombu that we override or read although its manual does not name them; its version has a ceiling.

What lies in a queue of Redis may be anything, and its Redis may be away: kombu would end the worker, or quote the
message. What a message is about is not this module's business. ``tests/unit/test_kombu_internals.py`` fails when one of
the parts changes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, ClassVar, Final

import redis
from kombu.serialization import registry
from kombu.transport import TRANSPORT_ALIASES, virtual
from kombu.transport import redis as redis_transport
from redis.exceptions import DataError, OutOfMemoryError

log = logging.getLogger(__name__)

#: Put in by `PacsMessage` in place of the header that would have kombu unpack the body.
_COMPRESSED: Final = "courier-compressed"


def install() -> None:
    """Let this process's connections to Redis brokers be of the kind below; before the first one is made."""
    TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), f"{__name__}:{PacsTransport.__name__}"))


def decoded_body(message: Any) -> Any:
    """The body of ``message`` as it was decoded; None if nothing has read it yet, or it could not be read."""
    return message._decoded_cache


def is_compressed(headers: dict[str, Any]) -> bool:
    """Whether the message with ``headers`` says that its body is compressed; it was not unpacked."""
    return bool(headers.get(_COMPRESSED))


def knows_serializer(name: str) -> bool:
    """Whether a message can be sent with the serializer ``name``."""
    return name in registry.name_to_type


class PacsQoS(redis_transport.QoS):
    """What was delivered and not yet acknowledged, also when its Redis has gone or refuses to note it.

    kombu closes a connection and then looks for it, once for each message that was delivered over it. Its
    `AttributeError` would end the worker.
    """

    def append(self, message: Any, delivery_tag: str) -> None:
        """Note that a message was taken. It has left its queue, so one that Redis does not note is kept here."""
        try:
            super().append(message, delivery_tag)  # type: ignore[no-untyped-call]  # kombu is untyped
        except (redis.ConnectionError, redis.TimeoutError, redis.ResponseError, OSError) as error:
            log.warning(
                "Redis did not note that a message was taken (%s); it is put back as soon as Redis takes it",
                type(error).__name__,
            )
            info = message.delivery_info
            PacsChannel.adrift.append((message._raw, info["exchange"], info["routing_key"]))
            raise

    def restore_unacked(self, client: Any = None) -> None:
        unreturned = set(self._delivered)
        PacsChannel.unreturned |= unreturned
        with self._perhaps_gone():
            super().restore_unacked(client)  # type: ignore[no-untyped-call]  # kombu is untyped
            PacsChannel.unreturned -= unreturned
        self._delivered.clear()

    def ack(self, delivery_tag: str) -> None:
        with self._perhaps_gone():
            super().ack(delivery_tag)  # type: ignore[no-untyped-call]  # kombu is untyped

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        with self._perhaps_gone():
            super().reject(delivery_tag, requeue=requeue)  # type: ignore[no-untyped-call]  # kombu is untyped

    @contextlib.contextmanager
    def _perhaps_gone(self) -> Iterator[None]:
        try:
            yield
        except AttributeError:
            if self.channel.connection is not None and self.channel.connection.client is not None:
                raise
            log.warning(
                "A message cannot be given back to a Redis that has gone; it is as soon as Redis is there again"
            )


class PacsMessage(virtual.Message):
    """kombu unpacks a body before anybody looks at it, and 256 KiB of gzip are 256 MiB. Nothing here compresses."""

    def __init__(self, payload: Any, channel: Any = None, **options: Any) -> None:
        headers = payload.get("headers") if isinstance(payload, dict) else None
        if isinstance(headers, dict) and headers.pop("compression", None):
            headers[_COMPRESSED] = True
        super().__init__(payload, channel=channel, **options)  # type: ignore[no-untyped-call]  # kombu is untyped


class PacsChannel(redis_transport.Channel):
    """A queue in Redis is a list to which anybody may push anything: what is no message at all ends here."""

    QoS = PacsQoS
    Message = PacsMessage
    #: What this process has taken from its queue and Redis has not noted: message, exchange and routing key.
    adrift: ClassVar[list[tuple[Any, str, str]]] = []

    #: Tags of messages that this process has taken, and could not give back when it lost its connection.
    unreturned: ClassVar[set[str]] = set()

    _for_commands: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        """One client for all commands: kombu makes one for each, which takes longer than the command.

        What waits for messages has a client and a connection of its own, as with kombu.
        """
        if asynchronous:
            return super()._create_client(asynchronous=True)  # type: ignore[no-untyped-call]  # kombu is untyped
        if self._for_commands is None or self._for_commands.connection_pool is not self.pool:
            self._for_commands = super()._create_client()  # type: ignore[no-untyped-call]  # kombu is untyped
        return self._for_commands

    def _brpop_start(self, *args: Any, **options: Any) -> None:
        if self.adrift or self.unreturned:
            self._give_back()
        super()._brpop_start(*args, **options)  # type: ignore[no-untyped-call]  # kombu is untyped

    def _give_back(self) -> None:
        """Redis is there again: what it did not take meanwhile comes before new messages are asked for."""
        while self.adrift:
            with self.conn_or_acquire() as client, client.pipeline() as pipe:
                self._do_restore_message(*self.adrift[0], pipe)
                pipe.execute()
            del self.adrift[0]
        for tag in list(self.unreturned):
            self.qos.restore_by_tag(tag)
            self.unreturned.discard(tag)

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[no-untyped-call]  # kombu is untyped
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, DataError) as error:
            log.error("Threw away what is no message: %s", type(error).__name__)
            return True

    def _do_restore_message(self, payload: Any, exchange: Any, routing_key: Any, *args: Any, **options: Any) -> None:
        """Put back what a worker took and did not end. kombu quotes a message that it cannot put back."""
        properties = payload["properties"]
        of_texts = isinstance(exchange, str) and isinstance(routing_key, str)
        of_objects = isinstance(payload.get("headers"), dict) and isinstance(properties.get("delivery_info"), dict)
        if of_texts and of_objects:
            super()._do_restore_message(payload, exchange, routing_key, *args, **options)  # type: ignore[no-untyped-call]
        else:
            log.error("Threw away a message that cannot be put back: its headers or its delivery_info are none")


class PacsTransport(redis_transport.Transport):
    """kombu's, for which a Redis without memory is one that is away for a while; kombu would end the worker."""

    Channel = PacsChannel

    connection_errors = (*redis_transport.Transport.connection_errors, OutOfMemoryError)
