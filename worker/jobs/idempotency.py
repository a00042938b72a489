"""A second wish under an idempotency key that is already somebody's: it ends as the first one does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from courier.errors import from_payload
from courier.ledger.jobs import job_id_for
from worker.jobs.attempt import Attempt, Postpone
from worker.jobs.services import Services

#: How soon to look again whether the first wish has ended.
LOOK_AGAIN_S = 1.0


def outcome_of_first(task: str, message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    """The outcome of the one job that bears this idempotency key, which is started if nobody did.

    Raises
    ------
    InvalidRequest
        The key is that of a job with another wish.
    CourierError
        What the one job ended with.
    """
    first = job_id_for(str(message["idempotency_key"]))
    before, own = services.ledger.read_record(first), services.ledger.read_record(attempt.job_id)
    # It had ended before it was wished for again: if the reason can pass, it is tried again.
    again = "ended_ms" in before and float(before["ended_ms"]) < float(own.get("created_ms", 0))
    services.ledger.submit(first, task=task, job=message, due_in_s=0, again=again, sender=attempt.sender)
    with attempt.step("follow"):
        record = services.ledger.read_record(first)
    if "outcome" not in record:
        raise Postpone(f"job {first} bears the same idempotency key", delay_s=LOOK_AGAIN_S, owner=first)
    outcome: dict[str, Any] = json.loads(record["outcome"])
    if "error" in outcome:
        attempt.last = True  # the first wish was tried as often as it may be
        raise from_payload(outcome["error"])
    payload: dict[str, Any] = outcome["payload"]
    return payload
