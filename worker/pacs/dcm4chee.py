"""DCM4CHEE: dcm4chee-arc-light 5, through the application entity that ``url`` names.

Only what this product does in its own way; each habit is told in docs/pacs-oddities.md.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from courier.errors import InvalidRequest, PacsMisanswered, PacsUnauthorized, PacsUnavailable, waits_for_server
from courier.filters import Filter
from courier.messages import Level, check_uid
from courier.redaction import printable
from courier.results import Dataset
from worker.dicom.fingerprints import Rewrites
from worker.dicom.instances import Instance
from worker.pacs.dcm4chee_hidden import REJECTION, Dcm4cheeHidden
from worker.pacs.dcm4chee_views import Dcm4cheeViews
from worker.pacs.dicomjson import FAILED_SOP_SEQUENCE, REFERENCED_SOP_CLASS_UID, items, text
from worker.pacs.dicomweb import DicomWeb, path_of
from worker.pacs.matching import REQUIRED, Matching, StudyQuery, widened
from worker.pacs.protocol import (
    DatabaseState,
    Deletion,
    DeletionFate,
    Fate,
    Found,
    Hiding,
    Outcome,
    Part,
    Retrieved,
    ServerState,
    StorageState,
    StreamedInstance,
    StudyPage,
    View,
)
from worker.pacs.stow import Codes, Sent, failed_by_code, read_outcomes
from worker.pacs.study_turns import StudyTurns
from worker.pacs.transport import Answer, Request, Transport
from worker.pacs.warning_text import warning_text

STORE_STATUSES = (200, 202, 409)
MAX_PAGE = 1000
MAX_OFFSET = 99_999
#: What it matches on studies beside `REQUIRED`; those of series stand in none of its rows of studies.
MATCHED_TOO = ("StudyDescription", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "SOPClassesInStudy")
OF_SERIES = ("InstitutionName", "InstitutionalDepartmentName", "StationName", "SeriesDescription", "BodyPartExamined")
#: A reject is one transaction per instance and runs for minutes on a big study. Oddity: "Rejecting is slow".
REJECT_TIMEOUT_S = 900.0
DATABASE_TIMEOUT_S = 10.0
FREED_LATER = (
    "Hidden by rejection 113039^DCM; storing the same images again shows them again. The archive's scheduler "
    "deletes them, by default after one day, and frees the files within five minutes of that."
)
CODES: Codes = {
    0x0110: (Fate.TRY_AGAIN, "The archive's database or storage failed while it stored the image."),
    0x0124: (Fate.REJECTED, "The archive's store permission service refuses the image."),
    0xA700: (Fate.TRY_AGAIN, "The archive cannot write to its storage."),
    0xA770: (Fate.CONFLICT, "The archive has a rejection note with this UID and other content."),
    0xA771: (
        Fate.REJECTED,
        "The image was rejected in the archive, by default with 113037 or 113038, and may not be stored again: revoke "
        "the rejection there first",
    ),
    0xA772: (Fate.REJECTED, "The rejection note names a series or an image that the archive does not have."),
    0xA773: (Fate.REJECTED, "The rejection note names an image with another SOP class."),
    0xA774: (Fate.REJECTED, "What the rejection note names is already rejected for another reason."),
    0xA775: (Fate.REJECTED, "The archive does not allow rejection for retention expiry."),
    0xA776: (Fate.REJECTED, "The retention period of the study is not over."),
    0xA777: (Fate.REJECTED, "The archive does not take images without a Patient ID."),
    0xA778: (Fate.CONFLICT, "The archive knows this study under another patient."),
    0xA779: (Fate.CONFLICT, "The archive knows this patient with other attributes."),
    0xA77A: (Fate.TRY_AGAIN, "The study is just being deleted in the archive."),
    0xA77B: (
        Fate.CONFLICT,
        "The archive has this image in another study or series, or with another SOP class.",
    ),
    0xA900: (Fate.REJECTED, "An attribute that the archive needs is missing."),
    0xA922: (Fate.REJECTED, "Bulk data that the metadata refer to is missing."),
    0xC409: (Fate.CONFLICT, "The image does not belong to the study it was sent to."),
    0xC499: (Fate.REJECTED, "The archive cannot read the file as DICOM."),
}

#: Oddity: "What DCM4CHEE rewrites".
REWRITES = Rewrites(
    added=frozenset(
        (
            0x00100020,  # PatientID
            0x00100021,  # IssuerOfPatientID
            0x00104000,  # PatientComments
            0x04000561,  # OriginalAttributesSequence
        )
    ),
    dropped=frozenset((0x7FE00003,)),  # EncapsulatedPixelDataValueTotalLength
    changed=frozenset(
        (
            0x00080005,  # SpecificCharacterSet
            0x00080032,  # AcquisitionTime
            0x00100040,  # PatientSex
            0x00101002,  # OtherPatientIDsSequence
        )
    ),
)


class Dcm4chee:
    #: Oddity: "What comes back is not what was sent".
    keeps_bytes = False
    rewrites = REWRITES
    #: HTTP_MAX_POST_SIZE of the image.
    request_bytes = 10_000_000_000
    accepts_streams = True

    def __init__(self, transport: Transport) -> None:
        self.server = transport.server
        self._transport = transport
        self._web = DicomWeb(transport)
        self._turns = StudyTurns()
        self._archive = archive_path(transport.base_path)
        self._hidden = Dcm4cheeHidden(
            transport,
            self._web,
            self._archive,
            reject_timeout_s=REJECT_TIMEOUT_S,
            delete_study=self._delete_study,
        )
        self.hiding: Hiding = self._hidden
        self._views = Dcm4cheeViews(transport, self._archive, REWRITES)

    def find(self, level: Level, uid: str) -> list[Found]:
        """A study is counted. Oddity: "A study is listed slowly and counted fast"."""
        if level != "study":
            return self._web.find(level, uid)
        count = self._count(check_uid(uid))
        if count is None:
            return self._web.find(level, uid)
        return [Found("study", uid)] if count else []

    def _count(self, study_instance_uid: str) -> int | None:
        """How many images of the study the application entity shows; None if it does not count (404)."""
        target = f"{self._transport.base_path}/studies/{study_instance_uid}/instances/count"
        answer = self._transport.exchange(Request("GET", target, _JSON, expected=(200, 404)))
        if answer.status == 404:
            return None
        found = self._web.parse(answer)
        count = found.get("count") if isinstance(found, dict) else None
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise self._web.misanswered("something that is no count")
        return count

    def present(self, study_instance_uid: str, sop_instance_uids: Collection[str]) -> set[str]:
        """Oddity: "Parameters are not to be trusted with anything": a list of UIDs is a repeated parameter."""
        briefly = (("includedefaults", "false"),)  # a fifth of the time that whole rows take
        return self._web.present_in_lists(study_instance_uid, sop_instance_uids, briefly=briefly)

    def store(self, parts: Sequence[Part]) -> list[Outcome]:
        """An image that is there already is `STORED` too. Oddity: "A duplicate is a success".

        The first of a study goes alone. Oddity: "First images of a study wait for each other".
        """
        with self._turns.turn({part.instance.study_instance_uid for part in parts}):
            outcomes = self._read_outcomes(parts, self._web.push(parts, expected=STORE_STATUSES))
            self._turns.begun(
                [
                    part.instance.study_instance_uid
                    for part, outcome in zip(parts, outcomes, strict=True)
                    if outcome.fate is Fate.STORED
                ]
            )
        return outcomes

    def store_stream(self, stream: Iterable[StreamedInstance]) -> list[Outcome]:
        """Without a turn: jobs pass images with their study locked, and one request at a time."""
        return self._read_outcomes(*self._web.push_stream(stream, expected=STORE_STATUSES))

    def _read_outcomes(self, sent: Sequence[Sent], answer: Answer) -> list[Outcome]:
        document = self._web.dataset(answer)
        failure_of = _Failures(document, answer.headers.get("Warning", "")).outcome
        return read_outcomes(sent, document, codes=CODES, warnings_of=lambda _: (), failure_of=failure_of)

    def metadata(self, found: Found) -> list[Dataset]:
        return self._web.metadata(found)

    def studies(self, *, filters: Mapping[str, str], limit: int, offset: int) -> StudyPage:
        """Ordered, for want of an order otherwise. Oddity: "Pages overlap and end at 100,000"."""
        return self._studies(filters, limit, offset, order="StudyInstanceUID")

    def newest_studies(self, *, filters: Mapping[str, str], limit: int, offset: int) -> StudyPage:
        page = self._studies(filters, limit, offset, order="-StudyDate,-StudyTime,StudyInstanceUID")
        return replace(page, is_sorted=StudyQuery.of(filters, MATCHING, self.server).is_single)

    def _studies(self, filters: Mapping[str, str], limit: int, offset: int, *, order: str) -> StudyPage:
        query = StudyQuery.of(filters, MATCHING, self.server)
        asked, at = query.parameters(offset)
        if at > MAX_OFFSET:
            sentence = "The archive pages through 100,000 studies at most: narrow the list, e.g. by StudyDate."
            raise InvalidRequest(sentence, details={"field": "cursor"})
        limit = max(1, min(limit, MAX_PAGE))
        window = (("orderby", order), ("limit", str(limit)), ("offset", str(at)))
        description = ("includefield", "StudyDescription")
        found = self._web.studies([*asked, description, *window])
        return query.page(found, offset=offset, limit=limit, step=limit, is_paged=True)

    def check_order_filters(self, filters: Mapping[str, str]) -> None:
        StudyQuery.of(filters, MATCHING, self.server).check_order()

    def instances(self, found: Found) -> Iterator[Found]:
        """With the titles of documents. Oddity: "A rejection note is no image"."""
        order = (("orderby", "SOPInstanceUID"), ("includefield", "ConceptNameCodeSequence"))
        return self._web.instances(found, page=MAX_PAGE, order=order)

    def deletion(self, level: Level, *, permanent: bool) -> Deletion:
        if level == "study" and permanent:
            return Deletion(DeletionFate.DELETED, "The archive frees the files within five minutes.")
        return Deletion(DeletionFate.HIDDEN, FREED_LATER)

    def delete(self, found: Found, *, permanent: bool) -> Deletion:
        """Reject, and delete if it is a study. Oddity: "Only studies can be deleted"."""
        hidden = self._reject(found)
        if found.level == "study" and permanent and hidden.fate is not DeletionFate.REFUSED:
            return self._delete_study(found)
        return hidden

    def retrieve(self, found: Found, *, view: View = "as_set") -> AbstractContextManager[Iterator[Retrieved]]:
        """Oddity: "Corrections are laid over what was stored"."""
        return self._views.retrieve(found, view)

    def state(self) -> ServerState:
        """`/ctrl/status` proves the archive alone, and not for this entity. Oddity: "Started is not a database".

        The configured url is asked a query only where nothing else is wrong: a database in trouble would hold it up.
        """
        status = self._archive_json("/ctrl/status").get("status")
        database = self.database()
        troubles = [] if database.ok else [f"its database is in trouble: {database.note}"]
        troubles += [why] if (why := self._why_not_to_be_used()) else []
        if not troubles and (fault := self._web.root_fault(hint="it ends with /aets/TITLE/rs")):
            troubles = [fault]
        archive = next((one for one in self._read_configuration("/devices") or () if one.get("hasArcDevExt")), {})
        version = archive.get("dicomSoftwareVersion")
        return ServerState(
            product=printable(str(archive.get("dicomManufacturerModelName") or "dcm4chee-arc"), limit=64),
            version=printable(str(version[0]), limit=64) if isinstance(version, list) and version else None,
            ready=status == "STARTED" and not troubles,
            note="; ".join([f"/ctrl/status says {status}", *troubles]),
        )

    def _why_not_to_be_used(self) -> str:
        """Why no images can be stored on the URL's application entity; "" if they can, or where that is not told."""
        title = self._transport.base_path.partition("/aets/")[2].partition("/")[0]
        if not title:
            return "its url names no application entity; it ends with /aets/TITLE/rs. Check the server's url"
        entities = self._read_configuration("/aets")
        titles = [str(one.get("dicomAETitle")) for one in entities or ()]
        if entities is not None and title not in titles:
            known = printable(", ".join(titles[:20]), limit=300)
            return f"it has no application entity {title}; there are {known}. Check the server's url"
        if entities is not None and self.server.retrieve_aet and self.server.retrieve_aet not in titles:
            return f"it has no application entity {self.server.retrieve_aet}; check the server's retrieve_aet"
        offered = self._read_configuration("/webapps") or []
        if (classes := _service_classes(offered, title)) and "STOW_RS" not in classes:
            return f"its application entity {title} takes no images (it has no STOW_RS); check the server's url"
        other = self.server.retrieve_aet
        if other and (classes := _service_classes(offered, other)) and "WADO_RS" not in classes:
            return (
                f"its application entity {other} gives no images (it has no WADO_RS); check the server's retrieve_aet"
            )
        return ""

    def _read_configuration(self, path: str) -> list[dict[str, Any]] | None:
        """A list out of the archive's configuration; None where it does not tell this account."""
        try:
            found = self._web.parse(self._transport.exchange(Request("GET", self._archive + path, _JSON)))
        except (PacsUnauthorized, PacsMisanswered) as error:
            if waits_for_server(error):
                raise
            return None
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else None

    def storage(self) -> StorageState:
        """A storage that cannot be opened is missing from the list, so an empty list is trouble."""
        answer = self._transport.exchange(Request("GET", f"{self._archive}/storage", _JSON))
        systems = self._web.parse(answer)
        if not isinstance(systems, list):
            raise self._web.misanswered("something that is no list of storage systems")
        return storage_state([system for system in systems if isinstance(system, dict)])

    def database(self) -> DatabaseState:
        """The cheapest call that touches the database counts a queue; `/ctrl/status` does not."""
        target = f"{self._archive}/queue/Export/count"
        expected = (200, 500)
        request = Request("GET", target, _JSON, expected=expected, read_timeout_s=DATABASE_TIMEOUT_S)
        try:
            answer = self._transport.exchange(request)
        except PacsUnavailable as error:
            if error.details.get("phase") != "answer":
                raise
            return DatabaseState(ok=False, note="A count did not come back; the archive waits for its database.")
        return DatabaseState(ok=answer.status == 200, note=f"/queue/Export/count answered {answer.status}")

    def _reject(self, found: Found) -> Deletion:
        """Hide ``found``."""
        target = f"{self._transport.base_path}{path_of(found)}/reject/{REJECTION}"
        expected = (200, 204, 400, 403, 404, 409)
        headers = {**_JSON, "Content-Length": "0"}
        request = Request("POST", target, headers, expected=expected, read_timeout_s=REJECT_TIMEOUT_S)
        answer = self._transport.exchange(request)
        if answer.status in (200, 204):
            return Deletion(DeletionFate.HIDDEN, FREED_LATER, images=rejected_images(answer))
        self._check_refusal(answer)
        if answer.status == 404:
            return Deletion(DeletionFate.NOT_THERE)
        if answer.status == 409:  # its own words would name the patients
            return Deletion(DeletionFate.REFUSED, "The archive has other data of the study's patient.")
        return Deletion(DeletionFate.REFUSED, f"The archive does not reject it: {error_message(answer)}")

    def _delete_study(self, found: Found) -> Deletion:
        """Oddity: "A rejection can stop half-way": it is completed, where the archive shows nothing of the study."""
        deletion = self._delete_rejected(found)
        if deletion.fate is not DeletionFate.REFUSED or not _IS_NOT_ALL_REJECTED(deletion.note):
            return deletion
        if self.find("study", found.study_instance_uid) or not self._hidden.complete(found.study_instance_uid):
            return deletion
        return self._delete_rejected(found)

    def _delete_rejected(self, found: Found) -> Deletion:
        target = self._transport.base_path + path_of(found)
        expected = (200, 204, 403, 404, 409)
        request = Request("DELETE", target, expected=expected, read_timeout_s=REJECT_TIMEOUT_S)
        answer = self._transport.exchange(request)
        if answer.status in (200, 204):
            return self.deletion("study", permanent=True)
        self._check_refusal(answer)
        if answer.status == 404:
            return Deletion(DeletionFate.NOT_THERE)
        if answer.status == 409:
            sentence = f"{self.server.name} is deleting the study already."
            details = {**_DELETING, "study_uid": found.study_instance_uid}
            raise self._transport.error(PacsUnavailable, sentence, details=details)
        return Deletion(DeletionFate.REFUSED, f"The archive does not delete it: {error_message(answer)}")

    def _check_refusal(self, answer: Answer) -> None:
        """Tell a refusal of the object from one of the caller: the latter is a 403 without a body."""
        message = error_message(answer)
        if answer.status == 403 and not answer.body:
            sentence = f"{self.server.name} answered 403: the account lacks a role for this."
            raise self._transport.error(PacsUnauthorized, sentence)
        if message.startswith(("No such Application Entity", "No Web Application", "Unknown Rejection Note")):
            raise self._transport.error(PacsMisanswered, f"{self.server.name} answered: {message}.")

    def _archive_json(self, path: str) -> dict[str, Any]:
        answer = self._transport.exchange(Request("GET", self._archive + path, _JSON))
        found = self._web.parse(answer)
        if not isinstance(found, dict):
            raise self._web.misanswered("something that is no object")
        return found


