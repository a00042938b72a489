"""STOW-RS as DCM4CHEE has it (PS3.18 10.5): parts are judged and stored one by one while the body still arrives.

There is no all-or-nothing: a 500 in mid body leaves the earlier parts stored.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from pydicom import Dataset
from pydicom.datadict import dictionary_VR

from sandbox import datasets
from sandbox.datasets import Header
from sandbox.dcm4chee.aets import NOTE, REJECTION_CODES
from sandbox.dcm4chee.archive import (
    DEVICE,
    PURGE_INTERVAL_S,
    RESERVED,
    ArchiveState,
    Refusal,
    attribute_path,
    entity,
    identity,
    invalid,
    parameters,
    refuse,
    services_url,
    unknown,
)
from sandbox.dcm4chee.forms import native_xml
from sandbox.dcm4chee.media import ANY, accepted, media
from sandbox.dcm4chee.notes import rejection_note
from sandbox.dcm4chee.objects import (
    INDEXED,
    PATIENT_TAGS,
    STYLE,
    Unreadable,
    has_a_broken_end,
    names,
    opened,
    read_header,
    supplemented_issuer,
)
from sandbox.store import Condition, InstanceRow, NewInstance, Spool, first_value
from sandbox.web import DICOM_JSON, FAULT, BodyPart, BrokenMultipart, TooLarge, dicom_json, operation, read_parts

#: HTTP_MAX_POST_SIZE of the image.
MAX_POST_BYTES = 10_000_000_000
NOT_A_DICOM_FILE = "1.2.40.0.13.1.15.110.3.165.2"
_OPTIONS = {
    "updatePolicy": {"SUPPLEMENT", "MERGE", "OVERWRITE"},
    "reasonForModification": {"COERCE", "CORRECT"},
    "sourceOfPreviousValues": None,
}


class InstanceFailure(Exception):
    """One instance's FailureReason, and what the Warning header will say of it."""

    def __init__(self, reason: int, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class _StowTransaction:
    """One STOW request and what became of its instances so far."""

    archive: ArchiveState
    fault: Any
    url: str
    study_instance_uid: str | None
    coerced: dict[str, Any]
    began_s: float = field(default_factory=time.monotonic)
    stored: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    last_failure: str = ""
    #: Studies of which this request has made up the Patient ID; its own images do not collide.
    made_up: set[str] = field(default_factory=set)


@operation("store")
async def stow(archive: ArchiveState, request: web.Request) -> web.StreamResponse:
    content_type = media(request.headers.get("Content-Type", ""))
    if content_type.name != "multipart/related":
        raise Refusal(web.Response(status=415))
    as_xml = _wants_xml(request)
    coerced = _coerced(request)
    entity(request, "STOW_RS")
    if "boundary" not in content_type.parameters:
        raise refuse(400, "Missing Boundary Parameter")
    if (request.content_length or 0) > MAX_POST_BYTES:
        raise Refusal(web.Response(status=400, headers={"Connection": "close"}))
    store_request = _StowTransaction(
        archive, request[FAULT], services_url(request), request.match_info.get("study"), coerced
    )
    try:
        await _take_in(store_request, request, content_type.parameters["boundary"])
    except BrokenMultipart as error:
        raise Refusal(web.Response(status=500)) from error  # without a type and without a word
    except TooLarge as error:
        raise Refusal(web.Response(status=400, headers={"Connection": "close"})) from error
    return _answer(store_request, as_xml=as_xml)


def _wants_xml(request: web.Request) -> bool:
    """Which of the two forms is accepted.

    For a wildcard the archive's choice is not stable: here it is the one that a client expects least.
    """
    for one in accepted(request):
        if one.name == DICOM_JSON:
            return False
        if one.name in ("application/dicom+xml", ANY, "application/*"):
            return True
    raise Refusal(web.Response(status=406))


def _coerced(request: web.Request) -> dict[str, Any]:
    """Attributes given as query parameters: each of them is written into every object of the request."""
    keys = Dataset()
    for parameter in parameters(request):
        if parameter.name in RESERVED:
            continue
        if parameter.name in _OPTIONS:
            allowed = _OPTIONS[parameter.name]
            if allowed is not None and parameter.value not in allowed:
                raise invalid(request, f"Invalid {parameter.name}", parameter.value)
            continue
        path = attribute_path(parameter.name)
        if path is None or len(path) != 1:
            raise unknown(request)
        tag = int(path[0], 16)
        try:
            keys.add_new(tag, dictionary_VR(tag), list(parameter.values))
        except (KeyError, ValueError) as error:
            raise unknown(request) from error
    return keys.to_json_dict()


async def _take_in(transaction: _StowTransaction, request: web.Request, boundary: str) -> None:
    arriving = read_parts(request, boundary, transaction.archive.store, max_bytes=MAX_POST_BYTES)
    if transaction.fault.lose_last_part:
        arriving = _all_but_the_last(arriving)
    async for part in arriving:
        kind = part.headers.get("content-type")
        if kind is None:
            part.spool.discard()
            sentence = b"RESTEASY003555: MediaType value is null"
            raise Refusal(web.Response(status=500, body=sentence, headers={"Content-Type": DICOM_JSON}))
        if media(kind).name == "application/dicom":
            _store_or_refuse(transaction, part.spool)
        else:
            part.spool.discard()


async def _all_but_the_last(parts: AsyncIterator[BodyPart]) -> AsyncIterator[BodyPart]:
    held: BodyPart | None = None
    async for part in parts:
        if held is not None:
            yield held
        held = part
    if held is not None:
        held.spool.discard()


def _store_or_refuse(transaction: _StowTransaction, spool: Spool) -> None:
    """Store one part, or say why not."""
    sop_class_uid, sop_instance_uid = NOT_A_DICOM_FILE, f"2.25.{uuid.uuid4().int}"
    spool = _with_preamble(transaction.archive, spool)
    try:
        sop_class_uid, sop_instance_uid = names(spool.source) or (sop_class_uid, sop_instance_uid)
        header = _read(spool)
        new = _as_new(transaction, header)
        sop_class_uid, sop_instance_uid = new.sop_class_uid, new.sop_instance_uid
        _may_store(transaction, new)
        _keep_or_reject(transaction.archive, header, new, spool)
    except InstanceFailure as failure:
        transaction.last_failure = str(failure)
        transaction.failed.append({**_reference(sop_class_uid, sop_instance_uid), "00081197": _us(failure.reason)})
    else:
        url = f"{transaction.url}/studies/{new.study_instance_uid}/series/{new.series_instance_uid}"
        item = {
            **_reference(sop_class_uid, sop_instance_uid),
            "00081190": {"vr": "UR", "Value": [f"{url}/instances/{sop_instance_uid}"]},
        }
        transaction.stored.append((new.study_instance_uid, item))
    finally:
        spool.discard()


def _with_preamble(archive: ArchiveState, spool: Spool) -> Spool:
    """The archive takes a file without its preamble, and writes it with one."""
    with opened(spool.source) as file:
        if file.read(8) != b"\2\0\0\0UL\4\0":
            return spool
        file.seek(0)
        whole = archive.store.spool()
        whole.write(bytes(128) + b"DICM" + file.read())
    spool.discard()
    return whole


def _read(spool: Spool) -> Header:
    try:
        header = read_header(spool.source)
        if has_a_broken_end(spool.source, header):
            raise InstanceFailure(0x0110, _CUT_OFF)
        return header
    except Unreadable as error:
        if error.is_dicom:
            raise InstanceFailure(0x0110, _CUT_OFF) from error
        raise InstanceFailure(0xC499, "org.dcm4che3.io.DicomStreamException: Not a DICOM Stream") from error


def _as_new(transaction: _StowTransaction, header: Header) -> NewInstance:
    """The object as it will be indexed: query parameters win, what is missing of the patient is filled in."""
    found = {name: datasets.elements(header, tags, STYLE) for name, tags in INDEXED.items()}
    for tag, element in transaction.coerced.items():
        for level, tags in INDEXED.items():
            if int(tag, 16) in tags:
                found[level][tag] = element
    study, series, instance = found["study"], found["series"], found["instance"]
    uids = [
        first_value(attributes.get(tag))
        for attributes, tag in (
            (study, "0020000D"),
            (series, "0020000E"),
            (instance, "00080018"),
            (instance, "00080016"),
        )
    ]
    if any(uid is None for uid in uids):
        raise InstanceFailure(0x0110, "java.lang.NullPointerException: missing Study, Series or SOP Instance UID")
    study_uid, series_uid, sop_uid, class_uid = [uid or "" for uid in uids]
    _check_texts(transaction.archive, header, study_uid, series_uid)
    return NewInstance(
        study_instance_uid=study_uid,
        series_instance_uid=series_uid,
        sop_instance_uid=sop_uid,
        sop_class_uid=class_uid,
        transfer_syntax_uid=header.transfer_syntax_uid,
        study=_identified(transaction, study_uid, study),
        series=series,
        instance=instance,
        received_at_s=transaction.archive.now_s(),
        notes={"coerced": transaction.coerced} if transaction.coerced else {},
    )


#: What the database keeps in columns of 255 characters.
_COLUMNS = (
    *(0x00080050, 0x00080060, 0x00080080, 0x00080090, 0x00081010, 0x00081030, 0x0008103E, 0x00081040, 0x00081050),
    *(0x00100010, 0x00100020, 0x00100021, 0x00100030, 0x00102297, 0x00180015, 0x00200010, 0x00200060, 0x00380010),
    *(0x0040A491, 0x0040A493),
)
#: The same of the items of sequences.
_COLUMNS_OF_ITEMS = {
    0x00080051: ("00400031",),  # IssuerOfAccessionNumberSequence: LocalNamespaceEntityID
    0x00101002: ("00100020", "00100021"),  # OtherPatientIDsSequence
    0x00400275: ("00080050", "00321032", "00321033", "00400009", "00401001"),  # RequestAttributesSequence
    0x0040A073: ("0040A075",),  # VerifyingObserverSequence: VerifyingObserverName
}
_CUT_OFF = "java.io.EOFException"
_NOT_COMMITTED = (
    "jakarta.ejb.EJBTransactionRolledbackException: jakarta.transaction.RollbackException: ARJUNA016053: Could not "
    "commit transaction."
)


def _check_texts(archive: ArchiveState, header: Header, study_uid: str, series_uid: str) -> None:
    """What the database does not take fails when it is written: of a study's or series' own, with its first image."""
    written = set(_COLUMNS)
    if archive.store.instances(study_instance_uid=study_uid):
        written.discard(0x00200010)
    if archive.store.instances(study_instance_uid=study_uid, series_instance_uid=series_uid):
        written.discard(0x00080060)
    texts = [header.text(tag) or "" for tag in written]
    if any(_is_too_much(text) for text in (*texts, *_texts_of_items(header))):
        raise InstanceFailure(0x0110, _NOT_COMMITTED)


def _is_too_much(text: str) -> bool:
    """Of several values the database keeps the first, without the blanks around it."""
    kept = text.partition("\\")[0].rstrip("\0 ").lstrip(" ")
    return "\0" in kept or len(kept) > 255


def _texts_of_items(header: Header) -> Iterator[str]:
    sequences = datasets.elements(header, _COLUMNS_OF_ITEMS, STYLE)
    for tag, columns in _COLUMNS_OF_ITEMS.items():
        for item in sequences.get(f"{tag:08X}", {}).get("Value", ()):
            for column in columns:
                yield first_value(item.get(column)) or ""


def _identified(transaction: _StowTransaction, study_instance_uid: str, study: dict[str, Any]) -> dict[str, Any]:
    """The study's attributes with a patient id and an issuer, made up where the object has none.

    Requests that overlap do not see what the others have made up.
    """
    archive, study = transaction.archive, dict(study)
    if first_value(study.get("00100020")) is None:
        known = _known_patient(archive, study_instance_uid)
        ours = study_instance_uid in transaction.made_up
        if not ours and archive.made_up_s.get(study_instance_uid, 0) > transaction.began_s:
            known = {}
        elif not known:
            transaction.made_up.add(study_instance_uid)
            archive.made_up_s[study_instance_uid] = time.monotonic()
        made = f"P-{uuid.uuid4().int % 10**8:08d}"
        study["00100020"] = known.get("00100020") or {"vr": "LO", "Value": [made]}
        if "00100021" in known:
            study["00100021"] = known["00100021"]
    if first_value(study.get("00100021")) is None:
        issuer = supplemented_issuer(first_value(study.get("00100010")), first_value(study.get("00100030")))
        study["00100021"] = {"vr": "LO", "Value": [issuer]}
    return study


def _known_patient(archive: ArchiveState, study_instance_uid: str) -> dict[str, Any]:
    found = archive.store.search("study", [Condition("study_instance_uid", "=", study_instance_uid)])
    return {tag: element for tag, element in found[0].study.items() if tag in PATIENT_TAGS} if found else {}


def _may_store(transaction: _StowTransaction, new: NewInstance) -> None:
    """Everything but duplicates that keeps an instance out, in the archive's order."""
    fault = transaction.fault
    if transaction.study_instance_uid not in (None, new.study_instance_uid):
        raise InstanceFailure(
            0xC409,
            f"Study Instance UID[{new.study_instance_uid}] of received object does not match "
            f"Study Instance UID[{transaction.study_instance_uid}] specified in the request URL",
        )
    if fault.failure_reason is not None:
        raise InstanceFailure(fault.failure_reason, f"Failure {fault.failure_reason:04X}")
    if fault.storage_down or fault.disk_full == "A700":
        raise InstanceFailure(0xA700, "java.nio.file.FileSystemException: No space left on device")
    if fault.disk_full == "272":
        raise InstanceFailure(0x0110, "java.io.IOException: No space left on configured storage systems")
    if fault.database_down:
        raise InstanceFailure(0x0110, "jakarta.ejb.EJBException: Unable to acquire JDBC Connection")
    if fault.fail_image == new.sop_instance_uid:
        raise InstanceFailure(0x0110, "java.lang.NullPointerException")
    if fault.transient_272:
        raise InstanceFailure(
            0x0110, "jakarta.persistence.PersistenceException: duplicate key value violates unique constraint"
        )
    if new.study_instance_uid in transaction.archive.deleting:
        raise InstanceFailure(0xA77A, f"Study[uid={new.study_instance_uid}] is being deleted")


def _keep(archive: ArchiveState, new: NewInstance, spool: Spool) -> None:
    """Store a first instance; a known SOP Instance UID is ignored, refused or restored instead."""
    known = archive.store.by_sop(new.sop_instance_uid)
    if known:
        _keep_again(archive, new, spool, known[0])
        return
    patient = _known_patient(archive, new.study_instance_uid)
    if patient and identity(patient) != identity(new.study):
        raise InstanceFailure(0xA778, f"Conflicting Patient ID in Study[uid={new.study_instance_uid}]")
    archive.store.add(new, spool)
    archive.learn(new.study)


def _keep_or_reject(archive: ArchiveState, header: Header, new: NewInstance, spool: Spool) -> None:
    note = None if archive.store.by_sop(new.sop_instance_uid) else rejection_note(header)
    if note is None:
        _keep(archive, new, spool)
        return
    if why := note.refusal(archive):
        raise InstanceFailure(0xA772, why)
    _keep(archive, new, spool)
    note.take_effect(archive, new)


def _keep_again(archive: ArchiveState, new: NewInstance, spool: Spool, known: InstanceRow) -> None:
    """Overwrite policy SAME_SOURCE: STOW has no calling AE, so what is there stays, and the client hears nothing.

    So it is also with what was rejected in another study or series.
    """
    if known.rejection is None or _place(known) != _place(new):
        return
    if known.rejection.startswith(NOTE):
        if known.sha256 != spool.sha256:
            raise InstanceFailure(0xA770, f"Rejection Note[uid={new.sop_instance_uid}] already received")
        return
    rule = REJECTION_CODES[known.rejection].on_restow
    if rule == "REJECT":
        raise InstanceFailure(0xA771, f"Subsequent occurrence of rejected Object[uid={new.sop_instance_uid}]")
    if rule == "RESTORE":
        _restore(archive, new, spool, known)


def _restore(archive: ArchiveState, new: NewInstance, spool: Spool, known: InstanceRow) -> None:
    """Take the rejection back; other bytes replace the stored ones, under the UIDs they had."""
    if known.sha256 == spool.sha256:
        archive.store.reject([known.key], None)
        return
    with archive.store.transaction():
        archive.store.delete([known], free_at_s=archive.now_s() + PURGE_INTERVAL_S)
        archive.store.add(new, spool)


def _place(instance: InstanceRow | NewInstance) -> tuple[str, str]:
    return instance.study_instance_uid, instance.series_instance_uid


# -- the answer -----------------------------------------------------------------------------------------------------


def _answer(transaction: _StowTransaction, *, as_xml: bool) -> web.Response:
    stored, failed = transaction.stored, transaction.failed
    studies = {study for study, _item in stored}
    retrieve_url: dict[str, Any] = {"vr": "UR"}
    if len(studies) == 1:
        retrieve_url["Value"] = [f"{transaction.url}/studies/{studies.pop()}"]
    body: dict[str, Any] = {"00081190": retrieve_url}
    if failed:
        body["00081198"] = {"vr": "SQ", "Value": failed}
    if stored:
        body["00081199"] = {"vr": "SQ", "Value": [item for _study, item in stored]}
    status = 409 if not stored else 202 if failed else 200
    headers = {"Warning": f'299 {DEVICE} "{transaction.last_failure}"'} if failed else {}
    if as_xml:
        return web.Response(status=status, body=native_xml(body), content_type="application/dicom+xml", headers=headers)
    return dicom_json(body, status=status, headers={**headers, "Content-Type": DICOM_JSON})


def _reference(sop_class_uid: str, sop_instance_uid: str) -> dict[str, Any]:
    return {
        "00081150": {"vr": "UI", "Value": [sop_class_uid]},
        "00081155": {"vr": "UI", "Value": [sop_instance_uid]},
    }


def _us(number: int) -> dict[str, Any]:
    return {"vr": "US", "Value": [number]}
