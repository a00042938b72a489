"""What a worker does with messages that are no jobs: it throws them away, says so in one line, and goes on.

Only what decoding and checking a message raise is the message's fault. After any other error it is given back
(``shortage.py``). Celery's own consumer quotes the body of such a message in its log, and a few of them make it drop
its connection, find the same message again, and so on for ever. Nothing here knows what a job is about; that begins in
``tasks/``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import redis
from celery import bootsteps, signals
from celery.exceptions import BackendError, SecurityError
from celery.worker.consumer import Consumer
from kombu.exceptions import ContentDisallowed, OperationalError
from redis.exceptions import OutOfMemoryError

from courier import signing
from courier.errors import CourierError, InvalidRequest, Refused
from courier.ledger.jobs import NOTHING_ATTACHED, Attachment, PendingFollowUps, words_of
from courier.messages import MESSAGE_BYTES
from courier.queues import BATCHES, DUE, QUEUES
from courier.redaction import shown_id, where_it_broke
from courier.result_lines import shown_failure
from worker.runtime import celery_internals, envelope, follow_ups, shortage
from worker.runtime.follow_ups import End
from worker.runtime.kombu_internals import decoded_body, is_compressed
from worker.runtime.watchdog import Signs, times_woken

log = logging.getLogger(__name__)

#: How soon to look again whether a Redis that refused a command takes it.
REFUSED_S: Final = 1.0

#: Names of tasks that may stand in a log: neither sentences nor URLs.
_NAME: Final = re.compile(r"[\w.:-]{1,200}", re.ASCII)
#: Celery's tasks that call another task in a loop, outside of any job, or send themselves again without an end; and
#: what to send in their place.
LOOPS: Final = {
    **dict.fromkeys(("celery.map", "celery.starmap", "celery.chunks"), "send a group, or a batch"),
    "celery.chord_unlock": "a chord needs a client whose result backend is the worker's own",
}


class _Unsigned(Exception):
    """No key that is trusted stands behind a message; the text says why."""


@dataclass(frozen=True)
class Named:
    """What a message says that it is; its first protocol says so in its body, which has to be read before."""

    task: object
    job_id: object

    @property
    def can_be_told(self) -> bool:
        """Whether a result can be stored under its id: that takes UTF-8."""
        return isinstance(self.job_id, str) and bool(self.job_id) and not re.search("[\ud800-\udfff]", self.job_id)


def unfit(message: Any) -> str | None:
    """Why ``message`` (kombu's) cannot be a job for anybody; None if it may be one.

    Raises whatever decoding its body raises.
    """
    return (
        _unfit_to_read(message)
        or _unfit_to_run(message)
        or envelope.wrong_property(message.properties, message.delivery_info)
    )


def _unfit_to_read(message: Any) -> str | None:
    signed = message.content_type == signing.CONTENT_TYPE  # in base64, and with a signature before it
    if len(message.body or b"") > (MESSAGE_BYTES * 3 // 2 if signed else MESSAGE_BYTES):
        return f"it is larger than {MESSAGE_BYTES} bytes"
    if not isinstance(message.headers, dict) or is_compressed(message.headers):
        return "its headers are no object, or say that it is compressed"
    if any(kind is not None and not isinstance(kind, str) for kind in (message.content_type, message.content_encoding)):
        return "its content type or encoding is no text"
    return None


def _unfit_to_run(message: Any) -> str | None:
    headers, arguments = _parts(message.payload, message.headers)
    if len(arguments) != 3 or not isinstance(headers.get("task"), str):
        return "it is no task"
    kinds = (list | tuple, dict, dict)
    if not all(isinstance(argument, kind) for argument, kind in zip(arguments, kinds, strict=True)):
        return "its arguments are not of the right kinds"
    if headers["task"] in LOOPS:
        return f"{headers['task']} runs no jobs here; {LOOPS[headers['task']]}"
    return (
        envelope.wrong_id(headers.get("id"))
        or envelope.wrong_depth([headers, *arguments, message.properties, message.delivery_info])
        or envelope.wrong_property(message.properties, message.delivery_info)
        or envelope.wrong_header(headers)
        or envelope.wrong_follow_up(arguments[2])
        or _wrong_arguments(headers["task"], *arguments[:2])
    )


def _wrong_arguments(task: str, positional: Sequence[Any], by_name: Mapping[str, Any]) -> str | None:
    """Why one of our tasks cannot be called with these; None if it can. Each has one parameter, the job."""
    if not task.startswith("pacs."):
        return None
    if len(positional) > 1 or "self" in by_name or (positional and "job" in by_name):
        return "its arguments are others than one object job"
    return None


def _parts(body: object, headers: Mapping[str, Any]) -> tuple[Mapping[str, Any], Sequence[Any]]:
    """The headers and the arguments of a message; neither has been checked."""
    if "task" in headers:  # the second version of Celery's protocol
        return headers, body if isinstance(body, list | tuple) else ()
    return _first_protocol(body, headers) if isinstance(body, dict) else ({}, ())


#: What follow-ups are called in the body of the first version of Celery's protocol, which has no chains.
_FOLLOW_UPS: Final = ("callbacks", "errbacks", "chord")


def _first_protocol(body: Mapping[str, Any], headers: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The headers, in which Celery lets those of the message stand before those of the body, and the arguments."""
    rest = {name: value for name, value in body.items() if name not in ("args", "kwargs", *_FOLLOW_UPS)}
    embed = {name: body.get(name) for name in _FOLLOW_UPS}
    return {**rest, **headers}, (body.get("args", []), body.get("kwargs", {}), embed)


def named(message: Any) -> Named:
    """What the headers say, and for the first protocol what the body says, if that has been read."""
    headers = message.headers if isinstance(message.headers, dict) else {}
    body = decoded_body(message)
    if "task" not in headers and isinstance(body, dict):
        return Named(headers.get("task", body.get("task")), headers.get("id", body.get("id")))
    return Named(headers.get("task"), headers.get("id"))


class PacsConsumer(Consumer):  # type: ignore[misc]  # celery is untyped
    """Celery's consumer, which survives whatever lies in its queues and quotes none of it."""

    #: The one of this process, if it has one.
    running: ClassVar[PacsConsumer | None] = None
    #: Whether a job is one that the ledger will bring to its end, whatever becomes of a message; worker/app.py knows.
    #: Raises a `redis.RedisError` where the ledger does not answer.
    is_written_down: ClassVar[Callable[[str], bool]] = staticmethod(lambda _: False)
    #: Counts that the message of a job was given back; returns how often it was by now.
    count_return: ClassVar[Callable[[str], int]] = staticmethod(lambda _: 0)
    #: Makes a dead letter of a job (its id, task, message, and what is attached) that cannot be done; False if it has
    #: ended already.
    dead_letter: ClassVar[Callable[[str, str, Mapping[str, Any], Attachment, CourierError], bool]] = staticmethod(
        lambda *_: True
    )
    #: Celery's; how a request is handed to the pool.
    on_task_request: Any
    #: Notes that the outcome of a job is where its client looks for it.
    published: ClassVar[Callable[[str], None]] = staticmethod(lambda _: None)
    #: Messages that came, whatever became of them, and turns of the loop: what a watchdog judges it by.
    taken = 0
    turns = 0
    #: When a message came last that a caller may be waiting for: one of neither a batch nor a released job.
    asked_at: float | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        PacsConsumer.running = self
        self.returns = shortage.Returns()
        self._to_consume = frozenset(self.app.amqp.queues.consume_from)
        celery_internals.hand_over_by(self, self._hand_over)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        take = super().create_task_handler(*args, **kwargs)

        def on_message(message: Any) -> None:
            self.taken += 1
            note_message(self, message)
            try:
                reason = unfit(message)
                if reason is None:
                    self._check_signature(message)
            except Exception as error:  # noqa: BLE001 - decoders raise anything
                self.on_decode_error(message, error)
                return
            if reason is not None:
                self.throw_away(message, reason)
                return
            try:
                take(message)
            except Exception as error:
                if self._is_of_the_broker(error):
                    raise
                self.give_back(message, error)

        return on_message

    def add_task_queue(self, queue: str, *args: Any, **options: Any) -> None:
        """`celery control add_consumer` without a destination reaches every worker of every application."""
        if queue in self._to_consume or queue in QUEUES:
            super().add_task_queue(queue, *args, **options)
        else:
            log.error("Did not begin to read the queue %s: name it with -Q if it is one of ours", shown_id(queue))

    def _is_of_the_broker(self, error: Exception) -> bool:
        """Whether the connection is to be made anew; kombu counts a `KeyError` and all of `OSError` among those."""
        if isinstance(error, KeyError) or shortage.is_shortage(error):
            return False
        return isinstance(error, self.connection_errors + self.channel_errors)

    def _check_signature(self, message: Any) -> None:
        """The signature itself is good; is it one for this message? Notes whose it is, for the slots of this worker."""
        message.headers.pop(signing.SENDER_HEADER, None)
        if self.app.conf.task_serializer != signing.SERIALIZER:
            return
        reason: str | None = "it is of the first version of Celery's protocol, which is not signed here"
        if "task" in message.headers:
            reason = signing.objection(message.headers, message.payload[2], good_for_s=self.app.conf.result_expires)
        if reason:
            raise _Unsigned(reason)
        message.headers[signing.SENDER_HEADER] = signing.sender_of(message.body)

    def on_decode_error(self, message: Any, exc: BaseException) -> None:
        signed = self.app.conf.task_serializer == signing.SERIALIZER
        if shortage.is_shortage(exc):
            self.give_back(message, exc)
        elif isinstance(exc, _Unsigned):
            self.throw_away(message, f"{exc} (queue.signing)")
        elif signed and isinstance(exc, ContentDisallowed):
            self.throw_away(message, "it is not signed (queue.signing)")
        elif any(isinstance(one, SecurityError) for one in (exc, *exc.args)):  # kombu wraps it
            self.throw_away(message, "its signature is none of a trusted key (queue.signing)")
        else:
            self.throw_away(message, f"it cannot be read ({type(exc).__name__})")

    def on_unknown_message(self, body: object, message: Any) -> None:  # noqa: ARG002 - Celery's signature
        self.throw_away(message, "it is no task")

    def on_unknown_task(self, body: object, message: Any, exc: BaseException) -> None:  # noqa: ARG002 - Celery's
        self.throw_away(message, "no task is called so")

    def on_invalid_task(self, body: object, message: Any, exc: BaseException) -> None:  # noqa: ARG002 - Celery's
        self.throw_away(message, f"it is no task that can be run ({type(exc).__name__})")

    def on_connection_error_before_connected(self, exc: BaseException) -> None:
        _wait_for_redis(exc)
        super().on_connection_error_before_connected(exc)

    def on_connection_error_after_connected(self, exc: BaseException) -> None:
        _wait_for_redis(exc)
        super().on_connection_error_after_connected(exc)

    def throw_away(self, message: Any, reason: str) -> None:
        """Reject it for good, in one line, and end its id with `InvalidRequest`.

        A job that the ledger knows is not ended by a message that is none: the ledger sends another one.
        """
        name = named(message)
        try:
            goes_on = name.can_be_told and type(self).is_written_down(str(name.job_id))
        except (redis.ConnectionError, redis.TimeoutError) as error:
            away = type(error).__name__
            log.warning("The ledger does not say whether it knows a job (%s); the message is given back", away)
            message.reject_log_error(log, self.connection_errors, requeue=True)
            time.sleep(shortage.PAUSE_S)
            return
        except redis.RedisError:  # what it has under this id is no job
            goes_on = False
        size = len(message.body or b"")
        log.error("Threw a message away: %s (%s, %d bytes)", reason, _shown(message), size)
        refusal = InvalidRequest(f"The worker threw the message away: {reason}.")
        if name.can_be_told and not goes_on and not self._follow_up(message, name, refusal):
            message.reject_log_error(log, self.connection_errors, requeue=True)
            time.sleep(shortage.PAUSE_S)
            return
        if not message.acknowledged:
            message.reject_log_error(log, self.connection_errors)
        signals.task_rejected.send(sender=self, message=message, exc=None)
        if name.can_be_told and not goes_on:
            self._publish(str(name.job_id), refusal)

    def _follow_up(self, message: Any, name: Named, refusal: CourierError) -> bool:
        """Send what follows on the failure of a job that the ledger does not know; False: do it again later."""
        pending = PendingFollowUps(self._attached(message).follow_ups)
        if not pending.follow_ups:
            return True
        try:
            end = End(str(name.job_id), str(name.task), refusal)
            return follow_ups.send(self.app, end, pending, lambda _: None) is not None
        except (BackendError, OperationalError, redis.RedisError) as away:
            log.warning("The follow-ups of a refused message cannot be sent now: %s", type(away).__name__)
            return False

    def _attached(self, message: Any) -> Attachment:
        """What a message bears besides its job, as far as it can be used; nothing without the signature it needs."""
        body = decoded_body(message)
        if body is None or not isinstance(message.headers, dict):
            return NOTHING_ATTACHED
        try:
            self._check_signature(message)
        except (_Unsigned, LookupError, TypeError):
            return NOTHING_ATTACHED
        headers, arguments = _parts(body, message.headers)
        embedded = envelope.sound_follow_ups(arguments[2]) if len(arguments) == 3 else {}
        return follow_ups.attachment(embedded, envelope.sound_place(headers))

    def _publish(self, job_id: str, error: CourierError) -> None:
        try:
            self.app.backend.store_result(job_id, error, "FAILURE")
            type(self).published(job_id)
        except (BackendError, redis.RedisError) as away:
            log.warning("Nobody could be told: %s", type(away).__name__)
        if self.event_dispatcher:
            line = shown_failure(error.payload, refused=isinstance(error, Refused))
            self.event_dispatcher.send("task-failed", uuid=job_id, exception=repr(error.message), result=line)

    # --- what is not the message's fault ------------------------------------------------------------------------

    def _hand_over(self, hand_over: Callable[[Any], None], request: Any) -> None:
        """A pool may hand a message over later than it came, when a process is free: outside of `on_message`."""
        try:
            hand_over(request)
        except Exception as error:
            if self._is_of_the_broker(error):
                raise
            celery_internals.take_back(self, request)
            self.give_back(request.message, error)

    def give_back(self, message: Any, error: BaseException) -> None:
        """Put it back into its queue, behind the others, and wait; after a few in a row end the worker.

        One that was given back `shortage.MAX_RETURNS` times while others succeeded becomes a dead letter.
        """
        why = shortage.why(error)
        if not shortage.is_shortage(error):
            log.error("A fault of the worker itself: %s", where_it_broke(error))
        log.error("Gave a message back, because %s (%s)", why, _shown(message))
        times = self.returns.given_back(lambda: self._count(named(message)))
        self.end_after_a_few(why)
        if times >= shortage.MAX_RETURNS:
            self._dead_letter(message, why)
        elif not message.acknowledged:
            message.reject_log_error(log, self.connection_errors, requeue=True)
            time.sleep(shortage.PAUSE_S)

    def end_after_a_few(self, why: str) -> None:
        """End the worker if it has given a few back in a row."""
        if self.returns.in_a_row >= shortage.IN_A_ROW and not celery_internals.is_told_to_stop():
            log.critical(
                "This worker gave %d messages back in a row, the last one because %s. It ends itself with exit status"
                " %d; %s, then start it again.",
                self.returns.in_a_row,
                why,
                shortage.EXIT_STATUS,
                shortage.what_to_do(why),
            )
            celery_internals.stop(shortage.EXIT_STATUS)

    def _count(self, name: Named) -> int:
        try:
            return type(self).count_return(str(name.job_id)) if name.can_be_told else 0
        except redis.RedisError:
            return 0

    def _dead_letter(self, message: Any, why: str) -> None:
        """A job that the ledger has brought to its end meanwhile stays as it ended."""
        name, fault = named(message), shortage.dead_letter(why)
        try:
            arguments = message.payload[1] if "task" in message.headers else message.payload.get("kwargs", {})
            job = arguments.get("job")
            job = job if isinstance(job, Mapping) else {}
            died = type(self).dead_letter(str(name.job_id), str(name.task), job, self._attached(message), fault)
        except Exception as failed:  # noqa: BLE001 - what made it come back may keep it from being read
            log.error("A dead letter could not be written into the ledger: %s", type(failed).__name__)
            died = True
        message.reject_log_error(log, self.connection_errors)
        if died:
            log.error("Dead letter: %s (%s)", fault.message, _shown(message))
            self._publish(str(name.job_id), fault)


def _shown(message: Any) -> str:
    """Task and id as the headers name them; nothing of a body is quoted."""
    headers = message.headers if isinstance(message.headers, dict) else {}
    task, job_id = headers.get("task"), headers.get("id")
    task = task if isinstance(task, str) and _NAME.fullmatch(task) else "-"
    return f"task {task}, id {shown_id(job_id) if isinstance(job_id, str) and job_id else '-'}"


class Turns(bootsteps.StartStopStep):  # type: ignore[misc]  # celery is untyped
    """Counts that the consumer's loop turns: a timer of its own, set anew with each connection."""

    def start(self, parent: Any) -> None:
        if parent.hub is not None:
            parent.timer.call_repeatedly(1.0, self._count, (parent,))

    @staticmethod
    def _count(parent: Any) -> None:
        parent.turns += 1


class HeardSignals(bootsteps.StartStopStep):  # type: ignore[misc]  # celery is untyped
    """Has a signal end the wait of the consumer's loop, which would look a second later whether it is to stop."""

    def start(self, parent: Any) -> None:
        if parent.hub is not None and threading.current_thread() is threading.main_thread():
            wake_by_signals(parent.hub)


def wake_by_signals(hub: Any) -> None:
    """Have a signal to this process wake ``hub`` (kombu's) once its handler has run. Only the main thread may ask."""
    told = _told_of_signals()
    hub.add_reader(told, _read_all, told)


@functools.cache
def _told_of_signals() -> int:
    """A pipe that signals are written to. It stays open: another file with its number would be written to."""
    told, tells = os.pipe()
    os.set_blocking(told, False)
    os.set_blocking(tells, False)
    signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
    return told


def _read_all(told: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.read(told, 4096)


def note_message(consumer: Any, message: Any) -> None:
    """A message came to ``consumer``, whatever becomes of it."""
    info = message.delivery_info
    if not isinstance(info, dict) or info.get("routing_key") not in (BATCHES, DUE):
        consumer.asked_at = time.monotonic()


def quiet_s() -> float:
    """How long ago a message came to this process that a caller may be waiting for."""
    asked_at = PacsConsumer.running.asked_at if PacsConsumer.running else None
    return math.inf if asked_at is None else time.monotonic() - asked_at


def read_signs(worker: Any) -> Signs:
    """What Celery's ``worker`` (its controller) shows of its progress; the broker is asked anew each time."""
    consumer = worker.consumer
    slots, busy = celery_internals.slots(worker)
    return Signs(
        turns=None if consumer.hub is None else consumer.turns,
        taken=consumer.taken,
        worked=times_woken() if celery_internals.runs_threads(worker) else None,
        slots=slots,
        busy=busy,
        waiting=_waiting(worker.app),
        stopping=celery_internals.is_told_to_stop() or celery_internals.is_told_to_terminate(),
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


def _wait_for_redis(error: BaseException) -> None:
    """A Redis that refuses commands does so at once: nothing else would keep the worker from asking without a pause."""
    if isinstance(error, OutOfMemoryError):
        log.error("Redis has no memory left and takes nothing; give it more (maxmemory). The worker waits for it.")
    elif isinstance(error, redis.ResponseError):
        log.error("Redis refuses a command of the broker (%s). The worker waits and connects anew.", words_of(error))
    else:
        return
    time.sleep(REFUSED_S)
