"""Circuit breakers, one state for all workers: which servers get no calls for a while, because they failed.

What stands here is in Redis, and each transition is one Lua script by the Redis server's clock. Who asks before each
call is ``pacs/guard.py``; the jobs that wait for a server are parked by ``jobs.py``, which reads the same keys.
Why no library does it: docs/decisions/0004.

Keys, beside the ledger's:

    breaker:NAME    hash   until_ms (the end of its pause), opened (times in a row), probe, probe_until_ms, woken_ms;
                           reason (why it was opened, of a credential); none while the breaker is closed
    failures:NAME   list   when calls failed since one last succeeded

A server has three breakers: ``NAME`` for all calls; ``NAME:changes`` for what changes something there, because a full
disk or a broken storage answers every question; and ``NAME:credential``, which opens when the server refuses the
worker's credential. The credentials of stores have breakers as well (``worker/storage/credentials.py``).
States: *closed* → *open* for a pause → *half-open*: one call, the *probe*, is let through, and closes the breaker or
opens it again for twice as long.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import redis

from courier.settings import PREFIX, BreakerSettings

BREAKER: Final = "breaker:"
FAILURES: Final = "failures:"
CHANGES: Final = ":changes"
CREDENTIAL: Final = ":credential"
#: What stands behind a server's name where an operator has taken it out of service (``suspensions.py``).
SUSPENDED: Final = ":suspended"
#: What the breaker of a store's credential begins with; no server is called so.
STORE: Final = "credential:"
#: A server that failed so lately, and did nothing well since, gets no new studies while there are others.
SICK_S: Final = 30.0

_NOW = "local t = redis.call('TIME'); local now = t[1] * 1000 + math.floor(t[2] / 1000)\n"

# What a state is told as: failures, ms since the last (-1: none), ms of pause left (-1: closed), ms of a probe left,
# and the reason.
_STATE = (
    _NOW
    + """
local function state(breaker, failures)
  local fields = redis.call('HMGET', breaker, 'until_ms', 'probe_until_ms', 'reason')
  local last = redis.call('LINDEX', failures, -1)
  return {
    redis.call('LLEN', failures), last and now - tonumber(last) or -1,
    fields[1] and math.max(0, tonumber(fields[1]) - now) or -1,
    math.max(0, tonumber(fields[2] or 0) - now), fields[3] or '',
  }
end
"""
)

_STATES = (
    _STATE
    + """
local states = {}
for i = 1, #KEYS, 2 do states[#states + 1] = state(KEYS[i], KEYS[i + 1]) end
return states
"""
)

# A call that began before the breaker opened changes nothing any more: only the probe speaks for an open breaker.
_FAILED = (
    _STATE
    + """
local breaker, failures = KEYS[1], KEYS[2]
local threshold, window_ms, asked_ms = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[6])
redis.call('RPUSH', failures, string.format('%.0f', now))
redis.call('LTRIM', failures, -threshold, -1)
redis.call('PEXPIRE', failures, window_ms)
local fields = redis.call('HMGET', breaker, 'until_ms', 'probe')
local opens = false
if fields[1] then
  opens = ARGV[1] ~= '' and fields[2] == ARGV[1]
else
  local first = tonumber(redis.call('LINDEX', failures, 0))
  opens = asked_ms > 0 or (redis.call('LLEN', failures) >= threshold and first >= now - window_ms)
end
if opens then
  local opened = redis.call('HINCRBY', breaker, 'opened', 1)
  local pause = math.min(tonumber(ARGV[5]), ARGV[4] * 2 ^ math.min(opened - 1, 30)) * ARGV[7]
  redis.call('HSET', breaker, 'until_ms', string.format('%.0f', now + math.max(pause, asked_ms)))
  redis.call('HDEL', breaker, 'probe', 'probe_until_ms', 'woken_ms')
  if ARGV[8] ~= '' then redis.call('HSET', breaker, 'reason', ARGV[8]) end
