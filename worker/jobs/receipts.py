"""What goes into the ledger's receipts when images are deleted, or copied by the study: every deletion is ordered here.

A receipt is void before its image is deleted, so that no death between the two leaves one that outlives its image.
Each order to delete, to hide or to show again leaves an audit line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from courier.ledger.jobs import Ledger
from worker.jobs.attempt import Attempt
from worker.jobs.audit_lines import AuditLines
from worker.pacs.protocol import Deletion, Found, Pacs


@dataclass(frozen=True)
class Receipts:
    """The receipts as a job writes and voids them. Without a ledger nothing is written."""

    ledger: Ledger | None = None
    job_id: str = ""
    lines: AuditLines = field(default_factory=AuditLines)

    @classmethod
    def of(cls, attempt: Attempt) -> Receipts:
        return cls(attempt.ledger, attempt.job_id, AuditLines(attempt))

    def delete(self, pacs: Pacs, found: Found, *, permanent: bool) -> Deletion:
        """Delete or hide ``found`` on a server, and void the receipts of all that it holds there."""
        if self.ledger is not None:
            series = None if found.level == "study" else found.series_instance_uid
            image = found.sop_instance_uid if found.level == "image" else None
            study = found.study_instance_uid
            self.ledger.void(pacs.server.name, study, series, image, job_id=self.job_id)
        order = partial(pacs.delete, found, permanent=permanent)
        return self.lines.of_deletion("delete" if permanent else "hide", pacs.server.name, found, order)

    def delete_hidden(self, pacs: Pacs, study_instance_uid: str) -> Deletion:
        """Delete for good a study of which a server hides all images; their receipts are void by now."""
        assert pacs.hiding is not None  # noqa: S101 - the callers have hidden images there
        order, study = partial(pacs.hiding.delete_hidden, study_instance_uid), Found("study", study_instance_uid)
        return self.lines.of_deletion("delete_hidden", pacs.server.name, study, order)

    def show_again(self, pacs: Pacs, found: Found) -> None:
        """Show again what a server hides of ``found``."""
        assert pacs.hiding is not None  # noqa: S101 - or nothing was hidden
        self.lines.of_revocation(pacs.server.name, found, partial(pacs.hiding.revoke, found))

    def copying(self, pacs: Pacs, study_instance_uid: str) -> None:
        """Images of the study are about to be copied to a server."""
        if self.ledger is not None:
            self.ledger.copying(pacs.server.name, study_instance_uid, job_id=self.job_id)

    def copied(self, pacs: Pacs, study_instance_uid: str, images: int) -> None:
        """So many images of the study have been copied to a server."""
        if self.ledger is not None:
            self.ledger.copied(pacs.server.name, study_instance_uid, job_id=self.job_id, images=images)
