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

from courier.batches.store import CHUNK_TASK, Batches, chunk_pass
from courier.errors import CourierError, NotFound
from courier.ledger.jobs import ORDER, Known, Ledger, Note, StudyPush, Voided
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
from worker.jobs.attempt import Run
from worker.jobs.result_fields import place
from worker.jobs.services import Tools
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


def trace(message: Mapping[str, Any], run: Run, tools: Tools) -> dict[str, Any]:
    """Everything that is known of one UID.

    Raises
    ------
    NotFound
        Every server says that there is no such image, series or study, and the ledger never heard of it.
    """
    job = read_job(TraceJob, message)
    with run.step("check"):
        said = _ask(job.uid, tools)
    with run.step("ledger"):
        known = _known(job.uid, said, tools.ledger)
        jobs = _jobs(known, tools.ledger)
    seen = [one for one in said if one.found]
    if not seen and not any(_anything(one) for one in known.values()) and not any(one.error for one in said):
        sentence = "Neither a server nor the ledger knows of this UID."
        raise NotFound(sentence, details={"uid": job.uid, "asked": tools.fleet.names})
    now = _Now(said)
    first = now.present[0] if now.present else _last_known(now, known)
    return TracePayload(
        job_id=run.job_id,
        uid=job.uid,
        level=seen[0].found[0].level if seen else _level(known[job.uid]),
        server_name=first,
        server_type=tools.fleet[first].server.type if first else None,
        viewer_url=place(seen[0].found[0], seen[0].pacs.server).viewer_url if seen else "",
        why=_why(now, known, job.uid),
        present=now.present,
        servers=[_entry(one) for one in said],
        claim=_claim(known.values()),
        receipt=_receipt(known[job.uid], now),
        pushes=[_push(push, now if of == job.uid else None) for of, one in known.items() for push in one.pushes],
        held_by=known[job.uid].holder,
        storing=known[job.uid].storing,
        jobs=jobs,
        timeline=_events(known),
    ).as_json()


def _ask(uid: str, tools: Tools) -> list[Said]:
    """Ask every server at every level, all at once. The first level at which it is found counts."""
    fleet = tools.probes or tools.fleet
    answers = iter(fleet.gather([partial(pacs.find, level, uid) for pacs in fleet for level in LEVELS]))
    said = []
    for pacs in fleet:
        replies = [next(answers) for _ in LEVELS]
        found = next((reply for reply in replies if not isinstance(reply, CourierError) and reply), [])
        error = next((reply for reply in replies if isinstance(reply, CourierError)), None)
        said.append(Said(pacs, found, None if found else error))
    return said


def _known(uid: str, said: Sequence[Said], ledger: Ledger) -> dict[str, Known]:
    """The ledger's knowledge of the UID itself and, if it is not a study's, of the study above it."""
    known = {uid: ledger.known(uid)}
    above = {one.found[0].study_instance_uid for one in said if one.found}
    above |= {note.details["study_uid"] for note in known[uid].trail if note.details.get("study_uid")}
    above |= {study for study in [known[uid].receipt.get("study_uid")] if study}
    return known | {study: ledger.known(study) for study in sorted(above - {uid})}


def _anything(known: Known) -> bool:
    return bool(known.trail or known.holder or known.storing or known.claim or known.receipt or known.pushes)


def _level(known: Known) -> Level | None:
    """What the ledger makes of a UID that is on no server: images have receipts, studies have claims."""
    if known.claim or known.storing or known.pushes:
        return "study"
    return "image" if known.receipt or any(note.event == "routed" for note in known.trail) else None


def _last_known(now: _Now, known: Mapping[str, Known]) -> str | None:
    """A server that did not answer, and that the ledger had it on, or its study claimed for, last."""
    names = [one.receipt.get("server") for one in known.values() if not one.voided]
    names += [one.claim.get("server") for one in known.values()]
    return next((name for name in names if name in now.silent), None)


def _why(now: _Now, known: Mapping[str, Known], uid: str) -> str:
    """One sentence on where it is, and one on the last decision that says why."""
    if not now.present:
        return _why_nowhere(now, known, uid)
    first, own = now.present[0], known[uid]
    if own.voided and own.receipt["server"] == first:
        return (
            f"It is on {first}. {_stored(own)}, and job {own.voided.job_id} {_VOIDED[own.voided.how]} at"
            f" {_time(own.voided.at_ms)}: what is there now was not removed, or has been stored since."
        )
    return _why_there(first, known)


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


def _why_there(first: str, known: Mapping[str, Known]) -> str:
    routed = [note for one in known.values() for note in one.trail if note.event == "routed"]
    if routed and routed[-1].details.get("server") == first:
        reason = _REASONS.get(routed[-1].details.get("reason", ""), "of a decision")
        return f"It is on {first}. Job {routed[-1].job_id} was to push it there, because {reason}."
    if first in {one.claim.get("server") for one in known.values()}:
        return f"It is on {first}, which its study is claimed for."
    pushes = [push for one in known.values() for push in one.pushes if push.server == first and push.voided is None]
    if pushes:
        return f"It is on {first}. Job {pushes[-1].job_id} put images of the study there at {_time(pushes[-1].at_ms)}."
    return (
        f"It is on {first}; the ledger holds no claim or route of ours for it, so it was opened there by others or"
        " long ago. What we decided about a single image of it: trace that image's UID."
    )


