"""Which certificates may send orders that delete (``queue.signing.destructive_senders``), and which orders those are.

The check comes before anything of an order is asked of a server. Whose key signed a message is verified by the
consumer and kept with the job at the first message of it, because later ones are signed by the worker that wakes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from courier.batches.store import Batch, Batches
from courier.errors import InvalidRequest
from worker.batches.coordinator import unbegun
from worker.jobs.attempt import Attempt
from worker.jobs.runner import Work
from worker.jobs.services import Services

#: These delete or hide, unless they are dry runs.
ALWAYS: Final = frozenset({"pacs.delete", "pacs.delete_all", "pacs.batch.delete"})
#: These do, if they move.
MOVES: Final = frozenset({"pacs.batch.migrate"})
#: These do, depending on the batch that they go on with: the task, and the command.
GO_ON: Final = {f"pacs.batch.{command}": command for command in ("apply", "retry", "verify", "undo")}
#: Of these the job's id is that of the batch.
OPENS_A_BATCH: Final = frozenset({"pacs.delete_all", "pacs.batch.delete", "pacs.batch.migrate"})
#: These never do. A chunk does what its batch has been ordered to do, whose order was checked.
NEVER: Final = frozenset(
    (
        *("pacs.upload", "pacs.exists", "pacs.metadata", "pacs.download", "pacs.list_studies", "pacs.trace"),
        *("pacs.audit", "pacs.status", "pacs.storage", "pacs.database"),
        *("pacs.batch.upload", "pacs.batch.download", "pacs.batch.chunk"),
        *("pacs.batch.show", "pacs.batch.pause", "pacs.batch.resume", "pacs.batch.cancel"),
    )
)
SENDER_NOT_ALLOWED: Final = "sender_not_allowed"


def checked(work: Work, task: str) -> Work:
    """``work``, begun only if its order does not delete, or its sender may send such orders."""

    def work_if_allowed(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
        if attempt.checkpoint is None:  # what has begun was allowed, and says what it has done
            with unbegun(attempt, services):
                _check(task, message, attempt, services)
        return work(message, attempt, services)

    return work_if_allowed


def _check(task: str, message: Mapping[str, Any], attempt: Attempt, services: Services) -> None:
    allowed = services.settings.queue.signing.destructive_senders or ()
    if attempt.sender in allowed or not deletes(task, message, attempt.job_id, Batches(services.ledger)):
        return
    who = f"the certificate {attempt.sender}" if attempt.sender else "no certificate that a worker has verified"
    raise InvalidRequest(
        f"The order deletes and is signed by {who}; queue.signing.destructive_senders names those that may send such"
        " orders. Nothing was deleted.",
        details={"reason": SENDER_NOT_ALLOWED, "sender": attempt.sender or None},
    )


def deletes(task: str, message: Mapping[str, Any], job_id: str, batches: Batches) -> bool:
    """Whether an order may delete or hide anything. One that is not known here may.

    Of a batch that a program has planned, the ledger has the order, and the message says little.
    """
    if task in NEVER:
        return False
    if task in GO_ON:
        batch = batches.get(str(message.get("batch_id")))
        return batch is not None and _goes_on_deleting(GO_ON[task], batch)
    planned = batches.get(job_id) if task in OPENS_A_BATCH else None
    orders = [message, *([planned.order] if planned else [])]
    if all(order.get("dry_run") is True for order in orders):
        return False
    return task not in MOVES or any(order.get("delete_source") not in (None, False) for order in orders)


def _goes_on_deleting(command: str, batch: Batch) -> bool:
    """An undo takes back copies and uploads by deleting them; a deletion is taken back by storing."""
    if command == "undo":
        return batch.kind not in ("delete", "download")
    return bool(batch.order.get("delete_source")) or (batch.kind == "delete" and command != "verify")
