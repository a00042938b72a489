"""The door of `pacs.audit`."""

from __future__ import annotations

from typing import Any

from celery import Task

from worker.app import app
from worker.jobs.audit import audit
from worker.tasks.door import deliver


@app.task(name="pacs.audit", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_audit(self: Task, job: object = None, **_: Any) -> dict[str, Any]:
    """Which studies are on more than one server, and in which images they differ."""
    return deliver(self, audit, job)
