"""What the ledger holds of a batch: its frozen plan, what became of each item in each pass, and how far it is.

No PACS and no Celery here, and nothing of what an item means: an item is one line of text, and a server if it is known.
Nothing here holds all items at once. Plans are made through `courier.batches.planner.Planner`.

A batch is a sequence of passes over the same frozen chunks: ``survey`` (what would happen), ``apply`` (do it),
``verify`` (see whether it is so) and ``undo`` (take it back). A chunk in a pass is a job of the ledger,
``BATCH.PASS.NUMBER``, so lease, fence and retry are a job's; at most ``width`` chunks are open at a time.

Keys, all below ``batch:ID`` behind the prefix of the ledger's:

    (itself)        hash    state, kind, order, servers, items, chunks …; for each pass ``PASS:next`` (chunks begun),
                            ``PASS:open`` (under way), ``PASS:finished``, ``PASS:round``, ``PASS:begun_ms``,
                            ``PASS:ended_ms``, ``PASS:bytes``; and counts: ``n:plan:SERVER``,
                            ``n:PASS:SERVER:STATUS`` ("-": no server), in which each item stands once, and
                            ``m:PASS:SERVER:STATUS`` for the further servers of items that several were asked for
    :plan:TOKEN     hash    chunk number → its items, deflated, one a line: position of the server or "-", size in bytes
                            or "-", text. A planner writes under a token of its own, so that two cannot mix.
    :outcomes:PASS  string  one letter per item; a zero byte is open
    :results:PASS   hash    chunk number → what more there is to say of its items, deflated: server, code, message and
                            result of each (`_packed`). The results of ``apply`` are the items' receipts.
    :ended:PASS     bitmap  the chunks that are over

States: ``planning`` → ``planned`` → ``running`` → ``verifying`` → ``done`` | ``cancelled``; ``undoing`` → ``undone``.
Each of those in -ing may be ``paused`` and goes on where it was.
"""

from __future__ import annotations

import json
import re
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final, Literal, cast, get_args

from courier.errors import InvalidRequest
from courier.ledger.jobs import DueJob, LeaseLost, Ledger
from courier.messages import check_batch_id
from courier.redaction import redact_url, stated
from courier.redis_internals import ask_raw

State = Literal["planning", "planned", "running", "verifying", "paused", "cancelled", "done", "undoing", "undone"]
Pass = Literal["survey", "apply", "verify", "undo"]
PASSES: Final[tuple[Pass, ...]] = get_args(Pass)
#: The state of a batch while it is in a pass.
STATE_OF: Final[Mapping[Pass, State]] = {
    "survey": "planning",
    "apply": "running",
    "verify": "verifying",
    "undo": "undoing",
}
ACTIVE: Final[tuple[State, ...]] = tuple(STATE_OF.values())
ItemStatus = Literal[
    "open",  # nothing is known of it yet in this pass
    "planned",  # survey: it goes on to be applied
    "skipped",  # nothing is to be done with it, and why
    "refused",  # somebody said no: trying again would end the same way
    "failed",  # it was tried as often as it may be; `retry` opens it again
    "deleted",
    "hidden",
    "not_there",
    "stored",
    "already_there",
    "copied",
    "downloaded",
    "verified",  # verify: it is as it should be
    "differs",  # verify, undo: it is there, but not the same
    "missing",  # verify: it is not there
    "unverified",  # verify: nobody can say
    "undone",
    "kept",  # undo: it is not ours to take back, or has changed since
]
LETTERS: Final[Mapping[ItemStatus, str]] = dict(zip(get_args(ItemStatus), "\0pkrfdhnsacwvxmquo", strict=True))
_STATUSES: Final[Mapping[str, ItemStatus]] = {letter: status for status, letter in LETTERS.items()}
#: Of an item that ended so in ``apply`` there is nothing to verify or to undo, unless it left a result.
NOT_DONE: Final = frozenset({"open", "skipped", "refused", "failed"})
#: What reports and results name among the failures.
TROUBLE: Final = frozenset({"refused", "failed", "differs", "missing"})
#: The kinds of which a retry does again what verify found missing. A migration's verify brings that itself.
DONE_AGAIN: Final = frozenset({"upload", "download"})
CHUNK_ITEMS: Final = 100
#: The task that does a chunk.
CHUNK_TASK: Final = "pacs.batch.chunk"
_CHUNK_ID: Final = re.compile(rf"(?P<batch>.+)\.(?P<which>{'|'.join(PASSES)})\.\d+(\.\d+)?").fullmatch
#: So many chunks are read at a time by who reads them all.
_CHUNKS_READ: Final = 20
_NO_SERVER: Final = "-"
#: In `ItemOutcome.server`: the item has come to no server, also if the plan names one.
NOWHERE: Final = _NO_SERVER
#: The record of a chunk that ended serves messages of it that come late; there are many such records.
_RECORD_KEEP_MS: Final = 300_000
#: A program has read all items before it begins to write a plan, so it is gone if it has not written for so long.
_PLANNER_GONE_MS: Final = 60_000
_PLANNER_GONE: Final = "Whoever planned it was interrupted; nothing was done. Order it again."

_NOW = "local t = redis.call('TIME'); local now = t[1] * 1000 + math.floor(t[2] / 1000)\n"

_OPEN = (
    _NOW
    + """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], 'state', 'planning', 'kind', ARGV[2], 'servers', ARGV[3], 'order', ARGV[4],
  'width', ARGV[5], 'name', ARGV[6], 'items', 0, 'chunks', 0, 'bytes', 0, 'created_ms', now, 'planned_ms', now)
redis.call('PEXPIRE', KEYS[1], ARGV[7])
redis.call('ZADD', KEYS[2], now, ARGV[1])
return 1
"""
)

_WRITTEN_ON = _NOW + "if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], 'planned_ms', now) end"

# What the planner has left out it has written under its token, too.
# KEYS: batch; outcomes and results of the planner, those of apply. ARGV: token, then fields of the batch.
_FREEZE = """
local b = redis.call('HMGET', KEYS[1], 'state', 'planner', 'frozen')
if b[1] ~= 'planning' or b[2] ~= ARGV[1] or b[3] then return 0 end
redis.call('HSET', KEYS[1], 'frozen', 1, 'filters_applied', 1, unpack(ARGV, 2))
for i = 2, 3 do
  if redis.call('EXISTS', KEYS[i]) == 1 then redis.call('RENAME', KEYS[i], KEYS[i + 2]) end
end
return 1
"""