def _service_classes(offered: Sequence[Mapping[str, Any]], title: str) -> set[str]:
    """What the web services of an application entity do; nothing where the archive names none."""
    services = [one for one in offered if one.get("dicomAETitle") == title]
    return {name for one in services for name in one.get("dcmWebServiceClass") or ()}


class _Failures:
    """What an answer says of the images that it has not stored.

    Its header Warning speaks of the last of them alone. Oddity: "A file that cannot be stored is a 272 too".
    """

    def __init__(self, document: Dataset, warning: str) -> None:
        failed = items(document, FAILED_SOP_SEQUENCE)
        self._last = failed[-1] if failed else None
        self._warning = warning

    def outcome(self, sent: Sent, item: Dataset) -> Outcome:
        instance, warning = sent.instance, self._warning if item is self._last else ""
        found = failed_by_code(sent, item, codes=CODES)
        if found.failure_reason == _CONFLICTING_PATIENT_ID and not instance.has_patient_id:
            return replace(found, fate=Fate.TRY_AGAIN, message=_OTHER_MADE_UP_ID)
        if details := _DETAILS.get(found.failure_reason or 0):
            return replace(found, details=details)
        if found.failure_reason == _NOTE_WITHOUT_IMAGES:
            return replace(found, is_moot=True)
        if found.failure_reason not in (_FAILED, _NO_DICOM_STREAM):
            return found
        text = warning_text(warning)
        said = f" It says: {text}." if text else ""
        if found.fate is Fate.TRY_AGAIN and (why := _proof(instance, item, warning, self._warning)):
            return replace(found, fate=Fate.REJECTED, message=f"{why}{said}")
        return replace(found, message=found.message + said, is_doubtful=found.fate is Fate.TRY_AGAIN)


