"""A rejection note (IOCM) that arrives by STOW: what it names has to be there, and is rejected with its code."""

from __future__ import annotations

from dataclasses import dataclass

from pydicom import Dataset

from sandbox.datasets import Header
from sandbox.dcm4chee.aets import NOTE, REJECTION_CODES
from sandbox.dcm4chee.archive import ArchiveState
from sandbox.dcm4chee.objects import KEY_OBJECT
from sandbox.store import InstanceRow, NewInstance


@dataclass(frozen=True)
class RejectionNote:
    """A Key Object Selection whose title is a rejection code; ``named`` are series and instance of what it rejects."""

    code: str
    named: tuple[tuple[str, str], ...]

    def refusal(self, archive: ArchiveState) -> str:
        """Why it cannot take effect; "" if it can."""
        for series, instance in self.named:
            if not self._rows(archive, series, instance):
                known = archive.store.instances(series_instance_uid=series)
                missing, uid = ("Instance", instance) if known else ("Series", series)
                return f"Failed to reject Instance[uid={instance}] - no such {missing}[uid={uid}]."
        return ""

    def take_effect(self, archive: ArchiveState, note: NewInstance) -> None:
        """Reject what it names, and count it among the notes."""
        rows = [row for series, instance in self.named for row in self._rows(archive, series, instance)]
        with archive.store.transaction():
            archive.store.reject([row.key for row in rows], self.code)
            for row in archive.store.by_sop(note.sop_instance_uid):
                archive.store.reject([row.key], NOTE + self.code)

    @staticmethod
    def _rows(archive: ArchiveState, series: str, instance: str) -> list[InstanceRow]:
        return archive.store.instances(series_instance_uid=series, sop_instance_uid=instance)


def rejection_note(header: Header) -> RejectionNote | None:
    """None for any other object, a Key Object Selection with another title among them."""
    ds = header.dataset
    titles = ds.get("ConceptNameCodeSequence") or [Dataset()]
    code = f"{titles[0].get('CodeValue')}^{titles[0].get('CodingSchemeDesignator')}"
    if ds.get("SOPClassUID") != KEY_OBJECT or code not in REJECTION_CODES:
        return None
    named = [
        (str(series.SeriesInstanceUID), str(one.ReferencedSOPInstanceUID))
        for study in ds.get("CurrentRequestedProcedureEvidenceSequence", ())
        for series in study.get("ReferencedSeriesSequence", ())
        for one in series.get("ReferencedSOPSequence", ())
    ]
    return RejectionNote(code, tuple(named))
