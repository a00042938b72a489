"""How fast a server may be asked, over all workers, once it has asked for fewer requests.

A 429 (RFC 6585), or a 503 with Retry-After (RFC 9110 15.6.4), is no failure and costs a job none of its attempts. This
is the one place that decides how long a request, and so its job, waits after one:

* none is sent before the time in Retry-After, of at most ``jobs.retry_after_cap_s``;
* after it requests go out one by one, evenly: at first at half the rate at which the server refused one, then faster,
  so that this rate is reached again after a minute;
* the next such answer to a request that went out since halves the rate again; once the server accepts requests, a rate
  that was halved several times in a row doubles with every five of them, up to where the first halving had brought it;
* ten minutes without such an answer end the limit;
* a request waits up to `STAY_S` in its worker; if its turn comes later, its job is put aside until about then.

How long a job waits in all is ``jobs.max_wait_s`` (``worker/jobs/runner.py``). Who asks before each request is
``worker/pacs/guard.py``. Each decision is one Lua script by the Redis server's clock. Keys, beside the ledger's:

    slowed:NAME     hash   cut (requests per second after the last halving), ceiling (the rate at which the server
                           refused a request, the first of several in a row), cuts (how many), from_us (since when the
                           rate grows), turns (given since), next_us (the next free turn), later_us (when the last job
                           that was put aside looks again), until_us (the end of what Retry-After asked for), status
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import redis

from courier.ledger.slots import SLOTS
from courier.settings import PREFIX

SLOWED: Final = "slowed:"
#: A request waits so long for its turn in its worker; a job whose request would wait longer is put aside.
STAY_S: Final = 10.0
#: Jobs that are put aside look again within so long after their server may be asked.
SPREAD_S: Final = 60.0
#: So long after the last such answer a server may be asked as fast as before.
FORGOTTEN_S: Final = 600.0
#: Requests per second: the rate is never lowered below this, and first lowered from at least that.
LOWEST_PER_S: Final = 0.5
FIRST_PER_S: Final = 16.0
#: So many requests after a halving the next one is no longer in a row with it.
TURNS_BETWEEN: Final = 5

_RATE = (
    f"local turns_between = {TURNS_BETWEEN}"
    + """
local t = redis.call('TIME'); local us = t[1] * 1000000 + t[2]
local function at(value) return string.format('%.0f', value) end
local function limit(key)
  local names = {'cut', 'ceiling', 'cuts', 'from_us', 'turns', 'next_us', 'later_us', 'until_us', 'status'}
  local values, found = redis.call('HMGET', key, unpack(names)), {}
  if not values[1] then return nil end
  for i, name in ipairs(names) do found[name] = tonumber(values[i] or 0) end
  local seconds = math.max(0, us - found.from_us) / 1000000
  local doublings = math.min(seconds / 2, found.turns / turns_between, 30)
  found.per_s = math.min(found.cut * 2 ^ doublings, found.ceiling / 2) * (1 + seconds / 60)
  found.step_us = 1000000 / found.per_s
  found.free_us = math.max(us, found.next_us, found.until_us)
  return found
end
local function told(found, wait_us)
  return {found.cuts, string.format('%.6f', found.per_s), at(math.max(0, found.until_us - us)), at(wait_us),
    found.status}
end
"""
)

_READ = (
    _RATE
    + """
local rows = {}
for i, key in ipairs(KEYS) do
  local found = limit(key)
  rows[i] = found and told(found, found.free_us - us) or {0}
end
return rows
"""
)

# Jobs that are put aside come back evenly too, and all within a while: the rate may have grown by then.
_LATER = (
    f"local spread_us = {SPREAD_S * 1_000_000:.0f}"
    + """
local function later(key, found)
  local later_us = math.max(found.later_us, found.free_us) + found.step_us
  if later_us > found.free_us + spread_us then later_us = found.free_us + math.min(found.step_us, spread_us) end
  redis.call('HSET', key, 'later_us', at(later_us))
  return later_us - us
end
"""
)

# ARGV: how long the request may wait for its turn (us).
_TAKE = (
    _RATE
    + _LATER
    + """
local found = limit(KEYS[1])
if not found then return {0} end
if found.free_us - us > tonumber(ARGV[1]) then
  local row = told(found, later(KEYS[1], found))
  row[6] = 1
  return row
end
redis.call('HSET', KEYS[1], 'next_us', at(found.free_us + found.step_us))
redis.call('HINCRBY', KEYS[1], 'turns', 1)
return told(found, found.free_us - us)
"""
)

# Of many requests that were under way at one rate the first answer lowers it; all of them count for Retry-After.
# KEYS: slowed, slots. ARGV: how often the rate had been lowered when the request went out, Retry-After (us), the
# status, requests per second of this process; lowest, first, and how long the limit is kept (ms).
_LOWER = (
    _RATE
    + _LATER
    + """