# The jobs are written down in the same step that counts them as under way: none can be lost between the two.
# KEYS: batch, ended, due. ARGV: batch id, pass, its state, prefix of jobs, task, template, delay, life of records, 1 if
# their messages are to be sent now.
_FILL = (
    _NOW
    + """
local p = ARGV[2]
local b = redis.call('HMGET', KEYS[1], 'state', 'chunks', 'width', p .. ':next', p .. ':open', p .. ':round', 'pass')
if b[1] ~= ARGV[3] or b[7] ~= p then return {} end
local chunks, width = tonumber(b[2]), tonumber(b[3])
local next, open, round = tonumber(b[4] or 0), tonumber(b[5] or 0), tonumber(b[6] or 0)
local begun = {}
while next < chunks and open < width do
  if redis.call('GETBIT', KEYS[2], next) == 0 then
    local id = string.format('%s.%s.%d', ARGV[1], p, next)
    local tail = '}'
    if round > 0 then
      id = id .. '.' .. round
      tail = ', "round": ' .. round .. '}'
    end
    local job = ARGV[6] .. next .. tail
    redis.call('HSET', ARGV[4] .. id, 'state', 'queued', 'task', ARGV[5], 'job', job,
      'attempts', 0, 'fence', 0, 'created_ms', now, 'keep_ms', ARGV[8])
    if ARGV[9] == '1' then redis.call('HSET', ARGV[4] .. id, 'sent', 1) end
    redis.call('ZADD', KEYS[3], now + ARGV[7], id)
    begun[#begun + 1] = {id, job}
    open = open + 1
  end
  next = next + 1
end
redis.call('HSET', KEYS[1], p .. ':next', next, p .. ':open', open)
return begun
"""
)

# An outcome is written once; whoever comes late finds the item settled. What was written before stays in the rows too.
# KEYS: batch, outcomes, results, job. ARGV: fence, chunk, rows or "", bytes field, bytes, then at, letter, count field;
# a further count field of the same item follows with an empty letter.
_RECORD = """
local holder = redis.call('HMGET', KEYS[4], 'fence', 'state')
if holder[1] ~= ARGV[1] or holder[2] ~= 'running' then return -1 end
local written, fresh = 0, false
for i = 6, #ARGV, 3 do
  if ARGV[i + 1] ~= '' then
    local at = tonumber(ARGV[i])
    local letter = redis.call('GETRANGE', KEYS[2], at, at)
    fresh = letter == '' or letter == '\\0'
    if fresh then
      redis.call('SETRANGE', KEYS[2], at, ARGV[i + 1])
      written = written + 1
    end
  end
  if fresh then redis.call('HINCRBY', KEYS[1], ARGV[i + 2], 1) end
end
if ARGV[3] ~= '' then redis.call('HSET', KEYS[3], ARGV[2], ARGV[3]) end
if tonumber(ARGV[5]) > 0 then redis.call('HINCRBY', KEYS[1], ARGV[4], ARGV[5]) end
return written
"""

_END_CHUNK = """
if redis.call('SETBIT', KEYS[2], ARGV[2], 1) == 0 then
  redis.call('HINCRBY', KEYS[1], ARGV[1] .. ':open', -1)
  redis.call('HINCRBY', KEYS[1], ARGV[1] .. ':finished', 1)
end
local b = redis.call('HMGET', KEYS[1], ARGV[1] .. ':finished', 'chunks')
return b[1] == b[2] and 1 or 0
"""

# KEYS: batch, outcomes, ended. ARGV: pass, chunk, then at, letter, count field, as of _RECORD.
_REOPEN = """
local opened = false
for i = 3, #ARGV, 3 do
  if ARGV[i + 1] ~= '' then
    local at = tonumber(ARGV[i])
    opened = redis.call('GETRANGE', KEYS[2], at, at) == ARGV[i + 1]
    if opened then redis.call('SETRANGE', KEYS[2], at, '\\0') end
  end
  if opened then redis.call('HINCRBY', KEYS[1], ARGV[i + 2], -1) end
end
if redis.call('SETBIT', KEYS[3], ARGV[2], 0) == 1 then redis.call('HINCRBY', KEYS[1], ARGV[1] .. ':finished', -1) end
return 1
"""

# KEYS: batch; then all that belongs to it, to be kept. ARGV: job id, pass, state, then the states it may come out of.
# A coordinator that was interrupted finds that it has begun already.
_BEGIN = (
    _NOW
    + """
local p = ARGV[2]
local b = redis.call('HMGET', KEYS[1], 'state', 'pass', 'conductor', p .. ':begun_by')
if b[4] == ARGV[1] then return 1 end
local may = false
for i = 4, #ARGV do may = may or b[1] == ARGV[i] end
if not may or b[3] ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'state', ARGV[3], 'pass', p, p .. ':begun_by', ARGV[1], p .. ':begun_ms', now,
  p .. ':next', 0, p .. ':open', 0)
redis.call('HINCRBY', KEYS[1], p .. ':finished', 0)
if b[4] then redis.call('HINCRBY', KEYS[1], p .. ':round', 1) end
redis.call('HDEL', KEYS[1], p .. ':ended_ms')
for i = 1, #KEYS do redis.call('PERSIST', KEYS[i]) end
return 1
"""
)

_END_PASS = (
    _NOW
    + """
local b = redis.call('HMGET', KEYS[1], 'state', 'pass')
if b[2] ~= ARGV[1] or b[1] ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'state', ARGV[3], ARGV[1] .. ':ended_ms', now)
return 1
"""
)

# A batch has one coordinator at a time. ARGV: the job that wants to be it, prefix of jobs.
_TAKE = """
local mine = redis.call('HGET', KEYS[1], 'conductor')
if mine == ARGV[1] then return '' end
local state = mine and redis.call('HGET', ARGV[2] .. mine, 'state')
if state == 'queued' or state == 'running' or state == 'waiting' then return mine end
redis.call('HSET', KEYS[1], 'conductor', ARGV[1])
return ''
"""

_STEER = (
    _NOW
    + """
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return '' end
for i = 2, #ARGV do
  if state == ARGV[i] then
    redis.call('HSET', KEYS[1], 'state', ARGV[1], ARGV[1] .. '_ms', now)
    return ARGV[1]
  end
end
return state
"""
)

# A plan that is still being made is not paused: nothing of it has been done.
_PAUSE = (
    _NOW
    + """
local b = redis.call('HMGET', KEYS[1], 'state', 'frozen')
if not b[1] then return '' end
if (b[1] == 'planning' and b[2]) or b[1] == 'running' or b[1] == 'verifying' or b[1] == 'undoing' then
  redis.call('HSET', KEYS[1], 'state', 'paused', 'paused_from', b[1], 'paused_ms', now)
  return 'paused'
end
return b[1]
"""
)

