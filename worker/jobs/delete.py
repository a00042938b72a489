"""Delete an image, a series or a study wherever it is: `pacs.delete`, and what the deletion of many is made of.

How a server deletes is its dialect's affair. Here: who is asked, what is written down before anything is deleted, and
what may be said of a server that is silent. A job that was interrupted goes on with the objects of its *checkpoint*, so
that what it deleted itself is never reported as "not there".
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from courier.errors import (
    Cancelled,
    CourierError,
    InvalidRequest,
    NotFound,
    PacsRejected,
    TryAgain,
    first_to_wait_for,
    is_final,
)
from courier.ledger.breakers import is_suspension
from courier.messages import DeleteJob, Level, read_job
from courier.results import DeletedEntry, DeletePayload, Fault
from worker.jobs.attempt import Attempt, Postpone
from worker.jobs.audit_lines import Action, AuditLines
from worker.jobs.knowledge import server_left
from worker.jobs.lookup import find, in_that_study
from worker.jobs.maintenance import warned
from worker.jobs.receipts import Receipts
from worker.jobs.services import Services
from worker.pacs.finding import find_known
from worker.pacs.fleet import Fleet
from worker.pacs.in_service import in_maintenance, suspended, suspended_error
from worker.pacs.protection import check_allowed, refusal
from worker.pacs.protocol import Deletion, DeletionFate, Found, Pacs

log = logging.getLogger(__name__)

#: How soon to look again whether the other job at the same object has ended.
TURN_S = 0.5

Status = Literal["deleted", "hidden", "not_there", "unavailable", "refused", "would_delete", "would_hide", "not_asked"]
_STATUS: Mapping[DeletionFate, Status] = {
    DeletionFate.DELETED: "deleted",
    DeletionFate.HIDDEN: "hidden",
    DeletionFate.NOT_THERE: "not_there",
    DeletionFate.REFUSED: "refused",
}
#: Of several objects with one UID on one server, the fate that says most.
_WORST_FIRST = (DeletionFate.REFUSED, DeletionFate.HIDDEN, DeletionFate.DELETED, DeletionFate.NOT_THERE)


@dataclass
class _DeletionProgress:
    """What is known of each server: what was found there (and so begun), how it ended, or why it is open.

    ``ordered``: the follow-up deletions are written down.
    """

    begun: dict[str, list[Found]] = field(default_factory=dict)
    entries: dict[str, DeletedEntry] = field(default_factory=dict)
    errors: dict[str, CourierError] = field(default_factory=dict)
    ordered: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "begun": {name: [_uids(found) for found in founds] for name, founds in self.begun.items()},
            "entries": {name: entry.model_dump() for name, entry in self.entries.items()},
            **({"ordered": True} if self.ordered else {}),
        }

    @classmethod
    def from_json(cls, checkpoint: Mapping[str, Any] | None, level: Level) -> _DeletionProgress:
        if checkpoint is None:
            return cls()
        return cls(
            begun={name: [Found(level, *uids) for uids in rows] for name, rows in checkpoint["begun"].items()},
            entries={name: DeletedEntry(**entry) for name, entry in checkpoint["entries"].items()},
            ordered=checkpoint.get("ordered", False),
        )


def delete(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    """Delete what bears a UID on every server asked; one outcome per server (docs/jobs.md).

    A server in maintenance is not asked: another job, which is written down here, deletes there when that has ended.

    Raises
    ------
    NotFound
        Every server that was asked answered, and none has it.
    InvalidRequest
        The settings forbid it on a server that the order names, or on every server that has it.
    PacsRejected
        It is somewhere, and nobody who has it deletes it.
    CourierError
        A server is silent; ``details["servers"]`` says what was deleted elsewhere meanwhile.
    """
    job = read_job(DeleteJob, message)
    progress = _DeletionProgress.from_json(attempt.checkpoint, job.level)
    if attempt.cancelled:
        _cancel_follow_ups(progress, attempt)
        raise _cancelled(job, progress, attempt, services.fleet)
    if progress.begun:
        _check_still_known(job, progress, services.fleet)
    servers = select_servers(job.servers, services.fleet)
    if job.servers is not None and not progress.begun:
        check_allowed(servers, permanent=job.permanent)
    if job.follow_up_of is None:
        _leave_out(job, servers, progress)
    if job.dry_run:
        with attempt.step("check"):
            _find_targets(job, servers, progress, services.fleet)
            _foretell(job, progress, services.fleet)
    else:
        _check_in_service(servers, progress)
        _take_turn(job, attempt)
        _order_follow_ups(job, progress, attempt)
        with attempt.step("check"):
            resumed = set(progress.begun)
            _find_targets(job, servers, progress, services.fleet)
            if job.follow_up_of is not None:
                _spare_what_came_since(job, progress, resumed, attempt, services.fleet)
        with attempt.step("delete"):
            _execute(job, progress, resumed, attempt, services)
            forget_what_is_gone(_studies(job, progress), services)
    return _concluded(job, servers, progress, attempt).as_json()


def _leave_out(job: DeleteJob, servers: Sequence[Pacs], progress: _DeletionProgress) -> None:
    """An entry for each of the servers that are in maintenance, unless the deletion has begun there."""
    left = in_maintenance()
    for pacs in servers:
        name = pacs.server.name
        if name not in left or name in progress.begun or name in progress.entries:
            continue
        entry = _entry(pacs, "not_asked", note=f"{left[name]}.")
        if forbidden := refusal(pacs, permanent=job.permanent):
            entry = entry.model_copy(update={"note": f"{entry.note} {forbidden}"})
        elif not job.dry_run:
            entry = entry.model_copy(update={"follow_up_job_id": str(uuid.uuid4())})
        progress.entries[name] = entry


def _check_in_service(servers: Sequence[Pacs], progress: _DeletionProgress) -> None:
    """Wait for a server that is out of service before anything is locked, so that uploads need not wait as well."""
    left = suspended()
    for pacs in servers:
        name = pacs.server.name
        if name in left and name not in progress.entries and not progress.begun:
            raise suspended_error(pacs.server, left[name])


def _order_follow_ups(job: DeleteJob, progress: _DeletionProgress, attempt: Attempt) -> None:
    """Write down the deletions on servers that were left out, each as a job of its own that waits for its server.

    Their ids are in the checkpoint before, so that another attempt at this job orders none of them twice.
    """
    ordered = {name: entry for name, entry in progress.entries.items() if entry.follow_up_job_id is not None}
    if not ordered or progress.ordered:
        return
    _write_intent(progress, attempt)
    fields = job.model_dump(exclude={"servers", "dry_run", "follow_up_of"}, exclude_none=True)
    for name, entry in ordered.items():
        order = {**fields, "servers": [name], "follow_up_of": attempt.job_id}
        follow_up = str(entry.follow_up_job_id)
        attempt.ledger.submit(follow_up, task="pacs.delete", job=order, due_in_s=0, sender=attempt.sender)
        log.info("Deleting on %s is left to job %s, when its maintenance has ended", name, entry.follow_up_job_id)
    progress.ordered = True
    attempt.note(progress.as_json())


def _cancel_follow_ups(progress: _DeletionProgress, attempt: Attempt) -> None:
    for entry in progress.entries.values():
        if entry.follow_up_job_id is not None:
            attempt.ledger.cancel(entry.follow_up_job_id)


def _spare_what_came_since(
    job: DeleteJob, progress: _DeletionProgress, resumed: set[str], attempt: Attempt, fleet: Fleet
) -> None:
    """Refuse, of a deletion that was ordered before a maintenance ended, what images were stored into since."""
    ordered_ms = attempt.ledger.created_ms(attempt.job_id)
    for name in [name for name in progress.begun if name not in resumed]:
        for found in progress.begun[name]:
            pushes = attempt.ledger.uid_record(found.study_instance_uid).pushes
            since = next((push for push in pushes if push.server == name and push.at_ms >= ordered_ms), None)
            if since is not None:
                sentence = (
                    f"Job {since.job_id} has put images of the study on {name} since this deletion was ordered; if they"
                    f" are to go too, delete the {job.level} there again."
                )
                progress.entries[name] = _entry(fleet[name], "refused", error=InvalidRequest(sentence), found=found)


def _check_still_known(job: DeleteJob, progress: _DeletionProgress, fleet: Fleet) -> None:
    """A deletion that has begun cannot end without a server of it that has left the settings, and says what is done."""
    names = {*progress.begun, *(job.servers or ())} - {*progress.entries, *fleet.names}
    for name in sorted(names):
        details = {"level": job.level, "uid": job.uid, **_entries_json(progress)}
        error = server_left(name, "was to delete on", details=details)
        error.payload["message"] += _done_already(progress.entries.values())
        raise error


def _entries_json(progress: _DeletionProgress) -> dict[str, Any]:
    return {"servers": [entry.model_dump() for entry in progress.entries.values()]}


def select_servers(names: Sequence[str] | None, fleet: Fleet) -> list[Pacs]:
    """The servers that are meant, in order of preference; `InvalidRequest` lists the known ones."""
    if names is None:
        return list(fleet)
    wanted = {fleet[name].server.name for name in names}
    return [pacs for pacs in fleet if pacs.server.name in wanted]


def reachable(pacs: Pacs, level: Level, uid: str, *, permanent: bool, study_uid: str | None = None) -> list[Found]:
    """What a deletion can reach: one for good also a study of which all images are hidden."""
    found = find(pacs, level, uid, study_uid=study_uid)
    if found or level != "study" or study_uid not in (None, uid) or not permanent or pacs.hiding is None:
        return found
    return pacs.hiding.find_study(uid)


def remove(pacs: Pacs, founds: Iterable[Found], receipts: Receipts, *, permanent: bool, resumed: bool) -> Deletion:
    """Delete ``founds``, all with one UID, on one server.

    ``resumed``: an earlier attempt may have done it, so "not there" means that it did.
    """
    deletions = []
    for found in founds:
        deletion = receipts.delete(pacs, found, permanent=permanent)
        deletions.append(as_done(deletion, pacs, found.level, permanent=permanent) if resumed else deletion)
    return min(deletions, key=lambda deletion: _WORST_FIRST.index(deletion.fate))


def as_done(deletion: Deletion, pacs: Pacs, level: Level, *, permanent: bool) -> Deletion:
    """``deletion``, where "not there" means that an earlier attempt has done it."""
    if deletion.fate is not DeletionFate.NOT_THERE:
        return deletion
    promised = pacs.deletion(level, permanent=permanent)
    return deletion if promised.fate is DeletionFate.REFUSED else promised


def forget_what_is_gone(study_uids: Iterable[str], services: Services) -> None:
    """Give up the claims on those studies that every server says it does not have."""
    uids, servers = list(study_uids), list(services.fleet)
    answers = iter(services.fleet.gather([partial(pacs.find, "study", uid) for uid in uids for pacs in servers]))
    for uid in uids:
        if not any([next(answers) for _ in servers]):  # an error counts too: silence is never read as "gone"
            services.ledger.forget_study(uid)


def _take_turn(job: DeleteJob, attempt: Attempt) -> None:
    """Nobody stores into it from now on; who is storing already comes first."""
    if job.level == "image":
        owner = attempt.ledger.lock_image(job.uid, job_id=attempt.job_id, fence=attempt.fence)
    else:
        owner = attempt.ledger.lock_for_delete(job.uid, job_id=attempt.job_id, fence=attempt.fence)
    if owner is not None:
        raise Postpone(f"job {owner} is storing or deleting the same {job.level}", delay_s=TURN_S, owner=owner)


def _find_targets(job: DeleteJob, servers: Sequence[Pacs], progress: _DeletionProgress, fleet: Fleet) -> None:
    """Ask every server of which nothing is known yet."""
    names = [pacs.server.name for pacs in servers]
    open_ones = [name for name in names if name not in progress.begun and name not in progress.entries]
    answers = fleet.gather(
        [
            partial(reachable, fleet[name], job.level, job.uid, permanent=job.permanent, study_uid=job.study_uid)
            for name in open_ones
        ]
    )
    for name, answer in zip(open_ones, answers, strict=True):
        if isinstance(answer, CourierError):
            progress.errors[name] = answer
        elif answer:
            progress.begun[name] = answer
        else:
            progress.entries[name] = _entry(fleet[name], "not_there")


def _foretell(job: DeleteJob, progress: _DeletionProgress, fleet: Fleet) -> None:
    """What a delete would come to, with the number of images."""
    counts = fleet.gather([partial(_count, fleet[name], founds) for name, founds in progress.begun.items()])
    for (name, founds), count in zip(progress.begun.items(), counts, strict=True):
        deletion = fleet[name].deletion(job.level, permanent=job.permanent)
        would: Mapping[DeletionFate, Status] = {
            DeletionFate.DELETED: "would_delete",
            DeletionFate.HIDDEN: "would_hide",
        }
        entry = _entry(fleet[name], would.get(deletion.fate, "refused"), note=deletion.note, found=founds[0])
        images = None if isinstance(count, CourierError) else count or None  # of what is hidden no image is listed
        progress.entries[name] = entry.model_copy(update={"images": images})


def _count(pacs: Pacs, founds: Sequence[Found]) -> int:
    return sum(1 for found in founds for _ in pacs.instances(found))


def _execute(
    job: DeleteJob, progress: _DeletionProgress, resumed: set[str], attempt: Attempt, services: Services
) -> None:
    """Delete it wherever it was found; what is about to happen is written down first."""
    open_ones = [name for name in progress.begun if name not in progress.entries]
    if set(open_ones) - resumed:
        _write_intent(progress, attempt)
    fleet, receipts = services.fleet, Receipts.of(attempt)
    answers = fleet.gather(
        [
            partial(
                remove,
                fleet[name],
                progress.begun[name],
                receipts,
                permanent=job.permanent,
                resumed=name in resumed,
            )
            for name in open_ones
        ]
    )
    for name, answer in zip(open_ones, answers, strict=True):
        first = progress.begun[name][0]
        if isinstance(answer, Deletion):
            error = InvalidRequest(answer.note) if answer.code == InvalidRequest.code else None
            entry = _entry(fleet[name], _STATUS[answer.fate], note=answer.note, found=first, error=error)
            progress.entries[name] = entry
        elif is_final(answer) and not isinstance(answer, TryAgain):
            progress.entries[name] = _entry(fleet[name], "refused", error=answer, found=first)
        else:
            progress.errors[name] = answer
    if progress.errors and progress.begun:
        attempt.note(progress.as_json())  # too late to be cancelled: it has begun


def _write_intent(progress: _DeletionProgress, attempt: Attempt) -> None:
    """Write it down; a cancellation ends the job here, and says what was deleted before."""
    try:
        attempt.write_intent(progress.as_json())
    except Cancelled as error:
        _cancel_follow_ups(progress, attempt)
        gone = _done_already(progress.entries.values())
        sentence = f"The job was cancelled.{gone} Nothing else was deleted." if gone else error.message
        raise Cancelled(sentence, details=_entries_json(progress) if gone else None) from None


def _cancelled(job: DeleteJob, progress: _DeletionProgress, attempt: Attempt, fleet: Fleet) -> Cancelled:
    """The end of a job that was cancelled after an attempt that had begun: nothing more is deleted.

    What became of that attempt, its servers have to say. One that is silent is waited for as long as any job waits.

    Raises
    ------
    TryAgain
        A server does not say whether it still has it.
    """
    not_ended = [name for name in progress.begun if name not in progress.entries]
    open_ones = [name for name in not_ended if name in fleet.names]
    answers = fleet.gather([partial(_still_there, fleet[name], progress.begun[name]) for name in open_ones])
    left = [name for name in not_ended if name not in open_ones]
    lines, action = AuditLines(attempt), _action(job)
    for name, answer in zip(open_ones, answers, strict=True):
        if isinstance(answer, CourierError) and not is_final(answer) and not _is_given_up(answer, attempt):
            raise answer
        if isinstance(answer, CourierError) or answer:
            left.append(name)
        else:
            fate = fleet[name].deletion(job.level, permanent=job.permanent).fate
            status = "not_there" if fate is DeletionFate.REFUSED else _STATUS[fate]
            progress.entries[name] = _entry(fleet[name], status, found=progress.begun[name][0])
            lines.write(action, name, progress.begun[name][0], status)
    for name in left:
        lines.write(action, name, progress.begun[name][0], "unknown")
    gone = _done_already(progress.entries.values())
    rest = " Nothing else was deleted." if gone else ""
    if left:
        rest = f" An earlier attempt on {', '.join(left)} was not completed; look there for what is left."
    details = {**_entries_json(progress), **({"may_be_deleted_on": left} if left else {})}
    return Cancelled(f"The job was cancelled.{gone}{rest}", details=details)


def _is_given_up(error: CourierError, attempt: Attempt) -> bool:
    """Whether a cancelled job no longer waits for the server; while an operator keeps it from the server, it does."""
    return attempt.last and not is_suspension(error.open_circuit)


def _action(job: DeleteJob) -> Action:
    return "delete" if job.permanent else "hide"


def _still_there(pacs: Pacs, founds: Sequence[Found]) -> list[Found]:
    return [one for found in founds for one in find_known(pacs, found)]


def _done_already(entries: Iterable[DeletedEntry]) -> str:
    gone = [f"{entry.server_name} ({entry.status})" for entry in entries if entry.status in ("deleted", "hidden")]
    return f" Done already on {', '.join(gone)}." if gone else ""


def _concluded(job: DeleteJob, servers: Sequence[Pacs], progress: _DeletionProgress, attempt: Attempt) -> DeletePayload:
    """The payload, unless a server is silent, nobody has it, or nobody deletes it."""
    for name, error in progress.errors.items():
        pacs = next(pacs for pacs in servers if pacs.server.name == name)
        progress.entries[name] = _entry(pacs, "unavailable", error=error)
    still = [pacs.server.name for pacs in servers]
    left = [entry for name, entry in progress.entries.items() if name not in still]  # the settings, since an attempt
    entries = [*(progress.entries[name] for name in still), *left]
    details = {"level": job.level, "uid": job.uid, "servers": [entry.model_dump() for entry in entries]}
    statuses = {entry.status for entry in entries}
    not_asked = [entry.server_name for entry in entries if entry.status == "not_asked"]
    if progress.errors and not (job.dry_run and progress.begun):
        raise _still_open(list(progress.errors.values()), entries, details)
    if statuses == {"not_there"}:
        names = " or ".join(entry.server_name for entry in entries)
        raise NotFound(f"The {job.level} is not on {names}{in_that_study(job.level, job.study_uid)}.", details=details)
    if "refused" in statuses and not statuses & {"deleted", "hidden", "not_asked"} and not job.dry_run:
        refused = next(entry for entry in entries if entry.status == "refused")
        forbidden = refused.error is not None and refused.error.code == InvalidRequest.code
        kind = InvalidRequest if forbidden else PacsRejected
        sentence = f"{refused.server_name} does not delete the {job.level}. {refused.note}"
        raise kind(sentence, server_name=refused.server_name, server_type=refused.server_type, details=details)
    return DeletePayload(
        job_id=attempt.job_id,
        level=job.level,
        uid=job.uid,
        permanent=job.permanent,
        dry_run=job.dry_run,
        servers=entries,
        warnings=warned([], not_asked),
        not_asked=not_asked,
        timings_ms=attempt.timings_ms,
        attempts=attempt.number,
    )


def _still_open(
    errors: Sequence[CourierError], entries: Sequence[DeletedEntry], details: Mapping[str, Any]
) -> CourierError:
    """The error that decides what happens next (a new attempt, if one may help), with what is done already."""
    error = first_to_wait_for(errors)
    error.payload["message"] += _done_already(entries)
    error.payload["details"] = {**error.details, **details}
    return error


def _entry(
    pacs: Pacs, status: Status, *, note: str = "", found: Found | None = None, error: CourierError | None = None
) -> DeletedEntry:
    return DeletedEntry(
        server_name=pacs.server.name,
        server_type=pacs.server.type,
        status=status,
        note=error.message if error else note,
        study_uid=found.study_instance_uid if found else None,
        series_uid=found.series_instance_uid if found else None,
        image_uid=found.sop_instance_uid if found else None,
        error=Fault(code=error.payload["code"], message=error.message) if error else None,
    )


def _studies(job: DeleteJob, progress: _DeletionProgress) -> set[str]:
    """The studies that may be gone now. Of one that was nowhere, a claim may be left."""
    if job.level == "study" and not progress.errors:
        return {job.uid}
    return {found.study_instance_uid for founds in progress.begun.values() for found in founds}


def _uids(found: Found) -> list[str | None]:
    return [found.study_instance_uid, found.series_instance_uid, found.sop_instance_uid]
