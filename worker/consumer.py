"""What a worker does with messages that are no jobs: it throws them away, says so in one line, and goes on.

Celery's own consumer quotes the body of such a message in its log, and a few of them make it drop its connection, find
the same message again, and so on for ever. Nothing here knows what a job is about; that begins in ``tasks/``.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Final

import redis
from celery import bootsteps, signals
from celery.concurrency import thread
from celery.exceptions import BackendError, SecurityError
from celery.worker import state
from celery.worker.consumer import Consumer
from kombu.exceptions import ContentDisallowed, OperationalError
from kombu.transport import TRANSPORT_ALIASES, virtual
from kombu.transport import redis as redis_transport
from redis.exceptions import DataError, OutOfMemoryError

from worker import signing
from worker.errors import InvalidRequest
from worker.payloads import MESSAGE_BYTES
from worker.watchdog import Signs, times_woken

log = logging.getLogger(__name__)

#: How soon to look again whether a Redis without memory has some.
FULL_S: Final = 1.0

#: Names of tasks and ids that may stand in a log: neither sentences nor URLs.
_NAME: Final = re.compile(r"[\w.:-]{1,200}", re.ASCII)
#: Put in by `PacsMessage` in place of the header that would have kombu unpack the body.
_COMPRESSED: Final = "courier-compressed"


class _Unsigned(Exception):
    """No key that is trusted stands behind a message; the text says why."""


def unfit(message: Any) -> str | None:
    """Why ``message`` (kombu's) cannot be a job for anybody; None if it may be one.

    Raises whatever decoding its body raises.
    """
    signed = message.content_type == signing.CONTENT_TYPE  # in base64, and with a signature before it
    if len(message.body or b"") > (MESSAGE_BYTES * 3 // 2 if signed else MESSAGE_BYTES):
        return f"it is larger than {MESSAGE_BYTES} bytes"
    if not isinstance(message.headers, dict) or message.headers.get(_COMPRESSED):
        return "its headers are no object, or say that it is compressed"
    body = message.payload
    if "task" in message.headers:  # the second version of Celery's protocol
        named, shaped = message.headers, isinstance(body, list | tuple) and len(body) == 3
        arguments = body if shaped else ()
    else:
        named, shaped = body, isinstance(body, dict)
        arguments = (body.get("args", []), body.get("kwargs", {}), {}) if shaped else ()
    if not shaped or not isinstance(named.get("task"), str):
        return "it is no task"
    if not isinstance(named.get("id"), str) or not _NAME.fullmatch(named["id"]):
        return "its id is none"
    kinds = (list | tuple, dict, dict)
    if not all(isinstance(argument, kind) for argument, kind in zip(arguments, kinds, strict=True)):
        return "its arguments are not of the right kinds"
    return None


class PacsConsumer(Consumer):  # type: ignore[misc]  # celery is untyped
    """Celery's consumer, which survives whatever lies in its queues and quotes none of it."""

    #: Whether a job is one that the ledger will bring to its end, whatever becomes of a message; worker/app.py knows.
    is_written_down: ClassVar[Callable[[str], bool]] = staticmethod(lambda _: False)
    #: Messages that came, whatever became of them, and turns of the loop: what a watchdog judges it by.
    taken = 0
    turns = 0

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        take = super().create_task_handler(*args, **kwargs)

        def on_message(message: Any) -> None:
            self.taken += 1
            try:
                reason = unfit(message)
                if reason is None:
                    self._check_signature(message)
                    take(message)
                    return
            except Exception as error:
                if isinstance(error, self.connection_errors + self.channel_errors):
                    raise
                self.on_decode_error(message, error)
                return
            self.throw_away(message, reason)

        return on_message

    def _check_signature(self, message: Any) -> None:
        """The signature itself is good; is it one for this message?"""
        if self.app.conf.task_serializer != signing.SERIALIZER:
            return
        reason: str | None = "it is of the first version of Celery's protocol, which is not signed here"
        if "task" in message.headers:
            reason = signing.objection(message.headers, message.payload[2], good_for_s=self.app.conf.result_expires)
        if reason:
            raise _Unsigned(reason)

    def on_decode_error(self, message: Any, exc: BaseException) -> None:
        signed = self.app.conf.task_serializer == signing.SERIALIZER
        if isinstance(exc, _Unsigned):
            reason = str(exc)
        elif signed and isinstance(exc, ContentDisallowed):
            reason = "it is not signed"
        elif any(isinstance(one, SecurityError) for one in (exc, *exc.args)):  # kombu wraps it
            reason = "its signature is none of a trusted key"
        else:
            self.throw_away(message, f"it cannot be read ({type(exc).__name__})")
            return
        self.throw_away(message, f"{reason} (queue.signing)", tell=not self._goes_on(message))

    def _goes_on(self, message: Any) -> bool:
        """Whether the id is that of a job whose own message was, or will be, signed: this one must not end it."""
        _, job_id = _named(message)
        return job_id is not None and type(self).is_written_down(job_id)

    def on_unknown_message(self, body: object, message: Any) -> None:  # noqa: ARG002 - Celery's signature
        self.throw_away(message, "it is no task")

    def on_unknown_task(self, body: object, message: Any, exc: BaseException) -> None:  # noqa: ARG002 - Celery's
        self.throw_away(message, "no task is called so")

    def on_invalid_task(self, body: object, message: Any, exc: BaseException) -> None:  # noqa: ARG002 - Celery's
        self.throw_away(message, f"it is no task that can be run ({type(exc).__name__})")

    def on_connection_error_before_connected(self, exc: BaseException) -> None:
        _wait_for_room(exc)
        super().on_connection_error_before_connected(exc)

    def on_connection_error_after_connected(self, exc: BaseException) -> None:
        _wait_for_room(exc)
        super().on_connection_error_after_connected(exc)

    def throw_away(self, message: Any, reason: str, *, tell: bool = True) -> None:
        """Reject it for good, in one line; whoever waits for its id is told."""
        task, job_id = _named(message)
        size = len(message.body or b"")
        log.error("Threw a message away: %s (task %s, id %s, %d bytes)", reason, task or "-", job_id or "-", size)
        if not message.acknowledged:
            message.reject_log_error(log, self.connection_errors)
        signals.task_rejected.send(sender=self, message=message, exc=None)
        if job_id and tell:
            self._tell(job_id, InvalidRequest(f"The worker threw the message away: {reason}."))

    def _tell(self, job_id: str, error: InvalidRequest) -> None:
        try:
            self.app.backend.store_result(job_id, error, "FAILURE")
        except (BackendError, redis.RedisError) as away:
            log.warning("Nobody could be told: %s", type(away).__name__)
        if self.event_dispatcher:
            self.event_dispatcher.send("task-failed", uuid=job_id, exception=repr(error.message))


class Turns(bootsteps.StartStopStep):  # type: ignore[misc]  # celery is untyped
    """Counts that the consumer's loop turns: a timer of its own, set anew with each connection."""

    def start(self, parent: Any) -> None:
        if parent.hub is not None:
            parent.timer.call_repeatedly(1.0, self._count, (parent,))

    @staticmethod
    def _count(parent: Any) -> None:
        parent.turns += 1


def look(worker: Any) -> Signs:
    """What Celery's ``worker`` (its controller) shows of its progress; the broker is asked anew each time."""
    consumer = worker.consumer
    return Signs(
        turns=None if consumer.hub is None else consumer.turns,
        taken=consumer.taken,
        worked=times_woken() if issubclass(worker.pool_cls, thread.TaskPool) else None,
        slots=worker.pool.num_processes,
        busy=len(state.active_requests),
        waiting=_waiting(worker.app),
        stopping=any(asked not in (None, False) for asked in (state.should_stop, state.should_terminate)),
    )


def _waiting(app: Any) -> int | None:
    """How many messages are in the queues that this worker is to consume; None if the broker does not answer."""
    try:
        return sum(depths(app, list(app.amqp.queues.consume_from)).values())
    except (OperationalError, OSError, redis.RedisError):
        return None


def depths(app: Any, queues: Iterable[str]) -> dict[str, int]:
    """How many messages wait in each queue; raises what kombu does if the broker does not answer."""
    found = {}
    with app.connection_for_read() as connection:
        connection.ensure_connection(max_retries=1, timeout=5)
        for queue in queues:
            try:
                found[queue] = connection.default_channel.queue_declare(queue=queue, passive=True).message_count
            except connection.channel_errors:  # nothing was ever sent to it
                found[queue] = 0
    return found


def _wait_for_room(error: BaseException) -> None:
    """A Redis without memory answers at once: nothing else would keep the worker from asking without a pause."""
    if isinstance(error, OutOfMemoryError):
        log.error("Redis has no memory left and takes nothing; give it more (maxmemory). The worker waits for it.")
        time.sleep(FULL_S)


def _named(message: Any) -> tuple[str | None, str | None]:
    """The task and the id that the headers name, if they can be shown."""
    headers = message.headers if isinstance(message.headers, dict) else {}
    task, job_id = (
        name if isinstance(name, str) and _NAME.fullmatch(name) else None
        for name in (headers.get("task"), headers.get("id"))
    )
    return task, job_id


class PacsQoS(redis_transport.QoS):
    """What was delivered and not yet acknowledged, also when its Redis has gone: the ledger wakes those jobs.

    kombu closes a connection and then looks for it, once for each message that was delivered over it. Its
    `AttributeError` would end the worker.
    """

    def restore_unacked(self, client: Any = None) -> None:
        with self._perhaps_gone():
            super().restore_unacked(client)  # type: ignore[no-untyped-call]  # kombu is untyped
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
            log.warning("A message cannot be given back to a Redis that has gone; the ledger knows its job")


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

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[no-untyped-call]  # kombu is untyped
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, DataError) as error:
            log.error("Threw away what is no message: %s", type(error).__name__)
            return True


class PacsTransport(redis_transport.Transport):
    """kombu's, for which a Redis without memory is one that is away for a while; kombu would end the worker."""

    Channel = PacsChannel

    connection_errors = (*redis_transport.Transport.connection_errors, OutOfMemoryError)


def install() -> None:
    """Let this process's connections to Redis brokers be of the kind above; before the first one is made."""
    TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), f"{__name__}:{PacsTransport.__name__}"))