_RESUME = """
local b = redis.call('HMGET', KEYS[1], 'state', 'paused_from')
if not b[1] then return '' end
if b[1] ~= 'paused' then return b[1] end
redis.call('HSET', KEYS[1], 'state', b[2] or 'running')
return b[2] or 'running'
"""

# A batch whose coordinator's job is over (cancelled, dead) has no coordinator: it stops. So does one without a job
# whose plan nobody writes on. ARGV: prefix of jobs, batch id, life of a plan that does not grow, what is said then.
_STATE = (
    _NOW
    + """
local b = redis.call('HMGET', KEYS[1], 'state', 'conductor', 'paused_from', 'planned_ms')
local state = b[1] or ''
local doing = state == 'paused' and b[3] or state
if state == 'planning' and not b[2] and b[4] and now - b[4] > tonumber(ARGV[3])
    and redis.call('EXISTS', ARGV[1] .. ARGV[2]) == 0 then
  redis.call('HSET', KEYS[1], 'state', 'cancelled', 'warnings', ARGV[4])
  return {'cancelled', 1}
end
if b[2] and (doing == 'planning' or doing == 'running' or doing == 'verifying' or doing == 'undoing') then
  local job = redis.call('HGET', ARGV[1] .. b[2], 'state')
  if job == 'done' or job == 'dead' then
    state = doing == 'verifying' and 'done' or 'cancelled'
    redis.call('HSET', KEYS[1], 'state', state)
    return {state, 1}
  end
end
return {state, 0}
"""
)


@dataclass(frozen=True)
class Item:
    """One thing to do: ``number`` in the batch, and what, in the words of the batch's kind.

    ``server`` is "" where nobody has said which one yet.
    """

    number: int
    server: str
    text: str
    size_bytes: int | None = None


@dataclass(frozen=True)
class ItemOutcome:
    """What became of an item in a pass, and why, where that has to be said.

    ``server`` is where, if that is not the item's own; `NOWHERE` if it has come to none. ``result`` is what report,
    verify and undo need to know later: small, flat and JSON; its ``size_bytes`` counts as carried, and its ``servers``
    say what became of the item on each of several servers: its status there, or an object, which stands for ``status``.
    """

    item: Item
    status: ItemStatus
    code: str = ""
    message: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)
    server: str = ""

    @property
    def is_planned_so(self) -> bool:
        """Whether the plan itself has refused it: an image that was fetched in vain is at `NOWHERE`, or at a server."""
        return self.status == "refused" and not self.server and not self.item.server

    @property
    def server_name(self) -> str:
        return "" if self.server == NOWHERE else self.server or self.item.server

    @property
    def outcomes(self) -> dict[str, ItemStatus]:
        """What became of it on each server that it has come to; `server_name` is the first of them."""
        told = self.result.get("servers")
        named = told if isinstance(told, Mapping) else {}
        first = {self.server_name: self.status} if self.server_name else {}
        return {**first, **{name: _status_there(self, one) for name, one in named.items() if name not in first}}


def _status_there(one: ItemOutcome, told: object) -> ItemStatus:
    return cast(ItemStatus, told) if isinstance(told, str) and told in LETTERS else one.status


@dataclass(frozen=True)
class Row:
    """All that a report says of an item: what became of it in each pass that has come to it."""

    item: Item
    passes: Mapping[Pass, ItemOutcome]

    @property
    def outcome(self) -> ItemOutcome:
        """What became of it when it was applied."""
        return self.passes.get("apply", ItemOutcome(self.item, "open"))

    def as_json(self, types: Mapping[str, str]) -> dict[str, Any]:
        one = self.outcome
        told = {"number": self.item.number, "item": redact_url(self.item.text), **_outcome_as_json(one, types)}
        if not self.item.text.partition(":")[2]:
            told["study_uid"] = self.item.text
        told["size_bytes"] = one.result.get("size_bytes", self.item.size_bytes)
        others = {str(name): _outcome_as_json(found, types) for name, found in self.passes.items() if name != "apply"}
        return {**told, **others}


def _outcome_as_json(one: ItemOutcome, types: Mapping[str, str]) -> dict[str, Any]:
    several = [
        {"server_name": name, "server_type": types.get(name), "status": status} for name, status in one.outcomes.items()
    ]
    return {
        **({"servers": several} if len(several) > 1 else {}),
        "server_name": one.server_name or None,
        "server_type": types.get(one.server_name),
        "status": one.status,
        "code": one.code,
        "message": one.message,
        "result": dict(one.result),
    }


def left_out_as(code: str) -> ItemStatus:
    """The outcome of an item that the plan itself leaves out: refused with the ``code`` of an error, else skipped."""
    return "refused" if code else "skipped"


def is_missing(row: Row) -> bool:
    """Whether what was done of an item is not there any more, as verify saw."""
    seen = row.passes.get("verify")
    return seen is not None and seen.status == "missing" and row.outcome.status not in NOT_DONE


def is_to_undo(row: Row) -> bool:
    """Whether an undo has anything to do with the item: it was done, or left a result, and is not undone yet."""
    undone = row.passes.get("undo")
    if undone is not None and undone.status not in ("open", "failed", "refused"):
        return False
    return row.outcome.status not in NOT_DONE or bool(row.outcome.result)


@dataclass(frozen=True)
class PassState:
    """How far a pass is. ``counts`` are the items per server ("" for none) and status, each item once.

    ``further`` are the same for the other servers of items that several servers were asked for.
    """

    begun: int = 0
    finished: int = 0
    round: int = 0
    bytes: int = 0
    begun_by: str = ""
    begun_ms: int | None = None
    ended_ms: int | None = None
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    further: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def by_server(self) -> dict[str, dict[str, int]]:
        """What each server was touched by. An item that several servers were asked for counts for each of them."""
        return added_up((self.counts, self.further))

    @property
    def totals(self) -> dict[str, int]:
        totals: dict[str, int] = {}
        for counts in self.counts.values():
            for status, n in counts.items():
                totals[status] = totals.get(status, 0) + n
        return totals

    @property
    def settled(self) -> int:
        return sum(self.totals.values())

    def as_json(self) -> dict[str, Any]:
        return {
            "chunks_finished": self.finished,
            "settled": self.settled,
            "bytes": self.bytes,
            "begun_ms": self.begun_ms,
            "ended_ms": self.ended_ms,
            "totals": self.totals,
        }


