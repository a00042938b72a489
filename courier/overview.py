"""What goes on, as the ledger has it: jobs, what they wait for, servers, batches. Nothing here changes anything.

``pacs jobs``, ``pacs top`` and the pages of Flower show what is read here. Each question reads a bounded number of
records, so its cost does not grow with the ledger; where that was not all, the answer says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast, get_args

from courier.batches.store import Batch, Batches, chunk_pass
from courier.ledger.breakers import Breakers, BreakerState
from courier.ledger.jobs import PAGE, RECENT, JobStanding, Ledger
from courier.ledger.latencies import Latencies
from courier.ledger.slots import read_slots
from courier.ledger.suspensions import Suspension, Suspensions
from courier.redaction import redacted_fields
from courier.waits import utc

JobState = Literal["running", "waiting", "queued", "done", "failed", "dead"]
JOB_STATES: Final[tuple[JobState, ...]] = get_args(JobState)
OPEN_STATES: Final[frozenset[JobState]] = frozenset({"running", "waiting", "queued"})
#: So many open jobs are looked at, those first that are due first; and where a filter was given, which may find few.
LOOKED_AT: Final = 10_000
SEARCHED: Final = 100_000
#: So many of them in one step, during which Redis serves no one else.
_STEP: Final = 500

# Looks at open jobs in the order in which they are due. KEYS: due. ARGV: from which score on, how many, how many of
# those found are wanted, prefix of jobs; then what they have to be like, "" where anything will do: states, kind, code,
# server, created since and before (ms). Answers with how many were looked at, where to go on ("": that was all), what
# was found by state, code and server, and the first of those, in order: id, order of its state, created.
_LOOK = """
local t = redis.call('TIME'); local now = t[1] * 1000 + math.floor(t[2] / 1000)
local due, page, most, jobs = KEYS[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local states, kind, code, server = ARGV[5], ARGV[6], ARGV[7], ARGV[8]
local since, before = tonumber(ARGV[9]), tonumber(ARGV[10])
local order = {running = 1, waiting = 2, queued = 3}
local function standing(f)
  if f[1] == 'running' then
    if tonumber(f[6] or 0) >= now then return 'running', '', '' end
    return 'waiting', 'worker_lost', ''
  end
  if f[1] == 'queued' or f[7] then return f[1], 'queued', '' end
  return f[1], f[3] or '', f[4] or ''
end
local function is_kind(task)
  return kind == '' or task == kind or string.sub(task, 1, #kind + 1) == kind .. '.'
end
local function concerns(id, waits_for)
  if server == '' or waits_for == server then return true end
  local quoted = '"' .. server .. '"'
  for _, text in ipairs(redis.call('HMGET', jobs .. id, 'memo', 'job')) do
    for _, name in ipairs({'server', 'mode', 'from_server', 'to_server'}) do
      if text and string.find(text, '"' .. name .. '":' .. quoted, 1, true) then return true end
    end
    local list = text and string.match(text, '"servers":(%b[])')
    if list and string.find(list, quoted, 1, true) then return true end
  end
  return false
end
local rows = redis.call('ZRANGEBYSCORE', due, ARGV[1], '+inf', 'WITHSCORES', 'LIMIT', 0, page)
local count, next = #rows / 2, ''
if count == page then  -- those that are due in the same millisecond are looked at together
  local last = rows[#rows]
  while count > 0 and rows[2 * count] == last do count = count - 1 end
  if count == 0 then
    rows = redis.call('ZRANGEBYSCORE', due, last, last, 'WITHSCORES')
    count = #rows / 2
  end
  next = '(' .. rows[2 * count]
end
local found, counts = {}, {}
for i = 1, count do
  local id = rows[2 * i - 1]
  local f = redis.call('HMGET', jobs .. id, 'state', 'task', 'code', 'server', 'created_ms', 'lease_ms', 'sent',
    'replayed_ms')
  if f[1] and order[f[1]] then
    local state, why, waits_for = standing(f)
    local at = tonumber(f[8] or f[5] or 0)
    if (states == '' or string.find(states, ' ' .. state .. ' ', 1, true)) and is_kind(f[2] or '')
        and (code == '' or why == code) and (not since or at >= since) and (not before or at < before)
        and concerns(id, waits_for) then
      local key = state .. '\\n' .. why .. '\\n' .. waits_for
      counts[key] = (counts[key] or 0) + 1
      found[#found + 1] = {id, order[state], at}
    end
  end
end
table.sort(found, function(a, b)
  if a[2] ~= b[2] then return a[2] < b[2] end
  if a[3] ~= b[3] then return a[3] < b[3] end
  return a[1] < b[1]
end)
local first, by_reason = {}, {}
for i = 1, math.min(#found, most) do
  first[i] = {found[i][1], found[i][2], string.format('%.0f', found[i][3])}
end
for key, number in pairs(counts) do
  by_reason[#by_reason + 1] = key
  by_reason[#by_reason + 1] = number
end
return {count, next, by_reason, first}
"""

# Of a job that ended: which servers its outcome names, its study, and where an image came from. An outcome may hold the
# metadata of thousands of images, of which nothing is read here. KEYS: job.
_ENDED = """
local text = redis.call('HGET', KEYS[1], 'outcome') or ''
local servers, seen = {}, {}
for name in string.gmatch(text, '"server_name":"([^"\\\\]+)"') do
  if not seen[name] and #servers < 64 then
    seen[name] = true
    servers[#servers + 1] = name
  end
end
local code = redis.call('HGET', KEYS[1], 'code')
return {servers, string.match(text, '"study_uid":"([%d.]+)"') or '', string.match(text, '"source":"([^"]*)"') or '',
  code ~= 'done' and #text < 100000 and text or ''}
"""

#: What is read of a job that is shown, and of one that ended to say whether it is.
_SHOWN: Final = (
    *("state", "task", "job", "memo", "code", "created_ms", "replayed_ms", "ended_ms", "attempts"),
    *("requested_by", "reason"),
)
_ENDED_READ: Final = ("state", "task", "code", "created_ms", "replayed_ms", "ended_ms")
_NAMED_SERVERS: Final = ("server", "mode", "from_server", "to_server")
_EVERY_MODE: Final = ("either", "both")
_IS_TEXT = re.compile(r'[^"\\\x00-\x1f]*').fullmatch


@dataclass(frozen=True)
class JobQuery:
    """Which jobs are meant; what is empty or None means any.

    ``kind`` is a task without its ``pacs.``, or what several begin with (``batch``). ``code`` is why a job waits, or
    failed. ``server`` is one that it waits for, is at work at, was ordered for, or that its outcome names. ``since_s``
    and ``before_s`` (Unix time) are about when it was enqueued, or replayed.
    """

    states: Collection[str] = ()
    kind: str = ""
    code: str = ""
    server: str = ""
    since_s: float | None = None
    before_s: float | None = None

    @property
    def is_all(self) -> bool:
        return self == JobQuery()

    def wants(self, *states: JobState) -> bool:
        return not self.states or not set(states).isdisjoint(self.states)


@dataclass(frozen=True)
class JobRow:
    """A job as a list shows it. ``what`` is what it was ordered to do, ``code`` and ``message`` why it waits or failed.

    ``servers``: those that it waits for, is at work at, or was ordered for; once it ended, those its outcome names.
    ``requested_by`` and ``reason`` are as they were given, "" where they were not. Times are Unix ms; ``ended_ms`` is
    None while it is open.
    """

    job_id: str
    task: str
    what: str
    state: JobState
    created_ms: int
    now_ms: int
    code: str = ""
    message: str = ""
    servers: tuple[str, ...] = ()
    since: str | None = None
    next_try: str | None = None
    ended_ms: int | None = None
    attempts: int = 0
    batch_id: str = ""
    requested_by: str = ""
    reason: str = ""

    @property
    def kind(self) -> str:
        return self.task.removeprefix("pacs.")

    @property
    def age_s(self) -> float:
        """Since it was enqueued or replayed; of a job that ended, how long it took."""
        return max(0.0, ((self.ended_ms or self.now_ms) - self.created_ms) / 1000)

    def as_json(self) -> dict[str, Any]:
        return {
            "job_id": self.job_id,
            "task": self.task,
            "kind": self.kind,
            "what": self.what,
            "state": self.state,
            "code": self.code or None,
            "message": self.message or None,
            "server_name": self.servers[0] if len(self.servers) == 1 else None,
            "servers": list(self.servers),
            "since": self.since,
            "next_try": self.next_try,
            "created_at": utc(self.created_ms),
            "ended_at": None if self.ended_ms is None else utc(self.ended_ms),
            "age_s": round(self.age_s, 1),
            "attempts": self.attempts,
            "batch_id": self.batch_id or None,
            "requested_by": self.requested_by or None,
            "reason": self.reason or None,
        }


@dataclass(frozen=True)
class WaitingCount:
    """How many open jobs are in a state for one reason. ``server_name`` is "" where they wait for no server."""

    state: JobState
    code: str
    server_name: str
    jobs: int

    def as_json(self) -> dict[str, Any]:
        return {"state": self.state, "code": self.code, "server_name": self.server_name or None, "jobs": self.jobs}


@dataclass(frozen=True)
class OpenJobs:
    """How many jobs match by state and reason, of the ``looked_at`` ones that are due first out of ``open``.

    ``open`` counts all jobs that a worker has to look at once more, among them ended ones whose outcome is not
    published yet. ``complete``: all of them were looked at.
    """

    open: int
    looked_at: int
    complete: bool
    by_reason: tuple[WaitingCount, ...] = ()

    def count(self, state: JobState | None = None) -> int:
        return sum(one.jobs for one in self.by_reason if state in (None, one.state))

    @property
    def waiting(self) -> tuple[WaitingCount, ...]:
        """Those that wait for something else than a free worker, the most frequent reason first."""
        return tuple(one for one in self.by_reason if one.state == "waiting")

    def as_json(self) -> dict[str, Any]:
        return {
            "open": self.open,
            "looked_at": self.looked_at,
            "complete": self.complete,
            **{state: self.count(state) for state in ("running", "waiting", "queued")},
            "by_reason": [one.as_json() for one in self.by_reason],
        }


@dataclass(frozen=True)
class JobList:
    """Jobs that match, open ones first: running, waiting, queued, each the oldest first; then ended ones, the latest
    first. ``open_jobs`` says how many open ones match, and whether all were looked at.
    """

    rows: tuple[JobRow, ...]
    open_jobs: OpenJobs
    now_ms: int


@dataclass(frozen=True)
class ServerLoad:
    """A server as the workers share it. ``circuit`` is its gravest breaker; ``waiting`` counts jobs that are parked
    until it closes, or until an operator ends its ``suspension``, which is None where the server is in service.
    ``slots_limit`` is None where the settings of this process do not name the server, ``latency_ms`` where no worker
    has asked it anything within two minutes.
    """

    name: str
    circuit: BreakerState
    slots_used: int
    slots_limit: int | None
    waiting: int
    suspension: Suspension | None = None
    latency_ms: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "server_name": self.name,
            "suspension": None if self.suspension is None else self.suspension.as_json(),
            "circuit": self.circuit.name,
            "circuit_breaker": self.circuit.breaker,
            "pause_left_s": self.circuit.pause_left_s,
            "reason": self.circuit.reason or None,
            "latency_ms": self.latency_ms,
            "slots_used": self.slots_used,
            "slots_limit": self.slots_limit,
            "jobs_parked": self.waiting,
        }


@dataclass(frozen=True)
class _OpenIds:
    """What a walk over the open jobs has found: ids by their place in the list."""

    ids: list[str] = field(default_factory=list)
    open_jobs: OpenJobs = OpenJobs(0, 0, True)


class Overview:
    """Questions to the ledger that change nothing. Safe for threads."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._redis = ledger.client
        self._look, self._ended = self._redis.register_script(_LOOK), self._redis.register_script(_ENDED)

    # --- jobs -----------------------------------------------------------------------------------------------

    def jobs(self, which: JobQuery | None = None, *, limit: int = 50) -> JobList:
        """Open and recent jobs, ``limit`` at most; a fifth of that is left to ended ones, if there are so many."""
        which = which or JobQuery()
        now_ms = int(self._ledger.clock_s() * 1000)
        ended = list(self._ended_ids(which, limit)) if which.wants("done", "failed", "dead") else []
        wanted = limit - min(len(ended), limit // 5)
        found = (
            self._open_ids(which, wanted) if which.wants(*OPEN_STATES) else _OpenIds(open_jobs=self._none_looked_at())
        )
        rows = [*self._open_rows(found.ids, now_ms), *self._ended_rows(ended[: limit - len(found.ids)], now_ms)]
        return JobList(tuple(rows), found.open_jobs, now_ms)

    def open_jobs(self, which: JobQuery | None = None, *, at_most: int = LOOKED_AT) -> OpenJobs:
        """How many open jobs there are by state and reason."""
        return self._open_ids(which or JobQuery(), 0, at_most=at_most).open_jobs

    def job_ids(self, beginning: str = "", *, limit: int = 50) -> list[str]:
        """Ids of open jobs that begin so, of those that are due first: for shell completion."""
        ids = cast(list[str], self._redis.zrange(self._ledger.key("due"), 0, 999))
        fitting = self._read((job_id for job_id in ids if job_id.startswith(beginning)), ("state",))
        return [job_id for job_id, row in fitting.items() if row["state"] in OPEN_STATES][:limit]

    def _open_ids(self, which: JobQuery, wanted: int, *, at_most: int | None = None) -> _OpenIds:
        """The ids of open jobs that match, in the order of the list, as far as ``wanted``."""
        most = at_most or (LOOKED_AT if which.is_all else SEARCHED)
        first: dict[str, tuple[int, int]] = {}
        counts: dict[tuple[str, str, str], int] = {}
        looked_at, begin = 0, "-inf"
        while begin and looked_at < most:
            step = min(_STEP, most - looked_at)
            args: list[str | int] = [begin, step, wanted, self._ledger.key("job", ""), *_asked(which)]
            number, begin, by_reason, rows = self._look(keys=[self._ledger.key("due")], args=args)
            looked_at += int(number)
            for key, jobs in zip(by_reason[::2], by_reason[1::2], strict=True):
                state, code, server = key.split("\n")
                counts[state, code, server] = counts.get((state, code, server), 0) + int(jobs)
            first |= {job_id: (int(order), int(at)) for job_id, order, at in rows}
        ids = sorted(first, key=lambda job_id: (*first[job_id], job_id))[:wanted]
        open_jobs = looked_at if not begin else int(self._redis.zcard(self._ledger.key("due")))
        return _OpenIds(ids, OpenJobs(open_jobs, looked_at, looked_at >= open_jobs, _by_reason(counts)))

    def _none_looked_at(self) -> OpenJobs:
        return OpenJobs(int(self._redis.zcard(self._ledger.key("due"))), 0, complete=True)

    def _open_rows(self, ids: Sequence[str], now_ms: int) -> Iterator[JobRow]:
        standings = self._ledger.standing(ids)
        for job_id, row in self._read(ids, _SHOWN).items():
            if job_id in standings and standings[job_id].outcome is None and row["state"] not in ("done", "dead", None):
                yield _open_row(job_id, row, standings[job_id], now_ms)

    def _ended_ids(self, which: JobQuery, limit: int) -> Iterator[str]:
        """The latest first."""
        found = 0
        for ids in self._pages_of_ended(which):
            for job_id, row in self._read(ids, _ENDED_READ).items():
                if _matches(row, which) and (not which.server or which.server in self._servers(job_id)):
                    yield job_id
                    found += 1
                    if found == limit:
                        return

    def _pages_of_ended(self, which: JobQuery) -> Iterator[list[str]]:
        ids = cast(list[str], self._redis.lrange(self._ledger.key("recent"), 0, RECENT - 1))
        if which.states and set(which.states) <= {"dead"}:
            ids = cast(list[str], self._redis.zrevrange(self._ledger.key("dead"), 0, RECENT - 1))
        ids = list(dict.fromkeys(ids))
        for first in range(0, len(ids), PAGE):
            yield ids[first : first + PAGE]

    def _servers(self, job_id: str) -> list[str]:
        return cast(list[str], self._ended(keys=[self._ledger.key("job", job_id)])[0])

    def _ended_rows(self, ids: Sequence[str], now_ms: int) -> Iterator[JobRow]:
        rows = self._read(ids, _SHOWN)
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in rows:
                self._ended(keys=[self._ledger.key("job", job_id)], client=pipe)
            outcomes = pipe.execute() if rows else []
        for (job_id, row), outcome in zip(rows.items(), outcomes, strict=True):
            if row["state"] in ("done", "dead"):  # it may have been replayed, or be gone by now
                yield _ended_row(job_id, row, outcome, now_ms)

    def _read(self, ids: Iterable[str], fields: Sequence[str]) -> dict[str, dict[str, str | None]]:
        """These fields of each job, read in one go; None where there is none."""
        wanted = list(ids)
        if not wanted:
            return {}
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in wanted:
                pipe.hmget(self._ledger.key("job", job_id), *fields)
            rows = pipe.execute()
        return {job_id: dict(zip(fields, row, strict=True)) for job_id, row in zip(wanted, rows, strict=True)}

    # --- servers and batches --------------------------------------------------------------------------------

    def servers(self, limits: Mapping[str, int] | None = None) -> list[ServerLoad]:
        """Each server that ``limits`` names (its ``max_concurrency``) or that a worker knows, in this order."""
        limits = limits or {}
        known = cast(list[str], self._redis.zrange(self._ledger.key("servers"), 0, -1))
        names = list(dict.fromkeys((*limits, *sorted(known))))
        prefix = self._ledger.key()
        circuits = Breakers(self._redis, prefix=prefix).states(names)
        suspended = Suspensions(self._redis, prefix=prefix).read(names)
        latencies = Latencies(self._redis, prefix=prefix).read(names)
        slots, parked = read_slots(self._redis, names, prefix=prefix), self._ledger.parked()
        return [
            ServerLoad(
                name,
                circuits[name],
                slots[name],
                limits.get(name),
                waiting=parked.get(name, 0),
                suspension=suspended.get(name),
                latency_ms=latencies.get(name),
            )
            for name in names
        ]

    def batches(self, *, limit: int = 20) -> list[Batch]:
        """The latest batches, those first that are not over."""
        found = Batches(self._ledger).latest(limit)
        return sorted(found, key=lambda batch: batch.over)


def _asked(which: JobQuery) -> list[str]:
    states = f" {' '.join(which.states)} " if which.states else ""
    moments = ["" if moment is None else f"{moment * 1000:.0f}" for moment in (which.since_s, which.before_s)]
    return [states, f"pacs.{which.kind}" if which.kind else "", which.code, which.server, *moments]


def _by_reason(counts: Mapping[tuple[str, str, str], int]) -> tuple[WaitingCount, ...]:
    found = [WaitingCount(cast(JobState, state), code, server, jobs) for (state, code, server), jobs in counts.items()]
    return tuple(sorted(found, key=lambda one: (-one.jobs, one.state, one.code, one.server_name)))


def _state_of(row: Mapping[str, str | None]) -> JobState | None:
    """The state of a job that ended; None of one that has not, or whose record is gone."""
    if row["state"] == "dead":
        return "dead"
    return None if row["state"] != "done" else "done" if row["code"] == "done" else "failed"


def _matches(row: Mapping[str, str | None], which: JobQuery) -> bool:
    state, task, kind = _state_of(row), row["task"] or "", f"pacs.{which.kind}"
    if state is None or not which.wants(state):
        return False
    at_s = _created_ms(row) / 1000
    return (
        (not which.kind or task == kind or task.startswith(f"{kind}."))
        and (not which.code or row["code"] == which.code)
        and (which.since_s is None or at_s >= which.since_s)
        and (which.before_s is None or at_s < which.before_s)
    )


def _created_ms(row: Mapping[str, str | None]) -> int:
    return int(float(row["replayed_ms"] or row["created_ms"] or 0))


def _open_row(job_id: str, row: Mapping[str, str | None], standing: JobStanding, now_ms: int) -> JobRow:
    waiting = standing.waiting or {}
    state: JobState = cast(JobState, standing.state)
    if state == "running" and waiting:
        state = "waiting"  # its worker is gone
    job = _loaded(row["job"])
    servers = [waiting["server_name"]] if waiting.get("server_name") else _servers_of(_loaded(row["memo"]), job)
    return JobRow(
        job_id=job_id,
        task=row["task"] or "",
        what=what(job_id, row["task"] or "", job),
        state=state,
        created_ms=_created_ms(row),
        now_ms=now_ms,
        code=waiting.get("code") or "",
        message=waiting.get("message") or "",
        servers=tuple(servers),
        since=waiting.get("since"),
        next_try=waiting.get("next_try"),
        attempts=standing.attempts,
        batch_id=_batch_of(job_id, row["task"] or "", job),
        requested_by=row["requested_by"] or "",
        reason=row["reason"] or "",
    )


def _ended_row(job_id: str, row: Mapping[str, str | None], outcome: Sequence[Any], now_ms: int) -> JobRow:
    servers, study_uid, source, text = outcome
    error = _loaded(text).get("error") or {}
    job = _loaded(row["job"])  # a dead letter keeps it
    about = {"image_url": source if _IS_TEXT(source) else "", "study_uid": study_uid}
    return JobRow(
        job_id=job_id,
        task=row["task"] or "",
        what=what(job_id, row["task"] or "", job or {name: value for name, value in about.items() if value}),
        state=_state_of(row) or "done",
        created_ms=_created_ms(row),
        now_ms=now_ms,
        code="" if row["code"] == "done" else row["code"] or "",
        message=str(error.get("message") or ""),
        servers=tuple(servers),
        ended_ms=int(float(row["ended_ms"] or 0)),
        attempts=int(row["attempts"] or 0),
        batch_id=_batch_of(job_id, row["task"] or "", job),
        requested_by=row["requested_by"] or "",
        reason=row["reason"] or "",
    )


def _servers_of(*records: Mapping[str, Any]) -> list[str]:
    """The servers that the first of ``records`` names which names any: a job's checkpoint, then its order."""
    for record in records:
        named = [record[name] for name in _NAMED_SERVERS if record.get(name) not in (None, "", *_EVERY_MODE)]
        listed = record.get("servers")
        named += listed if isinstance(listed, list) else []
        if names := [name for name in named if isinstance(name, str)]:
            return list(dict.fromkeys(names))
    return []


def _batch_of(job_id: str, task: str, job: Mapping[str, Any]) -> str:
    """The batch that a job is a part of, or began."""
    if chunk := chunk_pass(job_id):
        return chunk[0]
    named = job.get("batch_id")
    if isinstance(named, str):
        return named
    return job_id if task.startswith("pacs.batch.") or task == "pacs.delete_all" else ""


#: What is said of a job, in this order, behind its kind.
_SAID: Final = ("image_url", "source", "level", "uid", "study_uid", "destination", "batch_id", "name")


def what(job_id: str, task: str, job: Mapping[str, Any]) -> str:
    """What a job was ordered to do, in one line: its kind, and what that is about. No query of a URL, no patient."""
    fields = redacted_fields(job)
    said = [task.removeprefix("pacs.")]
    if chunk := chunk_pass(job_id):
        said += [f"{chunk[1]} {fields['chunk']}"] if "chunk" in fields else [chunk[1]]
    said += [str(fields[name]) for name in _SAID if fields.get(name) not in (None, "")]
    if fields.get("from_server") or fields.get("to_server"):
        said.append(f"{fields.get('from_server')} → {fields.get('to_server')}")
    if fields.get("filters"):
        said.append(f"with {', '.join(map(str, cast(list[Any], fields['filters'])))}")
    if job.get("dry_run"):
        said.append("(dry run)")
    return " ".join(said)


def _loaded(text: str | None) -> dict[str, Any]:
    found = json.loads(text) if text else {}
    return found if isinstance(found, dict) else {}
