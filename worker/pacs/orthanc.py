"""Orthanc with its DICOMweb plugin; what DICOMweb lacks there goes through Orthanc's own REST API.

Only what this product does in its own way; each habit is told in docs/pacs-oddities.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from courier.filters import Filter
from courier.messages import Level, check_uid
from courier.results import Dataset
from worker.dicom.fingerprints import Rewrites
from worker.pacs.dicomjson import STUDY_INSTANCE_UID, text
from worker.pacs.dicomweb import LISTED, DicomWeb
from worker.pacs.matching import ANY_LETTERS, REQUIRED, Matching, StudyQuery, tag_of, time_range, vr_of
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
from worker.pacs.stow import Sent
from worker.pacs.transport import Request, Transport
from worker.pacs.zip_body import StreamedZip, ZipBody

MAX_PAGE = 1000
#: Orthanc's words for our levels, and the collections of its REST API.
RESOURCES: Mapping[Level, tuple[str, str]] = {
    "image": ("Instance", "/instances"),
    "series": ("Series", "/series"),
    "study": ("Study", "/studies"),
}
#: What identifies an object of a level, among the tags that Orthanc keeps in its index.
IDENTIFIERS: Mapping[Level, str] = {
    "image": "SOPInstanceUID",
    "series": "SeriesInstanceUID",
    "study": "StudyInstanceUID",
}
#: What it has in its index of studies and their patients, and so matches.
INDEXED = (
    *REQUIRED,
    "StudyDescription",
    "PatientBirthDate",
    "PatientSex",
    "InstitutionName",
    "RequestedProcedureDescription",
    "RequestingPhysician",
)
#: A SHA-1 in five groups.
_KEY = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}", re.ASCII).fullmatch
#: What Orthanc says of an image when it has it.
THERE = ("Success", "AlreadyStored")
#: What we call a file of which it says nothing.
LEFT_OUT = {"Status": "left out"}
FATES: Mapping[str, tuple[Fate, str]] = {
    LEFT_OUT["Status"]: (Fate.REJECTED, "The server cannot read the file as DICOM."),
    "Success": (Fate.STORED, ""),
    "AlreadyStored": (Fate.ALREADY_THERE, "The server has this image already."),
    "FilteredOut": (Fate.REJECTED, "A filter of the server does not let the image in."),
    "Failure": (Fate.TRY_AGAIN, "The server failed while it stored the image."),
}


class Orthanc:
    keeps_bytes = True
    rewrites = Rewrites()
    request_bytes = None
    hiding = None
    accepts_streams = True

    def __init__(self, transport: Transport) -> None:
        self.server = transport.server
        self._transport = transport
        self._web = DicomWeb(transport)
        self._root = rest_root(transport.base_path)

    def find(self, level: Level, uid: str) -> list[Found]:
        """Ask the index: a query that finds a study costs Orthanc a quarter of what QIDO does (docs/performance.md).

        Only QIDO tells the UIDs above an image or a series; a study has none above it.
        """
        check_uid(uid)
        question = {"Level": RESOURCES[level][0], "Query": {IDENTIFIERS[level]: uid}, "Expand": True}
        matches = self._query_index(question)
        if not all(_tag(match, IDENTIFIERS[level]) == uid for match in matches):
            raise self._web.misanswered("matches that were not asked for")
        if level == "study":
            return [Found("study", uid) for _ in matches]
        return self._web.find(level, uid) if matches else []

    def present(self, study_instance_uid: str, sop_instance_uids: Collection[str]) -> set[str]:
        """From the index, which takes a list; QIDO opens the file of every image that it lists."""
        there: set[str] = set()
        wanted = sorted(set(sop_instance_uids))
        for first in range(0, len(wanted), LISTED):
            uids = [check_uid(uid) for uid in wanted[first : first + LISTED]]
            query = {"StudyInstanceUID": check_uid(study_instance_uid), "SOPInstanceUID": "\\".join(uids)}
            matches = self._query_index({"Level": "Instance", "Query": query, "Expand": True})
            found = {_tag(match, "SOPInstanceUID") for match in matches}
            if not found <= set(uids):
                raise self._web.misanswered("matches that were not asked for")
            there |= found
        return there

    def store(self, parts: Sequence[Part]) -> list[Outcome]:
        """As an archive: cheaper for Orthanc than STOW, which does not tell a duplicate either.

        Oddity: "Orthanc does not tell a duplicate". Oddity: "An archive is answered file by file, in order".
        """
        told = self._import(ZipBody(parts))
        return _refused(parts) if told is None else self._read_outcomes(parts, told)

    def store_stream(self, stream: Iterable[StreamedInstance]) -> list[Outcome]:
        once = self._web.once(stream)
        told = self._import(StreamedZip(once))
        return _refused(once.sent) if told is None else self._read_outcomes(once.sent, told)

    def _import(self, archive: ZipBody | StreamedZip) -> list[dict[str, Any]] | None:
        """What Orthanc says of the files; None if it refuses the archive as a whole.

        Oddity: "One file can make Orthanc refuse an archive".
        """
        request = Request("POST", f"{self._root}/instances", archive.headers, archive, expected=(200, 400))
        answer = self._transport.exchange(request)
        return None if answer.status == 400 else self._objects(self._web.parse(answer))

    def _read_outcomes(self, sent: Sequence[Sent], told: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """One outcome per image. Where files are left out, what the others are has to be asked by their keys."""
        uids = [one.instance.sop_instance_uid for one in sent]
        keys = [str(one.get("ID")) for one in told if one.get("Status") != "Failure"]
        if len(told) > len(uids) or not all(map(_KEY, keys)) or len(set(keys)) < min(len(keys), len(set(uids))):
            raise self._web.misanswered("outcomes that are not those of the images it was sent")
        if len(told) == len(uids):
            return [_outcome(uid, one) for uid, one in zip(uids, told, strict=True)]
        there = {self._uid_of(str(one["ID"])): one for one in told if one.get("Status") in THERE}
        unclear = any(_outcome("", one).fate is Fate.TRY_AGAIN for one in told)
        return [_outcome(uid, there.get(uid, {"Status": "Failure"} if unclear else LEFT_OUT)) for uid in uids]

    def _uid_of(self, key: str) -> str:
        """The SOP Instance UID of what Orthanc calls by a key of its own."""
        return _tag(self._object(f"/instances/{key}"), IDENTIFIERS["image"])

    def metadata(self, found: Found) -> list[Dataset]:
        return self._web.metadata(found)

    def studies(self, *, filters: Mapping[str, str], limit: int, offset: int) -> StudyPage:
        """Values go unencoded and are compared here. Oddity: "Values of a query are not decoded"."""
        query = StudyQuery.of(filters, MATCHING, self.server)
        asked, at = query.parameters(offset)
        limit = max(1, min(limit, MAX_PAGE))
        window = (("limit", str(limit)), ("offset", str(at)))
        found = self._web.studies([*asked, ("includefield", "StudyDescription"), *window])
        rows = self._as_stored(found, [one.keyword for one in query.filters])
        return query.page(rows, offset=offset, limit=limit, step=len(found))

    def check_order_filters(self, filters: Mapping[str, str]) -> None:
        StudyQuery.of(filters, MATCHING, self.server).check_order()

    def _as_stored(self, rows: Sequence[Dataset], keywords: Collection[str]) -> list[Dataset]:
        """The rows with what the index holds of texts in ``keywords``. Oddity: "Lists are in Latin-1"."""
        texts = [keyword for keyword in keywords if keyword in INDEXED and vr_of(keyword) in ANY_LETTERS]
        if not texts:
            return list(rows)
        indexed = self._indexed([text(ds, STUDY_INSTANCE_UID) for ds in rows])
        return [_overlaid(ds, indexed.get(text(ds, STUDY_INSTANCE_UID), {}), texts) for ds in rows]

    def _indexed(self, study_instance_uids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What the index says of studies and their patients, by keyword."""
        found: dict[str, dict[str, Any]] = {}
        for first in range(0, len(study_instance_uids), LISTED):
            uids = study_instance_uids[first : first + LISTED]
            query = {"StudyInstanceUID": "\\".join(uids)}
            for match in self._objects(self._query_index({"Level": "Study", "Query": query, "Expand": True})):
                tags = {**_tags(match, "PatientMainDicomTags"), **_tags(match, "MainDicomTags")}
                found[_tag(match, "StudyInstanceUID")] = tags
        return found

    def instances(self, found: Found) -> Iterator[Found]:
        """Ask the index: QIDO opens every image's file, which costs as much as storing it (docs/performance.md).

        The images come in one answer. One whose series came into being after the series were listed is no answer.
        """
        if found.level == "image":
            yield found
            return
        above = self._series(found)
        series = {str(one.get("ID")): _tag(one, IDENTIFIERS["series"]) for one in above}
        for one in self._images(found, above):
            series_uid, image_uid = series.get(str(one.get("ParentSeries"))), _tag(one, IDENTIFIERS["image"])
            if not series_uid or not image_uid:
                raise self._web.misanswered("an image without the UIDs above it")
            yield self._web.nameable(Found("image", found.study_instance_uid, series_uid, image_uid))

    def deletion(self, level: Level, *, permanent: bool) -> Deletion:  # noqa: ARG002 - the same at every level
        if not permanent:
            return Deletion(DeletionFate.REFUSED, "Orthanc can only delete for good, it cannot hide.")
        return Deletion(DeletionFate.DELETED)

    def delete(self, found: Found, *, permanent: bool) -> Deletion:
        expected = self.deletion(found.level, permanent=permanent)
        if expected.fate is DeletionFate.REFUSED:
            return expected
        _, collection = RESOURCES[found.level]
        gone = [self._delete(f"{self._root}{collection}/{key}") for key in self._keys(found)]
        return expected if any(gone) else Deletion(DeletionFate.NOT_THERE)

    def retrieve(self, found: Found, *, view: View = "as_set") -> AbstractContextManager[Iterator[Retrieved]]:  # noqa: ARG002
        return self._web.retrieve(found)

    def state(self) -> ServerState:
        """`/system` stands beside the configured url, so it says nothing of that url."""
        system = self._object("/system")
        fault = self._web.root_fault(hint="it ends with /dicom-web", content_type="application/dicom+json")
        return ServerState(product="Orthanc", version=_text(system.get("Version")), ready=not fault, note=fault)

    def storage(self) -> StorageState:
        """Oddity: "Statistics tell what is used, as text"."""
        size = self._object("/statistics").get("TotalDiskSize")
        used = int(size) if isinstance(size, str | int) and str(size).isascii() and str(size).isdecimal() else None
        return StorageState(used_bytes=used, note="Orthanc does not tell the size of its disk.")

    def database(self) -> DatabaseState:
        """`/statistics` counts in the index, so an answer proves it."""
        counts = self._object("/statistics")
        return DatabaseState(ok="CountInstances" in counts, note="/statistics counted in the index")

    def _keys(self, found: Found) -> list[str]:
        """Orthanc's own keys for ``found``, its parents included in the question."""
        return [str(key) for key in self._query_index(_question(found.level, found))]

    def _series(self, above: Found) -> list[dict[str, Any]]:
        """What the index says of the series of ``above``, or of ``above`` itself."""
        return self._objects(self._query_index({**_question("series", above), "Expand": True}))

    def _images(self, above: Found, series: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What the index says of the images; by Orthanc's own key, that costs it a third of what a question does."""
        if not series:
            return []
        _, collection = RESOURCES[above.level]
        key = str(series[0].get("ID" if above.level == "series" else "ParentStudy"))
        if not _KEY(key):
            raise self._web.misanswered("a series without Orthanc's key for it")
        answer = self._transport.exchange(
            Request("GET", f"{self._root}{collection}/{key}/instances", expected=(200, 404))
        )
        return self._objects(self._web.parse(answer)) if answer.status == 200 else []

    def _objects(self, found: Any) -> list[dict[str, Any]]:
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise self._web.misanswered("something that is no list of objects")
        return found

    def _query_index(self, question: Mapping[str, Any]) -> list[Any]:
        """What Orthanc's index knows: keys of Orthanc's own or, if ``Expand`` is asked for, what they stand for."""
        body = (json.dumps(question).encode(),)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body[0]))}
        request = Request("POST", f"{self._root}/tools/find", headers, body, only_asks=True)
        matches = self._web.parse(self._transport.exchange(request))
        if not isinstance(matches, list):
            raise self._web.misanswered("something that is no list of matches")
        return matches

    def _delete(self, target: str) -> bool:
        return self._transport.exchange(Request("DELETE", target, expected=(200, 404))).status == 200

    def _object(self, path: str) -> dict[str, Any]:
        answer = self._transport.exchange(Request("GET", self._root + path))
        found = self._web.parse(answer)
        if not isinstance(found, dict):
            raise self._web.misanswered("something that is no object")
        return found


