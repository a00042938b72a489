"""Why an image, a series or a study is where it is: `pacs.trace` puts together what ledger and servers know.

Where it is, the servers alone say, now; what the ledger holds is history, and told as such. Nothing is tried again here
and nothing is changed: a server's silence is part of the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from courier.batches.store import Batches
from courier.errors import CourierError, NotFound, PacsUnavailable
from courier.ledger.jobs import ORDER, Event, Ledger, StudyPush, UidRecord, Voided
from courier.messages import Level, TraceJob, read_job
from courier.redaction import stated
from courier.results import (
    Fault,
    TraceClaim,
    TracedJob,
    TraceEntry,
    TraceEvent,
    TracePayload,
    TracePush,
    TraceReceipt,
    TraceState,
)
from worker.jobs.attempt import Attempt
from worker.jobs.result_fields import place
from worker.jobs.services import Services
from worker.pacs.in_service import STATE, suspended
from worker.pacs.protocol import Found, Pacs

LEVELS: tuple[Level, ...] = ("image", "series", "study")
_BY_HAND = {
    "replayed": "Taken out of the dead letters and queued again.",
    "purged": "Dropped from the dead letters.",
}
#: The records of so many jobs are shown, the latest ones.
MAX_JOBS = 20


@dataclass(frozen=True)
class Said:
    """What one server said of a UID whose level nobody knows."""

    pacs: Pacs
    found: list[Found]
    error: CourierError | None


@dataclass(frozen=True)
class _Now:
    """What all servers said."""

    said: Sequence[Said]

    @property
    def present(self) -> list[str]:
        return [one.pacs.server.name for one in self.said if one.found]

    @property
    def silent(self) -> list[str]:
        return [one.pacs.server.name for one in self.said if one.error]

    def state(self, server: str, voided: Voided | None) -> TraceState:
        """What has become of what was pushed to ``server``."""
        if voided is not None:
            return voided.how
        if server in self.present:
            return "there"
        names = [one.pacs.server.name for one in self.said]
        return "unknown" if server in self.silent or server not in names else "gone"


def trace(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    """Everything that is known of one UID.

    Raises
    ------
    NotFound
        Every server says that there is no such image, series or study, and the ledger never heard of it.
    """
    job = read_job(TraceJob, message)
    with attempt.step("check"):
        said = _ask(job.uid, services)
    with attempt.step("ledger"):
        uid_records = _uid_records(job.uid, said, services.ledger)
        jobs = _jobs(uid_records, services.ledger)
    seen = [one for one in said if one.found]
    if not seen and not any(_anything(one) for one in uid_records.values()) and not any(one.error for one in said):
        sentence = "Neither a server nor the ledger knows of this UID."
        raise NotFound(sentence, details={"uid": job.uid, "asked": services.fleet.names})
    now = _Now(said)
    first = now.present[0] if now.present else _last_known(now, uid_records)
    return TracePayload(
        job_id=attempt.job_id,
        uid=job.uid,
        level=seen[0].found[0].level if seen else _level(uid_records[job.uid]),
        server_name=first,
        server_type=services.fleet[first].server.type if first else None,
        viewer_url=place(seen[0].found[0], seen[0].pacs.server).viewer_url if seen else "",
        why=_why(now, uid_records, job.uid),
        present=now.present,
        servers=[_entry(one) for one in said],
        claim=_claim(uid_records.values()),
        receipt=_receipt(uid_records[job.uid], now),
        pushes=[_push(push, now if of == job.uid else None) for of, one in uid_records.items() for push in one.pushes],
        held_by=uid_records[job.uid].holder,
        storing=uid_records[job.uid].writers,
        jobs=jobs,
        timeline=_events(uid_records),
    ).as_json()


def _ask(uid: str, services: Services) -> list[Said]:
    """Ask every server at every level, all at once. The first level at which it is found counts.

    One that an operator has taken out of service is not asked.
    """
    fleet = services.probes or services.fleet
    left = suspended()
    asked = [pacs for pacs in fleet if pacs.server.name not in left]
    answers = iter(fleet.gather([partial(pacs.find, level, uid) for pacs in asked for level in LEVELS]))
    said = []
    for pacs in fleet:
        if (suspension := left.get(pacs.server.name)) is not None:
            said.append(Said(pacs, [], PacsUnavailable(f"{suspension}.", details={STATE: suspension.state})))
            continue
        replies = [next(answers) for _ in LEVELS]
        found = next((reply for reply in replies if not isinstance(reply, CourierError) and reply), [])
        error = next((reply for reply in replies if isinstance(reply, CourierError)), None)
        said.append(Said(pacs, found, None if found else error))
    return said


def _uid_records(uid: str, said: Sequence[Said], ledger: Ledger) -> dict[str, UidRecord]:
    """The ledger's knowledge of the UID itself and, if it is not a study's, of the study above it."""
    uid_records = {uid: ledger.uid_record(uid)}
    above = {one.found[0].study_instance_uid for one in said if one.found}
    above |= {event.details["study_uid"] for event in uid_records[uid].history if event.details.get("study_uid")}
    above |= {study for study in [uid_records[uid].receipt.get("study_uid")] if study}
    return uid_records | {study: ledger.uid_record(study) for study in sorted(above - {uid})}


def _anything(record: UidRecord) -> bool:
    return bool(record.history or record.holder or record.writers or record.claim or record.receipt or record.pushes)


def _level(record: UidRecord) -> Level | None:
    """What the ledger makes of a UID that is on no server: images have receipts, studies have claims."""
    if record.claim or record.writers or record.pushes:
        return "study"
    return "image" if record.receipt or any(event.event == "routed" for event in record.history) else None


def _last_known(now: _Now, uid_records: Mapping[str, UidRecord]) -> str | None:
    """A server that did not answer, and that the ledger had it on, or its study claimed for, last."""
    names = [one.receipt.get("server") for one in uid_records.values() if not one.voided]
    names += [one.claim.get("server") for one in uid_records.values()]
    return next((name for name in names if name in now.silent), None)


def _why(now: _Now, uid_records: Mapping[str, UidRecord], uid: str) -> str:
    """One sentence on where it is, and one on the last decision that says why."""
    if not now.present:
        return _why_nowhere(now, uid_records, uid)
    first, own = now.present[0], uid_records[uid]
    if own.voided and own.receipt["server"] == first:
        return (
            f"It is on {first}. {_stored(own)}, and job {own.voided.job_id} {_VOIDED[own.voided.how]} at"
            f" {_time(own.voided.at_ms)}: what is there now was not removed, or has been stored since."
        )
    return _why_there(first, uid_records)


_VOIDED = {
    "deleted": "was to delete it",
    "replaced": "began to copy images of its study there",
}
_REASONS = {
    "study_exists": "its study was there already",
    "claimed": "another image of its study had been sent there before",
    "new_study": "its study was new and the routing policy chose that server",
    "requested": "the job asked for that server",
}


def _why_there(first: str, uid_records: Mapping[str, UidRecord]) -> str:
    routed = [event for one in uid_records.values() for event in one.history if event.event == "routed"]
    if routed and routed[-1].details.get("server") == first:
        reason = _REASONS.get(routed[-1].details.get("reason", ""), "of a decision")
        return f"It is on {first}. Job {routed[-1].job_id} was to push it there, because {reason}."
    if first in {one.claim.get("server") for one in uid_records.values()}:
        return f"It is on {first}, which its study is claimed for."
    pushes = [
        push for one in uid_records.values() for push in one.pushes if push.server == first and push.voided is None
    ]
    if pushes:
        return f"It is on {first}. Job {pushes[-1].job_id} put images of the study there at {_time(pushes[-1].at_ms)}."
    return (
        f"It is on {first}; the ledger holds no claim or route of ours for it, so it was opened there by others or"
        " long ago. What we decided about a single image of it: trace that image's UID."
    )


def _why_nowhere(now: _Now, uid_records: Mapping[str, UidRecord], uid: str) -> str:
    silent = f", and {' and '.join(now.silent)} did not answer" if now.silent else ""
    return f"No server {'that answered ' if silent else ''}has it{silent}. {_last_word(uid_records, uid)}"


def _last_word(uid_records: Mapping[str, UidRecord], uid: str) -> str:
    own = uid_records[uid]
    if own.voided:
        return f"{_stored(own)}, and job {own.voided.job_id} {_VOIDED[own.voided.how]} at {_time(own.voided.at_ms)}."
    if own.receipt:
        since = ", and no job of ours deleted it since" if "stored_us" in own.receipt else ""  # 0.1 voided no receipts
        return f"The ledger's last word is {own.receipt['server']}: {_stored(own)}{since}."
    if own.pushes:
        return f"The ledger's last word is {own.pushes[-1].server}: {_pushed(own.pushes[-1])}."
    claims = [one.claim["server"] for one in uid_records.values() if one.claim.get("server")]
    return (
        f"The ledger's last word is {claims[0]}, which its study is claimed for."
        if claims
        else ("The ledger names no server for it.")
    )


def _stored(record: UidRecord) -> str:
    receipt = record.receipt
    return f"Job {receipt['job_id']} stored it on {receipt['server']} at {_time(receipt.get('stored_ms'))}"


def _pushed(push: StudyPush) -> str:
    said = f"Job {push.job_id} put images of the study there at {_time(push.at_ms)}"
    if push.voided is None:
        return said
    return f"{said}, and job {push.voided.job_id} was to delete it at {_time(push.voided.at_ms)}"


def _entry(answer: Said) -> TraceEntry:
    server, error = answer.pacs.server, answer.error
    fault = Fault(code=error.payload["code"], message=error.message) if error else None
    if not answer.found:
        away = error is not None and error.details.get(STATE) == "maintenance"
        status = "not_asked" if away else "unavailable" if error else "not_there"
        return TraceEntry(server_name=server.name, server_type=server.type, status=status, error=fault)
    first = answer.found[0]
    where = place(first, server).model_dump()
    return TraceEntry(server_name=server.name, server_type=server.type, status="found", level=first.level, **where)


def _claim(uid_records: Iterable[UidRecord]) -> TraceClaim | None:
    for one in uid_records:
        if one.claim.get("server"):
            return TraceClaim(
                server_name=one.claim["server"],
                claimed_by=one.claim.get("claimed_by"),
                claimed_at=_time(one.claim.get("claimed_ms")),
                opened_by=one.claim.get("opened_by"),
            )
    return None


def _receipt(record: UidRecord, now: _Now) -> TraceReceipt | None:
    receipt = record.receipt
    if not receipt:
        return None
    return TraceReceipt(
        server_name=receipt["server"],
        job_id=receipt["job_id"],
        stored_at=_time(receipt.get("stored_ms")),
        sha256=receipt["sha256"],
        size_bytes=int(receipt["size_bytes"]),
        state=now.state(receipt["server"], record.voided),
        **_voided(record.voided),
    )


def _push(push: StudyPush, now: _Now | None) -> TracePush:
    """``now`` is what the servers said of the study; None if they were asked for something in it."""
    unasked: TraceState = "deleted" if push.voided else "unknown"
    return TracePush(
        kind=push.kind,
        server_name=push.server,
        job_id=push.job_id,
        at=_time(push.at_ms),
        images=push.images,
        state=now.state(push.server, push.voided) if now else unasked,
        **_voided(push.voided),
    )


def _voided(voided: Voided | None) -> dict[str, Any]:
    return {} if voided is None else {"voided_at": _time(voided.at_ms), "voided_by": voided.job_id}


def _jobs(uid_records: Mapping[str, UidRecord], ledger: Ledger) -> list[TracedJob]:
    """The records of the jobs that had to do with it, as far as they are kept."""
    ids: dict[str, None] = {}
    for one in uid_records.values():
        named = [one.claim.get("claimed_by"), one.claim.get("opened_by"), one.receipt.get("job_id"), one.holder]
        ids |= dict.fromkeys(job_id for job_id in (*named, *one.writers) if job_id)
        ids |= dict.fromkeys(event.job_id for event in one.history)
        ids |= dict.fromkeys(push.job_id for push in one.pushes)
        # Last, because the pieces of a batch, which may have deleted it, write into no history.
        ids |= dict.fromkeys(voided.job_id for voided in (one.voided, *(push.voided for push in one.pushes)) if voided)
    records = {job_id: ledger.read_record(job_id) for job_id in list(ids)[-MAX_JOBS:]}
    return [_job(job_id, record, _requested_by(job_id, record, ledger)) for job_id, record in records.items() if record]


def _requested_by(job_id: str, record: Mapping[str, str], ledger: Ledger) -> Mapping[str, str]:
    """Who requested the job, and why; of a piece of a batch that is said of the job that began its pass."""
    ordered_by, _ = Batches(ledger).ordering_job(job_id, record.get("task", ""))
    return stated(record if ordered_by == job_id else ledger.read_record(ordered_by))


def _job(job_id: str, record: Mapping[str, str], asked_for: Mapping[str, str]) -> TracedJob:
    return TracedJob(
        job_id=job_id,
        task=record.get("task", ""),
        state=record.get("state", ""),
        attempts=int(record.get("attempts", 0)),
        code=record.get("code"),
        message=record.get("message"),
        created_at=_time(record.get("created_ms")),
        ended_at=_time(record.get("ended_ms")),
        requested_by=asked_for["requested_by"] or None,
        reason=asked_for["reason"] or None,
    )


def _events(uid_records: Mapping[str, UidRecord]) -> list[TraceEvent]:
    """All events in order of time; one that stands in several histories comes once."""
    events: dict[tuple[int, str, str, str], TraceEvent] = {}
    for uid, one in uid_records.items():
        for entry in one.history:
            event = TraceEvent(
                at=_time(entry.at_ms) or "",
                uid=uid,
                event=entry.event,
                job_id=entry.job_id,
                text=sentence_of(entry),
                details=entry.details,
            )
            events.setdefault((entry.at_ms, entry.job_id, entry.event, event.text), event)
    return [events[key] for key in sorted(events, key=lambda key: (key[0], ORDER.get(key[2], 0)))]


def sentence_of(event: Event) -> str:
    """A note as one sentence, also where another version of the ledger wrote it and left something out."""
    details = event.details
    server = details.get("server", "a server")
    match event.event:
        case "claimed":
            return _claimed(server, details.get("void"))
        case "routed":
            on = ", ".join(details.get("study_on") or []) or "no server"
            return f"To be pushed to {server} ({details.get('reason')}; the study was on {on})."
        case "stored":
            return f"Stored on {server}."
        case "waiting":
            return _waiting(details)
        case "ended":
            return _ending(details)
        case _:
            return _BY_HAND.get(event.event, event.event)


def _claimed(server: str, void: str | None) -> str:
    if void is None:
        return f"The study was new; it now belongs to {server}."
    return f"The study now belongs to {server}; its claim on {void} is void, because no worker that runs knows {void}."


def _waiting(details: Mapping[str, Any]) -> str:
    """A job that waits for a circuit breaker has no delay: it goes on when the server is well."""
    how_long = f"for {details['delay_s']} s" if "delay_s" in details else "until its circuit breaker closes"
    return f"Put aside {how_long} ({details.get('code')}): {details.get('message', '')}"


def _ending(details: Mapping[str, Any]) -> str:
    if details.get("code") == "done":
        return f"{details.get('task')} is done."
    end = "ended as a dead letter" if details.get("dead") else "was refused"
    return f"{details.get('task')} {end} ({details.get('code')}): {details.get('message', '')}"


def _time(at_ms: str | int | None) -> str | None:
    """RFC 3339, UTC, milliseconds, by the clock of Redis."""
    if not at_ms:
        return None
    at = datetime.fromtimestamp(int(float(at_ms)) / 1000, tz=UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
