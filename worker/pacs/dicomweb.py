"""DICOMweb (PS3.18) as every dialect speaks it: QIDO-RS, STOW-RS, metadata and WADO-RS on one server.

No vendor's habit lives here: which parameters, statuses and codes are right is said by the dialects that
call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any
from urllib.parse import quote, urlencode

from courier.errors import NotFound, PacsMisanswered, PacsRejected, PacsUnavailable
from courier.messages import Level, check_uid
from courier.redaction import printable
from courier.results import Dataset
from worker.pacs.dicomjson import SERIES_INSTANCE_UID, SOP_INSTANCE_UID, STUDY_INSTANCE_UID, is_too_dense, text, values
from worker.pacs.multipart import read_parts
from worker.pacs.protocol import Found, Part, Retrieved, StreamedInstance
from worker.pacs.stow import Once, StowBody, StreamedBody
from worker.pacs.transport import Answer, Request, Transport

DICOM_JSON = {"Accept": "application/dicom+json"}
#: Long lists and the metadata of many images are worth compressing. A query's few hundred bytes are not, nor are the
#: ten kilobytes of one image's metadata: DCM4CHEE takes a fifth more processor time to send them as two.
DICOM_JSON_GZIP = {**DICOM_JSON, "Accept-Encoding": "gzip"}
AS_STORED = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}

#: So many images are asked for one by one before the whole study is listed, or named in one query.
FEW, LISTED = 3, 50

#: Legal in a query as they are, and Orthanc understands them only so. DCM4CHEE makes a list of a bare comma.
RAW = "!$'()*;:@/?"
_TAG = re.compile(r"[0-9A-Fa-f]{8}", re.ASCII)
#: Whether a UID can stand in the path of a URL; letters are tolerated.
fits_path = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,63}").fullmatch


@dataclass(frozen=True)
class Query:
    resource: str
    keyword: str
    tag: str


QUERIES: Mapping[Level, Query] = {
    "image": Query("/instances", "SOPInstanceUID", SOP_INSTANCE_UID),
    "series": Query("/series", "SeriesInstanceUID", SERIES_INSTANCE_UID),
    "study": Query("/studies", "StudyInstanceUID", STUDY_INSTANCE_UID),
}


class DicomWeb:
    """The transactions on one server's DICOMweb root. Safe to use from several threads at once."""

    def __init__(self, transport: Transport, *, base_path: str | None = None) -> None:
        """``base_path``: of another root than the configured one."""
        self.transport = transport
        self._base = transport.base_path if base_path is None else base_path

    def find(self, level: Level, uid: str, *, fields: Sequence[str] = ()) -> list[Found]:
        """Every object of ``level`` that bears ``uid``, asked on the top-level resource: no parent is needed.

        Each match is compared with the question. Oddity: "Unknown keys match everything". ``fields`` are asked for
        beside what is told anyway.
        """
        query = QUERIES[level]
        check_uid(uid)
        more = "".join(f"&includefield={name}" for name in fields)
        target = f"{self._base}{query.resource}?{query.keyword}={uid}{more}"
        found = [self._found(level, ds) for ds in self._search(target, DICOM_JSON)]
        if any(text(one.attributes, query.tag) != uid for one in found):
            raise self.misanswered("matches that were not asked for")
        return found

    def studies(self, parameters: Iterable[tuple[str, str]]) -> list[Dataset]:
        """What ``/studies`` answers to ``parameters``, each item with at least its study's one UID."""
        target = f"{self._base}/studies?{urlencode(list(parameters), safe=RAW, quote_via=quote)}"
        found = self._search(target, DICOM_JSON_GZIP)
        if not all(text(ds, STUDY_INSTANCE_UID) for ds in found):
            raise self.misanswered("a study without its UID")
        if any(len(values(ds, STUDY_INSTANCE_UID)) > 1 for ds in found):
            raise self.misanswered("a study with several UIDs")
        return found

    def root_fault(self, *, hint: str = "", content_type: str = "") -> str:
        """Why the configured url is no root of DICOMweb; "" if one query with limit=1 is answered there (PS3.18 10.6).

        ``hint`` is what an operator has to know of such urls on this product, and ``content_type`` what its answers are
        always labelled.

        Raises
        ------
        PacsUnavailable, PacsUnauthorized
            That cannot be told: the server is silent or in trouble, or the account may not query.
        """
        request = Request("GET", f"{self._base}/studies?limit=1", DICOM_JSON, expected=(200, 204))
        try:
            answer = self.transport.exchange(request)
            label = answer.headers.get("Content-Type", "")
            is_labelled = answer.status == 204 or content_type in label
            if answer.status == 200 and answer.body.strip():
                self._datasets(answer)
        except (PacsMisanswered, PacsRejected) as error:
            status = error.details.get("status")
            return _no_root(f"{self._base}/studies", f"it answered {status}" if status else "its answer is none", hint)
        if not is_labelled:
            return _no_root(f"{self._base}/studies", f"its answer is labelled {printable(label, limit=64)}", hint)
        return ""

    def instances(self, found: Found, *, page: int, order: Sequence[tuple[str, str]] = ()) -> Iterator[Found]:
        """The images below ``found``, ``page`` at a time; only an empty page is the last.

        A server that takes no notice of ``offset`` would never come to an end, so the same page twice is an error.
        """
        if found.level == "image":
            yield found
            return
        offset, target = 0, f"{self._base}{path_of(found)}/instances"
        before: list[Dataset] = []
        while datasets := self._search(f"{target}?{urlencode([*order, *window(page, offset)])}", DICOM_JSON_GZIP):
            if datasets == before:
                raise self.misanswered("the same page of images twice")
            before = datasets
            for ds in datasets:
                image = text(ds, SOP_INSTANCE_UID)
                series = text(ds, SERIES_INSTANCE_UID) or found.series_instance_uid
                if not image or not series or text(ds, STUDY_INSTANCE_UID) not in ("", found.study_instance_uid):
                    raise self.misanswered("an image without the UIDs above it")
                yield self.nameable(Found("image", found.study_instance_uid, series, image, attributes=ds))
            offset += len(datasets)  # and not by the page: a server may hold its pages smaller than it was asked

    def present(self, study_instance_uid: str, sop_instance_uids: Collection[str], *, page: int) -> set[str]:
        """Few are asked for one by one; for more, the study is listed, as long as that takes fewer questions."""
        wanted = set(sop_instance_uids)
        listed: set[str | None] = set()
        if len(wanted) > FEW:
            images = self.instances(Found("study", study_instance_uid), page=page)
            listed = {one.sop_instance_uid for one in islice(images, page * len(wanted))}
            if len(listed) < page * len(wanted):
                return {uid for uid in wanted if uid in listed}
        found = [one for uid in wanted - listed for one in self.find("image", uid)]
        alone = {one.sop_instance_uid for one in found if one.study_instance_uid == study_instance_uid}
        return {uid for uid in wanted if uid in listed or uid in alone}

    def present_in_lists(
        self, study_instance_uid: str, sop_instance_uids: Collection[str], *, briefly: Sequence[tuple[str, str]] = ()
    ) -> set[str]:
        """The same where a query may name several UIDs, the parameter repeated. ``briefly`` asks for UIDs alone."""
        wanted = sorted(set(sop_instance_uids))
        target = f"{self._base}{path_of(Found('study', study_instance_uid))}/instances"
        there: set[str] = set()
        for first in range(0, len(wanted), LISTED):
            asked = [("SOPInstanceUID", check_uid(uid)) for uid in wanted[first : first + LISTED]]
            found = self._search(f"{target}?{urlencode([*asked, ('limit', str(LISTED)), *briefly])}", DICOM_JSON_GZIP)
            uids = {text(ds, SOP_INSTANCE_UID) for ds in found}
            if not uids <= {uid for _, uid in asked}:
                raise self.misanswered("matches that were not asked for")
            there |= uids
        return there

    def push(self, parts: Sequence[Part], *, expected: Collection[int]) -> Answer:
        """Send ``parts`` to ``/studies``, streamed; a fresh token makes the body be built again."""
        body = StowBody(parts)
        headers = {"Content-Type": body.content_type, "Content-Length": str(body.content_length)}
        return self._post(body, headers, expected)

    def push_stream(
        self, stream: Iterable[StreamedInstance], *, expected: Collection[int]
    ) -> tuple[list[StreamedInstance], Answer]:
        """Send instances to ``/studies`` while they arrive, chunked (RFC 9112 7.1); what was sent, and the answer."""
        once = self.once(stream)
        body = StreamedBody(once)
        answer = self._post(body, {"Content-Type": body.content_type}, expected)
        return once.sent, answer

    def _post(self, body: Iterable[bytes], headers: Mapping[str, str], expected: Collection[int]) -> Answer:
        target = f"{self._base}/studies"
        return self.transport.exchange(Request("POST", target, {**DICOM_JSON, **headers}, body, expected=expected))

    def once(self, stream: Iterable[StreamedInstance]) -> Once:
        """``stream``, which nobody gets a second time: for a fresh token the images have to be brought again."""
        sentence = f"{self._name} wanted a fresh token after the images had passed; they are brought again."
        return Once(stream, again=lambda: self.transport.error(PacsUnavailable, sentence))

    def metadata(self, found: Found) -> list[Dataset]:
        target = f"{self._base}{path_of(found)}/metadata"
        headers = DICOM_JSON if found.level == "image" else DICOM_JSON_GZIP
        answer = self.transport.exchange(Request("GET", target, headers, expected=(200, 204, 404)))
        return self._datasets(answer) if answer.status == 200 else []

    @contextmanager
    def retrieve(self, found: Found) -> Iterator[Iterator[Retrieved]]:
        request = Request("GET", self._base + path_of(found), AS_STORED, expected=(200, 204, 404, 206, 410))
        with self.transport.stream(request) as (answer, blocks):
            if answer.status in (204, 404):
                raise self.transport.error(NotFound, f"{self._name} no longer has what was to be retrieved.")
            if answer.status != 200:
                raise self.misanswered("only a part of what was to be retrieved, the rest is not accessible")
            content_type = answer.headers.get("Content-Type", "")
            yield read_parts(blocks, content_type, error=self._broken)

    def dataset(self, answer: Answer) -> Dataset:
        """The one dataset of a STOW answer; a list of one is taken for it.

        A 400 without a dataset refuses the request as a whole.
        """
        try:
            return self._dataset(answer)
        except PacsMisanswered as error:
            if answer.status != 400:
                raise
            raise self.transport.error(PacsRejected, f"{self._name} refuses the request as a whole.") from error

    def _dataset(self, answer: Answer) -> Dataset:
        document = self.parse(answer)
        if isinstance(document, list) and len(document) == 1:
            document = document[0]
        if not isinstance(document, dict) or not all(_TAG.fullmatch(tag) for tag in document):
            raise self.misanswered("something that is no dataset")
        return document

    def parse(self, answer: Answer) -> Any:
        if is_too_dense(answer.body):
            raise self.misanswered("JSON that is brackets for the most part")
        try:
            return json.loads(answer.body)
        except (ValueError, RecursionError) as error:
            raise self.misanswered("something that is not JSON") from error

    def misanswered(self, what: str) -> PacsMisanswered:
        return self.transport.error(PacsMisanswered, f"{self._name} sent {what}.")

    def lasting(self, sentence: str, **details: object) -> PacsMisanswered:
        """An answer that will come again however often it is asked for; ``sentence`` says what a person can do."""
        said = f"The answer of {self._name} cannot be used. {sentence}."
        error = self.transport.error(PacsMisanswered, said, details=details)
        error.is_lasting = True
        return error

    def _broken(self, sentence: str) -> PacsMisanswered:
        return self.transport.error(PacsMisanswered, f"The answer of {self._name} is unusable. {sentence}")

    @property
    def _name(self) -> str:
        return self.transport.server.name

    def _search(self, target: str, headers: Mapping[str, str]) -> list[Dataset]:
        """QIDO: 204 and ``[]`` alike. Oddity: "Nothing found has two forms"."""
        answer = self.transport.exchange(Request("GET", target, headers, expected=(200, 204)))
        return self._datasets(answer) if answer.status == 200 else []

    def _datasets(self, answer: Answer) -> list[Dataset]:
        document = self.parse(answer)
        if not isinstance(document, list) or not all(isinstance(ds, dict) for ds in document):
            raise self.lasting("It sent JSON that is no list of datasets; check the server's url and type")
        return document

    def _found(self, level: Level, ds: Dataset) -> Found:
        study, series = text(ds, STUDY_INSTANCE_UID), text(ds, SERIES_INSTANCE_UID)
        image = text(ds, SOP_INSTANCE_UID)
        if not study or (level != "study" and not series) or (level == "image" and not image):
            raise self.misanswered("a match without the UIDs above it")
        if level == "study":
            return self.nameable(Found(level, study, attributes=ds))
        return self.nameable(Found(level, study, series, image if level == "image" else None, attributes=ds))

    def nameable(self, found: Found) -> Found:
        """``found``, if its UIDs can stand in the path of what is asked next; letters in them are tolerated."""
        uids = (found.study_instance_uid, found.series_instance_uid, found.sop_instance_uid)
        if not all(uid is None or fits_path(uid) for uid in uids):
            raise self.misanswered("a UID that is none")
        return found


def _no_root(path: str, why: str, hint: str) -> str:
    """That the configured url is no root of DICOMweb, as a part of a sentence."""
    return f"GET {path} is no DICOMweb query there, {why}: check the server's url{f' ({hint})' if hint else ''}"


def window(limit: int, offset: int) -> tuple[tuple[str, str], ...]:
    return (("limit", str(limit)), ("offset", str(offset)))


def path_of(found: Found) -> str:
    """``/studies/…[/series/…[/instances/…]]`` of ``found``, below the DICOMweb root."""
    path = f"/studies/{found.study_instance_uid}"
    if found.series_instance_uid is not None:
        path += f"/series/{found.series_instance_uid}"
    if found.sop_instance_uid is not None:
        path += f"/instances/{found.sop_instance_uid}"
    return path
