"""How the servers are: `pacs.status`, `pacs.storage`, `pacs.database`.

A server's silence is the answer here, so nothing is tried again. What a server offers no call for is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeVar

from courier.errors import CourierError, PacsUnavailable
from courier.ledger.elsewhere import ElsewhereStudies
from courier.messages import ServersJob, StatusJob, read_job
from courier.results import (
    DatabaseEntry,
    DatabasePayload,
    ElsewhereEntry,
    Fault,
    RateLimit,
    StatusEntry,
    StatusPayload,
    StorageEntry,
    StoragePayload,
    SuspensionEntry,
)
from courier.waits import utc
from worker.jobs.attempt import Attempt
from worker.jobs.places import tried_places
from worker.jobs.services import Services
from worker.pacs.protocol import DatabaseState, Pacs, ServerState, StorageState

State = TypeVar("State", ServerState, StorageState, DatabaseState)
Kind = TypeVar("Kind", StatusEntry, StorageEntry, DatabaseEntry)


def status(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    """Who answers, how fast, and what each server says of itself."""
    asked = _ask(message, attempt, services, lambda pacs: pacs.state())
    entries = [
        _with_suspension(_with_rate(_entry(StatusEntry, *answer, _status), services), services) for answer in asked
    ]
    places = tried_places(services) if read_job(StatusJob, message).places else []
    return StatusPayload(job_id=attempt.job_id, servers=entries, places=places).as_json()


def _with_suspension(entry: StatusEntry, services: Services) -> StatusEntry:
    """``entry`` with what an operator has ordered for the server, and what a maintenance has left to be looked at."""
    if services.suspensions is None:
        return entry
    name, ledger = entry.server_name, services.ledger
    suspension = services.suspensions.read([name]).get(name)
    audit = ElsewhereStudies(ledger.client, prefix=ledger.key("")).read(name)
    audit = audit if audit is None or audit.split != 0 else None
    note = "; ".join(filter(None, [str(suspension or ""), str(audit or ""), entry.note]))
    ordered = None if suspension is None else SuspensionEntry.model_validate(suspension.as_json())
    elsewhere = None if audit is None else ElsewhereEntry.model_validate(audit.as_json())
    return entry.model_copy(update={"suspension": ordered, "elsewhere": elsewhere, "note": note})


def _with_rate(entry: StatusEntry, services: Services) -> StatusEntry:
    """``entry`` with the rate at which workers ask the server, if it has asked for fewer requests."""
    if services.rates is None:
        return entry
    rate = services.rates.read([entry.server_name])[entry.server_name]
    if rate.per_s is None:
        return entry
    held_until = utc((services.now() + rate.held_s) * 1000) if rate.held_s > 0 else None
    limit = RateLimit(status=rate.status, per_s=round(rate.per_s, 2), held_until=held_until)
    note = "; ".join(filter(None, [entry.note.rstrip("."), str(rate)]))
    return entry.model_copy(update={"rate_limit": limit, "note": note})


def storage(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    """How much room each server says that it has."""
    asked = _ask(message, attempt, services, _storage_of)
    entries = [_entry(StorageEntry, *answer, _storage) for answer in asked]
    return StoragePayload(job_id=attempt.job_id, servers=entries).as_json()


def database(message: Mapping[str, Any], attempt: Attempt, services: Services) -> dict[str, Any]:
    """Whether each server's database works, by a call that touches it."""
    asked = _ask(message, attempt, services, _database_of)
    entries = [_entry(DatabaseEntry, *answer, _database) for answer in asked]
    return DatabasePayload(job_id=attempt.job_id, servers=entries).as_json()


def _ask(
    message: Mapping[str, Any], attempt: Attempt, services: Services, question: Callable[[Pacs], State]
) -> list[tuple[Pacs, float, State | CourierError]]:
    """Ask the servers that the job names, all at once; each answer with how long it took in milliseconds."""
    job = read_job(ServersJob, message)
    fleet = services.probes or services.fleet
    servers = list(fleet) if job.servers is None else [fleet[name] for name in dict.fromkeys(job.servers)]

    def timed(pacs: Pacs) -> tuple[Pacs, float, State | CourierError]:
        begun = attempt.clock()
        try:
            answer: State | CourierError = question(pacs)
        except CourierError as error:
            answer = error
        return pacs, round((attempt.clock() - begun) * 1000, 1), answer

    with attempt.step("check"):
        answers = fleet.gather([partial(timed, pacs) for pacs in servers])
    return [answer for answer in answers if not isinstance(answer, CourierError)]


def _storage_of(pacs: Pacs) -> StorageState:
    storage = pacs.storage()
    if storage.total_bytes is None and storage.used_bytes is None:
        pacs.state()  # perhaps nothing was asked, so whether the server answers is still open
    return storage


def _database_of(pacs: Pacs) -> DatabaseState:
    database = pacs.database()
    if database.ok is None:
        pacs.state()  # as above
    return database


def _entry(
    kind: type[Kind],
    pacs: Pacs,
    latency_ms: float,
    answer: State | CourierError,
    as_entry: Callable[[State], dict[str, Any]],
) -> Kind:
    known: dict[str, Any]
    if isinstance(answer, CourierError):
        known = {"status": reachability(answer), "error": Fault(code=answer.payload["code"], message=answer.message)}
    else:
        known = {"status": "up", "note": answer.note, **as_entry(answer)}
    return kind(server_name=pacs.server.name, server_type=pacs.server.type, latency_ms=latency_ms, **known)


def reachability(error: CourierError) -> Literal["degraded", "not responding"]:
    """An HTTP status is an answer, even if it says that something is wrong; anything less is silence."""
    silent = isinstance(error, PacsUnavailable) and "status" not in error.details
    return "not responding" if silent else "degraded"


def _status(state: ServerState) -> dict[str, Any]:
    known = {"ready": state.ready, "product": state.product, "version": state.version}
    return {**_known(known), "warnings": list(state.warnings), "status": "degraded" if state.ready is False else "up"}


def _storage(state: StorageState) -> dict[str, Any]:
    return _known({name: getattr(state, name) for name in ("total_bytes", "free_bytes", "used_bytes")})


def _database(state: DatabaseState) -> dict[str, Any]:
    if state.ok is None:
        return {}
    return {"database": "ok"} if state.ok else {"database": "failed", "status": "degraded"}


def _known(told: Mapping[str, object]) -> dict[str, Any]:
    """What the server told; the rest stays unknown."""
    return {name: value for name, value in told.items() if value is not None}
