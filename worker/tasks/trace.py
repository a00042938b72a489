"""The door of `pacs.trace`."""

from __future__ import annotations

from typing import Any

from celery import Task

from worker.app import app
from worker.jobs.trace import trace
from worker.tasks.door import deliver


@app.task(name="pacs.trace", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_trace(self: Task, job: object = None, **_: Any) -> dict[str, Any]:
    """Why what bears ``uid`` is where it is."""
    return deliver(self, trace, job)