def _proof(instance: Instance, item: Dataset, warning: str, last_warning: str) -> str:
    """Why a 272 is the file's own fault; "" if it may be the archive's.

    ``warning`` is about the image, and "" if the answer has none about it; ``last_warning`` is that of the answer.
    """
    is_unexplained = not warning and (_IS_OF_A_TEXT(last_warning) or not _IS_TROUBLE(last_warning))
    if instance.odd_texts and (is_unexplained or _IS_OF_A_TEXT(warning)):
        return f"The archive cannot store {instance.odd_texts}: longer than 255 characters, or with a NUL in it."
    if _IS_TROUBLE(warning):
        return ""
    if text(item, REFERENCED_SOP_CLASS_UID) == NOT_A_DICOM_FILE or _IS_UNREADABLE(warning):
        return "The archive cannot read the file."
    return ""


_FAILED, _CONFLICTING_PATIENT_ID, _BEING_DELETED, _NO_DICOM_STREAM = 0x0110, 0xA778, 0xA77A, 0xC499
#: What the details of an error say where a study is being deleted, perhaps for ever.
_DELETING: Mapping[str, Any] = {"study_deleting": True}
#: What is known of a failure beside its text; the answer does not say with which code an image was rejected.
_DETAILS: Mapping[int, Mapping[str, Any]] = {_BEING_DELETED: _DELETING, 0xA771: {"hidden_by": "unknown"}}
#: Oddity: "A rejection note is no image".
_NOTE_WITHOUT_IMAGES = 0xA772
_OTHER_MADE_UP_ID = (
    "The image has no Patient ID, and the archive made up another one for an image of the study that arrived with it."
)
#: The SOP class that the archive gives to what it could not read. Oddity: "An unreadable file gets a random name".
NOT_A_DICOM_FILE = "1.2.40.0.13.1.15.110.3.165.2"
_IS_UNREADABLE = re.compile(r"EOFException|DicomStreamException", re.IGNORECASE).search
#: Of a database that does not take a value. ARJUNA016053 says that something was not committed, and not what.
_IS_OF_A_TEXT = re.compile(r"ARJUNA016053|too long|invalid byte sequence|\b0x00\b", re.IGNORECASE).search
#: Of the archive, and so no proof against the file.
_IS_TROUBLE = re.compile(r"space|storage|accessa|JDBC|FileSystem|NoSuchFile|Connection|Timeout", re.IGNORECASE).search
#: Why a study is not deleted: the archive counts it as not rejected, or not as a whole.
_IS_NOT_ALL_REJECTED = re.compile(r"Rejection State: (NONE|PARTIAL)").search
_JSON = {"Accept": "application/json"}
_MAX_MESSAGE_BYTES = 8_192
_MESSAGE = re.compile(r'"errorMessage"\s*:\s*"(.*)"\s*\}?\s*$', re.DOTALL)


