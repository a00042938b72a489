"""Delete every study of every server, or of those that are named: `pacs.delete_all`, a batch of study deletions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from courier.batches.planner import count_distinct
from courier.batches.store import Batch, Batches
from courier.errors import ConfirmationRequired
from courier.messages import DeleteAllJob, read_job
from courier.results import BatchFailure, BatchPayload, BatchServer
from worker.batches.coordinator import CONCURRENCY, Coordinator, has_begun
from worker.batches.deletions import CONFIRMATION, StudyDeletions, check_backup
from worker.jobs.attempt import Attempt
from worker.jobs.delete import select_servers
from worker.jobs.maintenance import refuse_in_maintenance
from worker.jobs.services import Services
from worker.jobs.study_lists import study_pages
from worker.pacs.fleet import Fleet
from worker.pacs.protection import check_allowed, refusal
from worker.pacs.protocol import Pacs

#: A result passes through Redis; the report has them all.
MAX_FAILURES_TOLD = 100


def delete_all(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    """Plan the deletion of all studies and see it through; the batch bears the job's id (docs/batches.md).

    Raises
    ------
    ConfirmationRequired
        ``confirm`` is not the sentence.
    InvalidRequest
        A field or a server is not known; the settings forbid it on a server that the order names, or on all servers; or
        nothing may be written where backups go. Or a server is in maintenance.
    CourierError
        A server could not be listed: nothing is deleted before all are.
    """
    job = read_job(DeleteAllJob, message)
    if not job.dry_run and job.confirm != CONFIRMATION:
        raise ConfirmationRequired(f'Nothing was deleted: confirm has to be "{CONFIRMATION}".')
    if not has_begun(attempt, services):
        _open(job, attempt, services)
    coordinator = Coordinator(
        StudyDeletions(), attempt.job_id, attempt, services, may_be_empty=True, confirm_studies=job.confirm_studies
    )
    batch = coordinator.order()
    remaining = {}
    if batch.state == "done":
        with attempt.step("verify"):
            remaining = _remaining(batch, services.fleet)
    return _payload(batch, remaining, attempt, services).as_json()


def _open(job: DeleteAllJob, attempt: Attempt, services: Services) -> None:
    """Refuse what cannot be done, before anything is; then the batch is there."""
    named = select_servers(job.servers, services.fleet)
    refuse_in_maintenance(named, "a deletion of all studies")
    if job.servers is not None or all(refusal(pacs, permanent=job.permanent) for pacs in named):
        check_allowed(named, permanent=job.permanent)
    servers = {pacs.server.name: pacs.server.type for pacs in named}
    check_backup(job.backup, services)
    given = {"backup": job.backup, "requested_by": job.requested_by, "reason": job.reason}
    order = {
        "servers": job.servers,
        "permanent": job.permanent,
        "dry_run": job.dry_run,
        "survey": False,
        "verify": False,
        **{name: value for name, value in given.items() if value is not None},
    }
    Batches(services.ledger).open(attempt.job_id, kind="delete", servers=servers, order=order, concurrency=CONCURRENCY)


def _remaining(batch: Batch, fleet: Fleet) -> dict[str, int]:
    """How many studies each server still lists; one that is silent now, or has left the settings, is left out."""
    known = fleet.known(batch.servers)
    counts = fleet.gather([partial(_count, pacs) for pacs in known])
    return {pacs.server.name: count for pacs, count in zip(known, counts, strict=True) if isinstance(count, int)}


def _count(pacs: Pacs) -> int:
    return count_distinct(uid for page in study_pages(pacs, []) for uid in page)


def _payload(batch: Batch, remaining: Mapping[str, int], attempt: Attempt, services: Services) -> BatchPayload:
    failures = Batches(services.ledger).failures(batch, MAX_FAILURES_TOLD)
    return BatchPayload(
        job_id=attempt.job_id,
        batch_id=batch.id,
        status="planned" if batch.state == "planned" else "done",
        items=batch.items,
        servers=[
            BatchServer(
                server_name=name,
                server_type=batch.types[name],
                remaining=remaining.get(name),
                **batch.counts[name],
            )
            for name in batch.servers
        ],
        failures=[
            BatchFailure(
                server_name=one.item.server,
                server_type=batch.types[one.item.server],
                study_uid=one.item.text,
                status="refused" if one.status == "refused" else "failed",
                code=one.code,
                message=one.message,
            )
            for one in failures
        ],
        failures_total=sum(batch.of("apply").totals.get(status, 0) for status in ("failed", "refused")),
        warnings=list(batch.warnings),
    )
