"""The doors of `pacs.exists` and `pacs.metadata`."""

from __future__ import annotations

from typing import Any

from celery import Task

from worker.app import app
from worker.jobs.lookup import exists, metadata
from worker.tasks.door import deliver


@app.task(name="pacs.exists", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_exists(self: Task, job: object = None, **_: Any) -> dict[str, Any]:
    """Who has the image, series or study that bears ``uid``."""
    return deliver(self, exists, job)


@app.task(name="pacs.metadata", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_metadata(self: Task, job: object = None, **_: Any) -> dict[str, Any]:
    """The metadata of every image of what bears ``uid``, from whoever has it."""
    return deliver(self, metadata, job)
