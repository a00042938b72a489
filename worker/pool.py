"""The threads that jobs run on, and how a worker ends that cannot wait for them.

Known to Celery as the pool ``threads`` (``app.py``); how Celery is changed is in ``runtime/celery_internals.py``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from worker.app import or_no_start, release_jobs
from worker.runtime.celery_internals import LeavingThreads


class ThreadPool(LeavingThreads):
    """A worker that gets no threads ends before it takes a message; a cold shutdown leaves running jobs to other
    workers, and ends the process.
    """

    def starting(self) -> AbstractContextManager[None]:
        return or_no_start()

    def release_jobs(self) -> int:
        return release_jobs()
