"""The threads that jobs run on, and how a worker ends that cannot wait for them.

Known to Celery as the pool ``threads`` (``app.py``). A thread cannot be ended from outside; Celery's own pool would
raise an error in the middle of a cold shutdown and then wait for the jobs after all, however long they take.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.concurrency import thread
from celery.platforms import EX_FAILURE
from celery.worker import state

from courier.redaction import where_it_broke
from worker.app import let_go, or_no_start
from worker.runtime import shortage

log = logging.getLogger(__name__)


class ThreadPool(thread.TaskPool):  # type: ignore[misc]  # celery is untyped
    """Celery's, but a cold shutdown gives running jobs to whoever else is there, and ends the process."""

    def on_start(self) -> None:
        """All threads are there before the first message is: later none has to be waited for."""
        super().on_start()
        with or_no_start():
            shortage.start_threads(self.executor, self.limit)

    def on_apply(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Celery loses sight of a message for which its own code around the job raises anything."""
        return super().on_apply(partial(_caught, target), *args, **kwargs)

    def terminate_job(self, pid: int | None, signal: int | None = None) -> None:
        """Nothing: the job goes on until `on_terminate`."""

    def on_stop(self) -> None:
        if state.should_terminate in (None, False):
            super().on_stop()
        else:
            self.executor.shutdown(wait=False, cancel_futures=True)

    def on_terminate(self, *_: Any) -> None:
        """The messages are back in their queues by now. Without jobs under way the process ends by itself."""
        if let_go():
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
