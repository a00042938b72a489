"""What a batch came to, in the words of a result: for the job that sees it through, and for who asks later.

No item's meaning and no pass is known here; what is counted, `courier.batches.store` has counted.
"""

from __future__ import annotations

from typing import Any, Final

from courier.batches.store import TROUBLE, Batch, Batches, ItemOutcome, Pass
from courier.redaction import redact_url
from courier.results import BatchEndPayload, BatchTrouble

#: A result passes through Redis; the report has them all.
MAX_FAILURES_TOLD: Final = 100


def end_payload(batch: Batch, batches: Batches, *, job_id: str) -> dict[str, Any]:
    """What a batch came to. What a survey refused counts where it was not applied."""
    passes: list[Pass] = [which for which in batch.passes if which != "survey"]
    told: list[BatchTrouble] = []
    for which in passes:
        found = batches.failures(batch, MAX_FAILURES_TOLD - len(told), which)
        told += [_trouble(one, which, batch) for one in found]
    total = sum(batch.of(which).totals.get(status, 0) for which in passes for status in TROUBLE)
    return BatchEndPayload.model_validate(
        {"job_id": job_id, **batches.published(batch), "failures": told, "failures_total": total}
    ).as_json()


def _trouble(one: ItemOutcome, which: Pass, batch: Batch) -> BatchTrouble:
    return BatchTrouble(
        number=one.item.number,
        item=redact_url(one.item.text),  # a signed URL is shown as in any other result
        pass_=which,
        server_name=one.server_name or None,
        server_type=batch.types.get(one.server_name) or None,
        status=one.status,
        code=one.code,
        message=one.message,
    )
