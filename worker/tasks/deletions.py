"""The door of `pacs.delete`."""

from __future__ import annotations

from typing import Any

from celery import Task

from worker.app import app
from worker.jobs.delete import delete
from worker.tasks.door import deliver


@app.task(name="pacs.delete", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_delete(self: Task, job: object = None, **beside: Any) -> dict[str, Any]:
    """Delete what bears ``uid`` wherever it is."""
    return deliver(self, delete, job, beside=beside)
