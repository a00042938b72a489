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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Final, NamedTuple

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

# KEYS: slots and queue of each server. ARGV: me, lease; then of each server how many slots are wanted, the limit, how
# many are in use here, how many are given back, and 1 if this process waits in line for those that are not free.
# The process that waited longest comes first. A process whose lease had run out comes back with what it has in use.
_TURN = (
    _NOW
    + """
local me, lease = ARGV[1], ARGV[2]
local function turn(slots, queue, want, limit, used, back, waits)
  local rows = redis.call('HGETALL', slots)
  local alive, others, members, mine = {}, 0, 0, nil
  for i = 1, #rows, 2 do
    local held, ends = string.match(rows[i + 1], '(%d+):(%d+)')
    if tonumber(ends) < now then
      redis.call('HDEL', slots, rows[i])
    elseif rows[i] == me then
      mine = tonumber(held)
    else
      alive[rows[i]], others, members = true, others + tonumber(held), members + 1
    end
  end
  mine = math.max((mine or used) - back, used)
  local ahead, passed, waiting = 0, false, 0
  for _, id in ipairs(redis.call('ZRANGE', queue, 0, -1)) do
    if id == me then
      passed = true
    elseif alive[id] then
      waiting = waiting + 1
      if not passed then ahead = ahead + 1 end
    else
      redis.call('ZREM', queue, id)
    end
  end
  local granted = math.max(0, math.min(want, limit - others - mine - ahead))
  mine = mine + granted
  waits = waits and want > granted
  if waits then redis.call('ZADD', queue, 'NX', now, me) else redis.call('ZREM', queue, me) end
  if mine > 0 or waits then
    redis.call('HSET', slots, me, string.format('%d:%.0f', mine, now + lease))
  else
    redis.call('HDEL', slots, me)
  end
  redis.call('PEXPIRE', slots, lease)
  redis.call('PEXPIRE', queue, lease)
  return {mine, waiting, members + 1}
end
local turns = {}
for i = 1, #KEYS, 2 do
  local want, limit, used, back, waits = unpack(ARGV, (i - 1) / 2 * 5 + 3, (i - 1) / 2 * 5 + 7)
  turns[#turns + 1] = turn(KEYS[i], KEYS[i + 1], tonumber(want), tonumber(limit), tonumber(used), tonumber(back),
    waits == '1')
end
return turns
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


@dataclass(frozen=True)
class _Wish:
    """How many slots of a server are wanted, are in use here, and are given back; ``waits`` in line for the rest."""

    name: str
    limit: int
    want: int
    used: int
    back: int
    waits: bool = True


class _SlotsGranted(NamedTuple):
    """How many slots of a server are ours now, how many other processes wait, and how many there are."""

    held: int
    waiting: int
    members: int


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

    def reserve(self, limits: Mapping[str, int], each: int) -> None:
        """Lease ``each`` slots of these servers, by their limits, as far as they are free: in one exchange, for calls
        that come at once and would each lease its own.
        """
        shares = [self._share(name, limit) for name, limit in sorted(limits.items())]
        with ExitStack() as asking:
            for share in shares:
                asking.enter_context(share.asking)
            wishes = [wish for share in shares if (wish := share.reserving(each)) is not None]
            if not wishes:
                return
            asked_at = self._clock()
            try:
                turns = self._exchange(wishes)
            except BaseException:
                for wish in wishes:
                    self._shares[wish.name].failed(wish)
                raise
            for wish, turn in zip(wishes, turns, strict=True):
                self._shares[wish.name].granted(turn, asked_at)

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

    def turn(self, wish: _Wish) -> _SlotsGranted:
        """One exchange with Redis: how many slots are ours now, how many others wait, how many processes there are."""
        return self._exchange([wish])[0]

    def _exchange(self, wishes: Sequence[_Wish]) -> list[_SlotsGranted]:
        keys = [f"{self._prefix}{kind}{wish.name}" for wish in wishes for kind in (SLOTS, QUEUE)]
        args: list[str | int] = [self._me, int(self._lease_s * 1000)]
        for wish in wishes:
            args += [wish.want, wish.limit, wish.used, wish.back, int(wish.waits)]
        return [_SlotsGranted(*(int(number) for number in row)) for row in self._turn(keys=keys, args=args)]

    def fresh_until(self, asked_at: float) -> float:
        return asked_at + self._lease_s

    def now(self) -> float:
        return self._clock()


class _Share:
    """One server's slots in this process: held ones, those in use, and threads that wait for one."""

    def __init__(self, slots: Slots, name: str, limit: int) -> None:
        self._slots, self._name, self._limit = slots, name, limit
        self._changed = threading.Condition()
        self.asking = threading.Lock()  # one exchange at a time, or an old answer would cover a new one
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
        with self.asking:
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
        with self.asking:
            self._turn(want)

    def _turn(self, want: int) -> None:
        asked_at = self._slots.now()
        wish = self._wish(want)
        try:
            turn = self._slots.turn(wish)
        except BaseException:
            self.failed(wish)
            raise
        self.granted(turn, asked_at)

    def _wish(self, want: int, *, waits: bool = True) -> _Wish:
        with self._changed:
            back, self._back = self._back, 0
            return _Wish(self._name, self._limit, want, self._used, back, waits)

    def reserving(self, each: int) -> _Wish | None:
        """What is to be asked for so that ``each`` slots are held and not in use; None if they are."""
        with self._changed:
            free = self._held - self._used if self._slots.now() < self._fresh_until else 0
        missing = min(each, self._limit) - free
        return self._wish(missing, waits=self._waiting > 0) if missing > 0 else None

    def failed(self, wish: _Wish) -> None:
        """The exchange did not take place."""
        with self._changed:
            self._back += wish.back

    def granted(self, turn: _SlotsGranted, asked_at: float) -> None:
        with self._changed:
            self._held = turn.held - self._back
            self._fresh_until = self._slots.fresh_until(asked_at)
            self._most = self._limit if not turn.waiting else self._limit // turn.members
            self._changed.notify_all()
