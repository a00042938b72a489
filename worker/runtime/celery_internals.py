"""The parts of Celery's worker that we replace, set or read although its manual does not name them; it has a ceiling.

What a message or a job is about is not this module's business. Two modules beside this one override methods of the
classes that Celery lets us name: ``consumer.py`` (``worker_consumer``) and ``request.py`` (``Task.Request``).
``tests/unit/test_celery_internals.py`` fails when one of the parts changes. What programs that enqueue use is in
``courier/celery_internals.py``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from billiard.einfo import ExceptionInfo
from celery import Celery, concurrency
from celery.backends.redis import RedisBackend
from celery.concurrency import thread
from celery.platforms import EX_FAILURE
from celery.worker import state

from courier.redaction import where_it_broke
from worker.runtime import shortage

log = logging.getLogger(__name__)


# --- the app ----------------------------------------------------------------------------------------------------------


class MarkingCelery(Celery):  # type: ignore[misc]  # celery is untyped
    """An app that is asked before a job is marked as failed in its result back-end, and what is stored of its error."""

    def mark_as_failure(
        self, mark: Callable[..., None], job_id: str, error: BaseException, *args: Any, **kwargs: Any
    ) -> None:
        """Called in the place of ``mark``, Celery's own, with the arguments that it would have had."""
        mark(job_id, error, *args, **kwargs)

    def module_of(self, error: BaseException) -> str:
        """The module that the result back-end names: a program that has loaded it is given its class of this error."""
        return type(error).__module__

    def text_of(self, result: object) -> str:  # noqa: ARG002 - for those that override it
        """The JSON of a ``result``, where it is encoded already; "" where it is not."""
        return ""

    def _get_backend(self) -> Any:
        backend = super()._get_backend()
        backend.mark_as_failure = functools.partial(self.mark_as_failure, backend.mark_as_failure)
        backend.prepare_exception = functools.partial(self._prepared, backend.prepare_exception)
        if backend.serializer == "json" and not backend.compression:
            backend.encode = functools.partial(self._encoded, backend.encode)
        return backend

    def _encoded(self, encode: Callable[[Any], Any], entry: Any) -> Any:
        """What the result back-end stores of a job, with the result's own JSON in it."""
        text = self.text_of(entry["result"]) if isinstance(entry, dict) and "result" in entry else ""
        if not text:
            return encode(entry)
        rest = encode({name: value for name, value in entry.items() if name != "result"})
        if not isinstance(rest, str) or not rest.startswith('{"'):  # a back-end with a format of its own
            return encode(entry)
        return f'{{"result":{text},{rest[1:]}'

    def _prepared(self, prepare: Callable[..., Any], error: BaseException, *args: Any, **kwargs: Any) -> Any:
        fields = prepare(error, *args, **kwargs)
        return {**fields, "exc_module": self.module_of(error)} if isinstance(fields, dict) else fields


def consume_no_other_queue(app: Celery) -> None:
    """Have the worker of ``app`` consume the queues that were selected, or all that it knows now. Celery would consume
    each queue, too, that it has once sent a message to, after the next lost connection.
    """
    if app.amqp.queues._consume_from is None:
        app.amqp.queues.select(list(app.amqp.queues))


def fail_chain(backend: Any, chain: Sequence[Mapping[str, Any]], error: BaseException, *, store_result: bool) -> None:
    """Store in the result ``backend`` that what would have followed on a failed job has failed, too."""
    backend._fail_chain(chain, error, store_result=store_result)


def is_chord_in_doubt(backend: Any, group: str) -> bool:
    """Whether all members of a chord are counted and its body may not be sent: Celery has one worker claim that, and
    others may try after a while.
    """
    if not isinstance(backend, RedisBackend):
        return False
    claim, size = (backend.get_key_for_group(group, suffix) for suffix in (".c", ".s"))
    return backend.client.get(claim) not in (None, b"done", "done") and bool(backend.client.exists(size))


def gather_events(dispatcher: Any, wake: Callable[[], None]) -> None:
    """Have ``wake`` called for each event that ``dispatcher`` keeps back; its ``flush`` sends them."""
    dispatcher.on_send_buffered = wake


# --- the pool ---------------------------------------------------------------------------------------------------------


def name_pool(name: str, path: str) -> None:
    """Let ``celery worker --pool NAME`` be the pool at ``path``, as in ``package.module:Class``."""
    concurrency.ALIASES[name] = path


