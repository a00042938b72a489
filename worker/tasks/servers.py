"""The doors of `pacs.status`, `pacs.storage` and `pacs.database`."""

from __future__ import annotations

from typing import Any

from celery import Task

from worker.app import app
from worker.jobs.servers import database, status, storage
from worker.tasks.door import deliver


@app.task(name="pacs.status", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_status(self: Task, job: object = None, **_: Any) -> dict[str, Any]:
    """Who answers, how fast, and what each server says of itself."""
    return deliver(self, status, job)


@app.task(name="pacs.storage", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_storage(self: Task, job: object = None, **_: Any) -> dict[str, Any]:
    """How much room each server says that it has."""
    return deliver(self, storage, job)


@app.task(name="pacs.database", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_database(self: Task, job: object = None, **_: Any) -> dict[str, Any]:
    """Whether each server's database works."""
    return deliver(self, database, job)
