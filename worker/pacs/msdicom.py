"""MSDICOM: Microsoft's DICOM server, API version 2, and Azure's DICOM service.

Only what this product does in its own way; each habit is told in docs/pacs-oddities.md.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from pydicom.datadict import keyword_for_tag

from courier.errors import PacsMisanswered
from courier.filters import Filter
from courier.messages import Level
from courier.results import Dataset
from worker.dicom.fingerprints import Rewrites
from worker.pacs.dicomjson import (
    ERROR_COMMENT,
    FAILED_ATTRIBUTES_SEQUENCE,
    WARNING_REASON,
    items,
    number,
    text,
)
from worker.pacs.dicomweb import DicomWeb, path_of
from worker.pacs.matching import Matching, StudyQuery
from worker.pacs.protocol import (
    DatabaseState,
    Deletion,
    DeletionFate,
    Fate,
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
from worker.pacs.stow import Codes, Sent, failed_by_code, read_outcomes, unmentioned
from worker.pacs.transport import Answer, Request, Transport

#: 400 also means that the server cancelled the call, so time may cure it. Oddity: "A cancelled call is a 400".
STATUSES = {400: PacsMisanswered}
STORE_STATUSES = (200, 202, 204, 409)
MAX_PAGE = 200
FILTERS = (
    "StudyInstanceUID",
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "AccessionNumber",
    "ReferringPhysicianName",
    "StudyDate",
    "StudyDescription",
    "ModalitiesInStudy",
)
CODES: Codes = {
    272: (Fate.TRY_AGAIN, "The server failed while it stored the image."),
    43264: (Fate.REJECTED, "The server cannot read the file, or an attribute that it needs is not valid."),
    43265: (Fate.REJECTED, "The image does not belong to the study it was sent to."),
    45070: (Fate.ALREADY_THERE, "The server has this image already."),
    45071: (Fate.PENDING, "Another store of this image is under way or was left behind."),
}
IMPLICIT_VR = 45063
#: A refusal names so many attributes.
NAMED = 10
_TAG = re.compile(r"\(([0-9A-Fa-f]{4}),([0-9A-Fa-f]{4})\)", re.ASCII)


class MsDicom:
    keeps_bytes = True
    rewrites = Rewrites()
    #: Of the server itself; Azure's service takes 4 GB by now.
    request_bytes = 2_147_483_647
    hiding = None
    accepts_streams = True

    def __init__(self, transport: Transport) -> None:
        self.server = transport.server
        self._transport = transport
        self._web = DicomWeb(transport)

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
        return read_outcomes(
            sent, self._web.dataset(answer), codes=CODES, warnings_of=warnings_of, failure_of=_failure_of
        )

    def metadata(self, found: Found) -> list[Dataset]:
        return self._web.metadata(found)

    def studies(self, *, filters: Mapping[str, str], limit: int, offset: int) -> StudyPage:
        """Only an empty page is the last. Oddity: "A short page is not the last"."""
        query = StudyQuery.of(filters, MATCHING, self.server)
        query.check_asked()
        asked, at = query.parameters(offset)
        limit = max(1, min(limit, MAX_PAGE))
        counts = ("includefield", "ModalitiesInStudy,NumberOfStudyRelatedInstances")
        found = self._web.studies([*asked, counts, ("limit", str(limit)), ("offset", str(at))])
        return query.page(found, offset=offset, limit=limit, step=limit)

    def check_order_filters(self, filters: Mapping[str, str]) -> None:
        StudyQuery.of(filters, MATCHING, self.server).check_order()

    def instances(self, found: Found) -> Iterator[Found]:
        return self._web.instances(found, page=MAX_PAGE)

    def deletion(self, level: Level, *, permanent: bool) -> Deletion:  # noqa: ARG002 - the same at every level
        if not permanent:
            return Deletion(DeletionFate.REFUSED, "MSDICOM can only delete for good, it cannot hide.")
        return Deletion(DeletionFate.DELETED, "Its files are freed later, by default after three days.")

    def delete(self, found: Found, *, permanent: bool) -> Deletion:
        expected = self.deletion(found.level, permanent=permanent)
        if expected.fate is DeletionFate.REFUSED:
            return expected
        target = self._transport.base_path + path_of(found)
        answer = self._transport.exchange(Request("DELETE", target, expected=(200, 204, 404)))
        if answer.status == 404:
            return Deletion(DeletionFate.NOT_THERE)
        return expected

    def retrieve(self, found: Found, *, view: View = "as_set") -> AbstractContextManager[Iterator[Retrieved]]:  # noqa: ARG002
        return self._web.retrieve(found)

    def state(self) -> ServerState:
        """The health report stands beside the configured url, so it says nothing of that url."""
        report = self._health()
        overall = "" if report is None else str(report.get("overallStatus"))
        note = f"{overall}, as of up to 30 s ago" if overall else "The server has no health report at /health/check."
        if overall and overall not in ("Healthy", "Degraded"):
            return ServerState(ready=False, note=note)
        fault = self._web.root_fault(hint="it ends with /v2, or with /v2/partitions/NAME")
        if fault:
            return ServerState(ready=False, note=f"{note.rstrip('.')}; {fault}")
        return ServerState(ready=True if overall else None, note=note)

    def storage(self) -> StorageState:
        return StorageState(note="MSDICOM has no call that tells its storage.")

    def database(self) -> DatabaseState:
        """Oddity: "Health is outside the version and up to 30 seconds old"."""
        details = (self._health() or {}).get("details")
        for entry in details if isinstance(details, list) else ():
            if isinstance(entry, dict) and entry.get("name") == "DataStoreHealthCheck":
                status = entry.get("status")
                return DatabaseState(ok=status == "Healthy", note=f"{status}, as of up to 30 s ago")
        return DatabaseState(ok=None, note="The server's health report does not mention its database.")

    def _health(self) -> dict[str, Any] | None:
        target = health_path(self._transport.base_path)
        answer = self._transport.exchange(Request("GET", target, expected=(200, 404, 503)))
        if answer.status == 404:
            return None
        report = self._web.parse(answer)
        if not isinstance(report, dict):
            raise self._web.misanswered("a health report that is none")
        return report


def health_path(base_path: str) -> str:
    """The health report stands outside the versions: ``/v2/partitions/x`` → ``/health/check``."""
    return re.sub(r"/v[^/]+(/partitions/[^/]+)?$", "", base_path) + "/health/check"


def _whole_value(one: Filter, member: str) -> str | None:
    """No wildcards, no groups of names. Oddity: "Queries match little and refuse the rest"."""
    misread = "*?<=" if one.vr == "PN" else "*?<"
    return None if any(sign in member for sign in misread) else member


MATCHING = Matching(FILTERS, value=_whole_value)


def _failure_of(sent: Sent, item: Dataset) -> Outcome:
    """What a failed item says, with the attributes that it names."""
    found = failed_by_code(sent, item, codes=CODES)
    named = list(dict.fromkeys(filter(None, map(_attribute, _comments(item)))))
    if not named:
        return found
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    sentence = f"{found.message} It names {', '.join(named[:NAMED])}{more}."
    return replace(found, message=sentence, details={"attributes": named[:NAMED]})


def warnings_of(item: Dataset) -> tuple[str, ...]:
    """What an item was stored in spite of. Comments are cut down to their tag: they may quote a value."""
    reason = number(item, WARNING_REASON)
    found = [_attribute_warning(comment) for comment in _comments(item)]
    if reason == IMPLICIT_VR:
        found.insert(0, "the dataset is encoded with implicit VR")
    if reason is not None and not found:
        found = [f"the server gives warning {reason}"]
    return tuple(dict.fromkeys(found))


def _comments(item: Dataset) -> list[str]:
    return [text(entry, ERROR_COMMENT) for entry in items(item, FAILED_ATTRIBUTES_SEQUENCE)]


def _attribute_warning(comment: str) -> str:
    return f"{_attribute(comment) or 'an attribute'} is not valid and is missing from the metadata"


def _attribute(comment: str) -> str:
    """The attribute that a comment is about, by its keyword and tag; "" if it names none."""
    tag = _TAG.search(comment)
    if tag is None:
        return ""
    name = keyword_for_tag(int(tag[1] + tag[2], 16))
    return f"{name or 'attribute'} ({tag[1]},{tag[2]})"