def runs_threads(worker: Any) -> bool:
    """Whether the jobs of Celery's ``worker`` (its controller) run in this process, on threads."""
    return issubclass(worker.pool_cls, thread.TaskPool)


class LeavingThreads(thread.TaskPool):  # type: ignore[misc]  # celery is untyped
    """Celery's threads: all are there before the first message is, and a cold shutdown does not wait for their jobs.

    A thread cannot be ended from outside; Celery's own pool would raise an error in the middle of a cold shutdown and
    then wait for the jobs after all, however long they take.
    """

    def starting(self) -> AbstractContextManager[None]:
        """Entered while the threads are started."""
        return contextlib.nullcontext()

    def release_jobs(self) -> int:
        """Called in a cold shutdown, after the messages were given back: how many jobs are under way."""
        return 0

    def on_start(self) -> None:
        """Later no thread has to be waited for."""
        super().on_start()
        with self.starting():
            shortage.start_threads(self.executor, self.limit)

    def on_apply(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Celery loses sight of a message for which its own code around the job raises anything."""
        return super().on_apply(functools.partial(_caught, target), *args, **kwargs)

    def terminate_job(self, pid: int | None, signal: int | None = None) -> None:
        """Nothing: the job goes on until `on_terminate`."""

    def on_stop(self) -> None:
        if is_told_to_terminate():
            self.executor.shutdown(wait=False, cancel_futures=True)
        else:
            super().on_stop()

    def on_terminate(self, *_: Any) -> None:
        """The messages are back in their queues by now. Without jobs under way the process ends by itself."""
        if self.release_jobs():
            os._exit(EX_FAILURE)  # the interpreter would wait for the threads


def _caught(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What ``target`` (Celery's tracer) returns: whether the job failed, its result, and how long it took."""
    try:
        return target(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - the outermost door of a slot
        log.error("A fault of the worker itself: %s", where_it_broke(error))
        try:
            raise shortage.Escaped(error) from None
        except shortage.Escaped:
            return 1, ExceptionInfo(), 0.0


# --- what a worker has in hand ----------------------------------------------------------------------------------------


def hand_over_by(consumer: Any, hand: Callable[[Callable[[Any], None], Any], None]) -> None:
    """Have ``hand`` called with Celery's own function and a request, where ``consumer`` would have handed the request
    to its pool; a pool of processes may be handed one later than it came, when a process is free.
    """
    worker = consumer.controller
    celerys = worker._process_task
    ours = functools.partial(hand, celerys)
    worker._process_task = ours
    if consumer.on_task_request == celerys:
        consumer.on_task_request = ours


def take_back(consumer: Any, request: Any) -> None:
    """Forget ``request``, which could not be handed to the pool, and free its place there."""
    if consumer.pool.uses_semaphore and hasattr(consumer.controller, "_quick_release"):
        consumer.controller._quick_release()
    state.task_ready(request)


def in_hand(worker: Any) -> list[str]:
    """The ids of the messages that Celery's ``worker`` has taken: in its slots, or waiting for one or for a rate limit.

    Another thread goes on with them meanwhile.
    """
    consumer = getattr(worker, "consumer", None)  # it has none before it is ready
    buckets = [bucket for bucket in consumer.task_buckets.values() if bucket is not None] if consumer else []
    with contextlib.suppress(RuntimeError):  # it has changed while it was read; the next look will do
        limited = [request.id for bucket in buckets for request, _ in list(bucket.contents)]
        return [*limited, *(request.id for request in list(state.reserved_requests))]
    return []


def slots(worker: Any) -> tuple[int, int]:
    """How many slots Celery's ``worker`` has, and in how many a job runs."""
    return worker.pool.num_processes, len(state.active_requests)


# --- the end of a worker ----------------------------------------------------------------------------------------------


def is_told_to_stop() -> bool:
    """Whether this worker takes no further message and ends when its jobs have; a cold shutdown does not count."""
    return _is_told(state.should_stop)


def is_told_to_terminate() -> bool:
    """Whether this worker is in a cold shutdown."""
    return _is_told(state.should_terminate)


def _is_told(status: int | bool | None) -> bool:
    """Celery puts the exit status there: 0, which equals False, in a warm shutdown."""
    return status is not None and status is not False


def stop(exit_status: int) -> None:
    """Have this worker take no further message, let the jobs under way end, and end with ``exit_status``."""
    state.should_stop = exit_status
