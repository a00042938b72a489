"""What the ledger holds of a batch: its frozen plan, what became of each item, and how far it is.

No PACS and no Celery here, and nothing of what an item means: an item is a server and one line of text. A batch is
stored in about its items' text and one byte each, however many there are; nothing here holds them all.

Keys, all below ``courier:batch:ID``:

    (itself)    hash    state, kind, servers, width, items, chunks, next, finished … and a count per server and status
    :plan       hash    chunk number → its items, one per line: the server's position and the item's text
    :seen       set     what has been planned already; only while it is planned
    :outcomes   string  one letter per item; a zero byte is open
    :notes      hash    item number → why it failed
    :ended      bitmap  the chunks that are over

States: ``planning`` → ``running`` ⇄ ``paused`` → ``done`` | ``cancelled``; a dry run ends as ``planned``. A chunk is a
job of the ledger, ``ID.NUMBER``, so lease, fence and retry are a job's; at most ``width`` chunks are open at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Literal, cast

from worker.ledger import PREFIX, LeaseLost, Ledger

State = Literal["planning", "planned", "running", "paused", "cancelled", "done"]
ItemStatus = Literal["open", "deleted", "hidden", "not_there", "refused", "failed"]
LETTERS: Final[Mapping[ItemStatus, str]] = {
    "open": "\0",
    "deleted": "d",
    "hidden": "h",
    "not_there": "n",
    "refused": "r",
    "failed": "f",
}
_STATUSES: Final[Mapping[str, ItemStatus]] = {letter: status for status, letter in LETTERS.items()}
CHUNK_ITEMS: Final = 100
#: The task that does a chunk.
CHUNK_TASK: Final = "pacs.batch.chunk"
_PARTS: Final = ("", ":plan", ":seen", ":outcomes", ":notes", ":ended")

_NOW = "local t = redis.call('TIME'); local now = t[1] * 1000 + math.floor(t[2] / 1000)\n"

_OPEN = (
    _NOW
    + """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], 'state', 'planning', 'kind', ARGV[2], 'servers', ARGV[3], 'order', ARGV[4],
  'width', ARGV[5], 'items', 0, 'chunks', 0, 'next', 0, 'finished', 0, 'created_ms', now)
redis.call('ZADD', KEYS[2], now, ARGV[1])
return 1
"""
)

# The jobs are written down in the same step that counts them as under way: none can be lost between the two.
_FILL = (
    _NOW
    + """
local b = redis.call('HMGET', KEYS[1], 'state', 'next', 'chunks', 'finished', 'width')
if b[1] ~= 'running' then return 0 end
local next, chunks, finished, width = tonumber(b[2]), tonumber(b[3]), tonumber(b[4]), tonumber(b[5])
local begun = 0
while next < chunks and next - finished < width do
  local id = string.format('%s.%d', ARGV[1], next)
  redis.call('HSET', ARGV[2] .. id, 'state', 'queued', 'task', ARGV[3], 'job', string.format(ARGV[4], next),
    'attempts', 0, 'fence', 0, 'created_ms', now)
  redis.call('ZADD', KEYS[2], now, id)
  next = next + 1
  begun = begun + 1
end
redis.call('HSET', KEYS[1], 'next', next)
return begun
"""
)

# An outcome is written once; whoever comes late finds the item settled.
_RECORD = """
local holder = redis.call('HMGET', KEYS[4], 'fence', 'state')
if holder[1] ~= ARGV[1] or holder[2] ~= 'running' then return -1 end
local written = 0
for i = 2, #ARGV, 4 do
  local at = tonumber(ARGV[i])
  local letter = redis.call('GETRANGE', KEYS[2], at, at)
  if letter == '' or letter == '\\0' then
    redis.call('SETRANGE', KEYS[2], at, ARGV[i + 1])
    redis.call('HINCRBY', KEYS[1], ARGV[i + 2], 1)
    if ARGV[i + 3] ~= '' then redis.call('HSET', KEYS[3], at, ARGV[i + 3]) end
    written = written + 1
  end
end
return written
"""

_END_CHUNK = """
if redis.call('SETBIT', KEYS[2], ARGV[1], 1) == 0 then redis.call('HINCRBY', KEYS[1], 'finished', 1) end
return 1
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

# A batch whose own job is over (cancelled, dead) is nobody's any more: it stops.
_STATE = """
local state = redis.call('HGET', KEYS[1], 'state') or ''
local job = redis.call('HGET', KEYS[2], 'state')
if (state == 'planning' or state == 'running' or state == 'paused') and (job == 'done' or job == 'dead') then
  redis.call('HSET', KEYS[1], 'state', 'cancelled')
  return 'cancelled'
end
return state
"""


@dataclass(frozen=True)
class Item:
    """One thing to do: ``number`` in the batch, at which server, and what, in the words of the batch's kind."""

    number: int
    server: str
    text: str


