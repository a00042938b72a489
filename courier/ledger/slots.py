"""How many requests may be in flight to a server, over all workers: slots that processes lease, use, and give back.

A process keeps a slot it has leased for its next call, so that a busy one asks Redis for nothing; what it did not need
for half a second it gives back. Where others wait, it shrinks to its share. A dead process's slots expire with its
lease. Nothing is known here of servers or jobs. Why no library does it: docs/decisions/0005.

Keys, beside the ledger's:

    slots:NAME        hash   process → slots held and the end of its lease (ms)
    slotqueue:NAME    zset   processes that wait for a slot, by the time since when
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

import redis

from courier.settings import PREFIX

log = logging.getLogger(__name__)

SLOTS: Final = "slots:"
QUEUE: Final = "slotqueue:"
#: A process that is silent so long is taken for dead. Where workers die often, the dead must not hold all the slots.
LEASE_S: Final = 4.0
#: How soon a process that waits for a slot asks for it again.
ASK_AGAIN_S: Final = 0.05

_NOW = "local t = redis.call('TIME'); local now = t[1] * 1000 + math.floor(t[2] / 1000)\n"

# KEYS: slots, queue. ARGV: me, how many are wanted, the limit, lease, how many are in use here, how many to give back.
# Whoever waited longer comes first. A process whose lease had run out comes back with what it has in use.
_TURN = (
    _NOW
    + """
local me, want, limit, used = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[5])
local rows = redis.call('HGETALL', KEYS[1])
local alive, others, members, mine = {}, 0, 0, nil
for i = 1, #rows, 2 do
  local held, ends = string.match(rows[i + 1], '(%d+):(%d+)')
  if tonumber(ends) < now then
    redis.call('HDEL', KEYS[1], rows[i])
  elseif rows[i] == me then
    mine = tonumber(held)
  else
    alive[rows[i]], others, members = true, others + tonumber(held), members + 1
  end
end
mine = math.max((mine or used) - tonumber(ARGV[6]), used)
local ahead, passed, waiting = 0, false, 0
for _, id in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  if id == me then
    passed = true
  elseif alive[id] then
    waiting = waiting + 1
    if not passed then ahead = ahead + 1 end
  else
    redis.call('ZREM', KEYS[2], id)
  end
end
local granted = math.max(0, math.min(want, limit - others - mine - ahead))
mine = mine + granted
if want > granted then redis.call('ZADD', KEYS[2], 'NX', now, me) else redis.call('ZREM', KEYS[2], me) end
if mine > 0 or want > granted then
  redis.call('HSET', KEYS[1], me, string.format('%d:%.0f', mine, now + ARGV[4]))
else
  redis.call('HDEL', KEYS[1], me)
end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return {mine, waiting, members + 1}
"""
)


# How many slots of a server are leased by processes that live. KEYS: slots of each server.
_HELD = (
    _NOW
    + """
local counts = {}
for i, key in ipairs(KEYS) do
  counts[i] = 0
  for _, row in ipairs(redis.call('HVALS', key)) do
    local held, ends = string.match(row, '(%d+):(%d+)')
    if ends and tonumber(ends) >= now then counts[i] = counts[i] + tonumber(held) end
  end
end
return counts
"""
)


def read_slots(client: redis.Redis, names: Sequence[str], *, prefix: str = PREFIX) -> dict[str, int]:
    """How many slots of each server are leased just now, by all processes together."""
    keys = [prefix + SLOTS + name for name in names]
    counts = client.register_script(_HELD)(keys=keys) if keys else []
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


class NoSlot(Exception):
    """None came free in time."""


class Slots:
    """This process's slots for all servers. Safe for threads; made after a fork.

    `tend` SHALL be called about twice a second.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
        prefix: str = PREFIX,
    ) -> None:
        self._prefix = prefix
        self._turn = client.register_script(_TURN)
        self._me = uuid.uuid4().hex
        self._lease_s = lease_s
        self._clock = clock
        self._shares: dict[str, _Share] = {}
        self._lock = threading.Lock()

    @contextmanager
    def slot(
        self, name: str, *, limit: int, wait_s: float, meanwhile: AbstractContextManager[None] | None = None
    ) -> Iterator[None]:
        """Hold one of ``limit`` slots inside. ``meanwhile`` is entered for as long as it has to be waited for.

        Raises
        ------
        NoSlot
            None came free within ``wait_s``.
        """
        share = self._share(name, limit)
        share.take(wait_s, meanwhile or nullcontext())
        try:
            yield
        finally:
            share.give()

    def tend(self) -> None:
        """Renew the leases and give back what was not needed since the last time."""
        with self._lock:
            shares = list(self._shares.values())
        for share in shares:
            share.tend()

    def _share(self, name: str, limit: int) -> _Share:
        with self._lock:
            if name not in self._shares:
                self._shares[name] = _Share(self, name, limit)
            return self._shares[name]

    def turn(self, name: str, limit: int, *, want: int, used: int, back: int) -> tuple[int, int, int]:
        """One exchange with Redis: how many slots are ours now, how many others wait, how many processes there are."""
        args: list[str | int] = [self._me, want, limit, int(self._lease_s * 1000), used, back]
        held, waiting, members = self._turn(keys=[self._prefix + SLOTS + name, self._prefix + QUEUE + name], args=args)
        return int(held), int(waiting), int(members)

    def fresh_until(self, asked_at: float) -> float:
        return asked_at + self._lease_s

    def now(self) -> float:
        return self._clock()


