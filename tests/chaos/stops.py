"""A worker whose jobs stop where a test wants them to: ``celery -A tests.chaos.stops worker``.

It is the product's worker with its functions wrapped; nothing of it is in the product. In the Redis at ``CHAOS_URL``,
the hash ``stops`` says at which point a job shall stop (``points.py``), once. A job that has stopped says so in the
list ``reached`` and waits for something in the list ``go:ID``.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import redis
from celery.app.amqp import AMQP

from courier.ledger.jobs import Ledger
from tests.chaos import points
from worker import app as product
from worker.jobs import upload
from worker.runtime import follow_ups, urllib3_internals
from worker.storage import spool
from worker.storage.sources import Sources
from worker.tasks import door

app = product.app
if "CHAOS_SOFT_SHUTDOWN_S" in os.environ:
    app.conf.worker_soft_shutdown_timeout = float(os.environ["CHAOS_SOFT_SHUTDOWN_S"])

#: A stop that nobody ends ends by itself, so that no test leaves a worker behind.
LONGEST_S = 120
KILL = "kill: "

_control = redis.Redis.from_url(os.environ["CHAOS_URL"], decode_responses=True)
_job_id: ContextVar[str] = ContextVar("stopping_job_id", default="-")
_pushing: ContextVar[bool] = ContextVar("pushing", default=False)


def stop(point: str, job_id: str | None = None) -> None:
    """Wait here, if this is where the job shall stop; or die here, each time, if that is what it shall do."""
    job_id = job_id or _job_id.get()
    order = _control.hget("stops", job_id)
    if order == KILL + point:
        os.kill(os.getpid(), signal.SIGKILL)
    if order != point or not _control.hdel("stops", job_id):
        return
    _control.rpush("reached", json.dumps({"job_id": job_id, "point": point, "pid": os.getpid()}))
    deadline = time.monotonic() + LONGEST_S
    while _control.blpop([f"go:{job_id}"], timeout=1) is None and time.monotonic() < deadline:
        pass


def _wrap(owner: Any, name: str, *, before: str | None = None, after: str | None = None) -> None:
    function: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before:
            stop(before)
        result = function(*args, **kwargs)
        if after:
            stop(after)
        return result

    setattr(owner, name, wrapped)


_wrap(Sources, "fetch", before=points.BEFORE_FETCH)
_wrap(upload, "identify", after=points.AFTER_IDENTIFY)
_wrap(upload, "_check", after=points.AFTER_CHECK)
_wrap(Ledger, "claim_study", after=points.AFTER_CLAIM)
_wrap(upload, "_receipt", before=points.BEFORE_RECEIPT, after=points.AFTER_RECEIPT)
_wrap(upload, "_metadata", before=points.DESCRIBE)
_wrap(Ledger, "finish", after=points.BEFORE_RESULT)

_execute, _within, _push, _readinto = door.execute, spool._within, upload._push, spool._View.readinto
_getresponse, _after_return = urllib3_internals.Deadline.getresponse, product.PacsTask.after_return


def _named_execute(*args: Any, job_id: str, **kwargs: Any) -> Any:
    token = _job_id.set(job_id)
    try:
        return _execute(*args, job_id=job_id, **kwargs)
    finally:
        _job_id.reset(token)


def _stopping_within(*args: Any) -> Iterator[bytes]:
    for chunk in _within(*args):
        yield chunk
        stop(points.MID_FETCH)


def _stopping_push(*args: Any, **kwargs: Any) -> Any:
    token = _pushing.set(True)
    try:
        return _push(*args, **kwargs)
    finally:
        _pushing.reset(token)


def _stopping_readinto(view: Any, buffer: Any) -> int:
    if view._position:
        stop(points.MID_PUSH)
    return _readinto(view, buffer)


def _stopping_getresponse(connection: Any) -> Any:
    if _pushing.get():
        stop(points.ANSWER_UNREAD)
    return _getresponse(connection)


def _stopping_after_return(task: Any, status: str, retval: object, task_id: str, *rest: object) -> None:
    _after_return(task, status, retval, task_id, *rest)
    stop(points.BEFORE_ACK, task_id)


_send_follow_up, _count = follow_ups._send, follow_ups._count


def _stopping_send(app: Any, follow_up: Any, end: Any, options: Any) -> None:
    _send_follow_up(app, follow_up, end, options)
    stop(points.FOLLOW_UP_SENT, end.job_id)


def _named_count(app: Any, end: Any, canvases: Any) -> bool:
    token = _job_id.set(end.job_id)
    try:
        return _count(app, end, canvases)
    finally:
        _job_id.reset(token)


follow_ups._send = _stopping_send
follow_ups._count = _named_count
_wrap(AMQP, "_retry_publish", before=points.CHORD_COMPLETE)  # so Celery sends the body of a chord
door.execute = _named_execute
spool._within = _stopping_within
upload._push = _stopping_push
spool._View.readinto = _stopping_readinto
urllib3_internals.Deadline.getresponse = _stopping_getresponse
product.PacsTask.after_return = _stopping_after_return