def added_up(all_counts: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """The sum of counts per server and status."""
    total: dict[str, dict[str, int]] = {}
    for counts in all_counts:
        for name, by_status in counts.items():
            row = total.setdefault(name, {})
            for status, n in by_status.items():
                row[status] = row.get(status, 0) + n
    return total


_NO_PASS: Final = PassState()


@dataclass(frozen=True)
class Batch:
    """A batch as it stands. ``order`` is what was asked for, ``servers`` those that its plan names, in order.

    ``types`` are the types of those and of all that were configured when it began.
    """

    id: str
    state: State
    kind: str
    order: Mapping[str, Any] = field(default_factory=dict)
    servers: tuple[str, ...] = ()
    types: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    items: int = 0
    chunks: int = 0
    bytes: int = 0
    concurrency: int = 1
    created_ms: int = 0
    frozen: bool = False
    #: Whether the worker that planned it has matched each study against the filters itself; 0.1 did not.
    filters_applied: bool = False
    planner: str = ""
    coordinator: str = ""
    current: Pass | None = None
    planned: Mapping[str, int] = field(default_factory=dict)
    passes: Mapping[Pass, PassState] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """``concurrency``, as version 0.1 named it."""
        return self.concurrency

    def of(self, which: Pass) -> PassState:
        return self.passes.get(which, _NO_PASS)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """The items per server: how many are ``planned``, and what became of them when they were applied.

        An item that several servers were asked for counts for each of them.
        """
        applied = self.of("apply").by_server
        names = dict.fromkeys((*self.servers, *filter(None, applied)))
        return {name: {"planned": self.planned.get(name, 0), **applied.get(name, {})} for name in names}

    @property
    def outcomes(self) -> dict[str, dict[str, int]]:
        """What became of the items on each server ("" for none), in all passes but the survey."""
        return added_up(state.by_server for which, state in self.passes.items() if which != "survey")

    @property
    def settled(self) -> int:
        """How many items are settled in the pass that the batch is in; in ``apply``, if it is in none."""
        in_pass = self.current if self.current and self.state in (*ACTIVE, "paused") else "apply"
        return self.of(in_pass).settled

    @property
    def over(self) -> bool:
        return self.state in ("planned", "cancelled", "done", "undone")

    @property
    def stated(self) -> dict[str, str | None]:
        """Who requested its order, and why, as far as that was given."""
        return {name: text or None for name, text in stated(self.order).items()}

    def as_json(self) -> dict[str, Any]:
        return {
            "batch_id": self.id,
            "name": self.name,
            "kind": self.kind,
            "state": self.state,
            "pass": self.current,
            "items": self.items,
            "bytes": self.bytes,
            "settled": self.settled,
            "created_ms": self.created_ms,
            "warnings": list(self.warnings),
            "totals": self.of("apply").totals,
            "passes": {name: found.as_json() for name, found in self.passes.items()},
            "servers": [
                {
                    "server_name": name,
                    "server_type": self.types.get(name) or None,
                    "planned": self.planned.get(name, 0),
                    **self.outcomes.get(name, {}),
                }
                for name in dict.fromkeys((*self.servers, *filter(None, self.outcomes)))
            ],
        }


class Batches:
    """The batches in a ledger. Safe for threads."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._redis = ledger.client
        self._keep_ms = ledger.keep_ms
        self._grace_ms = ledger.grace_ms
        script = self._redis.register_script
        self._open, self._freeze, self._fill = script(_OPEN), script(_FREEZE), script(_FILL)
        self._record, self._end_chunk, self._reopen = script(_RECORD), script(_END_CHUNK), script(_REOPEN)
        self._begin, self._end_pass, self._take = script(_BEGIN), script(_END_PASS), script(_TAKE)
        self._steer, self._pause, self._resume = script(_STEER), script(_PAUSE), script(_RESUME)
        self._state, self._written_on = script(_STATE), script(_WRITTEN_ON)

    # --- the plan -------------------------------------------------------------------------------------------

    def open(
        self,
        batch_id: str,
        *,
        kind: str,
        order: Mapping[str, Any],
        servers: Mapping[str, str] | None = None,
        concurrency: int,
        name: str = "",
    ) -> bool:
        """Begin to plan a batch; False if it is known. ``servers`` are those it is about, by name and type.

        What no coordinator begins is forgotten after as long as results are kept.
        """
        keys = [self._key(batch_id), self._ledger.key("batches")]
        args: list[str | int] = [batch_id, kind, json.dumps(dict(servers or {})), _dumped(order), concurrency, name]
        return bool(self._open(keys=keys, args=[*args, self._keep_ms]))

    def begin_plan(self, batch_id: str) -> str:
        """Begin the plan, once more if another planner has not come to its end; gives the new planner's token."""
        token = uuid.uuid4().hex[:12]
        before = cast(str | None, self._redis.hget(self._key(batch_id), "planner"))
        with self._redis.pipeline() as pipe:
            pipe.hset(self._key(batch_id), "planner", token)
            if before:
                pipe.delete(*(self._key(batch_id, f":{part}:{before}") for part in ("plan", "outcomes", "results")))
            pipe.execute()
        return token

    def plan_chunks(self, batch_id: str, token: str, chunks: Mapping[int, str]) -> None:
        """Write down chunks by their number: lines as the top of this module says, without the last line's end."""
        key = self._key(batch_id, f":plan:{token}")
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hset(key, mapping={str(number): cast(Any, deflated(lines)) for number, lines in chunks.items()})
            pipe.pexpire(key, self._keep_ms)
            pipe.pexpire(self._key(batch_id), self._keep_ms)
            self._written_on(keys=[self._key(batch_id)], client=pipe)
            pipe.execute()

    def leave_out_planned(self, batch_id: str, token: str, left_out: Mapping[int, tuple[str, str]]) -> None:
        """Items of whole chunks, by their number, that the plan itself skips or, with a code, refuses; and why."""
        by_chunk: dict[int, list[list[Any]]] = {}
        for number, (code, why) in left_out.items():
            chunk, at = divmod(number, CHUNK_ITEMS)
            by_chunk.setdefault(chunk, []).append([at, "", code, why, {}])
        with self._redis.pipeline(transaction=False) as pipe:
            for number, (code, _) in left_out.items():
                pipe.setrange(self._key(batch_id, f":outcomes:{token}"), number, LETTERS[left_out_as(code)])
            for chunk, rows in by_chunk.items():
                pipe.hset(self._key(batch_id, f":results:{token}"), str(chunk), cast(Any, _packed(rows)))
            for part in ("outcomes", "results"):
                pipe.pexpire(self._key(batch_id, f":{part}:{token}"), self._keep_ms)
            pipe.execute()

    def freeze(  # noqa: PLR0913 - what a plan comes to
        self,
        batch_id: str,
        token: str,
        *,
        items: int,
        planned: Mapping[str, int],
        servers: Mapping[str, str],
        size_bytes: int = 0,
        left_out: Mapping[tuple[str, ItemStatus], int] | None = None,
        warnings: Sequence[str] = (),
    ) -> bool:
        """The plan is complete and does not change any more; the batch stays ``planning`` until it has a coordinator.

        False: another planner has taken over, or the batch was cancelled meanwhile.
        """
        fields: dict[str, Any] = {f"n:plan:{name or _NO_SERVER}": n for name, n in planned.items()}
        fields.update({f"n:apply:{name or _NO_SERVER}:{how}": n for (name, how), n in (left_out or {}).items()})
        fields.update(items=items, chunks=-(-items // CHUNK_ITEMS), bytes=size_bytes)
        fields.update(servers=json.dumps(dict(servers)), warnings=json.dumps(list(warnings)))
        parts = (f":outcomes:{token}", f":results:{token}", ":outcomes:apply", ":results:apply")
        keys = [self._key(batch_id), *(self._key(batch_id, part) for part in parts)]
        args: Sequence[Any] = [token, *(part for pair in fields.items() for part in pair)]
        return bool(self._freeze(keys=keys, args=args))

    def set_fleet(self, batch_id: str, types: Mapping[str, str]) -> None:
        """Say of all configured servers what type they are: a producer does not know, and an upload may go to any."""
        self._redis.hset(self._key(batch_id), "fleet", json.dumps(dict(types)))

    # --- its items ------------------------------------------------------------------------------------------

    def chunk_rows(self, batch: Batch, chunk: int, passes: Sequence[Pass]) -> list[Row]:
        """The items of a chunk, in order, with what became of each so far in ``passes``."""
        found = next(self._read(batch, [chunk], passes))
        items = [one.item for one in found[passes[0]]]
        return [Row(item, {which: found[which][at] for which in passes}) for at, item in enumerate(items)]

    def items(self, batch: Batch, chunk: int, which: Pass = "apply") -> list[ItemOutcome]:
        """The items of a chunk, in order, with what became of each so far in a pass."""
        return next(self._read(batch, [chunk], [which]))[which]

    def rows(self, batch: Batch, passes: Sequence[Pass] = PASSES) -> Iterator[Row]:
        """Every item in the order of the plan, with what became of it in ``passes``, some chunks at a time."""
        begun = [which for which in passes if which == "apply" or which in batch.passes]
        for some in _some(batch.chunks, _CHUNKS_READ):
            for found in self._read(batch, some, begun):
                for at, one in enumerate(found[begun[0]]):
                    yield Row(one.item, {which: found[which][at] for which in begun})

    def report(self, batch: Batch, which: Pass = "apply") -> Iterator[ItemOutcome]:
        """What became of every item in a pass, in the order of the plan."""
        for some in _some(batch.chunks, _CHUNKS_READ):
            for found in self._read(batch, some, [which]):
                yield from found[which]

    def troubled(self, batch: Batch, which: Pass = "apply") -> Iterator[ItemOutcome]:
        """What failed, was refused, or is not as it should be; only its chunks are read."""
        letters = frozenset(LETTERS[cast(ItemStatus, status)] for status in TROUBLE)
        for chunk in self._chunks_with(batch, which, letters):
            yield from (one for one in self.items(batch, chunk, which) if one.status in TROUBLE)

    def failures(self, batch: Batch, limit: int, which: Pass = "apply") -> list[ItemOutcome]:
        return list(islice(self.troubled(batch, which), limit))

    def record_outcomes(
        self, batch: Batch, which: Pass, chunk: int, outcomes: Iterable[ItemOutcome], *, job_id: str, fence: int
    ) -> None:
        """Write outcomes of a chunk down, each once, as the holder of a job; `LeaseLost` if it is another's now.

        An outcome that is ``open`` leaves the item open and keeps what it says for who looks, or for the next attempt.
        """
        recorded = list(outcomes)
        if not recorded:
            return
        rows, changed = self._merged(batch, which, chunk, recorded)
        carried = sum(_carried(one) for one in recorded)
        args: list[Any] = [fence, chunk, _packed(rows.values()) if changed else ""]
        args += [f"{which}:bytes", carried]
        for one in recorded:
            if one.status != "open":
                args += _counted(which, _as_stored(one, rows))
        parts = (f":outcomes:{which}", f":results:{which}")
        keys = [self._key(batch.id), *(self._key(batch.id, part) for part in parts), self._ledger.key("job", job_id)]
        if int(self._record(keys=keys, args=args)) < 0:
            raise LeaseLost

    def _merged(
        self, batch: Batch, which: Pass, chunk: int, outcomes: Sequence[ItemOutcome]
    ) -> tuple[dict[int, list[Any]], bool]:
        """The rows of a chunk by their places, with what is new in them; whether anything is."""
        new: dict[int, list[Any]] = {}
        for one in outcomes:
            row: list[Any] = [one.item.number % CHUNK_ITEMS, one.server, one.code, one.message[:300], dict(one.result)]
            if any(row[1:]):
                new[row[0]] = row
        blob = ask_raw(self._redis, "HGET", self._key(batch.id, f":results:{which}"), chunk)
        rows: dict[int, list[Any]] = {row[0]: row for row in _rows(cast(bytes | None, blob))}
        for place, row in new.items():  # whoever says nothing of it does not take back what an attempt has written
            row[4] = row[4] or rows.get(place, row)[4]
        return {**rows, **new}, bool(new)

    def _read(
        self, batch: Batch, chunks: Iterable[int], passes: Sequence[Pass]
    ) -> Iterator[dict[Pass, list[ItemOutcome]]]:
        """By pass, the items of each of the ``chunks``; all read in one go."""
        wanted = [str(chunk) for chunk in chunks]
        if not wanted:
            return
        first, last = int(wanted[0]) * CHUNK_ITEMS, (int(wanted[-1]) + 1) * CHUNK_ITEMS - 1
        with self._redis.pipeline(transaction=False) as pipe:
            ask_raw(pipe, "HMGET", self._key(batch.id, f":plan:{batch.planner}"), *wanted)
            for which in passes:
                pipe.getrange(self._key(batch.id, f":outcomes:{which}"), first, last)
                ask_raw(pipe, "HMGET", self._key(batch.id, f":results:{which}"), *wanted)
            plans, *found = pipe.execute()
        for place, (chunk, plan) in enumerate(zip(wanted, plans, strict=True)):
            items = _items(batch, int(chunk), plan)
            start = int(chunk) * CHUNK_ITEMS - first
            yield {
                which: _outcomes(items, found[2 * n][start : start + len(items)], found[2 * n + 1][place])
                for n, which in enumerate(passes)
            }

    def _chunks_with(self, batch: Batch, which: Pass, letters: frozenset[str]) -> Iterator[int]:
        """The chunks that have an item with one of ``letters``."""
        for some in _some(batch.chunks, 100):
            first, last = some[0] * CHUNK_ITEMS, min((some[-1] + 1) * CHUNK_ITEMS, batch.items) - 1
            found = str(self._redis.getrange(self._key(batch.id, f":outcomes:{which}"), first, last))
            found = found.ljust(last - first + 1, "\0")
            for chunk in some:
                start = chunk * CHUNK_ITEMS - first
                if not letters.isdisjoint(found[start : start + CHUNK_ITEMS]):
                    yield chunk

    # --- its course -----------------------------------------------------------------------------------------

    def take(self, batch_id: str, job_id: str) -> str | None:
        """Become the batch's coordinator; the id of the job that is, if there is another under way."""
        return str(self._take(keys=[self._key(batch_id)], args=[job_id, self._ledger.key("job", "")])) or None

    def begin(self, batch_id: str, which: Pass, *, job_id: str, out_of: Sequence[State]) -> bool:
        """Begin a pass as the batch's coordinator, if the batch is in one of the states ``out_of``.

        True also if this coordinator has begun it before.
        """
        keys = [self._key(batch_id), *self._all_keys(batch_id)]
        return bool(self._begin(keys=keys, args=[job_id, which, STATE_OF[which], *out_of]))

    def reopen(self, batch: Batch, which: Pass, statuses: Iterable[ItemStatus]) -> int:
        """Open the items again that ended so, with their chunks and those that have open items; how many chunks."""
        opened = frozenset(statuses)
        letters = frozenset(LETTERS[status] for status in opened) | {"\0"}
        chunks = 0
        for chunk in self._chunks_with(batch, which, letters):
            args: list[Any] = [which, chunk]
            for one in self.items(batch, chunk, which):
                if one.status in opened:
                    args += _counted(which, one)
            parts = (f":outcomes:{which}", f":ended:{which}")
            self._reopen(keys=[self._key(batch.id), *(self._key(batch.id, part) for part in parts)], args=args)
            chunks += 1
        return chunks

    def reopen_missing(self, batch: Batch) -> int:
        """Open what verify found missing as if it had never been applied; how many chunks have any."""
        chunks = 0
        for chunk in self._chunks_with(batch, "verify", frozenset(LETTERS["missing"])):
            args: list[Any] = ["apply", chunk]
            lost = [row for row in self.chunk_rows(batch, chunk, ["apply", "verify"]) if is_missing(row)]
            for row in lost:
                args += _counted("apply", row.outcome)
            places = {row.item.number % CHUNK_ITEMS for row in lost}
            results, parts = self._key(batch.id, ":results:apply"), (":outcomes:apply", ":ended:apply")
            blob = ask_raw(self._redis, "HGET", results, chunk)
            kept = _packed(row for row in _rows(cast(bytes | None, blob)) if row[0] not in places)
            with self._redis.pipeline() as pipe:  # both, or a server's count would be looked for in vain
                ask_raw(pipe, "HSET", results, chunk, kept)
                self._reopen(
                    keys=[self._key(batch.id), *(self._key(batch.id, part) for part in parts)], args=args, client=pipe
                )
                pipe.execute()
            chunks += 1
        return chunks

    def forget_pass(self, batch: Batch, which: Pass) -> None:
        """A pass begins again from nothing."""
        fields = [f"{which}:finished", f"{which}:bytes"]
        fields += [
            f"{letter}:{which}:{server or _NO_SERVER}:{status}"
            for letter, by_server in (("n", batch.of(which).counts), ("m", batch.of(which).further))
            for server, counts in by_server.items()
            for status in counts
        ]
        with self._redis.pipeline() as pipe:
            pipe.hdel(self._key(batch.id), *fields)
            pipe.delete(*(self._key(batch.id, part) for part in _parts(which)))
            pipe.execute()

    def end_pass(self, batch_id: str, which: Pass, to: State) -> bool:
        """The pass is over; the batch goes on to ``to``, unless somebody has steered it elsewhere."""
        return bool(self._end_pass(keys=[self._key(batch_id)], args=[which, STATE_OF[which], to]))

    def fill(self, batch: Batch, which: Pass, *, due_in_s: float | None = None) -> list[DueJob]:
        """Write down jobs for the next chunks, as many as may be open at a time, and give them back to be sent.

        Should their messages get lost, they are due after the grace period, or after ``due_in_s``.
        """
        template = json.dumps(_message(batch, which))[:-1] + ', "chunk": '
        delay_ms = self._grace_ms if due_in_s is None else int(due_in_s * 1000)
        keys = [self._key(batch.id), self._key(batch.id, f":ended:{which}"), self._ledger.key("due")]
        args: Sequence[Any] = [
            batch.id,
            which,
            STATE_OF[which],
            self._ledger.key("job", ""),
            CHUNK_TASK,
            template,
            delay_ms,
            _RECORD_KEEP_MS,
            int(due_in_s is None),
        ]
        return [DueJob(job_id, CHUNK_TASK, json.loads(job)) for job_id, job in self._fill(keys=keys, args=args)]

    def end_chunk(self, batch_id: str, which: Pass, chunk: int) -> bool:
        """The chunk is over; True if with it the whole pass is."""
        keys = [self._key(batch_id), self._key(batch_id, f":ended:{which}")]
        return bool(self._end_chunk(keys=keys, args=[which, chunk]))

    def open_chunks(self, batch: Batch, which: Pass) -> list[int]:
        """The chunks that were begun and are not over."""
        bits = cast(bytes | None, ask_raw(self._redis, "GET", self._key(batch.id, f":ended:{which}"))) or b""
        begun = batch.of(which).begun
        bits = bits.ljust(-(-begun // 8), b"\0")
        full = {place for place, byte in enumerate(bits) if byte == 0xFF}
        return [
            chunk for chunk in range(begun) if chunk // 8 not in full and not bits[chunk // 8] >> (7 - chunk % 8) & 1
        ]

    def state(self, batch_id: str) -> str:
        """The state; it is over when the coordinator's job is, or the planner is gone. "" if there is no such batch."""
        args: list[str | int] = [self._ledger.key("job", ""), batch_id, _PLANNER_GONE_MS, json.dumps([_PLANNER_GONE])]
        state, ended = self._state(keys=[self._key(batch_id)], args=args)
        if ended:
            self.expire(batch_id)
        return str(state)

    def steer(self, batch_id: str, to: State, *, out_of: Sequence[State]) -> str:
        """Move the batch on to ``to`` if it is in one of the states ``out_of``; its state then."""
        return str(self._steer(keys=[self._key(batch_id)], args=[to, *out_of]))

    def pause(self, batch_id: str) -> str:
        """Begin nothing new until it is resumed; the state then."""
        return str(self._pause(keys=[self._key(batch_id)]))

    def resume(self, batch_id: str) -> str:
        """Go on where it was paused; the state then."""
        state = str(self._resume(keys=[self._key(batch_id)]))
        self.wake_now(batch_id)
        return state

    def cancel(self, batch_id: str) -> str:
        """End it; the state then. A plan that nobody has begun to apply is dropped with it."""
        state = self.steer(batch_id, "cancelled", out_of=[*ACTIVE, "planned", "paused"])
        self.wake_now(batch_id)
        return state

    def cancel_job(self, job_id: str, *, mark: bool = False) -> str:
        """Cancel a job, as `Ledger.cancel`; of one that a batch has under way, or any piece of a batch, the batch.

        A batch is never cancelled by halves: its pieces would lose what they know of items that they have begun.
        """
        task, batch_id = self._task_and_batch(job_id)
        if not batch_id:
            return self._ledger.cancel(job_id, mark=mark)
        self.cancel(batch_id)
        if task != CHUNK_TASK:
            self._ledger.cancel(job_id, unless="taken")
        return self._ledger.read_record(job_id).get("state", "")

    def batch_of(self, job_id: str) -> str:
        """The batch that `cancel_job` would cancel with the job; "" if there is none."""
        return self._task_and_batch(job_id)[1]

    def _task_and_batch(self, job_id: str) -> tuple[str, str]:
        task, job = self._ledger.kind_of(job_id)
        return task, self._batch_of(job_id, task, str(job.get("batch_id") or ""))

    def _batch_of(self, job_id: str, task: str, named: str) -> str:
        """The batch that a job has under way, or is a piece of, or is called like; "" if there is none.

        ``named`` is the batch that the job's message names.
        """
        if named and (task == CHUNK_TASK or self._redis.hget(self._key(named), "conductor") == job_id):
            return named
        try:
            check_batch_id(job_id)
        except InvalidRequest:
            return ""
        return job_id if self.state(job_id) else ""

    def ordering_job(self, job_id: str, task: str) -> tuple[str, Batch | None]:
        """The job that ordered what a job does, and its batch: of a chunk, the job that began its pass; else itself."""
        piece = chunk_pass(job_id) if task == CHUNK_TASK else None
        batch = self.get(piece[0]) if piece else None
        return (batch.of(piece[1]).begun_by, batch) if piece and batch else (job_id, None)

    def wake_now(self, batch_id: str) -> None:
        """Have all who wait at the batch look again now: it has been steered elsewhere."""
        batch = self.get(batch_id)
        if batch is None:
            return
        jobs = (
            [chunk_job(batch, batch.current, chunk).job_id for chunk in self.open_chunks(batch, batch.current)]
            if batch.current
            else []
        )
        for job_id in (*jobs, batch.coordinator):
            self._ledger.wake_now(job_id, by_sweeper=True)

    def expire(self, batch_id: str) -> None:
        """It is over: kept as long as results are."""
        with self._redis.pipeline(transaction=False) as pipe:
            for key in (self._key(batch_id), *self._all_keys(batch_id)):
                pipe.pexpire(key, self._keep_ms)
            pipe.execute()

    def get(self, batch_id: str) -> Batch | None:
        """The batch as it stands; None if there is none of that id."""
        self.state(batch_id)
        fields = cast(dict[str, str], self._redis.hgetall(self._key(batch_id)))
        return _batch(batch_id, fields) if "kind" in fields else None

    def published(self, batch: Batch) -> dict[str, Any]:
        """The batch as it stands, with who requested its order and each of its passes, and why.

        It is not for logs and errors: what people write there may name a patient.
        """
        document = {**batch.as_json(), **batch.stated}
        for which, state in batch.passes.items():
            record = self._ledger.read_record(state.begun_by) if state.begun_by else {}
            document["passes"][which].update({name: text or None for name, text in stated(record).items()})
        return document

    def warn(self, batch: Batch, sentences: Iterable[str]) -> None:
        """Add what has to be known of its order to the warnings of a batch, once: for coordinator and planner."""
        new = [sentence for sentence in sentences if sentence not in batch.warnings]
        if new:
            self._redis.hset(self._key(batch.id), "warnings", json.dumps([*batch.warnings, *new]))

    def latest(self, limit: int | None) -> list[Batch]:
        """So many that are known, the latest first; forgotten ones among them are left out."""
        last = -1 if limit is None else limit - 1
        ids = cast(list[str], self._redis.zrevrange(self._ledger.key("batches"), 0, last))
        found = {batch_id: self.get(batch_id) for batch_id in ids}
        gone = [batch_id for batch_id, batch in found.items() if batch is None]
        if gone:
            self._redis.zrem(self._ledger.key("batches"), *gone)
        return [batch for batch in found.values() if batch is not None]

    def list(self) -> list[Batch]:
        """All that are known, the latest first."""
        return self.latest(None)

    def _key(self, batch_id: str, part: str = "") -> str:
        """Raises InvalidRequest, or an id such as ``B:outcomes:apply`` would be taken for another key of batch B."""
        return self._ledger.key("batch", check_batch_id(batch_id) + part)

    def _all_keys(self, batch_id: str) -> Sequence[str]:
        token = cast(str | None, self._redis.hget(self._key(batch_id), "planner"))
        parts = [f":plan:{token}", *(part for which in PASSES for part in _parts(which))]
        return [self._key(batch_id, part) for part in parts]


def _some(chunks: int, at_a_time: int) -> Iterator[range]:
    for first in range(0, chunks, at_a_time):
        yield range(first, min(first + at_a_time, chunks))


def deflated(text: str) -> bytes:
    return zlib.compress(text.encode())


def chunk_job(batch: Batch, which: Pass, chunk: int) -> DueJob:
    """The job that does a chunk in the current round of a pass."""
    number = batch.of(which).round
    message = {**_message(batch, which), "chunk": chunk, **({"round": number} if number else {})}
    return DueJob(f"{batch.id}.{which}.{chunk}" + (f".{number}" if number else ""), CHUNK_TASK, message)


def chunk_pass(job_id: str) -> tuple[str, Pass] | None:
    """The batch and the pass that a chunk's job belongs to; None for an id that no `chunk_job` has."""
    found = _CHUNK_ID(job_id)
    return (found["batch"], cast(Pass, found["which"])) if found else None


def _message(batch: Batch, which: Pass) -> dict[str, Any]:
    named = {"name": batch.name} if batch.name else {}
    return {"version": 1, "batch_id": batch.id, **named, "pass": which}


def _parts(which: Pass) -> tuple[str, ...]:
    return (f":outcomes:{which}", f":results:{which}", f":ended:{which}")


def _items(batch: Batch, chunk: int, blob: bytes | None) -> list[Item]:
    if blob is None:
        return []
    found = []
    for number, line in enumerate(zlib.decompress(blob).decode().split("\n"), start=chunk * CHUNK_ITEMS):
        server, size, text = line.split("\t", 2)
        name = "" if server == _NO_SERVER else batch.servers[int(server)]
        found.append(Item(number, name, text, None if size == "-" else int(size)))
    return found


def _packed(rows: Iterable[Sequence[Any]]) -> bytes:
    """Rows (place in the chunk, server, code, message, result) as columns, which deflate best.

    Rows whose results have the same fields go together: their fields' names, then a list for each column.
    """
    alike: dict[tuple[str, ...], list[list[Any]]] = {}
    for *said, result in rows:
        alike.setdefault(tuple(result), []).append([*said, *result.values()])
    tables = [[list(names), *map(list, zip(*table, strict=True))] for names, table in alike.items()]
    return deflated(json.dumps(tables, separators=(",", ":")))


def _rows(blob: bytes | None) -> Iterator[list[Any]]:
    for names, *columns in json.loads(zlib.decompress(blob)) if blob else ():
        for at, server, code, message, *values in zip(*columns, strict=True):
            yield [at, server, code, message, dict(zip(names, values, strict=True))]


def _outcomes(items: Sequence[Item], letters: str, blob: bytes | None) -> list[ItemOutcome]:
    letters = letters.ljust(len(items), "\0")
    found = [ItemOutcome(item, _STATUSES[letter]) for item, letter in zip(items, letters, strict=True)]
    for at, server, code, message, result in _rows(blob):
        found[at] = replace(found[at], server=server, code=code, message=message, result=result)
    return found


def _carried(one: ItemOutcome) -> int:
    if one.status in NOT_DONE:
        return 0
    return int(one.result.get("size_bytes") or one.item.size_bytes or 0)


def _counted(which: Pass, one: ItemOutcome) -> list[Any]:
    """What the scripts need to count an item: once among all, and once more for each further server."""
    number, own = one.item.number, one.server_name
    args: list[Any] = [number, LETTERS[one.status], f"n:{which}:{own or _NO_SERVER}:{one.status}"]
    for name, status in one.outcomes.items():
        if name != own:
            args += [number, "", f"m:{which}:{name}:{status}"]
    return args


def _as_stored(one: ItemOutcome, rows: Mapping[int, Sequence[Any]]) -> ItemOutcome:
    """The outcome as a later reader finds it, who has to come to the same counts."""
    row = rows.get(one.item.number % CHUNK_ITEMS)
    return one if row is None else replace(one, server=row[1], result=row[4])


def _batch(batch_id: str, fields: Mapping[str, str]) -> Batch:
    planned: dict[str, int] = {}
    counts: dict[str, dict[str, dict[str, int]]] = {which: {} for which in PASSES}
    further: dict[str, dict[str, dict[str, int]]] = {which: {} for which in PASSES}
    for name, count in fields.items():
        match name.split(":"):
            case ["n", "plan", server]:
                planned["" if server == _NO_SERVER else server] = int(count)
            case ["n", which, server, status] if int(count):
                counts[which].setdefault("" if server == _NO_SERVER else server, {})[status] = int(count)
            case ["m", which, server, status] if int(count) > 0:
                further[which].setdefault(server, {})[status] = int(count)
    return Batch(
        id=batch_id,
        state=cast(State, fields["state"]),
        kind=fields["kind"],
        order=_read_order(fields["order"]),
        servers=tuple(json.loads(fields["servers"])),
        types={**json.loads(fields["servers"]), **json.loads(fields.get("fleet", "{}"))},
        name=fields.get("name", ""),
        items=int(fields["items"]),
        chunks=int(fields["chunks"]),
        bytes=int(fields.get("bytes", 0)),
        concurrency=int(fields["width"]),
        created_ms=int(fields["created_ms"]),
        frozen="frozen" in fields,
        filters_applied="filters_applied" in fields,
        planner=fields.get("planner", ""),
        coordinator=fields.get("conductor", ""),
        current=cast(Pass | None, fields.get("pass")),
        planned=planned,
        passes={
            which: replace(_pass_state(fields, which, counts[which]), further=further[which])
            for which in PASSES
            if f"{which}:begun_by" in fields or counts[which]
        },
        warnings=tuple(json.loads(fields.get("warnings", "[]"))),
    )


def _dumped(order: Mapping[str, Any]) -> str:
    """An order as the ledger has it. A worker of version 0.1 knows ``backup`` as ``keep``, and must not overlook it."""
    old = {"keep": order["backup"]} if "backup" in order else {}
    return json.dumps({**order, **old})


def _read_order(text: str) -> dict[str, Any]:
    """The order of a batch in the words of its message; one that version 0.1 wrote has ``keep`` for ``backup``."""
    order: dict[str, Any] = json.loads(text)
    kept = order.pop("keep", None)
    return order if kept is None else {**order, "backup": order.get("backup", kept)}


def _pass_state(fields: Mapping[str, str], which: str, counts: Mapping[str, Mapping[str, int]]) -> PassState:
    def number(name: str) -> int:
        return int(fields.get(f"{which}:{name}", 0))

    return PassState(
        begun=number("next"),
        finished=number("finished"),
        round=number("round"),
        bytes=number("bytes"),
        begun_by=fields.get(f"{which}:begun_by", ""),
        begun_ms=number("begun_ms") or None,
        ended_ms=number("ended_ms") or None,
        counts=counts,
    )
