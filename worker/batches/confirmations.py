"""What a batch needs before it may delete: the settings have to allow it, and a large order its exact count.

Called by the coordinator of a batch when the plan is frozen and before the pass begins. Each deletion is checked once
more when it is sent (`worker.pacs.protection`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from courier.batches.planner import count_distinct
from courier.batches.store import Batch, Batches, Row
from courier.errors import ConfirmationRequired
from worker.jobs.services import Services
from worker.pacs.fleet import Fleet

Command = Literal["apply", "retry", "verify", "undo"]
#: How a plan that is frozen is gone on with; an order's own plan is applied.
_AGAIN = "pacs batch {} {} --confirm-studies {}"


def check_may_begin(
    kind: object, command: Command, batch: Batch, services: Services, confirm_studies: int | None
) -> None:
    """Refuse a command that deletes what the settings forbid, or more studies than may be deleted unconfirmed.

    Raises
    ------
    InvalidRequest
        The settings forbid it on a server that the order names.
    ConfirmationRequired
        The order is about more studies than ``deletions.max_studies_per_order``, and ``confirm_studies`` is missing; or
        ``confirm_studies`` is not their number. ``details`` say how many there are.
    """
    refuse: Callable[[Command, Batch, Fleet], None] | None = getattr(kind, "refuse_forbidden", None)
    if refuse is not None:
        refuse(command, batch, services.fleet)
    limit = services.settings.deletions.max_studies_per_order
    if limit is None and confirm_studies is None:
        return
    studies = studies_at_stake(kind, command, batch, services)
    confirmed = studies <= (limit or 0) if confirm_studies is None else studies == confirm_studies
    if confirmed or not studies:
        return
    raise ConfirmationRequired(
        _sentence(command, batch, studies, confirm_studies, limit),
        details={"batch_id": batch.id, "command": command, "studies": studies, "max_studies_per_order": limit},
    )


def studies_at_stake(kind: object, command: Command, batch: Batch, services: Services) -> int:
    """The number of studies that a command deletes images of. Reads the whole plan; memory stays flat."""
    at_stake: Callable[[Command, Row, Batch, Fleet], str | None] | None = getattr(kind, "study_at_stake", None)
    if at_stake is None:
        return 0
    found = (at_stake(command, row, batch, services.fleet) for row in Batches(services.ledger).rows(batch))
    return count_distinct(uid for uid in found if uid is not None)


def _sentence(command: Command, batch: Batch, studies: int, given: int | None, limit: Any) -> str:
    again = _AGAIN.format(command, batch.id, studies)
    if given is not None:
        why = f"confirm_studies is {given}, and the batch deletes images of {studies} studies"
    else:
        why = f"the batch deletes images of {studies} studies, and deletions.max_studies_per_order is {limit}"
    return (
        f"Nothing was deleted: {why}. Look at the plan (pacs batch plan {batch.id}), then confirm the number: {again}"
    )
