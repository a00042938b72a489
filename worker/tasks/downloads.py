"""The door of `pacs.download`."""

from __future__ import annotations

from typing import Any

from celery import Task

from worker.app import app
from worker.jobs.download import download
from worker.tasks.door import deliver


@app.task(name="pacs.download", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_download(self: Task, job: object = None, **_: Any) -> dict[str, Any]:
    """Bring a study to a ZIP file or a folder."""
    return deliver(self, download, job)