@dataclass(frozen=True)
class Settled:
    """What became of an item, and why, where that has to be said."""

    item: Item
    status: ItemStatus
    code: str = ""
    message: str = ""

    def as_json(self, server_type: str) -> dict[str, Any]:
        return {
            "number": self.item.number,
            "server_name": self.item.server,
            "server_type": server_type,
            "study_uid": self.item.text,
            "status": self.status,
            "code": self.code,
            "message": self.message,
        }


@dataclass(frozen=True)
class Batch:
    """A batch as it stands. ``counts`` are the items per server and status; ``planned`` is one of them."""

    id: str
    state: State
    kind: str
    servers: tuple[str, ...]
    types: Mapping[str, str]
    order: Mapping[str, Any]
    items: int
    chunks: int
    begun: int
    finished: int
    created_ms: int
    counts: Mapping[str, Mapping[str, int]]
    warnings: tuple[str, ...] = ()

    @property
    def settled(self) -> int:
        return sum(n for counts in self.counts.values() for status, n in counts.items() if status != "planned")

    @property
    def over(self) -> bool:
        return self.state in ("planned", "cancelled", "done")

    def as_json(self) -> dict[str, Any]:
        return {
            "batch_id": self.id,
            "kind": self.kind,
            "state": self.state,
            "items": self.items,
            "settled": self.settled,
            "created_ms": self.created_ms,
            "warnings": list(self.warnings),
            "servers": [
                {"server_name": name, "server_type": self.types[name], **self.counts[name]} for name in self.servers
            ],
        }


