"""The door of `pacs.list_studies`."""

from __future__ import annotations

from typing import Any

from celery import Task

from worker.app import app
from worker.jobs.studies import list_studies
from worker.tasks.door import deliver


@app.task(name="pacs.list_studies", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_list_studies(self: Task, job: object = None, **_: Any) -> dict[str, Any]:
    """One page of the list of all servers' studies."""
    return deliver(self, list_studies, job)
