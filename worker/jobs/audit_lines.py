"""The audit lines of the log: one for each order that a job gives a server to delete, to hide or to show again.

They say who ordered it, what it is, where, and what the server made of it. Looking for split studies, which is also
called an audit, is in ``audit.py``. Fields and rules: docs/observability.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from courier.batches.store import Batches, chunk_pass
from courier.errors import CourierError, NeedsPerson, Refused
from courier.redaction import stated
from worker.jobs.attempt import Attempt
from worker.pacs.protocol import Deletion, DeletionFate, Found

#: Whatever level the log has, these lines are in it (``worker/observability/log_format.py``).
log = logging.getLogger("courier.audit")

Action = Literal["delete", "hide", "delete_hidden", "show_again"]
#: A request of this phase was not sent: the circuit is open, or the server has asked for fewer requests.
_NOT_SENT: Final = "resting"
_FATES: Final = {
    DeletionFate.DELETED: "deleted",
    DeletionFate.HIDDEN: "hidden",
    DeletionFate.NOT_THERE: "not_there",
    DeletionFate.REFUSED: "refused",
}


@dataclass
class AuditLines:
    """The audit lines of one attempt at a job; None: of no job, as in a test of a part, which writes none."""

    attempt: Attempt | None = None
    _order: dict[str, str] | None = field(default=None, repr=False)

    def of_deletion(self, action: Action, server: str, found: Found, order: Callable[[], Deletion]) -> Deletion:
        """Give the order; then write what became of it, also where the server's answer did not come.

        Who ordered it is read before: where the ledger does not say, nothing is deleted.
        """
        self._ordered()
        try:
            deletion = order()
        except CourierError as error:
            if error.details.get("phase") != _NOT_SENT:
                refused = isinstance(error, Refused | NeedsPerson)
                self.write(action, server, found, "refused" if refused else "unknown", code=error.payload["code"])
            raise
        except BaseException:
            self.write(action, server, found, "unknown")
            raise
        code = deletion.code if deletion.fate is DeletionFate.REFUSED else ""
        self.write(action, server, found, _FATES[deletion.fate], code=code)
        return deletion

    def of_revocation(self, server: str, found: Found, order: Callable[[], object]) -> None:
        """The same of an order to show again what is hidden."""
        self._ordered()
        try:
            order()
        except CourierError as error:
            self.write("show_again", server, found, "unknown", code=error.payload["code"])
            raise
        self.write("show_again", server, found, "shown")

    def write(self, action: Action, server: str, found: Found, outcome: str, *, code: str = "") -> None:
        """One line. ``outcome``: deleted, hidden, not_there, refused, shown; unknown, where it may have happened."""
        if self.attempt is None:
            return
        uid = found.sop_instance_uid or found.series_instance_uid or found.study_instance_uid
        told = {
            "action": action,
            "level": found.level,
            "study_uid": found.study_instance_uid,
            "series_uid": found.series_instance_uid,
            "image_uid": found.sop_instance_uid,
            "server_name": server,
            "outcome": outcome,
            "code": code,
            "job_id": self.attempt.job_id,
            "task": self.attempt.task,
            "attempt": self.attempt.number,
            **self._ordered(),
        }
        sentence = f"{action} {found.level} {uid} on {server}: {outcome}"
        log.info(sentence, extra={"audit": {name: value for name, value in told.items() if value not in (None, "")}})

    def _ordered(self) -> dict[str, str]:
        """Who ordered the job and why, the certificate that signed the order, and the batch with what it does."""
        if self._order is None:
            self._order = {} if self.attempt is None else _order_of(self.attempt)
        return self._order


def _order_of(attempt: Attempt) -> dict[str, str]:
    job_id, batch = Batches(attempt.ledger).ordering_job(attempt.job_id, attempt.task)
    record = attempt.ledger.read_record(job_id)
    told = {**stated(record), "sender": record.get("sender", "")}
    if batch is None:
        return told
    piece = chunk_pass(attempt.job_id)
    told |= {"batch_id": batch.id, "batch_kind": batch.kind, "batch_pass": piece[1] if piece else ""}
    if batch.order.get("delete_source"):
        told["moved_to"] = str(batch.order.get("to_server", ""))
    return told
