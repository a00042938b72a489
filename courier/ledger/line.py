"""How waiting jobs are released: in line, the oldest first, and no more of them than workers do.

Whatever makes many jobs due at once (a server that answers again, a credential that is accepted, the end of a
``Retry-After``, lost messages, dead letters that are replayed), the sweep lets them join one line. Each worker sends
messages for as many as it has room for, and for the next ones when those have ended or were put aside. So what was
enqueued just now, a look-up above all, waits behind a few of them and not behind thousands. No Celery lives here.

Keys, beside the ledger's:

    line        zset   jobs that are due and no message was sent for, by the time since when
    released:W  zset   jobs that worker W has sent a message for, by the time when: until the attempt that it began has
                       ended

A job that stands in line stays in ``due`` as well, a grace period from then: should its place in line get lost, or all
workers be of a release that knows no line, it is looked at again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

#: So many jobs of the line are looked at in one sweep at most.
LOOKED_AT: Final = 200


#: What a worker has released is forgotten when it has not looked for so long.
FORGOTTEN_MS: Final = 3_600_000


@dataclass(frozen=True)
class Line:
    """Jobs of ``tasks`` stand in line. Messages are sent to ``queue`` as long as there is ``room``: that many of the
    jobs that this worker has released may be under way at a time, in the queue or at work.

    ``depth`` is how many messages are in the queue, as far as that is known: no more of those that were sent can be
    there, whatever has become of the others.
    """

    queue: str
    tasks: Collection[str]
    room: int
    depth: int | None = None

    def arguments(self, *, worker: str, settle_ms: int) -> list[str | int]:
        """A part of the arguments of a script that has `LUA`; its first one says how many follow."""
        depth = -1 if self.depth is None else self.depth
        return [len(self.tasks) + 5, *self.tasks, self.queue, self.room, depth, settle_ms, worker]


#: No line: each message is sent as soon as its job is due.
NO_LINE: Final[list[str | int]] = [0]

#: For a script that has defined ``now``, ``prefix`` and ``send``; ``from`` is where in ARGV the `Line.arguments` are.
#: A message that was sent within the last settle_ms may not be in its queue yet; of older ones there are no more than
#: its depth. That one was taken is known by the job's field ``sent``, which the claim deletes.
LUA: Final = (
    f"""
local looked_at, forgotten_ms = {LOOKED_AT}, {FORGOTTEN_MS}
local line = prefix .. 'line'
"""
    + """
local function line_of(from)
  local stands, last = {}, from + tonumber(ARGV[from])
  if last == from then return {stands = stands} end
  for i = from + 1, last - 5 do stands[ARGV[i]] = true end
  return {stands = stands, queue = ARGV[last - 4], room = tonumber(ARGV[last - 3]), depth = tonumber(ARGV[last - 2]),
    settle_ms = tonumber(ARGV[last - 1]), released = prefix .. 'released:' .. ARGV[last]}
end
local function join_line(due, grace_ms, id, since)
  redis.call('ZADD', line, 'NX', since, id)
  redis.call('ZADD', due, now + grace_ms, id)
end
local function under_way(its)
  local sent, lately, at_work = 0, 0, 0
  local rows = redis.call('ZRANGE', its.released, 0, -1, 'WITHSCORES')
  for i = 1, #rows, 2 do
    local fields = redis.call('HMGET', prefix .. 'job:' .. rows[i], 'sent', 'state', 'lease_ms')
    if fields[1] then
      sent = sent + 1
      if tonumber(rows[i + 1]) > now - its.settle_ms then lately = lately + 1 end
    elseif fields[2] == 'running' and tonumber(fields[3] or 0) > now then
      at_work = at_work + 1
    else
      redis.call('ZREM', its.released, rows[i])
    end
  end
  if its.depth >= 0 then sent = math.min(sent, its.depth) end
  return math.max(sent, lately) + at_work
end
local function may_be_sent(due, grace_ms, id, fields)
  local due_ms = tonumber(redis.call('ZSCORE', due, id) or '')
  if not fields[1] or fields[5] or not due_ms then return false end
  if fields[3] == 'running' and tonumber(fields[6] or 0) > now then return false end
  return due_ms <= now + grace_ms  -- later: it was put aside again by another message of it
end
local function release(due, unanswered, grace_ms, its, woken)
  local room = its.room - under_way(its)
  if room <= 0 then return end
  for _, id in ipairs(redis.call('ZRANGE', line, 0, looked_at - 1)) do
    if room <= 0 then return end
    local job = prefix .. 'job:' .. id
    local fields = redis.call('HMGET', job, 'task', 'job', 'state', 'trace', 'sent', 'lease_ms')
    redis.call('ZREM', line, id)
    if may_be_sent(due, grace_ms, id, fields) then
      woken[#woken + 1] = send(due, unanswered, grace_ms, id, job, fields, its.queue)
      redis.call('ZADD', its.released, now, id)
      redis.call('PEXPIRE', its.released, forgotten_ms)
      room = room - 1
    end
  end
end
"""
)
