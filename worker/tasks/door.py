"""What all doors do: hand the message to `carry`, and say its verdict in Celery's words."""

from __future__ import annotations

from functools import partial
from typing import Any

from celery import Task
from celery.exceptions import Ignore

from worker.app import pulse, tools
from worker.jobs.carry import Done, Failed, Parked, Work, carry
from worker.jobs.follow import follow
from worker.ledger import job_id_for
from worker.logs import job_lines


def deliver(task: Task, work: Work, message: object) -> dict[str, Any]:
    """Carry a delivered message and say it in Celery's words: return, raise, or leave it to somebody else."""
    job_id = task.request.id
    key = message.get("idempotency_key") if isinstance(message, dict) else None
    if isinstance(key, str) and key and job_id_for(key) != job_id:
        work = partial(follow, task.name)
    with job_lines(job_id):
        verdict = carry(work, task=task.name, job_id=job_id, message=message, tools=tools(), pulse=pulse())
    match verdict:
        case Done(payload):
            return payload
        case Failed(error):
            raise error from None
        case Parked():
            raise Ignore