class _Share:
    """One server's slots in this process: held ones, those in use, and threads that wait for one."""

    def __init__(self, slots: Slots, name: str, limit: int) -> None:
        self._slots, self._name, self._limit = slots, name, limit
        self._changed = threading.Condition()
        self._asking = threading.Lock()  # one exchange at a time, or an old answer would cover a new one
        self._held = self._used = self._waiting = 0
        self._back = 0  # given up here, which Redis has not been told yet
        self._peak = 0  # in use at once, since the last time it was tended
        self._most = limit  # to be held here: fewer where others wait
        self._fresh_until = self._ask_again_at = 0.0

    def take(self, wait_s: float, meanwhile: AbstractContextManager[None]) -> None:
        until = self._slots.now() + wait_s
        with self._changed:
            if self._take_held():
                return
            self._waiting += 1
        try:
            with meanwhile:
                self._take_freed(until)
        finally:
            with self._changed:
                self._waiting -= 1

    def _take_freed(self, until: float) -> None:
        while True:
            self._ask()
            with self._changed:
                if self._take_held():
                    return
                if self._slots.now() >= until:
                    raise NoSlot
                self._changed.wait(ASK_AGAIN_S)

    def give(self) -> None:
        with self._changed:
            self._used -= 1
            contested = self._held > self._most
            if contested:
                self._held -= 1
                self._back += 1
            else:
                self._changed.notify()
        if contested:
            self._return()

    def _return(self) -> None:
        """What was done with the slot is done, whether or not Redis hears at once that it is free again."""
        try:
            self._exchange(want=0)
        except redis.RedisError as error:
            log.warning("A slot for %s is given back later: %s", self._name, type(error).__name__)

    def tend(self) -> None:
        with self._changed:
            if not self._held and not self._waiting and not self._back:
                return
            if not self._waiting:
                idle = max(0, self._held - max(self._peak, self._used))
                self._held -= idle
                self._back += idle
            self._peak = self._used
            want = self._wanted()
        self._exchange(want=want)

    def _take_held(self) -> bool:
        if not self._can_take(self._slots.now()):
            return False
        self._used += 1
        self._peak = max(self._peak, self._used)
        return True

    def _wanted(self) -> int:
        return max(0, self._waiting - (self._held - self._used))

    def _ask(self) -> None:
        """On behalf of all threads that wait here; not again at once where it did not help."""
        with self._asking:
            with self._changed:
                now = self._slots.now()
                if self._can_take(now) or now < self._ask_again_at:
                    return
                want = self._wanted()
            self._turn(want)
            with self._changed:
                self._ask_again_at = now + ASK_AGAIN_S if self._wanted() else 0.0

    def _can_take(self, now: float) -> bool:
        return self._used < self._held and now < self._fresh_until

    def _exchange(self, *, want: int) -> None:
        with self._asking:
            self._turn(want)

    def _turn(self, want: int) -> None:
        asked_at = self._slots.now()
        with self._changed:
            used, back = self._used, self._back
            self._back = 0
        try:
            held, waiting, members = self._slots.turn(self._name, self._limit, want=want, used=used, back=back)
        except BaseException:
            with self._changed:
                self._back += back
            raise
        with self._changed:
            self._held = held - self._back
            self._fresh_until = self._slots.fresh_until(asked_at)
            self._most = self._limit if not waiting else self._limit // members
            self._changed.notify_all()
