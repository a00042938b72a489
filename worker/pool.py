"""The threads that jobs run on, and how a worker ends that cannot wait for them.

Known to Celery as the pool ``threads`` (``app.py``). A thread cannot be ended from outside; Celery's own pool would
raise an error in the middle of a cold shutdown and then wait for the jobs after all, however long they take.
"""

from __future__ import annotations

import os
from typing import Any

from celery.concurrency import thread
from celery.platforms import EX_FAILURE
from celery.worker import state

from worker.app import let_go


class ThreadPool(thread.TaskPool):  # type: ignore[misc]  # celery is untyped
    """Celery's, but a cold shutdown gives running jobs to whoever else is there, and ends the process."""

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
