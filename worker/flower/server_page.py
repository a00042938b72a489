"""The page PACS: each server with its circuit breaker, latency, slots, jobs that wait for it, and room."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from courier.ledger.breakers import BreakerState, circuit_open
from courier.ledger.jobs import Ledger
from courier.ledger.peers import Peers
from courier.overview import Overview, ServerLoad, WaitingCount
from courier.redaction import printable
from courier.settings import ServerSettings
from worker.app import OVERDUE_S, settings
from worker.flower.figures import amount, bytes_shown, duration
from worker.flower.ledger_page import LedgerPage
from worker.flower.rows import readable
from worker.flower.server_answers import Answers, ServerAnswers

#: How a state looks: Bootstrap's classes of a badge.
GOOD, DOUBTFUL, BAD = "text-bg-success", "text-bg-warning", "text-bg-danger"
_STATUS_LOOKS: Final = {"up": GOOD, "degraded": DOUBTFUL, "not responding": BAD}


@dataclass(frozen=True)
class ServerRow:
    """A server as the page shows it. ``slots_limit`` is 0 and ``type`` "" where these settings do not know it;
    ``suspended`` is "" where an operator has not taken it out of service.
    """

    name: str
    type: str
    circuit: str
    look: str
    circuit_note: str
    slots: int
    slots_limit: int
    waiting: int
    reasons: tuple[str, ...] = ()
    suspended: str = ""
    suspension: str = ""
    status: str = ""
    status_look: str = ""
    status_note: str = ""
    latency: str = ""
    storage: str = ""
    storage_percent: int | None = None

    @property
    def is_usable(self) -> bool:
        return self.circuit == "closed" and not self.suspended and self.status != "not responding"


class ServerPage(LedgerPage):
    answers: ClassVar[ServerAnswers] = ServerAnswers()
    tab, template, heading = "pacs", "courier_pacs.html", "PACS"
    description = "Which server works, how busy it is, and how many jobs wait for it."

    def question(self) -> Callable[[Ledger], Mapping[str, Any]]:
        return lambda ledger: look_at_servers(ledger, settings.servers, self.answers)


def look_at_servers(ledger: Ledger, known: Sequence[ServerSettings], answers: ServerAnswers) -> dict[str, Any]:
    """The values of the page, as the ledger has them now."""
    peers, overview = Peers.of(ledger), Overview(ledger)
    told = answers.last(ask_again=bool(peers.said))
    types = {server.name: server.type for server in known}
    open_jobs = overview.open_jobs()
    loads = overview.servers({server.name: server.max_concurrency for server in known})
    rows = [server_row(load, types.get(load.name, ""), open_jobs.waiting, told) for load in loads]
    return {
        "servers": rows,
        "usable": sum(row.is_usable for row in rows),
        "workers": len(peers.said),
        "open_jobs": amount(open_jobs.count() if open_jobs.complete else open_jobs.open),
        "elsewhere": [_reason(one) for one in open_jobs.waiting if not one.server_name],
        "looked_at": "" if open_jobs.complete else amount(open_jobs.looked_at),
        "dead": amount(ledger.load(overdue_s=OVERDUE_S).dead),
        "warnings": [text for text in (peers.difference and f"{peers.difference} {peers.consequence}",) if text],
        "answers_age": "" if told.age_s is None else duration(told.age_s),
    }


def server_row(load: ServerLoad, kind: str, waiting: Iterable[WaitingCount], answers: Answers) -> ServerRow:
    """One server, of the type ``kind``; ``waiting`` are all jobs that wait, by reason and server."""
    status, storage = answers.status.get(load.name, {}), answers.storage.get(load.name, {})
    look, note = _circuit(load.circuit)
    text, percent = _storage(storage)
    here = [one for one in waiting if one.server_name == load.name]
    return ServerRow(
        name=load.name,
        type=kind,
        circuit=load.circuit.name,
        look=look,
        circuit_note=note,
        slots=load.slots_used,
        slots_limit=load.slots_limit or 0,
        waiting=max(load.waiting, sum(one.jobs for one in here)),
        reasons=tuple(map(_reason, here)),
        suspended=load.suspension.state if load.suspension else "",
        suspension=printable(readable(f"{load.suspension}.")) if load.suspension else "",
        status=str(status.get("status", "")),
        status_look=_STATUS_LOOKS.get(str(status.get("status")), ""),
        status_note="" if status.get("status") == "up" else _note(status),
        latency=_latency(load.latency_ms, status),
        storage=text,
        storage_percent=percent,
    )


def _latency(of_questions_ms: float | None, status: Mapping[str, Any]) -> str:
    """Of the questions that workers asked lately; else of the status, if the server answered to that."""
    answered = status.get("latency_ms") if status.get("status") in ("up", "degraded") else None
    latency_ms = answered if of_questions_ms is None else of_questions_ms
    return "" if latency_ms is None else f"{latency_ms:,.0f} ms"


def _reason(one: WaitingCount) -> str:
    return f"{amount(one.jobs)} {one.code or 'no reason is known'}"


def _circuit(state: BreakerState) -> tuple[str, str]:
    """How the state of a circuit breaker looks, and what it means, in a sentence."""
    if state.closed:
        if not state.lately or state.last_failure_s is None:
            return GOOD, ""
        return DOUBTFUL, f"A request failed {duration(state.last_failure_s)} ago; none has succeeded since."
    why = f"{circuit_open(state.breaker)}{f': {state.reason}' if state.reason else ''}."
    if state.name == "half-open" or not state.pause_left_s:
        return DOUBTFUL, f"{why} One request is let through to test it."
    return BAD, f"{why} The next request is let through in {duration(state.pause_left_s)}."


def _note(status: Mapping[str, Any]) -> str:
    error = status.get("error")
    return str(error["message"] if isinstance(error, Mapping) and "message" in error else status.get("note") or "")


def _storage(entry: Mapping[str, Any]) -> tuple[str, int | None]:
    """How much room a server has, as far as it tells, and how many percent of it are used."""
    total, free, used = (_number(entry.get(f"{name}_bytes")) for name in ("total", "free", "used"))
    if total and free is None and used is not None:
        free = total - used
    if total and free is not None:
        return f"{bytes_shown(free)} free of {bytes_shown(total)}", min(100, round(100 * (total - free) / total))
    if free is not None:
        return f"{bytes_shown(free)} free", None
    return f"{bytes_shown(used)} used" if used is not None else "", None


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
