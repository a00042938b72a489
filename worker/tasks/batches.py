"""The doors of `pacs.delete_all` and `pacs.batch.*`, and which kinds of batch there are."""

from __future__ import annotations

from functools import partial
from typing import Any

from celery import Task

from worker.app import app
from worker.batches import coordinator
from worker.batches.chunks import chunk
from worker.batches.coordinator import BatchKind, Coordinator
from worker.batches.delete_all import delete_all
from worker.batches.deletions import StudyDeletions, delete_many
from worker.batches.downloads import StudyDownloads, download_all
from worker.batches.migrations import StudyMigrations, migrate
from worker.batches.uploads import KIND as UPLOADS
from worker.batches.uploads import upload_all
from worker.tasks.door import deliver

KINDS: dict[str, BatchKind] = {
    "delete": StudyDeletions(),
    "download": StudyDownloads(),
    "migrate": StudyMigrations(),
    "upload": UPLOADS,
}


@app.task(name="pacs.delete_all", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_delete_all(self: Task, job: object = None, **beside: Any) -> dict[str, Any]:
    """Delete every study, as a batch that bears the job's id."""
    return deliver(self, delete_all, job, beside=beside)


@app.task(name="pacs.batch.upload", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_batch_upload(self: Task, job: object = None, **_: Any) -> dict[str, Any]:
    """Upload many images."""
    return deliver(self, upload_all, job)


@app.task(name="pacs.batch.migrate", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_batch_migrate(self: Task, job: object = None, **beside: Any) -> dict[str, Any]:
    """Studies from one server to another, as a batch that bears the job's id."""
    return deliver(self, migrate, job, beside=beside)


@app.task(name="pacs.batch.delete", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_batch_delete(self: Task, job: object = None, **beside: Any) -> dict[str, Any]:
    """Delete many studies."""
    return deliver(self, delete_many, job, beside=beside)


@app.task(name="pacs.batch.download", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_batch_download(self: Task, job: object = None, **beside: Any) -> dict[str, Any]:
    """Bring many studies to a place."""
    return deliver(self, download_all, job, beside=beside)


@app.task(name="pacs.batch.chunk", bind=True, ignore_result=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_batch_chunk(self: Task, job: object = None, **_: Any) -> dict[str, Any]:
    """One piece of a batch."""
    return deliver(self, partial(chunk, kinds=KINDS), job)


@app.task(name="pacs.batch.show", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_batch_show(self: Task, job: object = None, **_: Any) -> dict[str, Any]:
    """How far a batch is."""
    return deliver(self, coordinator.show, job)


@app.task(name="pacs.batch.pause", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_batch_pause(self: Task, job: object = None, **_: Any) -> dict[str, Any]:
    """Begin nothing new of a batch for now."""
    return deliver(self, coordinator.pause, job)


@app.task(name="pacs.batch.resume", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_batch_resume(self: Task, job: object = None, **_: Any) -> dict[str, Any]:
    """Go on with a paused batch."""
    return deliver(self, coordinator.resume, job)


@app.task(name="pacs.batch.cancel", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_batch_cancel(self: Task, job: object = None, **_: Any) -> dict[str, Any]:
    """End a batch; what was done stays done."""
    return deliver(self, coordinator.cancel, job)


@app.task(name="pacs.batch.apply", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_batch_apply(self: Task, job: object = None, **beside: Any) -> dict[str, Any]:
    """See a plan through that was looked at."""
    return deliver(self, partial(coordinator.coordinated, kinds=KINDS, command=Coordinator.apply), job, beside=beside)


@app.task(name="pacs.batch.retry", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_batch_retry(self: Task, job: object = None, **beside: Any) -> dict[str, Any]:
    """Try again what failed of a batch, or was found missing."""
    return deliver(self, partial(coordinator.coordinated, kinds=KINDS, command=Coordinator.retry), job, beside=beside)


@app.task(name="pacs.batch.verify", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_batch_verify(self: Task, job: object = None, **beside: Any) -> dict[str, Any]:
    """Look once more whether what a batch did is so."""
    return deliver(self, partial(coordinator.coordinated, kinds=KINDS, command=Coordinator.verify), job, beside=beside)


@app.task(name="pacs.batch.undo", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def pacs_batch_undo(self: Task, job: object = None, **beside: Any) -> dict[str, Any]:
    """Take back what a batch did."""
    return deliver(self, partial(coordinator.coordinated, kinds=KINDS, command=Coordinator.undo), job, beside=beside)