def archive_path(base_path: str) -> str:
    """The calls of the whole archive stand above its application entities: ``/dcm4chee-arc/aets/X/rs``."""
    return base_path.partition("/aets/")[0]


def error_message(answer: Answer) -> str:
    """The archive's own words. They look like JSON but are not escaped. Oddity: "Errors look like JSON"."""
    body = answer.body[:_MAX_MESSAGE_BYTES].decode("utf-8", "replace")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    message = found.get("errorMessage") if isinstance(found, dict) else None
    match = _MESSAGE.search(body)
    if not isinstance(message, str):
        message = match[1] if match else f"status {answer.status}"
    return printable(message, limit=300)


def rejected_images(answer: Answer) -> int | None:
    """How many images the archive says that it has rejected; None if it does not say."""
    try:
        found = json.loads(answer.body)
    except (ValueError, RecursionError):
        return None
    count = found.get("count") if isinstance(found, dict) else None
    return count if isinstance(count, int) else None


def storage_state(systems: Sequence[Mapping[str, Any]]) -> StorageState:
    """The sum over the storage systems; those with the same figures share a file system and count once.

    One whose threshold is exceeded takes nothing, and has no room, whatever its disk has.
    """
    if not systems:
        sentence = "The archive lists no storage, which means that none can be opened."
        return StorageState(note=sentence, is_well=False)
    names = _named(systems)
    full = [system for system in systems if _is_exceeded(system)]
    is_well = len(full) < len(systems)
    note = f"storage: {names}"
    if full:
        told = sum(usable for _, usable in _figures(full)) / 1e9
        note += f"; full: {_named(full)} takes nothing more, because its threshold is exceeded ({told:.0f} GB free)"
    if not all(isinstance(system.get(space), int) for system in systems for space in ("totalSpace", "usableSpace")):
        return StorageState(note=note if full else f"The archive tells no space for {names}.", is_well=is_well)
    total_bytes, usable_bytes = (sum(figures) for figures in zip(*_figures(systems), strict=True))
    with_room = _figures([system for system in systems if not _is_exceeded(system)])
    free_bytes = sum(usable for _, usable in with_room)
    is_well = is_well and free_bytes > 0
    return StorageState(total_bytes, free_bytes, total_bytes - usable_bytes, note, is_well)