def _why_nowhere(now: _Now, known: Mapping[str, Known], uid: str) -> str:
    silent = f", and {' and '.join(now.silent)} did not answer" if now.silent else ""
    return f"No server {'that answered ' if silent else ''}has it{silent}. {_last_word(known, uid)}"


def _last_word(known: Mapping[str, Known], uid: str) -> str:
    own = known[uid]
    if own.voided:
        return f"{_stored(own)}, and job {own.voided.job_id} {_VOIDED[own.voided.how]} at {_time(own.voided.at_ms)}."
    if own.receipt:
        since = ", and no job of ours deleted it since" if "stored_us" in own.receipt else ""  # 0.1 voided no receipts
        return f"The ledger's last word is {own.receipt['server']}: {_stored(own)}{since}."
    if own.pushes:
        return f"The ledger's last word is {own.pushes[-1].server}: {_pushed(own.pushes[-1])}."
    claims = [one.claim["server"] for one in known.values() if one.claim.get("server")]
    return (
        f"The ledger's last word is {claims[0]}, which its study is claimed for."
        if claims
        else ("The ledger names no server for it.")
    )


def _stored(known: Known) -> str:
    receipt = known.receipt
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
        status = "unavailable" if error else "not_there"
        return TraceEntry(server_name=server.name, server_type=server.type, status=status, error=fault)
    first = answer.found[0]
    where = place(first, server).model_dump()
    return TraceEntry(server_name=server.name, server_type=server.type, status="found", level=first.level, **where)


def _claim(known: Iterable[Known]) -> TraceClaim | None:
    for one in known:
        if one.claim.get("server"):
            return TraceClaim(
                server_name=one.claim["server"],
                claimed_by=one.claim.get("claimed_by"),
                claimed_at=_time(one.claim.get("claimed_ms")),
                opened_by=one.claim.get("opened_by"),
            )
    return None


def _receipt(known: Known, now: _Now) -> TraceReceipt | None:
    receipt = known.receipt
    if not receipt:
        return None
    return TraceReceipt(
        server_name=receipt["server"],
        job_id=receipt["job_id"],
        stored_at=_time(receipt.get("stored_ms")),
        sha256=receipt["sha256"],
        size_bytes=int(receipt["size_bytes"]),
        state=now.state(receipt["server"], known.voided),
        **_voided(known.voided),
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


def _jobs(known: Mapping[str, Known], ledger: Ledger) -> list[TracedJob]:
    """The records of the jobs that had to do with it, as far as they are kept."""
    ids: dict[str, None] = {}
    for one in known.values():
        named = [one.claim.get("claimed_by"), one.claim.get("opened_by"), one.receipt.get("job_id"), one.holder]
        ids |= dict.fromkeys(job_id for job_id in (*named, *one.storing) if job_id)
        ids |= dict.fromkeys(note.job_id for note in one.trail)
        ids |= dict.fromkeys(push.job_id for push in one.pushes)
        # Last, because the pieces of a batch, which may have deleted it, write into no trail.
        ids |= dict.fromkeys(voided.job_id for voided in (one.voided, *(push.voided for push in one.pushes)) if voided)
    records = {job_id: ledger.look(job_id) for job_id in list(ids)[-MAX_JOBS:]}
    return [_job(job_id, record, _asked_for(job_id, record, ledger)) for job_id, record in records.items() if record]


def _asked_for(job_id: str, record: Mapping[str, str], ledger: Ledger) -> Mapping[str, str]:
    """Who requested the job, and why; of a piece of a batch that is said of the job that began its pass."""
    piece = chunk_pass(job_id) if record.get("task") == CHUNK_TASK else None
    batch = Batches(ledger).get(piece[0]) if piece else None
    return stated(ledger.look(batch.of(piece[1]).begun_by) if piece and batch else record)


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


def _events(known: Mapping[str, Known]) -> list[TraceEvent]:
    """All notes in order of time; one that stands on several trails is told once."""
    notes: dict[tuple[int, str, str, str], TraceEvent] = {}
    for uid, one in known.items():
        for note in one.trail:
            event = TraceEvent(
                at=_time(note.at_ms) or "",
                uid=uid,
                event=note.event,
                job_id=note.job_id,
                text=told(note),
                details=note.details,
            )
            notes.setdefault((note.at_ms, note.job_id, note.event, event.text), event)
    return [notes[key] for key in sorted(notes, key=lambda key: (key[0], ORDER.get(key[2], 0)))]


def told(note: Note) -> str:
    """A note as one sentence, also where another version of the ledger wrote it and left something out."""
    details = note.details
    server = details.get("server", "a server")
    match note.event:
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
            return _BY_HAND.get(note.event, note.event)


def _claimed(server: str, void: str | None) -> str:
    if void is None:
        return f"The study was new; it now belongs to {server}."
    return f"The study now belongs to {server}; its claim on {void} is void, because no worker that runs knows {void}."


def _waiting(details: Mapping[str, Any]) -> str:
    """A job that waits for a circuit breaker has no delay: it goes on when the server is well."""
    how_long = f"for {details['delay_s']} s" if "delay_s" in details else "until its server is well again"
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
