"""What all doors do: hand the message to `execute`, and say its verdict in Celery's words."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import redis
from celery import Task
from celery.exceptions import Ignore, Reject

from courier.errors import CourierError, InvalidRequest
from courier.json_text import EncodedResult
from courier.ledger.jobs import NO_SENDER, LeaseLost, PendingFollowUps, Sender, job_id_for
from courier.redaction import job_lines
from courier.signing import SENDER_HEADER
from courier.telemetry import continued
from worker.app import BROKER_ERRORS, app, ready
from worker.batches import senders
from worker.jobs.attempt import Attempt, Heartbeat
from worker.jobs.idempotency import outcome_of_first
from worker.jobs.runner import Deferred, Done, Failed, JobResult, NotTaken, Starved, Work, execute
from worker.jobs.services import Services
from worker.runtime import follow_ups
from worker.runtime.follow_ups import End, detach
from worker.runtime.request import NOT_BEGUN, WAITS
from worker.runtime.revokes import stamps_of
from worker.runtime.shortage import STARVED, is_shortage

log = logging.getLogger(__name__)

#: Without a ledger nothing can be done; a message that is given back comes again at once.
PAUSE_S = 1.0
#: Tasks whose job's id becomes that of a batch, and part of its keys.
OPENS_A_BATCH = frozenset(
    ("pacs.delete_all", "pacs.batch.upload", "pacs.batch.delete", "pacs.batch.download", "pacs.batch.migrate")
)
IS_BATCH_ID = re.compile(r"[\w.-]{1,200}", re.ASCII).fullmatch
_IS_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}").fullmatch


def deliver(task: Task, work: Work, message: object, *, beside: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Carry a delivered message and say it in Celery's words: return, raise, or leave it to somebody else.

    ``beside`` are further arguments of the message. With any, an order that deletes, moves, hides or overwrites is
    refused: a ``dry_run`` beside the job instead of in it must not delete.
    """
    attached = detach(task.request)
    job_id = task.request.id
    if beside:
        work, message = _refuse, {**beside, "job": message}  # as it came, so that it is refused when it is woken, too
    key = message.get("idempotency_key") if isinstance(message, dict) else None
    if isinstance(key, str) and key and job_id_for(key) != job_id:
        work = partial(outcome_of_first, task.name)
    elif task.name in OPENS_A_BATCH and not IS_BATCH_ID(job_id):
        wrong = InvalidRequest("A batch bears its job's id, which may hold letters, digits, . _ and - only.")
        return _said(task, Failed(wrong, PendingFollowUps(attached.follow_ups)))
    trace = _trace(task)
    with job_lines(job_id, task.name):
        services, heartbeat = _ready()  # the first job lets in who watches
        if services.settings.queue.signing.destructive_senders:
            work = senders.checked(work, task.name)
        if not _heeded(task, services):
            time.sleep(PAUSE_S)
            raise Reject("the ledger cannot be reached", requeue=True)
        with continued({"traceparent": trace} if trace else {}):
            result = execute(
                work,
                task=task.name,
                job_id=job_id,
                message=message,
                services=services,
                heartbeat=heartbeat,
                trace=trace,
                queue=_queue(task),
                attached=attached,
                sender=_sender(task, services),
            )
        return _said(task, result)


def _said(task: Task, result: JobResult) -> dict[str, Any]:
    match result:
        case Done(payload, pending):
            _send(task, payload, pending)
            return payload
        case Failed(error, pending):
            _send(task, error, pending)
            raise error from None
        case NotTaken():
            time.sleep(PAUSE_S)
            raise Reject("the ledger cannot be reached, or has lost the job", requeue=True)
        case Starved():
            time.sleep(PAUSE_S)
            raise Ignore(STARVED)
        case Deferred():
            raise Ignore(WAITS, dict(result.waiting))


def _send(task: Task, outcome: dict[str, Any] | CourierError, pending: PendingFollowUps | None) -> None:
    """Send what follows on the end of a job, before Celery hears of it. What cannot be sent now is sent by another
    worker: the job stays due.
    """
    if pending is None or not pending.follow_ups:
        return
    plain = outcome.read_back() if isinstance(outcome, EncodedResult) else outcome
    end = End(task.request.id, task.name, plain, task.request)
    try:
        if not pending.fence:
            if follow_ups.send(app, end, pending, lambda _: None) is not None:
                return
            raise Reject("a chord is being ended", requeue=True)
        if _sent(end, pending):
            return
    except (LeaseLost, RuntimeError, MemoryError, OSError, *BROKER_ERRORS) as error:
        log.warning("The follow-ups of the job are not all sent (%s); they are sent later", type(error).__name__)
        if not pending.fence:
            time.sleep(PAUSE_S)
            raise Reject("its follow-ups cannot be sent", requeue=True) from None
    raise Ignore


def _sent(end: End, pending: PendingFollowUps) -> bool:
    services, heartbeat = _ready()
    attempt = Attempt(
        end.job_id, pending.fence, number=0, last=False, ledger=services.ledger, task=end.task, shown=False
    )
    with heartbeat.keep_alive(attempt):
        sent = follow_ups.send(
            app, end, pending, lambda count: services.ledger.followed(end.job_id, pending, sent=count)
        )
        if sent is not None:
            services.ledger.followed(end.job_id, pending, sent=sent, all_of_them=True)
    return sent is not None


def _refuse(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:  # noqa: ARG001 - a `Work`
    raise InvalidRequest(
        f"The message has {len(message) - 1} arguments beside job; all fields of an order belong into the object job."
    )


def _ready() -> tuple[Services, Heartbeat]:
    try:
        return ready()
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        time.sleep(PAUSE_S)
        raise Ignore(NOT_BEGUN) from None  # what becomes of the message: worker/runtime/request.py


def _heeded(task: Task, services: Services) -> bool:
    """Cancel a job that bears a stamp whose jobs were revoked; False if the ledger does not say whether it does."""
    stamps = stamps_of(task.request)
    try:
        if stamps and services.ledger.is_cancelled_by_stamp(stamps):
            services.ledger.cancel(task.request.id, mark=True)
    except redis.RedisError as error:
        log.warning("The ledger does not say whether the job was revoked (%s)", type(error).__name__)
        return False
    return True


def _sender(task: Task, services: Services) -> Sender:
    """The certificate that has signed the message, as this worker's consumer has verified it."""
    settings = services.settings.queue.signing
    name = getattr(task.request, SENDER_HEADER, None) if settings.on else None
    if not isinstance(name, str) or not name:
        return NO_SENDER
    return Sender(name, may_delete=name in (settings.destructive_senders or ()))


def _trace(task: Task) -> str:
    """The W3C ``traceparent`` among the headers of the message, which anybody may have written."""
    header = getattr(task.request, "traceparent", None)
    return header if isinstance(header, str) and _IS_TRACEPARENT(header) else ""


def _queue(task: Task) -> str:
    """The queue that the message was taken from; "" if the broker does not say."""
    queue = (task.request.delivery_info or {}).get("routing_key")
    return queue if isinstance(queue, str) else ""
