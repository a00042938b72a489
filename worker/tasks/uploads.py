"""The door of `pacs.upload`."""

from __future__ import annotations

from typing import Any

from celery import Task

from worker.app import app
from worker.jobs.upload import upload
from worker.tasks.door import deliver


@app.task(name="pacs.upload", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_upload(self: Task, job: object = None, **_: Any) -> dict[str, Any]:
    """Put the image at ``image_url`` into the PACS it belongs to."""
    return deliver(self, upload, job)
