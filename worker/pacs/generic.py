"""Any other DICOMweb server: PS3.18 as it is written, and as servers are found to keep it (worker/pacs/tolerant.py)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

from courier.errors import PacsMisanswered
from courier.messages import Level
from courier.results import Dataset
from worker.dicom.fingerprints import Rewrites
from worker.pacs.dicomjson import WARNING_REASON, number
from worker.pacs.dicomweb import path_of
from worker.pacs.finding import find_known
from worker.pacs.matching import REQUIRED, Matching, StudyQuery
from worker.pacs.protocol import (
    NOTHING_OR_WRONG_URL,
    DatabaseState,
    Deletion,
    DeletionFate,
    Found,
    Outcome,
    Part,
    Retrieved,
    ServerState,
    StorageState,
    StreamedInstance,
    StudyPage,
    View,
)
from worker.pacs.stow import Sent, read_outcomes, rejected_if_alone, unmentioned
from worker.pacs.tolerant import PAGE, TolerantDicomWeb
from worker.pacs.transport import Answer, Request, Transport

#: A server may ignore anything else, and may know tags alone.
MATCHING = Matching(REQUIRED, fields_by_tag=True)
STORE_STATUSES = (200, 202, 204, 400, 409)
MAX_PAGE = PAGE
NO_DELETE = "The server offers no delete over DICOMweb."
NOT_THERE = DeletionFate.NOT_THERE
BAD_FILE = "The server says that the file is bad."
#: WarningReason (0008,1196), PS3.18 Table I.2-1.
WARNINGS = {
    0xB000: "the server changed attributes",
    0xB006: "the server dropped attributes",
    0xB007: "the dataset does not match its SOP class",
}


class GenericDicomWeb:
    #: Unknown, so never relied upon.
    keeps_bytes = False
    #: As unknown. Oddity: "What a plain DICOMweb server rewrites".
    rewrites = Rewrites()
    request_bytes = None
    hiding = None
    #: As unknown: a proxy in front may want to know how much will come.
    accepts_streams = False

    def __init__(self, transport: Transport) -> None:
        self.server = transport.server
        self._transport = transport
        self._web = TolerantDicomWeb(transport)

    def find(self, level: Level, uid: str) -> list[Found]:
        return self._web.find(level, uid)

    def present(self, study_instance_uid: str, sop_instance_uids: Collection[str]) -> set[str]:
        return self._web.present(study_instance_uid, sop_instance_uids, page=MAX_PAGE)

    def store(self, parts: Sequence[Part]) -> list[Outcome]:
        return self._read_outcomes(parts, self._web.push(parts, expected=STORE_STATUSES))

    def store_stream(self, stream: Iterable[StreamedInstance]) -> list[Outcome]:
        return self._read_outcomes(*self._web.push_stream(stream, expected=STORE_STATUSES))

    def _read_outcomes(self, sent: Sequence[Sent], answer: Answer) -> list[Outcome]:
        if answer.status == 204:
            return unmentioned(sent)
        outcomes = read_outcomes(sent, self._web.dataset(answer), codes={}, warnings_of=warnings_of)
        return rejected_if_alone(outcomes, BAD_FILE) if answer.status == 400 else outcomes

    def metadata(self, found: Found) -> list[Dataset]:
        return self._web.metadata(found)

    def studies(self, *, filters: Mapping[str, str], limit: int, offset: int) -> StudyPage:
        """A server may answer with fewer than ``limit``, so only an empty page is the last."""
        query = StudyQuery.of(filters, MATCHING, self.server)
        asked, at = query.parameters(offset)
        limit = max(1, min(limit, MAX_PAGE))
        found = self._web.studies([*asked, ("limit", str(limit)), ("offset", str(at))])
        return query.page(found, offset=offset, limit=limit, step=len(found))

    def check_order_filters(self, filters: Mapping[str, str]) -> None:
        StudyQuery.of(filters, MATCHING, self.server).check_order()

    def instances(self, found: Found) -> Iterator[Found]:
        return self._web.instances(found, page=MAX_PAGE)

    def deletion(self, level: Level, *, permanent: bool) -> Deletion:  # noqa: ARG002 - the same at every level
        if not permanent:
            return Deletion(DeletionFate.REFUSED, "DICOMweb has no way to hide an object.")
        return Deletion(DeletionFate.DELETED)

    def delete(self, found: Found, *, permanent: bool) -> Deletion:
        """The standard has no delete; many servers take one on the object's path, which is tried.

        Raises
        ------
        PacsMisanswered
            The server says that it has deleted the object, and still finds it: it is to be tried again.
        """
        expected = self.deletion(found.level, permanent=permanent)
        if expected.fate is DeletionFate.REFUSED:
            return expected
        target = self._transport.base_path + path_of(found)
        answer = self._transport.exchange(Request("DELETE", target, expected=(200, 202, 204, 404, 405, 501)))
        if answer.status in (405, 501):
            return Deletion(DeletionFate.REFUSED, NO_DELETE)
        if answer.status == 404:  # of the object, or of a server that takes no DELETE
            return Deletion(DeletionFate.REFUSED, NO_DELETE) if find_known(self, found) else Deletion(NOT_THERE)
        if self._still_has(found):  # it deletes later, or never
            sentence = f"{self.server.name} answered {answer.status} to a deletion and still has the {found.level}."
            raise self._transport.error(PacsMisanswered, sentence)
        return expected

    def _still_has(self, found: Found) -> bool:
        """Of a server that has just taken a deletion: that it now answers as one without studies, is what was asked."""
        try:
            return bool(find_known(self, found))
        except PacsMisanswered as error:
            if not error.details.get(NOTHING_OR_WRONG_URL):
                raise
            return False

    def retrieve(self, found: Found, *, view: View = "as_set") -> AbstractContextManager[Iterator[Retrieved]]:  # noqa: ARG002
        return self._web.retrieve(found)

    def state(self) -> ServerState:
        fault = self._web.root_fault(hint="a server that holds no study may answer 404, too")
        note = fault or "It answers queries; DICOMweb has no call for product and version."
        missing = "" if fault else self._web.missing_at_root()
        return ServerState(ready=not fault, note=note, warnings=(missing,) if missing else ())

    def storage(self) -> StorageState:
        return StorageState(note="DICOMweb has no call that tells the storage.")

    def database(self) -> DatabaseState:
        return DatabaseState(ok=None, note="DICOMweb has no call that tells the database.")


def warnings_of(item: Dataset) -> tuple[str, ...]:
    reason = number(item, WARNING_REASON)
    return () if reason is None else (WARNINGS.get(reason, f"the server gives warning {reason}"),)