local key, asked_us = KEYS[1], tonumber(ARGV[2])
local found = limit(key)
local until_us = math.max(found and found.until_us or 0, asked_us > 0 and us + asked_us or 0)
redis.call('HSET', key, 'until_us', at(until_us), 'status', ARGV[3])
if not found or tonumber(ARGV[1]) >= found.cuts then
  local processes = math.max(1, redis.call('HLEN', KEYS[2]))
  local per_s = found and found.per_s or math.max(tonumber(ARGV[6]), ARGV[4] * processes)
  local cut = math.max(tonumber(ARGV[5]), per_s / 2)
  local in_a_row = found and found.turns < turns_between
  local ceiling = math.max(in_a_row and found.ceiling or per_s, 2 * ARGV[5])
  redis.call('HSET', key, 'cut', string.format('%.6f', cut), 'ceiling', string.format('%.6f', ceiling), 'turns', 0,
    'next_us', at(us + 1000000 / cut), 'later_us', 0)
  redis.call('HINCRBY', key, 'cuts', 1)
end
redis.call('HSET', key, 'from_us', at(math.max(us, until_us)))
found = limit(key)
local kept_ms = math.max(tonumber(ARGV[7]), 100000 / found.cut) + math.max(0, until_us - us) / 1000
redis.call('PEXPIRE', key, math.ceil(kept_ms))
return told(found, later(key, found))
"""
)


@dataclass(frozen=True)
class ServerRate:
    """How fast ``server`` may be asked; ``per_s`` is None if it has not asked for fewer requests lately.

    None is sent before ``held_s`` is over. ``wait_s`` is how long the request, or the job, has to wait that was asked
    for, and ``is_turn`` False if it is the job: it is put aside. ``cuts`` counts how often the rate was lowered.
    """

    server: str
    cuts: int = 0
    per_s: float | None = None
    held_s: float = 0
    wait_s: float = 0
    status: int = 0
    is_turn: bool = True

    def __str__(self) -> str:
        """What is known, as a sentence."""
        if self.per_s is None:
            return f"{self.server} has not asked for fewer requests lately."
        held = f", and none in the next {self.held_s:.0f} s" if self.held_s >= 1 else ""
        per = f"{self.per_s:.1f} per second" if self.per_s >= 1 else f"one in {1 / self.per_s:.0f} s"
        return f"{self.server} asked for fewer requests ({self.status}): at most {per} is sent{held}."


class ServerRates:
    """The rates in the ledger's Redis. Keeps nothing in the process; safe for threads."""

    def __init__(self, client: redis.Redis, *, retry_after_cap_s: float = 600, prefix: str = PREFIX) -> None:
        self._prefix = prefix
        self._retry_after_cap_s = retry_after_cap_s
        script = client.register_script
        self._read, self._take, self._lower = script(_READ), script(_TAKE), script(_LOWER)

    def read(self, servers: Sequence[str]) -> dict[str, ServerRate]:
        """How fast each of ``servers`` may be asked, and how long a request would wait now."""
        rows = self._read(keys=[self._prefix + SLOWED + name for name in servers]) if servers else []
        return {name: _rate(name, row) for name, row in zip(servers, rows, strict=True)}

    def take(self, server: str) -> ServerRate:
        """The turn of one request, unless it would come after more than `STAY_S`; then until when its job waits."""
        return _rate(server, self._take(keys=[self._prefix + SLOWED + server], args=[_us(STAY_S)]))

    def lower(
        self, server: str, *, status: int, retry_after_s: float | None, cuts: int, measured_per_s: float
    ) -> ServerRate:
        """The server has asked for fewer requests, in answer to one that went out after ``cuts``; until when it waits.

        ``measured_per_s``: how fast this process has asked it lately.
        """
        asked_s = min(max(retry_after_s or 0.0, 0.0), self._retry_after_cap_s)
        args: list[str | int | float] = [cuts, _us(asked_s), status, measured_per_s]
        args += [LOWEST_PER_S, FIRST_PER_S, _us(FORGOTTEN_S) // 1000]
        return _rate(
            server, self._lower(keys=[self._prefix + SLOWED + server, self._prefix + SLOTS + server], args=args)
        )


def asks_to_slow_down(status: int, retry_after_s: float | None) -> bool:
    """Whether an answer is a request to slow down."""
    return status == 429 or (status == 503 and retry_after_s is not None)


def _rate(server: str, row: Sequence[Any]) -> ServerRate:
    if not int(row[0]):
        return ServerRate(server)
    cuts, per_s, held_us, wait_us, status, *is_late = row
    held_s, wait_s = float(held_us) / 1_000_000, float(wait_us) / 1_000_000
    return ServerRate(server, int(cuts), float(per_s), held_s, wait_s, int(status), is_turn=not is_late)


def _us(seconds: float) -> int:
    return int(seconds * 1_000_000)