def _refused(sent: Sequence[Sent]) -> list[Outcome]:
    """What a 400 means: Orthanc gave up at one of the files, and may have stored others. It refuses one sent alone."""
    uids = [one.instance.sop_instance_uid for one in sent]
    if len(uids) == 1:
        return [Outcome(uids[0], Fate.REJECTED, message="Orthanc cannot read the file: it answered 400.")]
    sentence = f"Orthanc gave up at one of {len(uids)} files (400), and does not say at which one."
    return [Outcome(uid, Fate.UNMENTIONED, message=sentence) for uid in uids]


def _outcome(uid: str, told: Mapping[str, Any]) -> Outcome:
    unknown = (Fate.TRY_AGAIN, "The server says of the image what is not documented.")
    fate, sentence = FATES.get(str(told.get("Status")), unknown)
    return Outcome(uid, fate, message=sentence)


def _question(level: Level, within: Found) -> dict[str, Any]:
    """What to ask the index for all objects of ``level`` that are ``within`` or below it."""
    uids = {
        "StudyInstanceUID": within.study_instance_uid,
        "SeriesInstanceUID": within.series_instance_uid,
        "SOPInstanceUID": within.sop_instance_uid,
    }
    return {"Level": RESOURCES[level][0], "Query": {name: uid for name, uid in uids.items() if uid is not None}}