end
return state(breaker, failures)
"""
)

_SUCCEEDED = (
    _STATE
    + """
local fields = redis.call('HMGET', KEYS[1], 'until_ms', 'probe')
if not fields[1] then
  redis.call('DEL', KEYS[2])
elseif ARGV[1] ~= '' and fields[2] == ARGV[1] then
  redis.call('DEL', KEYS[1], KEYS[2])
end
return state(KEYS[1], KEYS[2])
"""
)

_PROBE = (
    _STATE
    + """
local fields = redis.call('HMGET', KEYS[1], 'until_ms', 'probe', 'probe_until_ms')
local over = fields[1] and tonumber(fields[1]) <= now
local free = not fields[2] or fields[2] == ARGV[1] or tonumber(fields[3] or 0) <= now
if over and free then
  redis.call('HSET', KEYS[1], 'probe', ARGV[1], 'probe_until_ms', string.format('%.0f', now + ARGV[2]))
end
return {over and free and 1 or 0, state(KEYS[1], KEYS[2])}
"""
)

# A probe that was given up is not renewed by a beat that had begun before.
_RENEW = (
    _NOW
    + """
if redis.call('HGET', KEYS[1], 'probe') ~= ARGV[1] then return 0 end
if tonumber(ARGV[2]) == 0 then
  redis.call('HDEL', KEYS[1], 'probe', 'probe_until_ms')
else
  redis.call('HSET', KEYS[1], 'probe_until_ms', string.format('%.0f', now + ARGV[2]))
end
return 1
"""
)


@dataclass(frozen=True)
class BreakerState:
    """The breaker ``breaker``, as it was when it was read. ``pause_left_s`` is None while it is closed.

    ``failures`` are counted up to the number that opens the breaker; ``last_failure_s`` ago was the last of them.
    ``reason`` is why it was opened, as far as that was told.
    """

    breaker: str
    failures: int = 0
    last_failure_s: float | None = None
    pause_left_s: float | None = None
    probing: bool = False
    reason: str = ""

    @property
    def closed(self) -> bool:
        return self.pause_left_s is None

    @property
    def lately(self) -> bool:
        """Whether a call failed so lately, and none succeeded since, that other servers are to be preferred."""
        return self.last_failure_s is not None and self.last_failure_s < SICK_S

    @property
    def name(self) -> Literal["closed", "open", "half-open"]:
        if self.pause_left_s is None:
            return "closed"
        return "open" if self.pause_left_s > 0 else "half-open"


class Breakers:
    """The breakers in the ledger's Redis. Keeps nothing in the process; safe for threads."""

    def __init__(
        self,
        client: redis.Redis,
        settings: BreakerSettings | None = None,
        *,
        retry_after_cap_s: float = 600,
        rng: random.Random | None = None,
        prefix: str = PREFIX,
    ) -> None:
        self._prefix = prefix
        self._settings = settings or BreakerSettings()
        self._retry_after_cap_s = retry_after_cap_s
        self._rng = rng or random.SystemRandom()
        script = client.register_script
        self._states, self._failed, self._succeeded = script(_STATES), script(_FAILED), script(_SUCCEEDED)
        self._probe, self._renew = script(_PROBE), script(_RENEW)

    def read(self, breakers: Sequence[str]) -> dict[str, BreakerState]:
        """The states of ``breakers``, read in one go."""
        keys = [key for name in breakers for key in self._keys(name)]
        rows = self._states(keys=keys) if keys else []
        return {name: _state(name, row) for name, row in zip(breakers, rows, strict=True)}

    def states(self, servers: Iterable[str]) -> dict[str, BreakerState]:
        """For each server the state that says most: the server's own, then its credential's, then its changes'."""
        names = list(servers)
        read = self.read([breaker for name in names for breaker in breakers_of(name)])
        return {name: _gravest([read[breaker] for breaker in breakers_of(name)]) for name in names}

    def failed(
        self,
        breaker: str,
        *,
        probe: str = "",
        retry_after_s: float | None = None,
        at_once: bool = False,
        reason: str = "",
    ) -> BreakerState:
        """A call failed. What the server asked for (``Retry-After``) opens the breaker at once, for as long.

        ``probe`` is the token of a call that was let through a half-open breaker; ``at_once`` opens it, too. ``reason``
        is kept with a breaker that opens.
        """
        limits = self._settings
        asked_ms = max(_ms(min(retry_after_s or 0.0, self._retry_after_cap_s)), int(at_once))
        times = [_ms(limits.window_s), _ms(limits.pause_s), _ms(limits.pause_cap_s), asked_ms]
        args: list[str | int | float] = [probe, limits.failures, *times, self._rng.uniform(0.75, 1.0), reason]
        return _state(breaker, self._failed(keys=self._keys(breaker), args=args))

    def succeeded(self, breaker: str, *, probe: str = "") -> BreakerState:
        """A call succeeded: forget what failed before; the probe closes the breaker."""
        return _state(breaker, self._succeeded(keys=self._keys(breaker), args=[probe]))

    def probe(self, breaker: str, token: str, *, for_s: float) -> tuple[bool, BreakerState]:
        """Be the one call that is let through a half-open breaker, for ``for_s`` unless renewed."""
        mine, row = self._probe(keys=self._keys(breaker), args=[token, _ms(for_s)])
        return bool(mine), _state(breaker, row)

    def renew(self, breaker: str, token: str, *, for_s: float) -> bool:
        """The probe is still under way (0: give its place up)."""
        return bool(self._renew(keys=self._keys(breaker), args=[token, _ms(for_s)]))

    def _keys(self, breaker: str) -> list[str]:
        return [self._prefix + BREAKER + breaker, self._prefix + FAILURES + breaker]


