"""Deletion on DCM4CHEE: reject (hide), delete (forget), and purge (free), which are three different things.

Rejecting leaves a Key Object in a new series of the study; deleting takes a study that is rejected as a whole; the
files go with the purge, up to five minutes later.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from aiohttp import web
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from sandbox.dcm4chee.admin import finish_task, queue_task
from sandbox.dcm4chee.aets import EXPIRED, NOTE, REJECTION_CODES, REVOKE, ApplicationEntity, RejectionCode
from sandbox.dcm4chee.archive import (
    PURGE_INTERVAL_S,
    RESERVED,
    ArchiveState,
    Refusal,
    crash,
    entity,
    invalid,
    need_database,
    parameters,
    plain_json,
    refuse,
    unknown,
)
from sandbox.dcm4chee.objects import KEY_OBJECT, written
from sandbox.dcm4chee.qido import UNCOUNTED, rejection_state
from sandbox.store import Condition, InstanceRow, NewInstance
from sandbox.web import FAULT, operation

#: deleteStudyChunkSize
_CHUNK = 100
#: Objects rejected with 113039, and their notes, are deleted after a day; the other codes keep theirs.
EXPIRED_KEPT_S = 86_400.0


def _code(text: str) -> RejectionCode:
    code = REVOKE if text == REVOKE.code else REJECTION_CODES.get(text)
    if code is None and "^" not in text:
        raise Refusal(web.Response(status=404))  # no code at all: no such path
    if code is None:
        raise refuse(404, f"Unknown Rejection Note Code: ({text.replace('^', ', ', 1)})")
    return code


# -- reject ---------------------------------------------------------------------------------------------------------


@operation("reject")
async def reject(archive: ArchiveState, request: web.Request) -> web.StreamResponse:
    ae = entity(request, "DCM4CHEE_ARC_AET")
    code = _code(request.match_info["code"])
    need_database(request)
    asked = {parameter.name: parameter.value for parameter in parameters(request)}
    named = {name: request.match_info.get(name) for name in ("study", "series", "instance")}
    if asked.get("queue") == "true":
        if "scheduledTime" in asked and not re.fullmatch(r"\d{14}", asked["scheduledTime"]):
            raise refuse(400, f"Invalid scheduledTime: {asked['scheduledTime']}")
        task = queue_task(archive, "Rejection", "REJECT", asked.get("batchID"), str(request.url))
        asyncio.get_running_loop().call_soon(_reject_later, archive, ae, code, named, task)
        return web.Response(status=202)
    return plain_json({"count": _reject(archive, ae, code, named, half_way=request[FAULT].crash_in_reject)})


def _reject_later(
    archive: ArchiveState,
    ae: ApplicationEntity,
    code: RejectionCode,
    named: dict[str, str | None],
    task: dict[str, Any],
) -> None:
    try:
        count = _reject(archive, ae, code, named)
    except Refusal as refusal:
        finish_task(archive, task, "FAILED", refusal.response.text or "")
    else:
        finish_task(archive, task, "COMPLETED", f"Rejected {count} instances")


def _reject(
    archive: ArchiveState,
    ae: ApplicationEntity,
    code: RejectionCode,
    named: dict[str, str | None],
    *,
    half_way: bool = False,
) -> int:
    """Mark what this AE sees of it; how many instances that were."""
    rows = archive.store.instances(
        study_instance_uid=named["study"],
        series_instance_uid=named["series"],
        sop_instance_uid=named["instance"],
        view=ae.view,
    )
    notes = [row for row in rows if code is REVOKE and row.rejection and row.rejection.startswith(NOTE)]
    if code is REVOKE:
        rows = [row for row in rows if row.rejection and not row.rejection.startswith(NOTE)]
    if not rows:
        raise refuse(404, f"No instances of Study[UID={named['study']}] found for rejection.")
    for row in rows:
        earlier = row.rejection
        if earlier and not earlier.startswith(NOTE) and earlier not in (code.code, *code.replaces):
            # A774
            raise refuse(400, f"Rejection of instance[uid={row.sop_instance_uid}] already rejected with {earlier}")
    if half_way and code is not REVOKE:
        raise _stopped(archive, code, rows)
    with archive.store.transaction():
        archive.store.reject([row.key for row in rows], None if code is REVOKE else code.code)
        for row in rows:
            archive.store.annotate(row.key, {**row.notes, "rejected_at_s": archive.now_s()})
        _count_series(archive, rows)
        if code is not REVOKE:
            _leave_note(archive, code, rows)
    return len(rows) + len(notes)  # a revoke counts the notes too


def _stopped(archive: ArchiveState, code: RejectionCode, rows: Sequence[InstanceRow]) -> Refusal:
    """Each instance is rejected in a transaction of its own; that which counts series and study is rolled back."""
    with archive.store.transaction():
        archive.store.reject([row.key for row in rows], code.code)
        for row in rows:
            archive.store.annotate(row.key, {**row.notes, "rejected_at_s": archive.now_s(), UNCOUNTED: True})
    return crash("jakarta.persistence.OptimisticLockException", "Row was updated or deleted by another transaction")


def _count_series(archive: ArchiveState, rows: Sequence[InstanceRow]) -> None:
    """The series of ``rows`` are counted anew, and so what an earlier rejection has left in them."""
    for study, series in {(row.study_instance_uid, row.series_instance_uid) for row in rows}:
        for row in archive.store.instances(study_instance_uid=study, series_instance_uid=series):
            if UNCOUNTED in row.notes:
                archive.store.annotate(row.key, {name: note for name, note in row.notes.items() if name != UNCOUNTED})


def _leave_note(archive: ArchiveState, code: RejectionCode, rows: Sequence[InstanceRow]) -> None:
    """The Key Object Selection that says what was rejected, in a new series of the study."""
    study_instance_uid = rows[0].study_instance_uid
    found = archive.store.search("study", [Condition("study_instance_uid", "=", study_instance_uid)])[0]
    note = Dataset.from_json(found.study)
    note.SOPClassUID = KEY_OBJECT
    note.SOPInstanceUID = generate_uid(prefix=None)
    note.StudyInstanceUID = study_instance_uid
    note.SeriesInstanceUID = generate_uid(prefix=None)
    note.Modality = "KO"
    note.SeriesNumber = "1"
    note.InstanceNumber = "1"
    note.ValueType = "CONTAINER"
    note.ConceptNameCodeSequence = [_coded(code)]
    note.CurrentRequestedProcedureEvidenceSequence = [_evidence(rows)]
    note.SpecificCharacterSet = "ISO_IR 192"
    spool = archive.store.spool()
    spool.write(written(note, str(ExplicitVRLittleEndian)))
    instance = {
        tag: element for tag, element in note.to_json_dict().items() if tag in ("00080016", "00080018", "0040A043")
    }
    row = archive.store.add(
        NewInstance(
            study_instance_uid=study_instance_uid,
            series_instance_uid=note.SeriesInstanceUID,
            sop_instance_uid=note.SOPInstanceUID,
            sop_class_uid=KEY_OBJECT,
            transfer_syntax_uid=str(ExplicitVRLittleEndian),
            study=found.study,
            series={
                "00080060": {"vr": "CS", "Value": ["KO"]},
                "0020000E": {"vr": "UI", "Value": [str(note.SeriesInstanceUID)]},
                "00200011": {"vr": "IS", "Value": ["1"]},
            },
            instance={**instance, "00200013": {"vr": "IS", "Value": ["1"]}},
            received_at_s=archive.now_s(),
        ),
        spool,
    )
    archive.store.reject([row.key], NOTE + code.code)


def _coded(code: RejectionCode) -> Dataset:
    item = Dataset()
    item.CodeValue = code.code_value
    item.CodingSchemeDesignator = code.coding_scheme_designator
    item.CodeMeaning = code.code_meaning
    return item


def _evidence(rows: Sequence[InstanceRow]) -> Dataset:
    study = Dataset()
    study.StudyInstanceUID = rows[0].study_instance_uid
    study.ReferencedSeriesSequence = []
    for series_instance_uid in dict.fromkeys(row.series_instance_uid for row in rows):
        series = Dataset()
        series.SeriesInstanceUID = series_instance_uid
        series.ReferencedSOPSequence = [
            _referenced(row) for row in rows if row.series_instance_uid == series_instance_uid
        ]
        study.ReferencedSeriesSequence.append(series)
    return study


def _referenced(row: InstanceRow) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = row.sop_class_uid
    item.ReferencedSOPInstanceUID = row.sop_instance_uid
    return item


# -- delete ---------------------------------------------------------------------------------------------------------


@operation("delete")
async def delete_study(archive: ArchiveState, request: web.Request) -> web.StreamResponse:
    study = request.match_info["study"]
    asked = {parameter.name: parameter.value for parameter in parameters(request)}
    for name in asked:
        if name not in RESERVED and name not in ("retainObj", "reasonForModification", "sourceOfPreviousValues"):
            raise unknown(request)
    entity(request, "DCM4CHEE_ARC_AET")
    need_database(request)
    if study in archive.deleting:
        raise refuse(409, f"Deletion of Study[uid={study}] already in progress")
    rows = archive.store.instances(study_instance_uid=study)
    if not rows:
        raise refuse(404, f"No study found for {study}")
    state = rejection_state(rows)
    if state not in ("COMPLETE", "EMPTY"):
        raise refuse(403, f"Deletion of Study with Rejection State: {state} not permitted")
    archive.deleting.add(study)
    try:
        for start in range(0, len(rows), _CHUNK):
            # The fault's latency is per chunk here, so that a second request can meet the first one at work.
            await asyncio.sleep(request[FAULT].latency_s())
            retained_for_ever = asked.get("retainObj") == "true"
            free_at_s = float("inf") if retained_for_ever else archive.now_s() + PURGE_INTERVAL_S
            if request[FAULT].crash_in_delete:
                archive.cut_off.add(study)
                raise crash("java.net.SocketException", "Connection reset")
            archive.store.delete(rows[start : start + _CHUNK], free_at_s=free_at_s)
    finally:
        if study not in archive.cut_off:
            archive.deleting.discard(study)
    return web.Response(status=204)


# -- purge of a code --------------------------------------------------------------------------------------------------


@operation("delete")
async def delete_rejected(archive: ArchiveState, request: web.Request) -> web.StreamResponse:
    """Archive-wide: every instance rejected with that code, whoever rejected it."""
    asked = {parameter.name: parameter.value for parameter in parameters(request)}
    before_s = _before_s(request, asked.get("rejectedBefore"))
    if asked.get("keepRejectionNote", "false") not in ("true", "false"):
        raise invalid(request, "Invalid keepRejectionNote", asked["keepRejectionNote"])
    code = _code(request.match_info["code"])
    need_database(request)
    rows = _rejected_with(archive, code.code, before_s)
    if asked.get("keepRejectionNote") == "true":
        rows = [row for row in rows if row.rejection == code.code]
    for start in range(0, len(rows), _CHUNK):
        archive.store.delete(rows[start : start + _CHUNK], free_at_s=archive.now_s() + PURGE_INTERVAL_S)
        await asyncio.sleep(0)
    return plain_json({"deleted": len(rows)})


def _rejected_with(archive: ArchiveState, code: str, before_s: float) -> list[InstanceRow]:
    """Instances rejected with a code before that time, and the notes that say so."""
    rows = archive.store.instances(view=f"rejection IN ('{code}', '{NOTE}{code}')")
    return [row for row in rows if row.notes.get("rejected_at_s", row.received_at_s) < before_s]


def run_schedulers(archive: ArchiveState) -> None:
    """What the archive does by itself: delete what expired a day ago, free the files of what was deleted."""
    if archive.stopped:
        return
    now_s = archive.now_s()
    archive.store.purge(now_s)
    # The clock can be moved back as well as on.
    if abs(now_s - archive.looked_for_expired_at_s) >= PURGE_INTERVAL_S:
        archive.looked_for_expired_at_s = now_s
        expired = _rejected_with(archive, EXPIRED, now_s - EXPIRED_KEPT_S)
        archive.store.delete(expired, free_at_s=now_s + PURGE_INTERVAL_S)


def _before_s(request: web.Request, text: str | None) -> float:
    if text is None:
        return float("inf")
    if not re.fullmatch(r"(19|20)\d\d-\d\d-\d\d", text):
        raise invalid(request, "Invalid rejectedBefore", text)
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise invalid(request, "Invalid rejectedBefore", text) from error