def _tag(match: object, keyword: str) -> str:
    return str(_tags(match, "MainDicomTags").get(keyword, "")).strip(" \0")


def _tags(match: object, which: str) -> dict[str, Any]:
    tags = match.get(which) if isinstance(match, dict) else None
    return tags if isinstance(tags, dict) else {}


def _overlaid(ds: Dataset, tags: Mapping[str, Any], keywords: Sequence[str]) -> Dataset:
    """``ds`` with ``keywords`` as ``tags`` have them; without those that ``tags`` lack."""
    told = {tag_of(name): {"vr": vr_of(name), "Value": [tags[name]]} for name in keywords if name in tags}
    return {**{tag: element for tag, element in ds.items() if tag not in map(tag_of, keywords)}, **told}


def unencoded_value(one: Filter, member: str) -> str:
    """``member`` with ``*`` for what cannot stand in a URL; and around names, whose groups are one text there."""
    value = re.sub(r"[^A-Za-z0-9._~!$'()*;:@/-]+", "*", member)
    if one.vr == "PN":
        return re.sub(r"\*+", "*", f"*{value}*")
    return time_range(member) if one.vr == "TM" else value


#: Oddity: "Orthanc matches what it has in its index".
MATCHING = Matching(
    INDEXED,
    value=unencoded_value,
    uid_lists="commas",
    is_unproven=lambda keyword: keyword not in INDEXED and vr_of(keyword) in ANY_LETTERS,
)


def rest_root(base_path: str) -> str:
    """Where the REST API is: beside the DICOMweb root, ``/pacs/dicom-web`` → ``/pacs``."""
    return base_path.rpartition("/")[0]


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