def breakers_of(server: str) -> tuple[str, str, str]:
    """All breakers of a server: of all calls, of its credential, of changes."""
    return server, server + CREDENTIAL, server + CHANGES


def server_of(breaker: str) -> str:
    """The server that a breaker belongs to."""
    return breaker.removesuffix(CHANGES).removesuffix(CREDENTIAL).removesuffix(SUSPENDED)


def is_suspension(breaker: str | None) -> bool:
    """Whether ``breaker`` is no circuit breaker, but an operator's order to leave the server alone."""
    return breaker is not None and breaker.endswith(SUSPENDED)


def circuit_open(breaker: str) -> str:
    """That a circuit breaker is open, as a part of a sentence."""
    if breaker.startswith(STORE):
        return f"the credential of {breaker.removeprefix(STORE)} was refused (circuit breaker open)"
    if is_suspension(breaker):
        return f"{server_of(breaker)} is paused or in maintenance"
    if breaker.endswith(CREDENTIAL):
        return f"{server_of(breaker)} refused the worker's credential (circuit breaker of the credential open)"
    what, which = ("changes", " for changes") if breaker.endswith(CHANGES) else ("requests", "")
    return f"{server_of(breaker)} failed on its last {what} (circuit breaker{which} open)"


def _gravest(states: Sequence[BreakerState]) -> BreakerState:
    """The first that is not closed; else the first that failed lately."""
    by_gravity = sorted(states, key=lambda state: 0 if not state.closed else 1 if state.lately else 2)
    return by_gravity[0]


def _state(breaker: str, row: Sequence[Any]) -> BreakerState:
    failures, last_ms, pause_ms, probe_ms = (int(value) for value in row[:4])
    return BreakerState(
        breaker,
        failures,
        None if last_ms < 0 else last_ms / 1000,
        None if pause_ms < 0 else pause_ms / 1000,
        probing=probe_ms > 0,
        reason=str(row[4]),
    )


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def by_server(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts per breaker added up per server."""
    added: dict[str, int] = {}
    for breaker, count in counts.items():
        added[server_of(breaker)] = added.get(server_of(breaker), 0) + count
    return added