class Batches:
    """The batches in a ledger. Safe for threads."""

    def __init__(self, ledger: Ledger) -> None:
        self._redis = ledger.client
        self._keep_ms = ledger.keep_ms
        script = self._redis.register_script
        self._open, self._fill, self._record = script(_OPEN), script(_FILL), script(_RECORD)
        self._end_chunk, self._steer, self._state = script(_END_CHUNK), script(_STEER), script(_STATE)

    # --- the plan -------------------------------------------------------------------------------------------

    def open(
        self, batch_id: str, *, kind: str, servers: Mapping[str, str], order: Mapping[str, Any], width: int
    ) -> bool:
        """Begin to plan a batch for ``servers``, by name and type; False if it is known."""
        keys = [_key(batch_id), PREFIX + "batches"]
        args: list[str | int] = [batch_id, kind, json.dumps(dict(servers)), json.dumps(dict(order)), width]
        return bool(self._open(keys=keys, args=args))

    def clear_plan(self, batch_id: str) -> None:
        """Forget what a planner that did not come to its end has left."""
        self._redis.delete(*(_key(batch_id, part) for part in (":plan", ":seen")))

    def unseen(self, batch_id: str, server: int, texts: Sequence[str]) -> list[str]:
        """Those of ``texts`` that are not planned yet: a list that is paged through can show one twice."""
        with self._redis.pipeline(transaction=False) as pipe:
            for text in texts:
                pipe.sadd(_key(batch_id, ":seen"), f"{server} {text}")
            return [text for text, added in zip(texts, pipe.execute(), strict=True) if added]

    def plan_chunk(self, batch_id: str, chunk: int, lines: Sequence[tuple[int, str]]) -> None:
        """Write down a chunk: servers by their position, and texts."""
        content = "\n".join(f"{server} {text}" for server, text in lines)
        self._redis.hset(_key(batch_id, ":plan"), str(chunk), content)

    def freeze(
        self, batch_id: str, *, chunks: int, planned: Mapping[str, int], warnings: Sequence[str], state: State
    ) -> None:
        """The plan is complete and does not change any more; a batch that was cancelled meanwhile stays so."""
        items = sum(planned.values())
        fields: dict[Any, Any] = {f"n:{server}:planned": count for server, count in planned.items()}
        fields.update(items=items, chunks=chunks, warnings=json.dumps(list(warnings)))
        with self._redis.pipeline() as pipe:
            pipe.hset(_key(batch_id), mapping=fields)
            pipe.delete(_key(batch_id, ":seen"))
            if items:
                pipe.setrange(_key(batch_id, ":outcomes"), items - 1, "\0")
            pipe.execute()
        self._steer(keys=[_key(batch_id)], args=[state, "planning"])

    # --- its items ------------------------------------------------------------------------------------------

    def items(self, batch: Batch, chunk: int) -> list[Settled]:
        """The items of a chunk, with what became of each so far."""
        content = cast(str | None, self._redis.hget(_key(batch.id, ":plan"), str(chunk)))
        lines = content.split("\n") if content else []
        first = chunk * CHUNK_ITEMS
        letters = str(self._redis.getrange(_key(batch.id, ":outcomes"), first, first + len(lines) - 1))
        found = []
        for number, (line, letter) in enumerate(zip(lines, letters, strict=True), start=first):
            server, _, text = line.partition(" ")
            found.append(Settled(Item(number, batch.servers[int(server)], text), _STATUSES[letter]))
        return self._with_notes(batch.id, found)

    def report(self, batch: Batch) -> Iterator[Settled]:
        """Every item in the order of the plan, a chunk at a time."""
        for chunk in range(batch.chunks):
            yield from self.items(batch, chunk)

    def failures(self, batch: Batch, limit: int) -> list[Settled]:
        """The first items that failed or were refused."""
        if not self._redis.hlen(_key(batch.id, ":notes")):
            return []
        return list(islice((one for one in self.report(batch) if one.status in ("failed", "refused")), limit))

    def settle(self, batch_id: str, outcomes: Iterable[Settled], *, job_id: str, fence: int) -> None:
        """Write outcomes down, each once, as the holder of a job; `LeaseLost` if it is another's now."""
        args: list[str | int] = [fence]
        for one in outcomes:
            note = json.dumps({"code": one.code, "message": one.message[:300]}) if one.code or one.message else ""
            args += [one.item.number, LETTERS[one.status], f"n:{one.item.server}:{one.status}", note]
        keys = [_key(batch_id), _key(batch_id, ":outcomes"), _key(batch_id, ":notes"), f"{PREFIX}job:{job_id}"]
        if len(args) > 1 and int(self._record(keys=keys, args=args)) < 0:
            raise LeaseLost

    def _with_notes(self, batch_id: str, found: list[Settled]) -> list[Settled]:
        noted = [one for one in found if one.status in ("failed", "refused")]
        if not noted:
            return found
        rows = cast(list[Any], self._redis.hmget(_key(batch_id, ":notes"), [str(one.item.number) for one in noted]))
        notes = {one.item.number: json.loads(row) for one, row in zip(noted, rows, strict=True) if row}
        return [Settled(one.item, one.status, **notes.get(one.item.number, {})) for one in found]

    # --- its course -----------------------------------------------------------------------------------------

    def fill(self, batch_id: str) -> None:
        """Write down jobs for the next chunks, as many as may be open at a time; the sweeper sends them."""
        job = json.dumps({"version": 1, "batch_id": batch_id, "chunk": 0}).replace("%", "%%")
        template = job.replace('"chunk": 0', '"chunk": %d')
        args = [batch_id, f"{PREFIX}job:", CHUNK_TASK, template]
        self._fill(keys=[_key(batch_id), PREFIX + "due"], args=args)

    def end_chunk(self, batch_id: str, chunk: int) -> None:
        self._end_chunk(keys=[_key(batch_id), _key(batch_id, ":ended")], args=[chunk])

    def open_chunks(self, batch: Batch) -> list[int]:
        """The chunks that were begun and are not over."""
        with self._redis.pipeline(transaction=False) as pipe:
            for chunk in range(batch.begun):
                pipe.getbit(_key(batch.id, ":ended"), chunk)
            return [chunk for chunk, ended in enumerate(pipe.execute()) if not ended]

    def state(self, batch_id: str) -> str:
        """The state, seen to be ``cancelled`` when the batch's own job is over; "" if there is none."""
        return str(self._state(keys=[_key(batch_id), f"{PREFIX}job:{batch_id}"]))

    def steer(self, batch_id: str, to: State, *, out_of: Sequence[State]) -> str:
        """Move the batch on to ``to`` if it is in one of the states ``out_of``; its state then."""
        return str(self._steer(keys=[_key(batch_id)], args=[to, *out_of]))

    def expire(self, batch_id: str) -> None:
        """It is over: kept as long as results are."""
        with self._redis.pipeline(transaction=False) as pipe:
            for part in _PARTS:
                pipe.pexpire(_key(batch_id, part), self._keep_ms)
            pipe.execute()

    def get(self, batch_id: str) -> Batch | None:
        fields = cast(dict[str, str], self._redis.hgetall(_key(batch_id)))
        return _batch(batch_id, fields) if "kind" in fields else None

    def list(self) -> list[Batch]:
        """All that are known, the latest first."""
        ids = cast(list[str], self._redis.zrevrange(PREFIX + "batches", 0, -1))
        found = {batch_id: self.get(batch_id) for batch_id in ids}
        gone = [batch_id for batch_id, batch in found.items() if batch is None]
        if gone:
            self._redis.zrem(PREFIX + "batches", *gone)
        return [batch for batch in found.values() if batch is not None]


def _batch(batch_id: str, fields: Mapping[str, str]) -> Batch:
    types: dict[str, str] = json.loads(fields["servers"])
    counts: dict[str, dict[str, int]] = {server: {"planned": 0} for server in types}
    for field, count in fields.items():
        if field.startswith("n:"):
            _, server, status = field.split(":")
            counts[server][status] = int(count)
    return Batch(
        id=batch_id,
        state=cast(State, fields["state"]),
        kind=fields["kind"],
        servers=tuple(types),
        types=types,
        order=json.loads(fields["order"]),
        items=int(fields["items"]),
        chunks=int(fields["chunks"]),
        begun=int(fields["next"]),
        finished=int(fields["finished"]),
        created_ms=int(fields["created_ms"]),
        counts=counts,
        warnings=tuple(json.loads(fields.get("warnings", "[]"))),
    )


def _key(batch_id: str, part: str = "") -> str:
    return f"{PREFIX}batch:{batch_id}{part}"