def _figures(systems: Iterable[Mapping[str, Any]]) -> set[tuple[int, int]]:
    """Total and usable bytes of the file systems below."""
    spaces = {(system.get("totalSpace"), system.get("usableSpace")) for system in systems}
    return {(total, usable) for total, usable in spaces if isinstance(total, int) and isinstance(usable, int)}


def _named(systems: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(str(system.get("dcmStorageID"))[:64] for system in systems[:20])


def _is_exceeded(system: Mapping[str, Any]) -> bool:
    """A flag, or the time since when."""
    told = system.get("dcmStorageThresholdExceeded")
    return bool(told) and str(told).lower() != "false"


def _in_capitals(one: Filter, member: str) -> str | None:
    """Oddities: "Names in capitals ignore case", "A letter with an accent can be written in two ways"."""
    value = widened(one, member)
    if not value or one.vr != "PN":
        return value
    capitals = "".join(map(_in_capital, value))
    return capitals if capitals.strip("*?^ ") else value


def _in_capital(letter: str) -> str:
    """``*`` for a letter that has no one capital or can be written as several characters, and for ``?``.

    What ``?`` stands for may be such a letter.
    """
    capital = letter.upper()
    return capital if capital != "?" and len(capital) == 1 and unicodedata.is_normalized("NFD", capital) else "*"


#: Oddity: "What is not matched is ignored", and "Parameters are not to be trusted with anything".
MATCHING = Matching(
    (*REQUIRED, *MATCHED_TOO, *OF_SERIES),
    value=_in_capitals,
    uid_lists="repeated",
    is_unproven=OF_SERIES.__contains__,
)
