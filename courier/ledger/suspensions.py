"""Servers that an operator has taken out of service: paused, or in maintenance. One state for all workers.

*Paused*: nothing new begins there, and jobs that need the server wait. *In maintenance*: the server is not asked, and
work on the others goes on. What a job makes of either is said in ``worker/jobs``; who obeys before each request is
``worker/pacs/guard.py``. No HTTP here.

Keys, beside the ledger's:

    breaker:NAME:suspended  hash  state (paused or maintenance), id, set_by, reason, since_ms, until_ms; none while the
                                  server is in service. It expires at until_ms, so a maintenance ends by itself

The name of the key is that of a circuit breaker, so jobs wait for it as they wait for a breaker (`Ledger.park_for`).
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import redis

from courier.errors import InvalidRequest
from courier.ledger.breakers import BREAKER, SUSPENDED
from courier.settings import PREFIX
from courier.waits import utc

log = logging.getLogger(__name__)

SuspendedState = Literal["paused", "maintenance"]
#: How long a process relies on what it has read. A worker obeys an operator within two seconds.
FRESH_S: Final = 0.5

_NOW = "local t = redis.call('TIME'); local now = t[1] * 1000 + math.floor(t[2] / 1000)\n"

# ARGV: state, id, set_by, reason, until_ms or "". A pause is written once; a maintenance replaces a pause, and a new
# end replaces the old one. Gives 1 if something was written, 0 if not, -1 if the end is over already; and the record.
_SUSPEND = (
    _NOW
    + """
local was = redis.call('HMGET', KEYS[1], 'state', 'id', 'since_ms')
if ARGV[5] ~= '' and tonumber(ARGV[5]) <= now then return {-1, {}} end
if was[1] and ARGV[1] == 'paused' then return {0, redis.call('HGETALL', KEYS[1])} end
local id, since = ARGV[2], string.format('%.0f', now)
if was[1] == ARGV[1] then id, since = was[2], was[3] end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'state', ARGV[1], 'id', id, 'set_by', ARGV[3], 'reason', ARGV[4], 'since_ms', since)
if ARGV[5] ~= '' then
  redis.call('HSET', KEYS[1], 'until_ms', ARGV[5])
  redis.call('PEXPIREAT', KEYS[1], ARGV[5])
end
return {1, redis.call('HGETALL', KEYS[1])}
"""
)

# ARGV: the state that is to end. Gives 1 if it was in it, and the record as it was.
_END = """
local record = redis.call('HGETALL', KEYS[1])
if redis.call('HGET', KEYS[1], 'state') ~= ARGV[1] then return {0, record} end
redis.call('DEL', KEYS[1])
return {1, record}
"""


@dataclass(frozen=True)
class Suspension:
    """What an operator has ordered for ``server``. ``id`` is the same as long as a pause or a maintenance lasts."""

    server: str
    state: SuspendedState
    id: str
    set_by: str
    since_ms: int
    reason: str = ""
    until_ms: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "set_by": self.set_by,
            "reason": self.reason or None,
            "since": utc(self.since_ms),
            "until": None if self.until_ms is None else utc(self.until_ms),
        }

    def __str__(self) -> str:
        """As a sentence without its end: which server, in which state, by whom, since when, until when and why."""
        state = "paused" if self.state == "paused" else "in maintenance"
        until = "" if self.until_ms is None else f", until {utc(self.until_ms)}"
        why = f" ({self.reason})" if self.reason else ""
        return f"{self.server} is {state}, set by {self.set_by} at {utc(self.since_ms)}{until}{why}"


class Suspensions:
    """The suspensions in the ledger's Redis. Safe for threads.

    ``servers`` are the names that `current` looks at. It is read anew at most twice a second; where Redis does not
    answer, what was read last stays.
    """

    def __init__(
        self,
        client: redis.Redis,
        servers: Sequence[str] = (),
        *,
        prefix: str = PREFIX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis, self._servers, self._prefix, self._clock = client, list(servers), prefix, clock
        self._suspend, self._end = client.register_script(_SUSPEND), client.register_script(_END)
        self._known: dict[str, Suspension] = {}
        self._read_at: float | None = None
        self._reading = threading.Lock()

    def current(self) -> Mapping[str, Suspension]:
        """The servers that are out of service, as they were read at most `FRESH_S` ago."""
        if self._read_at is None or self._clock() - self._read_at >= FRESH_S:
            self.refresh()
        return self._known

    def refresh(self) -> None:
        """Read the states of all servers, and log each that has changed since this process read them last."""
        with self._reading:
            try:
                found = self.read(self._servers)
            except redis.RedisError as error:
                log.warning("Could not read which servers are paused or in maintenance: %s", type(error).__name__)
                found = self._known
            before, self._known, self._read_at = self._known, found, self._clock()
        for name in self._servers:
            _log_change(name, before.get(name), found.get(name))

    def read(self, servers: Iterable[str]) -> dict[str, Suspension]:
        """Those of ``servers`` that are out of service, asked of Redis now, in one go."""
        names = list(servers)
        with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hgetall(self._key(name))
            rows = cast(list[dict[str, str]], pipe.execute() if names else [])
        return {name: _suspension(name, row) for name, row in zip(names, rows, strict=True) if row.get("state")}

    def pause(self, server: str, *, set_by: str, reason: str = "") -> tuple[bool, Suspension]:
        """Pause ``server``. False if it was out of service already; then its record is left as it is."""
        return self._write(server, "paused", set_by, reason, None)

    def maintain(
        self, server: str, *, set_by: str, reason: str = "", until_ms: int | None = None
    ) -> tuple[bool, Suspension]:
        """Put ``server`` into maintenance, also one that is paused; one that is in maintenance gets the new end.

        Raises
        ------
        InvalidRequest
            ``until_ms`` is over.
        """
        return self._write(server, "maintenance", set_by, reason, until_ms)

    def end(self, server: str, state: SuspendedState) -> tuple[bool, Suspension | None]:
        """End a pause, or a maintenance. True, and what it was; or False, and what ``server`` is instead."""
        ended, row = self._end(keys=[self._key(server)], args=[state])
        record = _pairs(row)
        return bool(ended), _suspension(server, record) if record else None

    def _write(
        self, server: str, state: SuspendedState, set_by: str, reason: str, until_ms: int | None
    ) -> tuple[bool, Suspension]:
        args: list[str | int] = [state, uuid.uuid4().hex, set_by, reason, "" if until_ms is None else until_ms]
        written, row = self._suspend(keys=[self._key(server)], args=args)
        if written < 0:
            raise InvalidRequest("The end of a maintenance has to be in the future.", details={"field": "until"})
        return bool(written), _suspension(server, _pairs(row))

    def _key(self, server: str) -> str:
        return f"{self._prefix}{BREAKER}{server}{SUSPENDED}"


def _log_change(name: str, before: Suspension | None, now: Suspension | None) -> None:
    if before == now:
        return
    if now is None:
        log.warning("%s is in service again", name)
    else:
        log.warning("%s", now)


def _suspension(server: str, row: Mapping[str, str]) -> Suspension:
    until = row.get("until_ms")
    return Suspension(
        server,
        cast(SuspendedState, row["state"]),
        row.get("id", ""),
        row.get("set_by", ""),
        int(row.get("since_ms") or 0),
        row.get("reason", ""),
        int(until) if until else None,
    )


def _pairs(row: Sequence[str]) -> dict[str, str]:
    return dict(zip(row[::2], row[1::2], strict=True))
