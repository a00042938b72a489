"""The truth about every job, in Redis: who does it, what came of it, which image and study it has claimed.

A Celery message only wakes a job; whether there is anything to do is decided here. Each transition is one Lua
script and uses the Redis server's clock, so that it is atomic and needs no agreement between workers' clocks.
No Celery and no HTTP live here.

Keys, all below the prefix in the settings (``courier:``), in a database of their own:

    job:ID        hash    state, task, job, attempts, fence, lease_ms, memo, outcome, code …; what it holds;
                          requested_by and reason, as they were given with it first; sender: the certificate that
                          signed the order, as far as a worker has verified that; while it waits, code, message and
                          server say why, since_ms since when, and cause tells whether that is still the same; headers
                          of its first message that go with each one that wakes it; follow_ups, until they are sent
                          after its end, attached: which ones are known, telling_ms: until when a worker has time to
                          send them, followed: how many it has sent
    due           zset    job ids by the time (ms) at which somebody has to look at them again: to begin, to go on, or,
                          once a job has ended, to tell its outcome to whoever waits
    dead          zset    dead letters by the time of their death
    recent        list    the jobs that ended last, the latest first, without the chunks of batches (`RECENT`)
    died:HASH     hash    how often a worker died doing this content; by worker: at which count it did last
    unanswered    zset    job ids by the time when a message was sent for them, until one of theirs is seen
    taken         hash    queue → how many messages of it have reached a job's claim
    suspects:W    set     the jobs at work in worker W that a worker has died on before
    hold:UID      hash    the job that may store (or delete) this SOP instance now; by digest: write to a destination
    gate:UID      hash    the job that is deleting this study or series: nobody begins to store into it
    storing:UID   set     the jobs that are storing into this study or series: nobody begins to delete it
    receipt:UID   hash    what a job of ours stored last as this image, if a single upload ever did: job, server,
                          digest, size, study, series; and when a job of ours deleted it (gone). It proves a push,
                          never what a server has now
    pushes:UID    hash    of a study, by server: at:, when a job pushed images into it last; copying:, since when a
                          batch copies images into it; copied:, when a batch did, and how many; gone:, when it (or, with
                          a series UID behind the server, that series) was deleted. Receipts that are older are void
    study:UID     hash    the claim: which server a new study belongs to, which job opened it (none: no image of ours
                          is stored under it), when it was last stored into, and each follower:JOB that was told this
                          server and may still push
    trail:UID     list    what was decided about an image, a series or a study, the latest ones, for `pacs.trace`
    placed        hash    server → number of new studies it was given
    deleting:ID   hash    server and study → since when (ms) this job is told that the study is being deleted there
    stored        hash    server → when (µs) a job of ours last stored an image there
    hangs:SERVER  hash    file (its SHA-256, or the UID of a copied image) → how often this server hung at it, the first
                          and the last time (ms), and 1 if it answered other requests to store between
    cancelled:ID  text    a job of which no record exists was cancelled: it ends as soon as a message of it comes
    cancelled_stamps zset digests of stamps whose jobs are cancelled, by the time when that was asked
    returned:ID   text    how often a message of this job was given back while others were done
    workers       hash    worker → what its watchdog last said of it (JSON)
    servers       zset    the servers that workers know, by the time (ms) when one said so last
    probe         text    what `probe` writes, for a second
    schema        text    the shape of all this, as a number; none is 1, that of version 0.1
    parked        set     the circuit breakers that jobs wait for, and for each of them
    parked:NAME   zset    the jobs that wait until it closes, by the time since when

The breakers' own keys stand in ``breakers.py``, those of jobs that are due and wait to be sent for in ``line.py``.

States: ``queued`` → ``running`` ⇄ ``waiting`` → ``done`` | ``dead``; a dead job that is replayed is ``queued`` again.
Only the holder of the current *fence* may move a running job on; whoever comes late is refused with `LeaseLost`.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Literal, cast

import redis
from redis.commands.core import Script

from courier.errors import InvalidRequest
from courier.ledger import line
from courier.ledger.breakers import CHANGES, CREDENTIAL, SUSPENDED, by_server, is_suspension
from courier.ledger.line import NO_LINE, Line
from courier.redaction import redact_job, stated, without_queries
from courier.redis_urls import is_socket
from courier.settings import PREFIX
from courier.urls import is_url, unsigned
from courier.waits import CRASH_SUSPECT, IN_QUEUE, LOST, REDIS_UNAVAILABLE, SERVER_UNKNOWN, WaitReason

#: The newest shape of records that this release reads, and the one that it writes. Version 0.1 noted none: that is 1.
SCHEMA: Final = 2
#: A worker whose watchdog said nothing for so long does not run any more, or its process is stuck.
SILENT_S: Final = 60.0
#: No record of an ended job goes before the last message that may begin it anew: one that a killed worker held comes
#: back after Celery's visibility time-out (courier/celery_settings.py), and once more if that worker is killed too.
MESSAGES_S: Final = 5 * 3600
#: A history keeps so many decisions, the latest ones.
TRAIL_LENGTH: Final = 100
#: So many of the jobs that ended are listed, the latest ones.
RECENT: Final = 1000
#: What comes first of what stands on two histories in the same millisecond.
ORDER: Final = {
    event: number
    for number, event in enumerate(("claimed", "routed", "stored", "waiting", "ended", "replayed", "purged"))
}
#: How long the ledger keeps what a probe of a store found, and the ids of unfinished uploads to it.
STORES_KNOWN_S: Final = 7 * 86_400
#: How long a server's hang at a file counts.
HANGS_KNOWN_S: Final = 86_400
#: So many records are read at a time.
PAGE: Final = 200
#: So many of them are due at a time when it closes; the next ones with the next sweep.
WOKEN_AT_ONCE: Final = 1000
#: How long the one that was woken to be the probe has, until another one is.
PROBE_AGAIN_S: Final = 5.0
#: How soon a job looks again that waits for a server which an operator has taken out of service, if nothing wakes it.
SUSPENDED_LOOK_S: Final = 3600.0
#: How soon a job comes back whose breaker has closed while it was being parked.
CLOSED_MEANWHILE_S: Final = 0.5
#: So many messages more than waited are to be taken from a queue before one that waited is lost: those that workers had
#: in hand.
IN_HAND: Final = 200
#: By task, the queue that its messages are sent to and how many wait there; the same by the name of a queue itself.
#: Without those of which it is not known.
Queues = Callable[[set[str]], Mapping[str, tuple[str, int]]]
#: The follow-ups of a job, of all messages that came for it, take no more than this together, as JSON.
FOLLOW_UP_BYTES: Final = 512 * 1024
#: With these a job is refused, and yet may be done when it is sent again: the source has changed, or its URL has.
REUSABLE: Final = frozenset({"source_not_found", "source_denied", "source_unauthorized"})
#: Why a job waits that no attempt has put aside.
SUSPECT_MESSAGE: Final = "a worker has crashed on this job; another such job runs in this worker: job "
AWAY_MESSAGE: Final = "Redis could not be reached in the middle of an attempt"
#: What is told of a job and is no part of it.
_TOLD_OF_IT: Final = ("requested_by", "reason")
#: Names made from idempotency keys, so that every producer makes the same one.
_NAMESPACE: Final = uuid.UUID("6f1c35f2-6a0d-4d55-9d3b-8a3f1f0a7c11")

# Each script begins with this line; TIME gives seconds and microseconds.
_NOW = "local t = redis.call('TIME'); local now = t[1] * 1000 + math.floor(t[2] / 1000)\n"
# What may happen twice within a millisecond and is compared, in microseconds.
_NOW_US = "local t = redis.call('TIME'); local us = string.format('%.0f', t[1] * 1000000 + t[2])\n"

# A job that is put aside says why. ``cause`` is the same as long as it waits for the same thing (courier/waits.py).
_WAITS = """
local function since(job, cause)
  if redis.call('HGET', job, 'cause') ~= cause then
    redis.call('HSET', job, 'cause', cause, 'since_ms', string.format('%.0f', now))
  end
  return redis.call('HGET', job, 'since_ms')
end
local function ends_at_once(job)  -- cancelled in the middle of an attempt that has begun nothing
  return redis.call('HEXISTS', job, 'cancel') == 1 and redis.call('HEXISTS', job, 'memo') == 0
end
local function wait_for(job, code, message, server, cause)
  since(job, cause)
  redis.call('HSET', job, 'state', 'waiting', 'lease_ms', 0, 'code', code, 'message', message, 'server', server)
end
"""

# Servers that a worker which runs knows.
_SERVERS = f"""
local heard_ms = now - {SILENT_S * 1000:.0f}
local function known_servers() return redis.call('ZRANGEBYSCORE', prefix .. 'servers', heard_ms, '+inf') end
local function is_known(server) return tonumber(redis.call('ZSCORE', prefix .. 'servers', server) or 0) >= heard_ms end
"""

# Events are written by the scripts that decide, so a history costs no round trip. A job's own object is what it holds;
# the study and the series that it stores into get only events of trouble, or a study's images would fill its history.
_HISTORY = f"""
local function note(key, entry, keep_ms)
  redis.call('RPUSH', key, string.format('%.0f', now) .. ' ' .. entry)
  redis.call('LTRIM', key, -{TRAIL_LENGTH}, -1)
  redis.call('PEXPIRE', key, keep_ms)
end
local function note_of_job(job, entry, keep_ms, above)
  local fields = redis.call('HMGET', job, 'hold', 'gates', 'storing')
  local keys = (fields[1] or '') .. ' ' .. (fields[2] or '') .. ' ' .. (above and fields[3] or '')
  for key in string.gmatch(keys, '%S+') do
    local uid = string.match(key, ':([%d.]+)$')
    if uid then note(prefix .. 'trail:' .. uid, entry, keep_ms) end
  end
end
"""

# A claim binds as long as a job of those that follow it may still push. Of a job that waits, the checkpoint says
# whether it has pushed, or whether its server said that it was storing the image already; it asks for its server again
# before the next push. The record of a job that ended long ago is gone, and with it the doubt. A claim that is
# released without any image stored under it leaves no trace in the count of studies.
# Jobs of version 0.1 follow no claim, and say not when they asked the servers (asked_us). They are known by having
# made the claim, or by storing into the study; of the latter, a hundred are looked at.
_FOLLOWERS = """
local function may_have_pushed(memo)
  return string.find(memo, '"uncertain":true', 1, true) or string.find(memo, '"stored":true', 1, true)
    or string.find(memo, '"pendings":[1-9]')
end
local function is_pushing(id)
  local job = redis.call('HMGET', prefix .. 'job:' .. id, 'state', 'memo')
  if not job[1] then return false end
  if job[1] ~= 'waiting' and job[1] ~= 'queued' then return true end
  return may_have_pushed(job[2] or '')
end
local function is_pushing_unsaid(id, study)
  local job = redis.call('HMGET', prefix .. 'job:' .. id, 'state', 'memo', 'asked_us')
  if not job[1] or job[1] == 'done' then return false end
  if job[1] == 'running' and not job[3] then return true end
  local memo = job[2] or ''
  return may_have_pushed(memo) and string.find(memo, '"' .. study .. '"', 1, true)
end
local function is_followed(claim, asker, but_asker)
  local study = string.match(claim, '([%d.]+)$')
  for _, field in ipairs(redis.call('HKEYS', claim)) do
    local id = string.match(field, '^follower:(.+)$')
    local pushes = id and (but_asker and id == asker and is_pushing_unsaid or is_pushing)
    if pushes and pushes(id, study) then return true end
  end
  local unsaid = redis.call('SRANDMEMBER', prefix .. 'storing:' .. study, 100)
  unsaid[#unsaid + 1] = redis.call('HGET', claim, 'claimed_by') or nil
  for _, id in ipairs(unsaid) do
    if id ~= asker and is_pushing_unsaid(id, study) then return true end
  end
  return false
end
local function drop_claim(claim)
  local server = redis.call('HGET', claim, 'server')
  if server and redis.call('HEXISTS', claim, 'opened_by') == 0 then
    redis.call('HINCRBY', prefix .. 'placed', server, -1)
  end
  redis.call('DEL', claim)
end
local function unfollow(job, id, but)
  local left = {}
  for claim in string.gmatch(redis.call('HGET', job, 'claims') or '', '%S+') do
    if but[claim] then
      left[#left + 1] = claim
    elseif redis.call('HDEL', claim, 'follower:' .. id) == 1 then
      local opened = redis.call('HEXISTS', claim, 'opened_by') == 1
      if not opened and not is_followed(claim, id) then drop_claim(claim) end
    end
  end
  redis.call('HDEL', job, 'claims')
  if #left > 0 then redis.call('HSET', job, 'claims', table.concat(left, ' ')) end
end
"""

_SUBMIT = (
    _NOW
    + """
if redis.call('EXISTS', KEYS[1]) == 1 then
  local wish = redis.call('HGET', KEYS[1], 'wish')
  return wish and wish ~= ARGV[5] and -1 or 0
end
redis.call('HSET', KEYS[1], 'state', 'queued', 'task', ARGV[2], 'job', ARGV[3],
  'attempts', 0, 'fence', 0, 'created_ms', now)
for i, name in ipairs({'wish', 'trace', 'requested_by', 'reason', 'sent', 'sender'}) do
  if ARGV[4 + i] ~= '' then redis.call('HSET', KEYS[1], name, ARGV[4 + i]) end
end
redis.call('ZADD', KEYS[2], now + ARGV[4], ARGV[1])
return 1
"""
)

# A message that wakes a job which is done bears nothing of it any more: it has the outcome told.
# A worker that dies takes all its jobs along, and nobody knows which of them killed it. Those of one content died one
# death: it is counted for the first of them, and again only for one that was taken since. And a job that may not have
# another death is at work beside none that a worker has died on, or it might be buried for what that one does.
# Follow-ups that the job does not have yet are added to those it has; once it has ended, they are sent all the same.
# Whoever is given those of a job that has ended has as long as its lease to send them; nobody else is, meanwhile.
_TAKE = (
    _NOW
    + _WAITS
    + _SERVERS
    + f"""
local crash_suspect, crash_message = '{CRASH_SUSPECT}', '{SUSPECT_MESSAGE}'
local function attach(job, ended)
  if ARGV[15] ~= '' then redis.call('HSETNX', job, 'headers', ARGV[15]) end
  if ARGV[13] == '' then return true end
  local known = redis.call('HMGET', job, 'attached', 'follow_ups')
  local digests, texts = known[1] or '', known[2] or ''
  if string.find(digests, ARGV[13], 1, true) then return true end
  if #digests + #texts + #ARGV[14] > {FOLLOW_UP_BYTES} then return false end
  redis.call('HSET', job, 'attached', digests .. ARGV[13] .. ' ', 'follow_ups', texts .. ARGV[14] .. '\\n')
  if ended then redis.call('HSETNX', job, 'telling_ms', 0) end
  return true
end
"""
    + """
local job, due, deaths = KEYS[1], KEYS[2], KEYS[3]
local state = redis.call('HGET', job, 'state')
local wish = state and redis.call('HGET', job, 'wish')
local tells = state == 'done' and ARGV[3] == '{}'
if wish and wish ~= ARGV[9] and not tells then return {'other', redis.call('HGET', job, 'headers') or ''} end
if not attach(job, state == 'done' or state == 'dead') then
  return {'full', redis.call('HGET', job, 'headers') or ''}
end
if ARGV[16] ~= '' and (ARGV[17] == '1' or redis.call('HEXISTS', job, 'sender') == 0) then
  redis.call('HSET', job, 'sender', ARGV[16])
end
redis.call('ZREM', KEYS[5], ARGV[1])
redis.call('HDEL', job, 'sent', 'behind', 'empty_ms')
if ARGV[#ARGV] ~= '' then redis.call('HINCRBY', KEYS[6], ARGV[#ARGV], 1) end
if state == 'done' or state == 'dead' then
  local ended = redis.call('HMGET', job, 'outcome', 'telling_ms', 'follow_ups', 'followed')
  if not ended[2] then return {state, ended[1]} end
  if tonumber(ended[2]) > now then return {'held'} end
  redis.call('HSET', job, 'telling_ms', now + ARGV[4])
  redis.call('ZADD', due, now + ARGV[4], ARGV[1])
  return {state, ended[1], redis.call('HINCRBY', job, 'fence', 1), ended[3] or '', ended[4] or 0}
end
if state == 'running' and tonumber(redis.call('HGET', job, 'lease_ms')) > now then return {'held'} end
local score = redis.call('ZSCORE', due, ARGV[1])
if redis.call('DEL', prefix .. 'cancelled:' .. ARGV[1]) == 1 then redis.call('HSET', job, 'cancel', 1) end
local cancelled = redis.call('HEXISTS', job, 'cancel') == 1
local woken = cancelled or redis.call('HEXISTS', job, 'woken') == 1
if state == 'waiting' and score and tonumber(score) > now and not woken then
  return {'early'}
end
local died = tonumber(redis.call('HGET', deaths, 'count') or 0)
if state == 'running' then
  local was = redis.call('HMGET', job, 'worker', 'deaths', 'fence')
  redis.call('HSET', job, 'overtaken', was[3])
  local worker = 'worker:' .. (was[1] or '')
  if tonumber(was[2] or 0) >= tonumber(redis.call('HGET', deaths, worker) or 0) then
    died = redis.call('HINCRBY', deaths, 'count', 1)
    redis.call('HSET', deaths, worker, died)
  end
  redis.call('PEXPIRE', deaths, 86400000)
end
if not state then
  redis.call('HSET', job, 'task', ARGV[2], 'job', ARGV[3], 'created_ms', now)
  for i, name in ipairs({'wish', 'trace', 'requested_by', 'reason'}) do
    if ARGV[8 + i] ~= '' then redis.call('HSET', job, name, ARGV[8 + i]) end
  end
end
local last = tonumber(ARGV[6])
if died > 0 and died <= last then
  for _, other in ipairs(redis.call('SMEMBERS', KEYS[4])) do
    local its = redis.call('HMGET', ARGV[7] .. other, 'state', 'lease_ms', 'worker', 'deaths')
    if its[1] ~= 'running' or tonumber(its[2]) <= now or its[3] ~= ARGV[8] then
      redis.call('SREM', KEYS[4], other)
    elseif died == last or tonumber(its[4]) == last then
      wait_for(job, crash_suspect, crash_message .. other, '', crash_suspect .. other)
      redis.call('HSET', job, 'deaths', died)
      redis.call('HDEL', job, 'woken')
      redis.call('ZADD', due, now + math.min(250 * 2 ^ redis.call('HINCRBY', job, 'waits', 1), 2000), ARGV[1])
      return {'early'}
    end
  end
  redis.call('SADD', KEYS[4], ARGV[1])
  redis.call('PEXPIRE', KEYS[4], 86400000)
end
local attempts = redis.call('HINCRBY', job, 'attempts', 1)
local fence = redis.call('HINCRBY', job, 'fence', 1)
redis.call('HSET', job, 'state', 'running', 'lease_ms', now + ARGV[4], 'worker', ARGV[8], 'deaths', died)
local at = redis.call('HGET', job, 'parked')
if at then redis.call('ZREM', ARGV[5] .. at, ARGV[1]) end
redis.call('HDEL', job, 'sends', 'looks', 'woken', 'parked')
redis.call('ZADD', due, now + ARGV[4], ARGV[1])
local since, suspended = unpack(redis.call('HMGET', job, 'parked_ms', 'suspended_ms'))
if suspended then  -- what an operator has ordered takes nothing of the time that a job may wait for a server
  redis.call('HDEL', job, 'suspended_ms')
  since = since and string.format('%.0f', tonumber(since) + now - tonumber(suspended))
  if since then redis.call('HSET', job, 'parked_ms', since) end
end
local waited = since and now - tonumber(since) or 0
return {'yours', fence, attempts, died, redis.call('HGET', job, 'memo') or '', cancelled and 1 or 0, waited,
  redis.call('HGET', job, 'wants') or '', redis.call('HGET', job, 'follow_ups') or '',
  redis.call('HGET', job, 'attached') or '', redis.call('HGET', job, 'headers') or '',
  redis.call('HGET', job, 'sender') or '', known_servers()}
"""
)

# An attempt has ended in a worker that lives, and Redis knows nothing of it: Redis was away, or has lost the record.
# That is neither an attempt nor a death, also if the lease has run out meanwhile and another worker has counted one.
# ARGV: id, fence, worker, task, job, attempt, memo, wish, trace, who requested it, why, 1 if its message is given back,
# and how long it then has; its follow-ups, which ones those are, and its headers; who signed its order.
_HAND_BACK = (
    _NOW
    + _WAITS
    + f"""
local redis_away, away_message = '{REDIS_UNAVAILABLE}', '{AWAY_MESSAGE}'
"""
    + """
local job, due, deaths = KEYS[1], KEYS[2], KEYS[3]
local was = redis.call('HMGET', job, 'state', 'fence', 'overtaken')
if not was[1] then
  redis.call('HSET', job, 'state', 'queued', 'task', ARGV[4], 'job', ARGV[5], 'attempts', ARGV[6] - 1,
    'fence', ARGV[2], 'created_ms', now)
  for i, name in ipairs({'memo', 'wish', 'trace', 'requested_by', 'reason', 'sent'}) do
    if ARGV[6 + i] ~= '' then redis.call('HSET', job, name, ARGV[6 + i]) end
  end
  for i, name in ipairs({'follow_ups', 'attached', 'headers', 'sender'}) do
    if ARGV[13 + i] ~= '' then redis.call('HSET', job, name, ARGV[13 + i]) end
  end
  redis.call('ZADD', due, now + ARGV[13], ARGV[1])
  return 'restored'
end
if was[3] == ARGV[2] then
  redis.call('HDEL', job, 'overtaken')
  if was[1] ~= 'done' and was[1] ~= 'dead' then redis.call('HINCRBY', job, 'attempts', -1) end
  if redis.call('HDEL', deaths, 'worker:' .. ARGV[3]) == 1 then
    redis.call('HSET', job, 'deaths', redis.call('HINCRBY', deaths, 'count', -1))
  end
  return 'overtaken'
end
if was[2] ~= ARGV[2] or was[1] ~= 'running' then return 'settled' end
wait_for(job, redis_away, away_message, '', redis_away)
redis.call('HINCRBY', job, 'attempts', -1)
local waits = math.min(redis.call('HINCRBY', job, 'waits', 1), 6)
redis.call('ZADD', due, now + math.min(125 * 2 ^ waits, 8000), ARGV[1])
return 'released'
"""
)

# How often Redis has refused this job a command in the same words.
_REFUSED = """
if redis.call('HGET', KEYS[1], 'fence') ~= ARGV[1] then return 0 end
if redis.call('HGET', KEYS[1], 'state') ~= 'running' then return 0 end
if redis.call('HGET', KEYS[1], 'refused') ~= ARGV[2] then redis.call('HDEL', KEYS[1], 'refusals') end
redis.call('HSET', KEYS[1], 'refused', ARGV[2])
return redis.call('HINCRBY', KEYS[1], 'refusals', 1)
"""

_HEARTBEAT = (
    _NOW
    + """
local fields = redis.call('HMGET', KEYS[1], 'fence', 'state', 'telling_ms')
if fields[1] ~= ARGV[2] then return 0 end
if fields[2] == 'running' then
  redis.call('HSET', KEYS[1], 'lease_ms', now + ARGV[3])
elseif fields[3] then
  redis.call('HSET', KEYS[1], 'telling_ms', now + ARGV[3])
else
  return 0
end
redis.call('ZADD', KEYS[2], now + ARGV[3], ARGV[1])
return 1
"""
)

# What is told of a job before it is put aside: now, since when it waits, after how many waits in a row, and when the
# breaker's pause is over.
_FORESEE = (
    _NOW
    + _WAITS
    + """
if redis.call('HGET', KEYS[1], 'fence') ~= ARGV[1] then return {} end
if redis.call('HGET', KEYS[1], 'state') ~= 'running' then return {} end
local waits = redis.call('HGET', KEYS[1], 'waits')
return {now, since(KEYS[1], ARGV[2]), waits or 0, redis.call('HGET', KEYS[2], 'until_ms') or 0}
"""
)

# A worker has sent some of the follow-ups of a job that has ended. ARGV: id, fence, how many by now, and how long the
# list is that it was given, if it has sent all of that. What was added meanwhile is sent next. A dead letter keeps its
# follow-ups, to be replayed with them.
_FOLLOWED = (
    _NOW
    + """
local fields = redis.call('HMGET', KEYS[1], 'fence', 'state', 'telling_ms', 'follow_ups')
if fields[1] ~= ARGV[2] or not fields[3] then return 0 end
redis.call('HSET', KEYS[1], 'followed', ARGV[3])
if ARGV[4] == '' then return 1 end
if #(fields[4] or '') > tonumber(ARGV[4]) then
  redis.call('HSET', KEYS[1], 'telling_ms', 0)
  redis.call('ZADD', KEYS[2], now, ARGV[1])
else
  redis.call('HDEL', KEYS[1], 'telling_ms')
  if fields[2] == 'done' then redis.call('HDEL', KEYS[1], 'follow_ups', 'followed') end
end
return 1
"""
)

_PARK = (
    _NOW
    + _HISTORY
    + _WAITS
    + f"local server_unknown = '{SERVER_UNKNOWN}'"
    + """
if redis.call('HGET', KEYS[1], 'fence') ~= ARGV[2] then return 0 end
if redis.call('HGET', KEYS[1], 'state') ~= 'running' then return 0 end
if ARGV[4] == server_unknown and redis.call('HGET', KEYS[1], 'noted') ~= ARGV[10] then
  redis.call('HSET', KEYS[1], 'noted', ARGV[10])
  note_of_job(KEYS[1], ARGV[7], ARGV[8], true)
end
wait_for(KEYS[1], ARGV[4], ARGV[5], ARGV[9], ARGV[10])
local delay_ms = tonumber(ARGV[3])
if ARGV[6] == 'steady' then
  redis.call('HINCRBY', KEYS[1], 'attempts', -1)
elseif ARGV[6] == 'growing' then
  redis.call('HINCRBY', KEYS[1], 'attempts', -1)
  local waits = math.min(redis.call('HINCRBY', KEYS[1], 'waits', 1), 20)
  delay_ms = math.max(delay_ms, math.min(delay_ms * 2 ^ (waits - 1), 8000))
elseif ARGV[6] == 'server' then
  redis.call('HINCRBY', KEYS[1], 'attempts', -1)
  if redis.call('HSETNX', KEYS[1], 'parked_ms', string.format('%.0f', now)) == 1 then
    note_of_job(KEYS[1], ARGV[7], ARGV[8], true)
  end
else
  redis.call('HDEL', KEYS[1], 'waits')
  note_of_job(KEYS[1], ARGV[7], ARGV[8], true)
end
if ARGV[6] ~= 'counts' and redis.call('HEXISTS', KEYS[1], 'woken') == 1 then delay_ms = 0 end
if ends_at_once(KEYS[1]) then delay_ms = 0 end
redis.call('ZADD', KEYS[2], now + delay_ms, ARGV[1])
return 1
"""
)

# A breaker that has closed meanwhile wakes nobody any more: then the job is due at once.
_PARK_FOR = (
    _NOW
    + _HISTORY
    + _WAITS
    + """
local job, due, parked, index, breaker = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
if redis.call('HGET', job, 'fence') ~= ARGV[2] then return 0 end
if redis.call('HGET', job, 'state') ~= 'running' then return 0 end
wait_for(job, ARGV[4], ARGV[5], ARGV[11], ARGV[12])
if ARGV[10] == '0' then redis.call('HINCRBY', job, 'attempts', -1) end
local suspended = ARGV[13] == '1'
if suspended then
  redis.call('HSETNX', job, 'suspended_ms', string.format('%.0f', now))
  if redis.call('HGET', job, 'noted') ~= ARGV[12] then
    redis.call('HSET', job, 'noted', ARGV[12])
    note_of_job(job, ARGV[7], ARGV[8], true)
  end
elseif redis.call('HSETNX', job, 'parked_ms', string.format('%.0f', now)) == 1 then
  note_of_job(job, ARGV[7], ARGV[8], true)
end
if ends_at_once(job) then
  redis.call('ZADD', due, now, ARGV[1])
  return 1
end
if redis.call('EXISTS', breaker) == 0 then
  redis.call('ZADD', due, now + ARGV[9], ARGV[1])
  return 1
end
redis.call('HSET', job, 'parked', ARGV[6])
redis.call('ZADD', parked, now, ARGV[1])
redis.call('SADD', index, ARGV[6])
local since = suspended and now or tonumber(redis.call('HGET', job, 'parked_ms'))
redis.call('ZADD', due, since + ARGV[3], ARGV[1])
return 1
"""
)

# One job is woken to be the probe when the pause is over, another one if nothing comes of it; all when it has closed.
# All as well when no worker that runs knows the server: its breaker will not close. A server that an operator has taken
# out of service is not tried by anyone: all are woken when the order has ended. They are due in the order in which they
# began to wait, within a millisecond; the probe is due before all others, for many may depend on it.
_WAKE = (
    _NOW
    + _SERVERS
    + f"local parts = {{'{CHANGES}', '{CREDENTIAL}', '{SUSPENDED}'}}"
    + """
local index, due = KEYS[1], KEYS[2]
local knows = #known_servers() > 0
local total = 0
local function server_of(name)
  for _, part in ipairs(parts) do
    if name:sub(-#part) == part then return name:sub(1, -#part - 1) end
  end
  return name
end
for _, name in ipairs(redis.call('SMEMBERS', index)) do
  local breaker, parked = ARGV[1] .. name, ARGV[2] .. name
  local fields = redis.call('HMGET', breaker, 'until_ms', 'probe_until_ms', 'woken_ms')
  local count, probes = 0, false
  if name:sub(-#parts[3]) == parts[3] then
    local over = redis.call('EXISTS', breaker) == 0 or (knows and not is_known(server_of(name)))
    count = over and tonumber(ARGV[3]) or 0
  elseif not fields[1] or (knows and not is_known(server_of(name))) then
    count = tonumber(ARGV[3])
  elseif tonumber(fields[1]) <= now and tonumber(fields[2] or 0) <= now
      and tonumber(fields[3] or 0) + ARGV[4] <= now then
    count, probes = 1, true
    redis.call('HSET', breaker, 'woken_ms', string.format('%.0f', now))
  end
  if count > 0 then
    for i, id in ipairs(redis.call('ZRANGE', parked, 0, count - 1)) do
      redis.call('ZADD', due, probes and 0 or string.format('%.3f', now + (i - 1) / 1000), id)
      redis.call('ZREM', parked, id)
      total = total + 1
    end
    if redis.call('EXISTS', parked) == 0 then redis.call('SREM', index, name) end
  end
end
return total
"""
)

# A job that ended and yet may have pushed something goes on following its claims.
_FINISH = (
    _NOW
    + _HISTORY
    + _FOLLOWERS
    + f"local recent = {RECENT}"
    + """
local job, due, dead, deaths = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local state = redis.call('HGET', job, 'state')
if redis.call('HGET', job, 'fence') ~= ARGV[2] or state ~= 'running' then return {} end
redis.call('HSET', job, 'state', ARGV[3], 'outcome', ARGV[4], 'code', ARGV[5], 'ended_ms', now)
redis.call('HDEL', job, 'lease_ms', 'sends', 'waits', 'message', 'server', 'cause', 'since_ms')
redis.call('ZADD', due, now + ARGV[8], ARGV[1])
note_of_job(job, ARGV[7], ARGV[6], ARGV[5] ~= 'done')
local held = redis.call('HMGET', job, 'hold', 'holds', 'memo')
local doubtful = ARGV[9] == '1' or (held[2] or '') ~= ''
if ARGV[3] == 'dead' then doubtful = doubtful or may_have_pushed(held[3] or '') end
if not doubtful then unfollow(job, ARGV[1], {}) end
for hold in string.gmatch((held[1] or '') .. ' ' .. (held[2] or ''), '%S+') do
  if redis.call('HGET', hold, 'job_id') == ARGV[1] then redis.call('DEL', hold) end
end
for gate in string.gmatch(redis.call('HGET', job, 'gates') or '', '%S+') do
  if redis.call('HGET', gate, 'job_id') == ARGV[1] then redis.call('DEL', gate) end
end
for key in string.gmatch(redis.call('HGET', job, 'storing') or '', '%S+') do redis.call('SREM', key, ARGV[1]) end
if redis.call('HEXISTS', job, 'keep_ms') == 0 then
  redis.call('LPUSH', prefix .. 'recent', ARGV[1])
  redis.call('LTRIM', prefix .. 'recent', 0, recent - 1)
end
if ARGV[3] == 'dead' then
  redis.call('ZADD', dead, now, ARGV[1])
else
  redis.call('DEL', deaths)
  redis.call('HDEL', job, 'job', 'memo')
  redis.call('PEXPIRE', job, redis.call('HGET', job, 'keep_ms') or ARGV[6])
end
local follow_ups = redis.call('HGET', job, 'follow_ups') or ''
if follow_ups ~= '' then redis.call('HSET', job, 'telling_ms', now + ARGV[8]) end
return {follow_ups}
"""
)

# KEYS: due. ARGV: of each job its id, and how long ago (ms) its outcome was published. A job that has been done anew
# since has another outcome.
_PUBLISHED = (
    _NOW
    + """
for i = 1, #ARGV, 2 do
  local fields = redis.call('HMGET', prefix .. 'job:' .. ARGV[i], 'state', 'telling_ms', 'ended_ms')
  local ended = (fields[1] == 'done' or fields[1] == 'dead') and not fields[2]
  if ended and tonumber(fields[3] or 0) <= now - ARGV[i + 1] then redis.call('ZREM', KEYS[1], ARGV[i]) end
end
"""
)

# What the job held it let go of at its end, and what it was told of is outdated; its checkpoint says how far it came.
_ANEW = """
local function begin_anew(job, due, dead, deaths, id, delay_ms)
  redis.call('HSET', job, 'state', 'queued', 'attempts', 0, 'replayed_ms', now)
  redis.call('HINCRBY', job, 'replays', 1)
  redis.call('HDEL', job, 'outcome', 'code', 'message', 'ended_ms', 'deaths', 'cancel', 'hold', 'holds', 'gates',
    'storing', 'sent', 'sends', 'looks', 'waits', 'woken', 'parked', 'parked_ms', 'refused', 'refusals', 'server',
    'cause', 'since_ms', 'purged', 'telling_ms', 'followed', 'noted', 'suspended_ms',
    'sender')
  redis.call('PERSIST', job)
  redis.call('ZREM', dead, id)
  redis.call('DEL', deaths)
  redis.call('ZADD', due, now + delay_ms, id)
end
"""

_REPLAY = (
    _NOW
    + _HISTORY
    + _ANEW
    + """
local job = KEYS[1]
if redis.call('HGET', job, 'state') ~= 'dead' then return 0 end
note_of_job(job, ARGV[3], ARGV[4], true)
begin_anew(job, KEYS[2], KEYS[3], KEYS[4], ARGV[1], ARGV[2])
redis.call('HSET', job, 'sent', 1)
return 1
"""
)

# The same wish again, under the same idempotency key: with the URL as it is signed now. ARGV: id, delay, note, how long
# that is kept, wish, 1 if its message is sent now, job, trace, who requested it, why; then the codes that may pass.
_REUSE = (
    _NOW
    + _HISTORY
    + _ANEW
    + """
local job = KEYS[1]
local was = redis.call('HMGET', job, 'state', 'code', 'wish', 'purged')
local passed = was[1] == 'dead' or was[4]
for i = 11, #ARGV do passed = passed or (was[1] == 'done' and was[2] == ARGV[i]) end
if not passed or was[3] ~= ARGV[5] then return 0 end
note_of_job(job, ARGV[3], ARGV[4], true)
begin_anew(job, KEYS[2], KEYS[3], KEYS[4], ARGV[1], ARGV[2])
redis.call('HDEL', job, 'trace', 'requested_by', 'reason')
for i, name in ipairs({'sent', 'job', 'trace', 'requested_by', 'reason'}) do
  if ARGV[5 + i] ~= '' then redis.call('HSET', job, name, ARGV[5 + i]) end
end
return 1
"""
)

# A message of it may still be on its way, and would begin a job that nobody knows: so it stays as any job that ended.
_PURGE = (
    _NOW
    + _HISTORY
    + _FOLLOWERS
    + """
local job = KEYS[1]
if redis.call('HGET', job, 'state') ~= 'dead' then return 0 end
note_of_job(job, ARGV[2], ARGV[3], true)
redis.call('HSET', job, 'state', 'done', 'purged', 1)
unfollow(job, ARGV[1], {})
redis.call('HDEL', job, 'job', 'memo')
if redis.call('HEXISTS', job, 'telling_ms') == 0 then redis.call('HDEL', job, 'follow_ups', 'followed') end
redis.call('PEXPIRE', job, ARGV[3])
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
"""
)

# A job is due whose message is under way, or lost: that is looked into before another one is sent (_LOST).
_SEND = """
local function send(due, unanswered, grace_ms, id, job, fields, queue)
  local sends = math.min(redis.call('HINCRBY', job, 'sends', 1), 7)
  redis.call('HSET', job, 'sent', queue or 1)
  redis.call('HDEL', job, 'behind', 'empty_ms', 'looks')
  if fields[3] == 'waiting' then redis.call('HSET', job, 'woken', 1) end
  redis.call('ZADD', due, now + grace_ms * 2 ^ (sends - 1), id)
  redis.call('ZADD', unanswered, now, id)
  return {id, fields[1], fields[2] or '{}', fields[4] or '', redis.call('HGET', job, 'headers') or '', queue or ''}
end
"""

# ARGV: how many at most, grace, prefix of jobs, the line.
_SWEEP = (
    _NOW
    + _SEND
    + line.LUA
    + """
local due, unanswered, its = KEYS[1], KEYS[2], line_of(4)
local woken, asked = {}, {}
local rows = redis.call('ZRANGEBYSCORE', due, '-inf', now, 'WITHSCORES', 'LIMIT', 0, ARGV[1])
for i = 1, #rows, 2 do
  local id, since = rows[i], rows[i + 1]
  local job = ARGV[3] .. id
  local fields = redis.call('HMGET', job, 'task', 'job', 'state', 'trace', 'sent')
  if not fields[1] then
    redis.call('ZREM', due, id)
    redis.call('ZREM', unanswered, id)
  elseif fields[5] then
    local looks = math.min(redis.call('HINCRBY', job, 'looks', 1), 7)
    redis.call('ZADD', due, now + ARGV[2] * 2 ^ (looks - 1), id)
    asked[#asked + 1] = {id, fields[5] == '1' and fields[1] or fields[5]}
  elseif its.stands[fields[1]] then
    join_line(due, ARGV[2], id, since)
  else
    woken[#woken + 1] = send(due, unanswered, ARGV[2], id, job, fields)
  end
end
if its.queue then release(due, unanswered, ARGV[2], its, woken) end
return {woken, asked, #asked > 0 and redis.call('HGETALL', KEYS[3]) or {}}
"""
)

# A queue is a line: a message in it is behind no more than those that wait now. It is lost when as many have been
# taken, and some more that workers may have had in hand; or when the queue is empty and no worker says that it has the
# message (_IN_HAND). ARGV: grace, how long a queue has to be empty, how many more, prefix of jobs, the line; then id,
# how many messages are in its queue, and how many had been taken from it before those were counted.
_LOST = (
    _NOW
    + _SEND
    + line.LUA
    + """
local due, unanswered, its = KEYS[1], KEYS[2], line_of(5)
local woken = {}
for i = 6 + ARGV[5], #ARGV, 3 do
  local id, depth, taken = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  local job = ARGV[4] .. id
  local fields = redis.call('HMGET', job, 'task', 'job', 'state', 'trace', 'sent', 'behind', 'empty_ms')
  if fields[1] and fields[5] then
    local lost = false
    if depth == 0 then
      local since = tonumber(fields[7] or now)
      lost = now - since >= tonumber(ARGV[2])
      redis.call('HSET', job, 'empty_ms', since)
      redis.call('ZADD', due, now + ARGV[2], id)
    elseif fields[6] then
      lost = taken >= tonumber(fields[6])
    else
      redis.call('HSET', job, 'behind', taken + depth + ARGV[3])
    end
    if lost and its.stands[fields[1]] then
      redis.call('HDEL', job, 'sent', 'behind', 'empty_ms')
      join_line(due, ARGV[1], id, redis.call('ZSCORE', unanswered, id) or now)
      redis.call('ZREM', unanswered, id)
    elseif lost then
      woken[#woken + 1] = send(due, unanswered, ARGV[1], id, job, fields)
    elseif depth > 0 then
      redis.call('HDEL', job, 'empty_ms')
      redis.call('ZADD', unanswered, 'NX', now - ARGV[1], id)
    end
  end
end
return woken
"""
)

# Messages that a worker has taken and not begun, for want of a slot or because of a rate limit: they are not lost.
# ARGV: grace, prefix of jobs, ids.
_IN_HAND = (
    _NOW
    + """
for i = 3, #ARGV do
  local job = ARGV[2] .. ARGV[i]
  local fields = redis.call('HMGET', job, 'sent', 'state', 'lease_ms')
  if fields[1] and not (fields[2] == 'running' and tonumber(fields[3] or 0) > now) then
    redis.call('HDEL', job, 'behind', 'empty_ms', 'looks')
    redis.call('ZREM', KEYS[2], ARGV[i])
    redis.call('ZADD', KEYS[1], 'XX', now + ARGV[1], ARGV[i])
  end
end
"""
)

# Who is at it just now looks again, when it is put aside.
_WAKE_NOW = (
    _NOW
    + """
local fields = redis.call('HMGET', KEYS[1], 'state', 'task', 'job', 'headers')
if fields[1] ~= 'waiting' and fields[1] ~= 'running' then return {} end
redis.call('HSET', KEYS[1], 'woken', 1)
if fields[1] == 'running' then return {} end
if ARGV[2] == '1' then
  redis.call('ZADD', KEYS[2], now, ARGV[1])
else
  redis.call('HSET', KEYS[1], 'sent', 1)
end
return {fields[2], fields[3] or '{}', fields[4] or ''}
"""
)

_REQUEUE_LOST = (
    _NOW
    + """
for _, id in ipairs(ARGV) do
  if redis.call('ZREM', KEYS[2], id) == 1 then redis.call('ZADD', KEYS[1], 'XX', 'LT', now, id) end
end
"""
)

_CANCEL = (
    _NOW
    + """
local state = redis.call('HGET', KEYS[1], 'state')
if not state and ARGV[3] ~= '0' then redis.call('SET', prefix .. 'cancelled:' .. ARGV[1], 1, 'PX', ARGV[3]) end
if not state or state == 'done' or state == 'dead' then return state or '' end
if ARGV[2] == 'taken' and state ~= 'queued' then return 'taken' end
if ARGV[2] == 'begun' and redis.call('HEXISTS', KEYS[1], 'memo') == 1 then return 'begun' end
if redis.call('HSETNX', KEYS[1], 'cancel', 1) == 0 then return state end  -- each of many workers heard it
if state ~= 'running' then
  redis.call('HDEL', KEYS[1], 'sent')
  redis.call('ZADD', KEYS[2], now, ARGV[1])
end
return state
"""
)

# KEYS: hold, job, then the gates and after them the sets of the study and the series, if the image is to be stored.
# A job whose source gives another image than it did before gives up the image it held. Whoever holds asks the servers
# next: what is stored after asked_us may be missing from their answers. Who has to wait is told at the next claim what
# for (ARGV[3]), before the image is fetched once more.
_LOCK_IMAGE = (
    _NOW_US
    + """
if redis.call('HGET', KEYS[2], 'fence') ~= ARGV[2] then return '!lost' end
local owner = redis.call('HGET', KEYS[1], 'job_id')
if owner == ARGV[1] then owner = false end
local half = (#KEYS - 2) / 2
local registered = redis.call('HGET', KEYS[2], 'hold') == KEYS[1]
for i = 3, 2 + half do
  if not owner and not registered then owner = redis.call('HGET', KEYS[i], 'job_id') end
end
if owner then
  if half > 0 then redis.call('HSET', KEYS[2], 'wants', ARGV[3]) end
  return owner
end
redis.call('HDEL', KEYS[2], 'wants')
local before = redis.call('HMGET', KEYS[2], 'hold', 'storing')
if before[1] and not registered and redis.call('HGET', before[1], 'job_id') == ARGV[1] then
  redis.call('DEL', before[1])
end
for key in string.gmatch(before[2] or '', '%S+') do redis.call('SREM', key, ARGV[1]) end
redis.call('HSET', KEYS[1], 'job_id', ARGV[1])
redis.call('HSET', KEYS[2], 'hold', KEYS[1])
for i = 3 + half, #KEYS do
  redis.call('SADD', KEYS[i], ARGV[1])
  redis.call('PEXPIRE', KEYS[i], 86400000)
end
if half > 0 then redis.call('HSET', KEYS[2], 'storing', table.concat(KEYS, ' ', 3 + half), 'asked_us', us) end
return ''
"""
)

# The same for many images at once, held until they are let go; a job's record lists what it holds so. ARGV: job, fence,
# then image, study and series of each. What is another's is left out, and nobody waits for it while holding the rest.
_LOCK_IMAGES = (
    _NOW_US
    + """
if redis.call('HGET', KEYS[1], 'fence') ~= ARGV[2] then return {'!lost'} end
local before = redis.call('HMGET', KEYS[1], 'holds', 'storing')
local holds, storing, mine, into, owners = {}, {}, {}, {}, {}
for key in string.gmatch(before[1] or '', '%S+') do holds[#holds + 1] = key; mine[key] = true end
for key in string.gmatch(before[2] or '', '%S+') do storing[#storing + 1] = key; into[key] = true end
for i = 3, #ARGV, 3 do
  local hold = prefix .. 'hold:' .. ARGV[i]
  local owner = redis.call('HGET', hold, 'job_id') or ''
  if owner == ARGV[1] then owner = '' end
  for above = i + 1, i + 2 do
    local gate = prefix .. 'gate:' .. ARGV[above]
    if owner == '' and not mine[hold] then owner = redis.call('HGET', gate, 'job_id') or '' end
  end
  owners[#owners + 1] = owner
  if owner == '' then
    redis.call('HSET', hold, 'job_id', ARGV[1])
    if not mine[hold] then holds[#holds + 1] = hold; mine[hold] = true end
    for above = i + 1, i + 2 do
      local key = prefix .. 'storing:' .. ARGV[above]
      if not into[key] then
        redis.call('SADD', key, ARGV[1])
        redis.call('PEXPIRE', key, 86400000)
        storing[#storing + 1] = key
        into[key] = true
      end
    end
  end
end
if #holds > 0 then
  redis.call('HSET', KEYS[1], 'holds', table.concat(holds, ' '), 'storing', table.concat(storing, ' '), 'asked_us', us)
end
return owners
"""
)

# ARGV: job, fence, how many images stay held, these images, then the studies whose claims are still followed. As long
# as an image is held, so is what it is stored into.
_RELEASE_IMAGES = (
    _FOLLOWERS
    + """
if redis.call('HGET', KEYS[1], 'fence') ~= ARGV[2] then return 0 end
local images = 3 + tonumber(ARGV[3])
local keep, kept, followed = {}, {}, {}
for i = 4, images do keep[prefix .. 'hold:' .. ARGV[i]] = true end
for i = images + 1, #ARGV do followed[prefix .. 'study:' .. ARGV[i]] = true end
unfollow(KEYS[1], ARGV[1], followed)
for key in string.gmatch(redis.call('HGET', KEYS[1], 'holds') or '', '%S+') do
  if keep[key] then
    kept[#kept + 1] = key
  elseif redis.call('HGET', key, 'job_id') == ARGV[1] then
    redis.call('DEL', key)
  end
end
if #kept > 0 then return redis.call('HSET', KEYS[1], 'holds', table.concat(kept, ' ')) end
for key in string.gmatch(redis.call('HGET', KEYS[1], 'storing') or '', '%S+') do redis.call('SREM', key, ARGV[1]) end
return redis.call('HDEL', KEYS[1], 'holds', 'storing')
"""
)

_RELEASE_DESTINATION = """
if redis.call('HGET', KEYS[1], 'fence') ~= ARGV[2] then return 0 end
local hold = redis.call('HGET', KEYS[1], 'hold')
if hold and redis.call('HGET', hold, 'job_id') == ARGV[1] then redis.call('DEL', hold) end
return redis.call('HDEL', KEYS[1], 'hold')
"""

_LOCK_FOR_DELETE = """
local owner = redis.call('HGET', KEYS[1], 'job_id')
if owner and owner ~= ARGV[1] then return owner end
if redis.call('HGET', KEYS[2], 'fence') ~= ARGV[2] then return '!lost' end
if not owner then
  redis.call('HSET', KEYS[1], 'job_id', ARGV[1])
  local gates = redis.call('HGET', KEYS[2], 'gates')
  redis.call('HSET', KEYS[2], 'gates', gates and gates .. ' ' .. KEYS[1] or KEYS[1])
end
return redis.call('SRANDMEMBER', KEYS[3]) or ''
"""

_RELEASE = """
if redis.call('HGET', KEYS[1], 'fence') ~= ARGV[2] then return 0 end
for gate in string.gmatch(redis.call('HGET', KEYS[1], 'gates') or '', '%S+') do
  if redis.call('HGET', gate, 'job_id') == ARGV[1] then redis.call('DEL', gate) end
end
return redis.call('HDEL', KEYS[1], 'gates')
"""

_FORGET_STUDY = (
    _FOLLOWERS
    + """
if redis.call('SCARD', KEYS[2]) > 0 then return 0 end
drop_claim(KEYS[1])
return 1
"""
)

# Whoever decides to push an image holds it, and every server has said that it has none: a receipt from before is void.
# A push of a file at which its server has hung is not intended before a worker has judged that. Gives what became of it
# (`IntentResult`), and 1 if the server has hung at any file.
_INTENT = """
local lost, cancelled, written, hung, untried = -1, 0, 1, 2, 3
local function standing(job, fence)
  local fields = redis.call('HMGET', job, 'fence', 'state', 'cancel')
  if fields[1] ~= fence or fields[2] ~= 'running' then return lost end
  return fields[3] and cancelled or written
end
local function write_intent(job, memo, entry, keep_ms)
  redis.call('HSET', job, 'memo', memo)
  if entry ~= '' then
    note_of_job(job, entry, keep_ms, false)
    local uid = string.match(redis.call('HGET', job, 'hold') or '', '([%d.]+)$')
    if uid then redis.call('DEL', prefix .. 'receipt:' .. uid) end
  end
end
local function intend_push(job, memo, entry, keep_ms, hangs, file)
  if redis.call('EXISTS', hangs) == 0 then
    write_intent(job, memo, entry, keep_ms)
    return written, 0
  end
  if redis.call('HEXISTS', hangs, file) == 1 then return hung, 1 end
  write_intent(job, memo, entry, keep_ms)
  return written, 1
end
"""

# KEYS: job. ARGV: fence, memo, note ('' without one), how long that is kept.
_WRITE_INTENT = (
    _NOW
    + _HISTORY
    + _INTENT
    + """
local found = standing(KEYS[1], ARGV[1])
if found == written then write_intent(KEYS[1], ARGV[2], ARGV[3], ARGV[4]) end
return found
"""
)

# KEYS: job, hangs of the server. ARGV: fence, memo, note, how long that is kept, the file.
_INTEND_PUSH = (
    _NOW
    + _HISTORY
    + _INTENT
    + """
local found = standing(KEYS[1], ARGV[1])
if found ~= written then return {found, 0} end
return {intend_push(KEYS[1], ARGV[2], ARGV[3], ARGV[4], KEYS[2], ARGV[5])}
"""
)

# KEYS: claim, placed, history of the study, job; and the hangs of the server, where its push is intended at once.
# ARGV: server, job, lifetime, note, its lifetime, 1 if the job asked for that server, or `from:` and the server that it
# is to leave because of its maintenance; fence ('' where nothing is intended), memo, note of the intent, the file; then
# the servers that this worker knows: a claim on another server is left to a worker that knows it, and is void if no
# worker that runs does. A job that asked for its server takes over a claim if no job that follows it may still push,
# and nothing has been stored under it since the job asked the servers, which all said that they have none. A claim on a
# server in maintenance, which has not been asked, goes over to another server only if nothing was ever stored under it,
# and no job that follows it may still push. What is intended is the push to the server that the job asked for, or that
# it is the first to claim; otherwise the claim alone is told.
# Version 0.1 did not say when something was stored under a claim: it counts as now, once.
_CLAIM_STUDY = (
    _NOW
    + _NOW_US
    + _HISTORY
    + _FOLLOWERS
    + _SERVERS
    + _INTENT
    + """
local claim, job = KEYS[1], KEYS[4]
if ARGV[7] ~= '' then
  local found = standing(job, ARGV[7])
  if found ~= written then return {'', 0, found, 0} end
end
local server = redis.call('HGET', claim, 'server')
local binds = #ARGV == 10
for i = 11, #ARGV do binds = binds or ARGV[i] == server end
if server and not binds and is_known(server) then return {server, 0, untried, 0} end
local leaves = server and ARGV[6] == 'from:' .. server
local asked_elsewhere = (ARGV[6] == '1' or leaves) and server ~= ARGV[1]
if server and binds and asked_elsewhere then
  if redis.call('HEXISTS', claim, 'opened_by') == 1 then
    if leaves then return {server, 0, untried, 0} end
    redis.call('HSETNX', claim, 'stored_us', us)
  end
  local stored_us = tonumber(redis.call('HGET', claim, 'stored_us') or 0)
  local seen = stored_us < tonumber(redis.call('HGET', job, 'asked_us') or 1)
  if is_followed(claim, ARGV[2], leaves) or not (seen or leaves) then return {server, 0, untried, 0} end
end
local first = not (server and binds) or asked_elsewhere
if first then
  if server then redis.call('HINCRBY', KEYS[2], server, -1) end
  if asked_elsewhere then redis.call('DEL', claim) else redis.call('HDEL', claim, 'opened_by') end
  redis.call('HSET', claim, 'server', ARGV[1], 'claimed_by', ARGV[2], 'claimed_ms', now)
  redis.call('HINCRBY', KEYS[2], ARGV[1], 1)
  local said = ARGV[4]
  if server and not binds then said = string.gsub(said, '}$', ',"void":"' .. server .. '"}') end
  if said ~= '' then note(KEYS[3], said, ARGV[5]) end
end
redis.call('PEXPIRE', claim, ARGV[3])
if redis.call('HSETNX', claim, 'follower:' .. ARGV[2], now) == 1 and redis.call('HEXISTS', job, 'state') == 1 then
  local claims = redis.call('HGET', job, 'claims')
  redis.call('HSET', job, 'claims', claims and claims .. ' ' .. claim or claim)
end
local chosen, became, troubled = redis.call('HGET', claim, 'server'), untried, 0
if ARGV[7] ~= '' and chosen == ARGV[1] and (first or ARGV[6] == '1') then
  became, troubled = intend_push(job, ARGV[8], ARGV[9], ARGV[5], KEYS[5], ARGV[10])
end
return {chosen, first and 1 or 0, became, troubled}
"""
)

# A study that never was claimed is not claimed by being moved: servers are asked first.
_MOVE_CLAIM = (
    _NOW
    + _HISTORY
    + """
local server = redis.call('HGET', KEYS[1], 'server')
if not server or server == ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'server', ARGV[1])
redis.call('HINCRBY', KEYS[2], server, -1)
redis.call('HINCRBY', KEYS[2], ARGV[1], 1)
note(KEYS[3], ARGV[2], ARGV[3])
return 1
"""
)

_RECEIPT = """
local function write_receipt(row, keep_ms, only_anew)
  local receipt, pushes = prefix .. 'receipt:' .. row.image, prefix .. 'pushes:' .. row.study
  if redis.call('DEL', receipt) == 1 or not only_anew then
    redis.call('HSET', receipt, 'job_id', row.job, 'server', row.server, 'sha256', row.sha256,
      'size_bytes', row.size_bytes, 'study_uid', row.study, 'series_uid', row.series, 'stored_ms', now, 'stored_us', us)
    redis.call('PEXPIRE', receipt, keep_ms)
  end
  redis.call('HSET', pushes, 'at:' .. row.server, us .. ' ' .. row.job)
  redis.call('PEXPIRE', pushes, keep_ms)
  local claim = prefix .. 'study:' .. row.study
  if redis.call('HGET', claim, 'server') ~= row.server then return false end
  redis.call('HSETNX', claim, 'opened_by', row.job)
  redis.call('HSET', claim, 'stored_us', us)
  return redis.call('HGET', claim, 'opened_by') == row.job
end
"""

# ARGV: job, server, lifetime, note; fence ('' without a checkpoint), the checkpoint, and the one of a job that was the
# first to store anything of the study it had claimed; then image, study, series, digest and size of each. A single
# upload has a note for its image. A batch has none, and renews the receipts that there are: one for each of its images
# would take several times what it leaves otherwise, so what stands for the others is the entry of their study.
# The receipt of what is stored is written in any case, the checkpoint by the holder of the fence alone.
_STORED = (
    _NOW
    + _NOW_US
    + _HISTORY
    + _RECEIPT
    + _INTENT
    + """
local opened = false
redis.call('HSET', prefix .. 'stored', ARGV[2], us)
for i = 8, #ARGV, 5 do
  local row = {job = ARGV[1], server = ARGV[2], image = ARGV[i], study = ARGV[i + 1], series = ARGV[i + 2],
    sha256 = ARGV[i + 3], size_bytes = ARGV[i + 4]}
  opened = write_receipt(row, ARGV[3], ARGV[4] == '') or opened
  if ARGV[4] ~= '' then note(prefix .. 'trail:' .. row.image, ARGV[4], ARGV[3]) end
end
local found = untried
if ARGV[5] ~= '' then
  found = standing(KEYS[1], ARGV[5])
  if found == written then write_intent(KEYS[1], opened and ARGV[7] or ARGV[6], '', 0) end
end
return {opened and 1 or 0, found}
"""
)

# How often a server hung at files. ARGV: times (-1 takes one back), how long it counts, the files. What is older goes.
# In the field '' is when the server answered a request to store, which proves that it does not hang at all files alike.
_NOTE_HANG = (
    _NOW
    + """
local oldest = now - tonumber(ARGV[2])
local rows = redis.call('HGETALL', KEYS[1])
for i = 1, #rows, 2 do
  if tonumber(string.match(rows[i + 1], '^%d+ %d+ (%d+)')) < oldest then redis.call('HDEL', KEYS[1], rows[i]) end
end
local answered = tonumber(string.match(redis.call('HGET', KEYS[1], '') or '0 0 0', '^%d+ %d+ (%d+)'))
for i = 3, #ARGV do
  local known = redis.call('HGET', KEYS[1], ARGV[i]) or '0 0 0 0'
  local count, first, _, proven = string.match(known, '(%d+) (%d+) (%d+) (%d)')
  count, first = tonumber(count) + tonumber(ARGV[1]), tonumber(first)
  if count < 1 then
    redis.call('HDEL', KEYS[1], ARGV[i])
  else
    if first > 0 and answered > first then proven = '1' end
    first = first > 0 and first or now
    redis.call('HSET', KEYS[1], ARGV[i], string.format('%d %.0f %.0f %s', count, first, now, proven))
  end
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
)

_NOTE_ANSWER = (
    _NOW
    + """
if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], '', string.format('0 0 %.0f 0', now)) end
"""
)

# 1 if the server hung at any file; then for each of ARGV how often, and 1 if the server hung at others too since it
# first hung at this one, and answered no request to store between the two hangs.
_HANGS = """
local rows, known = redis.call('HGETALL', KEYS[1]), {}
local latest, second, latest_file = 0, 0, ''
for i = 1, #rows, 2 do
  local count, first, last, proven = string.match(rows[i + 1], '(%d+) (%d+) (%d+) (%d)')
  last = tonumber(last)
  if rows[i] ~= '' then
    known[rows[i]] = {tonumber(count), tonumber(first), proven == '1'}
    if last > latest then
      latest, second, latest_file = last, latest, rows[i]
    elseif last > second then
      second = last
    end
  end
end
local told = {#rows > 0 and 1 or 0}
for _, file in ipairs(ARGV) do
  local one = known[file]
  local other = latest_file == file and second or latest
  told[#told + 1] = one and {one[1], other > one[2] and not one[3] and 1 or 0} or {0, 0}
end
return told
"""

# ARGV: server, job, lifetime, field, what to add. Written before images are copied, and after.
_COPIES = (
    _NOW_US
    + """
redis.call('HSET', KEYS[1], ARGV[4] .. ARGV[1], us .. ' ' .. ARGV[2] .. ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
if ARGV[4] == 'copied:' then redis.call('HSET', prefix .. 'stored', ARGV[1], us) end
"""
)

# ARGV: job, server, lifetime, series, image, the last two '' above their level. Where no job of ours has pushed
# anything, there is nothing to void.
_VOID = (
    _NOW_US
    + """
if ARGV[5] ~= '' then
  local receipt = prefix .. 'receipt:' .. ARGV[5]
  if redis.call('HGET', receipt, 'server') == ARGV[2] then redis.call('HSET', receipt, 'gone', us .. ' ' .. ARGV[1]) end
  return
end
local pushes = KEYS[1]
if redis.call('EXISTS', pushes) == 0 then return end
redis.call('HSET', pushes, 'gone:' .. ARGV[2] .. (ARGV[4] ~= '' and ' ' .. ARGV[4] or ''), us .. ' ' .. ARGV[1])
redis.call('PEXPIRE', pushes, ARGV[3])
"""
)

# KEYS: schema, workers, servers. ARGV: schema of this release, worker, what it says, the servers that it knows. What is
# older becomes ours; a newer one is not ours to write into, and neither is what has no number of a schema there (0).
_REPORT_HEALTH = (
    _NOW
    + """
local text = redis.pcall('GET', KEYS[1]) or '1'
local schema = type(text) == 'string' and #text < 10 and string.match(text, '^[1-9]%d*$') and tonumber(text) or 0
if schema == 0 or schema > tonumber(ARGV[1]) then return schema end
if schema < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], ARGV[1]) end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
for i = 4, #ARGV do redis.call('ZADD', KEYS[3], now, ARGV[i]) end
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - 86400000)
return tonumber(ARGV[1])
"""
)


Wait = Literal["counts", "growing", "steady", "server"]


class LeaseLost(Exception):
    """Another attempt has taken this job over, or Redis has lost its record: `Ledger.hand_back` knows which."""


class TakeState(Enum):
    YOURS = "yours"
    DONE = "done"
    DEAD = "dead"
    HELD = "held"  # a live lease: the holder will finish, or the sweeper will notice
    EARLY = "early"  # parked: it will be woken when it is due
    OTHER = "other"  # its id is that of another job
    FULL = "full"  # its follow-ups are too many, together with those that came before


@dataclass(frozen=True)
class Attachment:
    """What a message bears besides its job. ``follow_ups`` (JSON) are sent when the job has ended, the same ones (by
    ``digest``) once; ``headers`` (JSON) belong to each message that wakes it.
    """

    follow_ups: str = ""
    digest: str = ""
    headers: str = ""


@dataclass(frozen=True)
class Attachments:
    """What the ledger has of what the messages of a job bore: as `Attachment`, of all of them."""

    follow_ups: str = ""
    digests: str = ""
    headers: str = ""


@dataclass(frozen=True)
class Sender:
    """The certificate whose key signed a message, by its ``name``; "" where messages are not signed.

    ``may_delete``: the settings let it send orders that delete.
    """

    name: str = ""
    may_delete: bool = False


NO_SENDER: Final = Sender()
NOTHING_ATTACHED: Final = Attachment()
NO_ATTACHMENTS: Final = Attachments()


@dataclass(frozen=True)
class PendingFollowUps:
    """Follow-ups of an ended job (JSON, one message's per line) that the holder of ``fence`` has to send now, but for
    the first ``sent`` ones. Fence 0: those of a message that was refused; the ledger has none of it.
    """

    follow_ups: str
    fence: int = 0
    sent: int = 0


@dataclass(frozen=True)
class TakeResult:
    """What became of the order to do a job now. ``checkpoint`` is what an earlier attempt left behind.

    ``waited_s`` ago it was first parked for an open circuit; 0 if it never was. ``wants`` are the image,
    study and series that it waits for, because another job has them. ``attachments`` are what its record has of its
    messages, ``pending`` is what is still to be sent of a job that has ended.
    """

    state: TakeState
    fence: int = 0
    attempt: int = 0
    crash_count: int = 0
    checkpoint: dict[str, Any] | None = None
    cancelled: bool = False
    waited_s: float = 0
    wants: tuple[str, ...] = ()
    #: The servers that workers which run know.
    servers: tuple[str, ...] = ()
    outcome: dict[str, Any] | None = None
    attachments: Attachments = NO_ATTACHMENTS
    #: The certificate that signed its order, as far as a worker has verified that.
    sender: str = ""
    pending: PendingFollowUps | None = None


class HandedBack(Enum):
    """What became of a job whose attempt could not be written down."""

    RESTORED = "restored"  # Redis had lost its record
    OVERTAKEN = "overtaken"  # the lease had run out, and another attempt has begun
    SETTLED = "settled"  # it has ended, was put aside, or another attempt has begun otherwise
    RELEASED = "released"  # it is due again


@dataclass(frozen=True)
class Receipt:
    """Proof that a job of ours stored an instance; whether it is there now, only its server can say."""

    job_id: str
    server: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class StoredImage:
    """One of many images that a job has stored."""

    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Hang:
    """How often a server hung at a file. ``others_hung``: at others too since, and it answered nothing between."""

    count: int
    others_hung: bool = False


@dataclass(frozen=True)
class Voided:
    """Why a receipt holds no longer: a job of ours has ``deleted`` the image since, or a batch may have copied another
    file to its place (``replaced``).
    """

    how: Literal["deleted", "replaced"]
    at_ms: int
    job_id: str


@dataclass(frozen=True)
class StudyPush:
    """When a job put images of a study on ``server`` last: by an ``upload``, or as a ``copy``, by migration or out of a
    backup, and then how many; None if it died over it.
    """

    kind: Literal["upload", "copy"]
    server: str
    job_id: str
    at_ms: int
    images: int | None
    voided: Voided | None


@dataclass(frozen=True)
class PushIntent:
    """That the attempt with ``fence`` is about to push ``file`` (its SHA-256) to ``server``, for `Ledger.write_intent`.

    ``checkpoint`` is what the next attempt has to know, ``decision`` what a trace will say of it.
    """

    fence: int
    checkpoint: Mapping[str, Any]
    decision: Mapping[str, Any]
    server: str
    file: str

    def texts(self, job_id: str) -> tuple[str, str]:
        """Checkpoint and event, as they are written."""
        return _dump(self.checkpoint), _event("routed", job_id, **self.decision)


class IntentState(Enum):
    LOST = -1
    CANCELLED = 0
    WRITTEN = 1
    HUNG = 2  # the server has hung at this file: it has to be judged whether it is sent again
    UNTRIED = 3  # none was given, or the study is another server's


@dataclass(frozen=True)
class IntentResult:
    """What became of an intent. ``troubled``: the server has hung at some file lately."""

    state: IntentState
    troubled: bool = False


LOST_INTENT: Final = IntentResult(IntentState.LOST)
NO_INTENT: Final = IntentResult(IntentState.UNTRIED)


@dataclass(frozen=True)
class StoredCheckpoint:
    """The checkpoint of an attempt that has stored an image: ``first`` if its job was the first in the study that it
    had claimed, else ``other``.
    """

    fence: int
    first: Mapping[str, Any]
    other: Mapping[str, Any]

    def args(self) -> list[str | int]:
        return [self.fence, _dump(self.other), _dump(self.first)]


@dataclass(frozen=True)
class StudyClaim:
    """``intended`` is what became of the intent that came with the claim."""

    server: str
    first: bool
    intended: IntentResult = NO_INTENT


@dataclass(frozen=True)
class Event:
    """One decision in a history: ``event``, its job, and what belongs to it.

    Events: claimed, routed, stored, waiting, ended, replayed, purged.
    """

    at_ms: int
    event: str
    job_id: str
    details: dict[str, Any]


@dataclass(frozen=True)
class UidRecord:
    """What the ledger knows of one UID. ``claim`` and ``receipt`` are the records as they stand, {} without one.

    ``holder`` is the job that is storing or deleting it now, ``writers`` are those that are storing into it. ``voided``
    says why the receipt holds no longer, ``pushes`` who has put images there last, if the UID is that of a study.
    """

    history: list[Event]
    holder: str | None
    writers: list[str]
    claim: dict[str, str]
    receipt: dict[str, str]
    voided: Voided | None = None
    pushes: Sequence[StudyPush] = ()


@dataclass(frozen=True)
class Load:
    """How many jobs wait or run, how many of them nobody looked at although it was time, how many dead letters."""

    open: int
    overdue: int
    dead: int


@dataclass(frozen=True)
class DeadLetter:
    """A job that nothing but a person can help. ``about`` is what it was to do, fit to be shown.

    ``crash_count`` is how often a worker crashed on it, ``replays`` how often it was replayed before; ``begun`` says
    that it had come as far as to write down what it was about to do, ``uids`` what it had got hold of.
    ``requested_by`` and ``reason`` are as they were given, "" where they were not.
    """

    job_id: str
    task: str
    about: str
    error: dict[str, Any]
    attempts: int
    crash_count: int
    replays: int
    created_ms: int
    died_ms: int
    begun: bool
    uids: list[str]
    requested_by: str = ""
    reason: str = ""

    @property
    def deaths(self) -> int:
        """``crash_count``, as version 0.1 named it."""
        return self.crash_count

    @property
    def code(self) -> str:
        return str(self.error.get("code", ""))

    @property
    def message(self) -> str:
        return str(self.error.get("message", ""))


@dataclass(frozen=True)
class JobStanding:
    """The ledger's answer to "what became of this job": ``outcome`` is set once the job has ended.

    ``state`` is one of queued, running, waiting, done, dead; ``waiting`` says why a job waits (`Waiting`), also one
    that is in its queue.
    """

    state: str
    outcome: dict[str, Any] | None
    attempts: int
    waiting: dict[str, Any] | None


@dataclass(frozen=True)
class DueJob:
    """A job to be woken. ``trace`` is the W3C ``traceparent`` of its sender, if that was traced; ``headers`` are those
    of its first message that belong to each one (its place in a canvas, its stamps).
    """

    job_id: str
    task: str
    job: dict[str, Any]
    trace: str = ""
    headers: dict[str, Any] = field(default_factory=dict)
    #: Where its message is sent; "" is the queue of its task.
    queue: str = ""


#: What Redis answers to any command while it starts, fails over, runs a script, or has no room or no replicas.
_PASSING: Final = re.compile(
    r"\b(LOADING|READONLY|OOM|BUSY|MISCONF|(MASTER|CLUSTER)DOWN|NOREPLICAS|TRYAGAIN|NOSCRIPT)\b"
)
#: How much of an answer is kept, and shown; behind "with args" Redis quotes what it was sent.
_WORDS: Final = 160


def passes(error: redis.RedisError) -> bool:
    """Whether time cures it: Redis is away, or cannot serve now. What is left is an answer to this one command."""
    if not isinstance(error, redis.ResponseError | redis.DataError):
        return True
    kinds = (redis.exceptions.ReadOnlyError, redis.exceptions.OutOfMemoryError, redis.exceptions.NoScriptError)
    return isinstance(error, (*kinds, redis.exceptions.ClusterError)) or bool(_PASSING.search(str(error)))


def words_of(error: redis.RedisError) -> str:
    """An answer of Redis in one line, without what it quotes of the command."""
    said = " ".join(re.split(r" script: |,? with args", str(error))[0].split())
    return f"{type(error).__name__}: {said[:_WORDS]}"


def _said(row: str) -> dict[str, Any] | None:
    """What a worker's watchdog said; None if ``row`` is nothing that one writes."""
    try:
        said = json.loads(row)
        numbers = (said["at"], said["every_s"], said.get("schema", 1))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    well = {"ok", "complaint"} <= said.keys() and all(isinstance(one, int | float) for one in numbers)
    return cast(dict[str, Any], said) if well else None


def job_id_for(idempotency_key: str | None) -> str:
    """A fresh job id, or the one id that belongs to ``idempotency_key``."""
    return str(uuid.uuid5(_NAMESPACE, idempotency_key) if idempotency_key else uuid.uuid4())


def content_digest(task: str, job: Mapping[str, Any]) -> str:
    """What a job is about, whatever its id and whoever wants it: deaths are counted by this."""
    order = {key: value for key, value in job.items() if key not in ("idempotency_key", *_TOLD_OF_IT)}
    return hashlib.sha256(f"{task}\n{_dump(order)}".encode()).hexdigest()


class Ledger:
    """The ledger in the Redis database at ``url``. Safe for threads; make one per process, after a fork."""

    def __init__(  # noqa: PLR0913 - what the settings say of it
        self,
        client: redis.Redis,
        *,
        lease_s: float = 30,
        grace_s: float = 60,
        keep_s: float = 86_400,
        claim_s: float = 7 * 86_400,
        worker: str = "",
        prefix: str = PREFIX,
    ) -> None:
        """``worker`` names what dies together: a process, or a pool of them. All keys begin with ``prefix``."""
        self._redis = client
        self._prefix = prefix
        self._worker = worker
        self.lease_s = lease_s
        self.client = client
        self.grace_ms = _ms(grace_s)
        self.keep_ms = _ms(max(keep_s, MESSAGES_S))
        self._claim_ms = _ms(claim_s)

        def script(text: str) -> Script:
            return client.register_script(f"local prefix = '{prefix}'\n{text}")

        self._submit, self._take, self._heartbeat = script(_SUBMIT), script(_TAKE), script(_HEARTBEAT)
        self._park, self._finish, self._sweep = script(_PARK), script(_FINISH), script(_SWEEP)
        self._cancel, self._lock_image, self._write_intent = script(_CANCEL), script(_LOCK_IMAGE), script(_WRITE_INTENT)
        self._claim_study, self._stored = script(_CLAIM_STUDY), script(_STORED)
        self._intend_push = script(_INTEND_PUSH)
        self._move_claim = script(_MOVE_CLAIM)
        self._lock_for_delete, self._release, self._forget_study = (
            script(_LOCK_FOR_DELETE),
            script(_RELEASE),
            script(_FORGET_STUDY),
        )
        self._lock_images, self._release_images = script(_LOCK_IMAGES), script(_RELEASE_IMAGES)
        self._foresee = script(_FORESEE)
        self._park_for, self._wake = script(_PARK_FOR), script(_WAKE)
        self._requeue_lost, self._lost, self._in_hand = script(_REQUEUE_LOST), script(_LOST), script(_IN_HAND)
        self._published, self._replay, self._purge = script(_PUBLISHED), script(_REPLAY), script(_PURGE)
        self._wake_now, self._release_destination = script(_WAKE_NOW), script(_RELEASE_DESTINATION)
        self._reuse = script(_REUSE)
        self._void, self._copies = script(_VOID), script(_COPIES)
        self._followed = script(_FOLLOWED)
        self._hand_back, self._refused = script(_HAND_BACK), script(_REFUSED)
        self._report_health = script(_REPORT_HEALTH)
        self._note_hang, self._note_answer, self._hangs = script(_NOTE_HANG), script(_NOTE_ANSWER), script(_HANGS)

    @classmethod
    def connect(cls, url: str, *, worker: str = "", prefix: str = PREFIX, **times: float) -> Ledger:
        """A ledger at ``url`` whose sockets cannot hang for ever and survive a restart of Redis."""
        over_tcp: dict[str, Any] = {} if is_socket(url) else {"socket_keepalive": True}
        client = redis.Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=15,
            socket_connect_timeout=5,
            health_check_interval=30,
            **over_tcp,
        )
        return cls(client, worker=worker, prefix=prefix, **times)

    def close(self) -> None:
        """End the connections of `connect`; whoever asks again opens new ones."""
        self.client.close()

    # --- a job's life ---------------------------------------------------------------------------------------

    def submit(  # noqa: PLR0913 - all that a record is made of
        self,
        job_id: str,
        *,
        task: str,
        job: Mapping[str, Any],
        due_in_s: float | None = None,
        trace: str = "",
        again: bool = False,
        sender: str = "",
    ) -> bool:
        """Write the job down; False if it is known. Its message is to be sent now: should it get lost, another one is.
        With ``due_in_s`` none is, and the sweeper sends the first one then.

        ``sender`` is that of the job which leaves this one behind, in a worker: its order is the same person's.
        ``trace`` (W3C ``traceparent``) is kept for whoever wakes it. ``again``: a job under an idempotency key that is
        a dead letter, purged or not, or failed for a reason that can pass (`REUSABLE`), begins anew under its id.
        `InvalidRequest`, if the id is known for another wish under the same idempotency key.
        """
        keys = [self.key("job", job_id), self.key("due")]
        delay_ms = self.grace_ms if due_in_s is None else _ms(due_in_s)
        args: list[str | int] = [
            job_id,
            task,
            _dump(job),
            delay_ms,
            _order_digest(task, job),
            trace,
            *stated(job).values(),
        ]
        args += ["1" if due_in_s is None else "", sender]
        written = int(self._submit(keys=keys, args=args))
        if written < 0:
            raise InvalidRequest(
                f"This idempotency key belongs to job {job_id}, which is another one; send this one under its own key."
                if job.get("idempotency_key")
                else f"The id {job_id} belongs to another job; send this one under its own id."
            )
        return bool(written) or (again and self._submit_again(job_id, task, job, delay_ms, trace, due_in_s is None))

    def _submit_again(
        self, job_id: str, task: str, job: Mapping[str, Any], delay_ms: int, trace: str, sent: bool
    ) -> bool:
        if not job.get("idempotency_key"):
            return False
        keys = [self.key("job", job_id), self.key("due"), self.key("dead"), self._crash_count_key(task, job)]
        event = _event("replayed", job_id, task=task)
        args: list[str | int] = [job_id, delay_ms, event, self.keep_ms, _order_digest(task, job)]
        args += ["1" if sent else "", _dump(job), trace, *stated(job).values(), *sorted(REUSABLE)]
        return bool(self._reuse(keys=keys, args=args))

    def take(  # noqa: PLR0913 - all that a message is
        self,
        job_id: str,
        *,
        task: str,
        job: Mapping[str, Any],
        max_deaths: int = 0,
        trace: str = "",
        queue: str = "",
        attached: Attachment = NOTHING_ATTACHED,
        sender: Sender = NO_SENDER,
    ) -> TakeResult:
        """Take the job for ``lease_s``, unless it is done, dead, somebody's, or parked for later.

        One that has had all its ``max_deaths`` but one waits while another that has had any is at work in the same
        worker, and that one for it. Of a job that nobody wrote down before, ``trace`` is kept too. ``queue`` is the one
        that its message was taken from. What is ``attached`` to that is kept with the job, and so is its first
        ``sender``, unless a later one may send what that one may not.
        """
        crash_suspects = self.key("suspects", self._worker)
        keys = [
            self.key("job", job_id),
            self.key("due"),
            self._crash_count_key(task, job),
            crash_suspects,
            self.key("unanswered"),
            self.key("taken"),
        ]
        args: list[str | int] = [
            job_id,
            task,
            _dump(job),
            _ms(self.lease_s),
            self.key("parked", ""),
            max_deaths - 1,
            self.key("job", ""),
        ]
        args += [self._worker, _order_digest(task, job), trace, *stated(job).values()]
        args += [attached.digest, attached.follow_ups, attached.headers, sender.name, int(sender.may_delete), queue]
        return _taken(self._take(keys=keys, args=args))

    def heartbeat(self, job_id: str, fence: int) -> bool:
        """Renew the lease, or the time to send follow-ups in; False when it was lost."""
        keys = [self.key("job", job_id), self.key("due")]
        return bool(self._heartbeat(keys=keys, args=[job_id, fence, _ms(self.lease_s)]))

    def count_return(self, job_id: str) -> int:
        """Count that a message of the job was given back although others were done; returns how often by now."""
        with self._redis.pipeline() as pipe:
            pipe.incr(self.key("returned", job_id))
            pipe.pexpire(self.key("returned", job_id), _ms(MESSAGES_S))
            return int(pipe.execute()[0])

    def park(  # noqa: PLR0913 - how long, and why
        self,
        job_id: str,
        fence: int,
        *,
        delay_s: float,
        code: str,
        message: str,
        wait: Wait = "counts",
        server_name: str = "",
        subject: str = "",
    ) -> None:
        """Put the job aside until ``delay_s`` from now; for the rest see `WaitReason`.

        Unless the attempt ``counts``, it is given back; ``growing`` waits in a row get longer, up to 8 s; those for a
        ``server`` add up from the first one on (`TakeResult.waited_s`).
        """
        keys = [self.key("job", job_id), self.key("due")]
        args: list[str | int] = [job_id, fence, _ms(delay_s), code, message, wait]
        event = _event("waiting", job_id, code=code, message=message, delay_s=round(delay_s, 1))
        reason = WaitReason(code, message, server_name, subject)
        self._guard(self._park(keys=keys, args=[*args, event, self.keep_ms, server_name, reason.cause]))

    def park_for(  # noqa: PLR0913 - as `park`, and for whom
        self,
        breaker: str,
        job_id: str,
        fence: int,
        *,
        max_wait_s: float,
        code: str,
        message: str,
        counts: bool = False,
        server_name: str = "",
    ) -> None:
        """Put the job aside until ``breaker`` closes, or until ``max_wait_s`` after it was first put aside so.

        An attempt that ``counts`` not is given back. Where an operator has taken the server out of service, the job
        waits as long as that lasts, which counts for no ``max_wait_s``.
        """
        suspended = is_suspension(breaker)
        max_wait_s = SUSPENDED_LOOK_S if suspended else max_wait_s
        keys = [self.key("job", job_id), self.key("due"), self.key("parked", breaker), self.key("parked")]
        keys.append(self.key("breaker", breaker))
        event = _event("waiting", job_id, code=code, message=message)
        args: list[str | int] = [job_id, fence, _ms(max_wait_s), code, message, breaker, event, self.keep_ms]
        reason = WaitReason(code, message, server_name, breaker)
        args += [_ms(CLOSED_MEANWHILE_S), int(counts), server_name, reason.cause, int(suspended)]
        self._guard(self._park_for(keys=keys, args=args))

    def foresee(
        self, job_id: str, fence: int, reason: WaitReason, *, delay_s: float, growing: bool = False, breaker: str = ""
    ) -> dict[str, Any]:
        """What is to be told of a running job that is about to be put aside: since when it waits, and until when."""
        answer = self._foresee(keys=[self.key("job", job_id), self.key("breaker", breaker)], args=[fence, reason.cause])
        self._guard(answer)
        now_ms, since_ms, waits, until_ms = (float(one) for one in answer)
        if is_suspension(breaker) and not until_ms:  # until an operator ends it
            return reason.as_json(since_ms=since_ms, next_ms=None)
        delay_ms = _grown_ms(_ms(delay_s), int(waits)) if growing else _ms(delay_s)
        return reason.as_json(since_ms=since_ms, next_ms=until_ms or now_ms + delay_ms)

    def hand_back(  # noqa: PLR0913 - all that a record is made of
        self,
        job_id: str,
        fence: int,
        *,
        task: str,
        job: Mapping[str, Any],
        attempt: int,
        checkpoint: Mapping[str, Any] | None = None,
        trace: str = "",
        attachments: Attachments = NO_ATTACHMENTS,
        sender: str = "",
        returned: bool = False,
    ) -> HandedBack:
        """End an attempt that could not be written down, although its worker lives: it counts neither as one nor as a
        death, and the job is due again soon. Where Redis has lost the record, it is made anew, with ``checkpoint`` and
        ``attachments``; its message may then be ``returned`` to the queue.
        """
        keys = [self.key("job", job_id), self.key("due"), self._crash_count_key(task, job)]
        args: list[str | int] = [job_id, fence, self._worker, task, _dump(job), attempt]
        args += [_dump(checkpoint) if checkpoint else "", _order_digest(task, job), trace, *stated(job).values()]
        args += ["1", self.grace_ms] if returned else ["", 0]
        args += [attachments.follow_ups, attachments.digests, attachments.headers, sender]
        return HandedBack(self._hand_back(keys=keys, args=args))

    def refused(self, job_id: str, fence: int, error: redis.RedisError) -> int:
        """Redis has refused the job a command: how often by now, in the same words."""
        refusals = int(self._refused(keys=[self.key("job", job_id)], args=[fence, words_of(error)]))
        self._guard(refusals)
        return refusals

    def wake_parked(self) -> int:
        """Make due who waited for a breaker that has closed, and one for each that is half-open; returns how many."""
        args: list[str | int] = [self.key("breaker", ""), self.key("parked", "")]
        args += [WOKEN_AT_ONCE, _ms(PROBE_AGAIN_S)]
        return int(self._wake(keys=[self.key("parked"), self.key("due")], args=args))

    def parked(self) -> dict[str, int]:
        """How many jobs wait for each server whose circuit is open."""
        breakers = sorted(cast(set[str], self._redis.smembers(self.key("parked"))))
        with self._redis.pipeline(transaction=False) as pipe:
            for breaker in breakers:
                pipe.zcard(self.key("parked", breaker))
            counts = dict(zip(breakers, pipe.execute(), strict=True))
        return by_server({breaker: count for breaker, count in counts.items() if count})

    def published(self, job_id: str) -> None:
        """The outcome of an ended job is where its client looks for it: nobody has to be woken to bring it there."""
        self.published_before({job_id: 0.0})

    def published_before(self, ages_s: Mapping[str, float]) -> None:
        """The same of many jobs, each so many seconds ago."""
        args = [part for job_id, age_s in ages_s.items() for part in (job_id, _ms(age_s))]
        self._published(keys=[self.key("due")], args=args)

    def finish(  # noqa: PLR0913 - as `_end`
        self,
        job_id: str,
        fence: int,
        *,
        outcome: Mapping[str, Any],
        code: str,
        task: str,
        job: Mapping[str, Any],
        text: str = "",
    ) -> PendingFollowUps | None:
        """Write the outcome, once, and let go of whatever the job held. Until it is `published`, the job stays due.
        Returns its follow-ups, which are to be sent before. ``text`` is the outcome as JSON, if it is encoded already.

        A claim under which no image has been stored is released, unless the error says that an image may still arrive.
        """
        ending = {"code": code, "task": task}
        return self._end(
            job_id,
            fence,
            "done",
            outcome=outcome,
            ending=ending,
            crash_count_key=self._crash_count_key(task, job),
            text=text,
        )

    def end_as_dead_letter(
        self,
        job_id: str,
        fence: int,
        *,
        outcome: Mapping[str, Any],
        code: str,
        task: str,
        job: Mapping[str, Any],
    ) -> PendingFollowUps | None:
        """End the job as a dead letter, which is kept, with its message, until somebody deals with it."""
        ending = {"code": code, "task": task, "dead": True}
        return self._end(
            job_id, fence, "dead", outcome=outcome, ending=ending, crash_count_key=self._crash_count_key(task, job)
        )

    def _end(  # noqa: PLR0913 - all that an end is
        self,
        job_id: str,
        fence: int,
        state: str,
        *,
        outcome: Mapping[str, Any],
        ending: Mapping[str, Any],
        crash_count_key: str,
        text: str = "",
    ) -> PendingFollowUps | None:
        keys = [self.key("job", job_id), self.key("due"), self.key("dead"), crash_count_key]
        event = _event("ended", job_id, **ending, **_gist(outcome))
        args: list[str | int] = [job_id, fence, state, text or _dump(outcome), ending["code"], self.keep_ms, event]
        untold_ms = min(self.grace_ms, _ms(self.lease_s))
        doubtful = "may_be_on" in outcome.get("error", {}).get("details", {})
        answer = cast(list[str], self._finish(keys=keys, args=[*args, untold_ms, int(doubtful)]))
        self._guard(answer)
        return PendingFollowUps(answer[0], fence) if answer[0] else None

    def followed(self, job_id: str, pending: PendingFollowUps, *, sent: int, all_of_them: bool = False) -> None:
        """Note how many of its follow-ups a worker has sent for a job that has ended; `LeaseLost` if another one does.

        Until ``all_of_them`` are sent, the job is not `published`.
        """
        length: str | int = len(pending.follow_ups) if all_of_them else ""
        args: list[str | int] = [job_id, pending.fence, sent, length]
        self._guard(self._followed(keys=[self.key("job", job_id), self.key("due")], args=args))

    def cancel(self, job_id: str, *, unless: Literal["taken", "begun"] | None = None, mark: bool = False) -> str:
        """Ask for the job to end before its push; gives the state it was in, "" if it is unknown.

        ``mark``: an id without a record is marked as cancelled, for as long as an ended job's record is kept, and a
        message that comes for it meanwhile ends so.

        ``unless`` a worker has "taken" it, or it has "begun", that is written down what it is about to do: then that
        word is given, and nothing is asked. Any other job that was cancelled so does nothing any more.
        """
        args: list[str | int] = [job_id, unless or "", self.keep_ms if mark else 0]
        return str(self._cancel(keys=[self.key("job", job_id), self.key("due")], args=args))

    def cancel_stamped(self, header: str, values: Iterable[str]) -> None:
        """Whatever comes with one of these stamps is cancelled, for as long as an ended job's record is kept."""
        now_ms, key = _ms(self.clock_s()), self.key("cancelled_stamps")
        with self._redis.pipeline() as pipe:
            pipe.zremrangebyscore(key, "-inf", now_ms - self.keep_ms)
            pipe.zadd(key, {_stamp(header, value): now_ms for value in values})
            pipe.pexpire(key, self.keep_ms)
            pipe.execute()

    def is_cancelled_by_stamp(self, stamps: Iterable[tuple[str, str]]) -> bool:
        """Whether one of these stamps, pairs of header and value, is cancelled."""
        members = [_stamp(header, value) for header, value in stamps]
        since_ms = _ms(self.clock_s()) - self.keep_ms
        found = cast(list[float | None], self._redis.zmscore(self.key("cancelled_stamps"), members) if members else [])
        return any(at_ms is not None and at_ms > since_ms for at_ms in found)

    def kind_of(self, job_id: str) -> tuple[str, dict[str, Any]]:
        """The task of a job and what it was given; "" and {} where the ledger does not know or no longer keeps it."""
        row = cast(list[str | None], self._redis.hmget(self.key("job", job_id), "task", "job"))
        return row[0] or "", json.loads(row[1] or "{}")

    def wake_now(self, job_id: str, *, by_sweeper: bool = False) -> DueJob | None:
        """Have a waiting job look again before its time; the message to send for it, unless the sweeper shall."""
        args: list[str | int] = [job_id, int(by_sweeper)]
        found = cast(list[str], self._wake_now(keys=[self.key("job", job_id), self.key("due")], args=args))
        return DueJob(job_id, found[0], json.loads(found[1]), headers=_headers(found[2])) if found else None

    def sweep(
        self, limit: int = 200, *, queues: Queues | None = None, settle_s: float = 0, line: Line | None = None
    ) -> list[DueJob]:
        """Jobs that a message has to be sent for. Each is due again later, and later each time, until claimed.

        Where one was sent before, ``queues`` says what is in the queue of each of the tasks: no further one is sent as
        long as that may be in it, nor before the queue has been empty for ``settle_s``. What is not known is not lost.
        Of the jobs that stand in ``line``, as many are given as there is room for.
        """
        keys = [self.key("due"), self.key("unanswered")]
        lined = NO_LINE if line is None else line.arguments(worker=self._worker, settle_ms=_ms(settle_s))
        first: list[str | int] = [limit, self.grace_ms, self.key("job", "")]
        rows, asked, taken = self._sweep(keys=[*keys, self.key("taken")], args=[*first, *lined])
        if asked and queues is not None:
            counts = dict(zip(taken[::2], taken[1::2], strict=True))
            known = queues({where for _, where in asked})
            args: list[str | int] = [self.grace_ms, _ms(settle_s), IN_HAND, self.key("job", ""), *lined]
            for job_id, where in asked:
                if where in known:
                    queue, depth = known[where]
                    args += [job_id, depth, counts.get(queue, 0)]
            rows = [*rows, *self._lost(keys=keys, args=args)]
        return [
            DueJob(job_id, task, json.loads(job), trace, _headers(headers), queue)
            for job_id, task, job, trace, headers, queue in rows
        ]

    def waiting_in_line(self) -> int:
        """How many jobs are due that no message has been sent for, because there was no room for them."""
        return int(self._redis.zcard(self.key("line")))

    def in_hand(self, job_ids: Sequence[str]) -> None:
        """A worker that lives has taken messages of these jobs, and will begin them: none of them is lost."""
        args: list[str | int] = [self.grace_ms, self.key("job", ""), *job_ids]
        self._in_hand(keys=[self.key("due"), self.key("unanswered")], args=args)

    def unsent(self, job_ids: Iterable[str]) -> None:
        """The messages of these jobs could not be sent: the sweeper sends them when they are due."""
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hdel(self.key("job", job_id), "sent")
            pipe.execute()

    def due_now(self, job_id: str) -> None:
        """No message is sent for the job; the sweeper does that, in line."""
        with self._redis.pipeline() as pipe:
            pipe.hdel(self.key("job", job_id), "sent")
            pipe.zadd(self.key("due"), {job_id: _ms(self.clock_s())})
            pipe.execute()

    def dispatched(self, limit: int = 200) -> dict[str, str]:
        """Jobs that a message was sent for more than a grace period ago and that no worker took up since, with their
        tasks, or with the queue that the message was sent to if that is not the task's own.
        """
        latest_ms = _ms(self.clock_s()) - self.grace_ms
        ids = cast(
            list[str], self._redis.zrange(self.key("unanswered"), "-inf", latest_ms, byscore=True, offset=0, num=limit)
        )
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hmget(self.key("job", job_id), "task", "sent")
            rows = zip(ids, pipe.execute(), strict=True)
            return {job_id: (task or "") if sent in (None, "1") else sent for job_id, (task, sent) in rows}

    def requeue_lost(self, job_ids: Iterable[str]) -> None:
        """The messages of these jobs are lost: they are due now, however often somebody was woken for them."""
        self._requeue_lost(keys=[self.key("due"), self.key("unanswered")], args=list(job_ids))

    def created_ms(self, job_id: str) -> int:
        """When the job was written down first, by the clock of Redis; 0 if there is no record."""
        return int(float(self._redis.hget(self.key("job", job_id), "created_ms") or 0))

    def read_record(self, job_id: str) -> dict[str, str]:
        """The record as it stands, without its messages (which may bear credentials); {} if there is none."""
        record = self._hash(self.key("job", job_id))
        for name in ("job", "follow_ups", "headers"):
            record.pop(name, None)
        return record

    def standing(self, job_ids: Iterable[str]) -> dict[str, JobStanding]:
        """The state of those jobs that have a record, read in one round trip; jobs without a record are left out."""
        ids = list(job_ids)
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hmget(self.key("job", job_id), *_STANDING)
            rows = [dict(zip(_STANDING, row, strict=True)) for row in (pipe.execute() if ids else [])]
        known = {job_id: row for job_id, row in zip(ids, rows, strict=True) if row["state"]}
        waits = self._waits({job_id: row for job_id, row in known.items() if row["state"] not in ("done", "dead")})
        return {job_id: _standing(row, waits.get(job_id)) for job_id, row in known.items()}

    def _waits(self, rows: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Any]]:
        """Why those of the jobs wait that do."""
        if not rows:
            return {}
        ids, breakers = list(rows), sorted({row["parked"] for row in rows.values() if row["parked"]})
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.time()
            for key in ("due", "unanswered", "line"):
                pipe.zmscore(self.key(key), ids)
            for breaker in breakers:
                pipe.hget(self.key("breaker", breaker), "until_ms")
            clock, *scores = pipe.execute()
        now_ms, until = _clock_ms(clock), dict(zip(breakers, scores[3:], strict=True))
        found = {}
        for job_id, due, woken, lined in zip(ids, *scores[:3], strict=True):
            row = rows[job_id]
            closed_ms = until.get(row["parked"])
            wait = _wait(
                row,
                now_ms=now_ms,
                due_ms=due if lined is None else now_ms,
                woken_ms=woken,
                until_ms=float(closed_ms) if closed_ms else None,
            )
            if wait is not None:
                found[job_id] = wait
        return found

    # --- dead letters ---------------------------------------------------------------------------------------

    def dead_letters(
        self, *, code: str | None = None, since_s: float | None = None, before_s: float | None = None
    ) -> Iterator[DeadLetter]:
        """The latest first; of one code, dead since ``since_s`` and before ``before_s`` (Unix time)."""
        least = "-inf" if since_s is None else _ms(since_s)
        most = "+inf" if before_s is None else f"({_ms(before_s)}"
        for ids in self._dead_ids(most, least):
            for letter in self._letters(ids):
                if code is None or letter.code == code:
                    yield letter

    def _dead_ids(self, most: str | float, least: str | float) -> Iterator[list[str]]:
        """By pages, each from where the last one ended: what is replayed or purged meanwhile moves none of the rest."""
        seen: set[str] = set()  # of those that died in the very millisecond at which the next page begins
        while True:
            rows = self._redis.zrevrangebyscore(
                self.key("dead"), most, least, start=0, num=PAGE + len(seen), withscores=True
            )
            page = [(job_id, at) for job_id, at in cast(list[tuple[str, float]], rows) if job_id not in seen]
            if not page:
                return
            yield [job_id for job_id, _ in page]
            last = page[-1][1]
            seen = {job_id for job_id, at in page if at == last} | (seen if last == most else set())
            most = last

    def dead_letter(self, job_id: str) -> DeadLetter | None:
        return next(iter(self._letters([job_id])), None)

    def _letters(self, job_ids: Sequence[str]) -> list[DeadLetter]:
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hgetall(self.key("job", job_id))
            rows = zip(job_ids, pipe.execute(), strict=True)
        return [_letter(job_id, row) for job_id, row in rows if row.get("state") == "dead"]

    def events_of(self, letter: DeadLetter) -> list[Event]:
        """What the histories of all that the job got hold of say of it, each event once, in order."""
        with self._redis.pipeline(transaction=False) as pipe:
            for uid in letter.uids:
                pipe.lrange(self.key("trail", uid), 0, -1)
            rows = dict.fromkeys(row for history in pipe.execute() for row in history)
        events = [event for event in map(_read_event, rows) if event.job_id == letter.job_id]
        return sorted(events, key=lambda event: (event.at_ms, ORDER.get(event.event, 0)))

    def replay(self, job_id: str) -> DueJob | None:
        """Make a dead letter a queued job again, with its checkpoint and no attempts; None if it is no dead letter.

        Like a submitted one it is due after the grace period, should its message get lost.
        """
        record = self._hash(self.key("job", job_id))
        task, job = record.get("task", ""), json.loads(record.get("job") or "{}")
        keys = [self.key("job", job_id), self.key("due"), self.key("dead"), self._crash_count_key(task, job)]
        args: list[str | int] = [job_id, self.grace_ms, _event("replayed", job_id, task=task), self.keep_ms]
        replayed = self._replay(keys=keys, args=args)
        headers = _headers(record.get("headers", ""))
        return DueJob(job_id, task, job, record.get("trace", ""), headers) if replayed else None

    def purge(self, job_id: str) -> bool:
        """Drop a dead letter and its message, so that it cannot be replayed; False if it is none.

        Its outcome and its history are kept as long as those of any ended job.
        """
        keys = [self.key("job", job_id), self.key("dead")]
        return bool(self._purge(keys=keys, args=[job_id, _event("purged", job_id), self.keep_ms]))

    # --- images and studies ---------------------------------------------------------------------------------

    def lock_image(self, sop_instance_uid: str, *, job_id: str, fence: int, into: Sequence[str] = ()) -> str | None:
        """Be the one job that may store (or delete) this instance until it ends; otherwise the id of the job that is.

        ``into`` are the study and the series that it is stored into: a job that is deleting one of them comes first.
        """
        keys = [self.key("hold", sop_instance_uid), self.key("job", job_id)]
        keys += [self.key("gate", uid) for uid in into] + [self.key("storing", uid) for uid in into]
        owner = str(self._lock_image(keys=keys, args=[job_id, fence, " ".join([sop_instance_uid, *into])]))
        self._guard(owner != "!lost")
        return owner or None

    def lock_images(self, images: Sequence[tuple[str, str, str]], *, job_id: str, fence: int) -> list[str | None]:
        """`lock_image` for many, in one step; in their order, the id of the job that has it, or None where we do.

        Each is named by its image, study and series UIDs. They are ours until they are let go or the job ends.
        """
        args: list[str | int] = [job_id, fence, *(uid for uids in images for uid in uids)]
        owners = cast(list[str], self._lock_images(keys=[self.key("job", job_id)], args=args) if images else [])
        self._guard(owners != ["!lost"])
        return [owner or None for owner in owners]

    def release_images(
        self, *, job_id: str, fence: int, but: Iterable[str] = (), following: Iterable[str] = ()
    ) -> None:
        """Let others have the images that `lock_images` gave us, ``but`` those whose fate is not known.

        The claims of other studies than those that the job goes on ``following`` are released, where no image has been
        stored under them.
        """
        still_locked = list(but)
        self._release_images(
            keys=[self.key("job", job_id)], args=[job_id, fence, len(still_locked), *still_locked, *following]
        )

    def lock_destination(self, url_sha256: str, *, job_id: str, fence: int) -> str | None:
        """Be the one job that may write to a destination, known by a digest; otherwise the id of the job that is."""
        owner = str(
            self._lock_image(keys=[self.key("hold", url_sha256), self.key("job", job_id)], args=[job_id, fence])
        )
        self._guard(owner != "!lost")
        return owner or None

    def release_destination(self, *, job_id: str, fence: int) -> None:
        """Let others write to the destination that `lock_destination` gave us, before the job ends."""
        self._release_destination(keys=[self.key("job", job_id)], args=[job_id, fence])

    def upload_begun(self, url: str, upload_id: str) -> None:
        """A multipart upload to ``url`` is one of ours, until `upload_ended`: a later job may abort it."""
        key = self._uploads(url)
        with self._redis.pipeline() as pipe:
            pipe.sadd(key, upload_id)
            pipe.expire(key, STORES_KNOWN_S)
            pipe.execute()

    def upload_ended(self, url: str, upload_id: str) -> None:
        self._redis.srem(self._uploads(url), upload_id)

    def uploads_begun(self, url: str) -> set[str]:
        """The uploads to ``url`` that our jobs began and did not end."""
        return {str(one) for one in cast(set[str], self._redis.smembers(self._uploads(url)))}

    def overwrites_prevented(self, place: str) -> bool | None:
        """Whether the store of ``place`` refuses to overwrite, as the last probe of a worker found; None if unknown."""
        noted = self._redis.get(self._store(place))
        return None if noted is None else noted == "1"

    def note_overwrites(self, place: str, *, prevented: bool) -> None:
        self._redis.set(self._store(place), int(prevented), ex=STORES_KNOWN_S)

    def lock_for_delete(self, uid: str, *, job_id: str, fence: int) -> str | None:
        """Keep new jobs from storing into a study or series until this job ends or lets go.

        Returns a job that has to end before anything may be deleted, if there is one; ask again until there is none.
        """
        keys = [self.key("gate", uid), self.key("job", job_id), self.key("storing", uid)]
        owner = str(self._lock_for_delete(keys=keys, args=[job_id, fence]))
        self._guard(owner != "!lost")
        return owner or None

    def release(self, job_id: str, *, fence: int) -> None:
        """Let others store again into what the job has shut, before its end; a late holder opens nothing."""
        self._release(keys=[self.key("job", job_id)], args=[job_id, fence])

    def receipt(self, sop_instance_uid: str) -> Receipt | None:
        """What a job of ours stored last as this image; None if nothing, or if the receipt is void."""
        row = self._hash(self.key("receipt", sop_instance_uid))
        if not row or _voided(row, self._pushes(row)):
            return None
        return Receipt(row["job_id"], row["server"], row["sha256"], int(row["size_bytes"]))

    def void(
        self, server: str, study_instance_uid: str, series_uid: str | None, sop_uid: str | None, *, job_id: str
    ) -> None:
        """Void the receipts of all that is about to be deleted from ``server``: an image, a series or a study.

        To be called before the deletion: of a receipt that is void although the deletion has failed, nothing is lost.
        """
        args: list[str | int] = [job_id, server, self.keep_ms, series_uid or "", sop_uid or ""]
        self._void(keys=[self.key("pushes", study_instance_uid)], args=args)

    def voided_study(self, server: str, study_instance_uid: str) -> str:
        """The job that deleted the study from ``server`` last, or was about to; "" if none of ours has."""
        told = self._redis.hget(self.key("pushes", study_instance_uid), f"gone:{server}")
        return str(told).partition(" ")[2] if told else ""

    def copying(self, server: str, study_instance_uid: str, *, job_id: str) -> None:
        """Images of the study are about to be copied to ``server``: older receipts may be of other files."""
        self._copies(keys=[self.key("pushes", study_instance_uid)], args=[server, job_id, self.keep_ms, "copying:", ""])

    def copied(self, server: str, study_instance_uid: str, *, job_id: str, images: int) -> None:
        """The receipt of a study: so many images of it have been copied to ``server``."""
        args: list[str | int] = [server, job_id, self.keep_ms, "copied:", f" {images}"]
        self._copies(keys=[self.key("pushes", study_instance_uid)], args=args)

    def _pushes(self, receipt: Mapping[str, str]) -> dict[str, str]:
        study = receipt.get("study_uid")
        return self._hash(self.key("pushes", study)) if study else {}

    def claim_study(  # noqa: PLR0913 - whose it is to be, what may void another choice, and what is intended with it
        self,
        study_instance_uid: str,
        *,
        server: str,
        job_id: str,
        among: Sequence[str] = (),
        in_history: bool = True,
        asked_for: bool = False,
        leaving: str | None = None,
        intent: PushIntent | None = None,
    ) -> StudyClaim:
        """Who a new study belongs to: ``server`` if nobody has claimed it yet, else the first claimant's choice.

        A choice that is not ``among`` these servers, if they are given, is void if no worker that runs knows it; where
        one does, it is given back, and the job does not follow the claim. Void is also any other choice if ``server``
        was ``asked_for`` and no job that follows the claim may still push; and the choice of the server ``leaving``,
        which is in maintenance, if moreover nothing was ever stored under the claim. From now on the job follows the
        claim, until it ends or lets go of its images. ``in_history`` leaves a line in the study's history.

        ``intent`` is written in the same step (`intend_push`), if the study is ``server``'s by this claim or the job
        asked for it; where the job was cancelled, nothing is claimed. `LeaseLost` if another attempt has taken it over.
        """
        keys = [
            self.key("study", study_instance_uid),
            self.key("placed"),
            self.key("trail", study_instance_uid),
            self.key("job", job_id),
        ]
        event = _event("claimed", job_id, server=server) if in_history else ""
        taking_over = int(asked_for) if leaving is None else f"from:{leaving}"
        args: list[str | int] = [server, job_id, self._claim_ms, event, self.keep_ms, taking_over]
        if intent is None:
            args += ["", "", "", ""]
        else:
            keys.append(self.key("hangs", intent.server))
            args += [intent.fence, *intent.texts(job_id), intent.file]
        chosen, first, *became = self._claim_study(keys=keys, args=[*args, *among])
        result = _intent_result(became)
        self._guard(result is not LOST_INTENT)
        return StudyClaim(str(chosen), bool(first), result)

    def claim_is_in_use(self, study_instance_uid: str) -> bool:
        """Whether a job that follows the claim of a study is at work just now."""
        claim = self._hash(self.key("study", study_instance_uid))
        followers = [field.partition(":")[2] for field in claim if field.startswith("follower:")]
        with self._redis.pipeline(transaction=False) as pipe:
            for job_id in followers:
                pipe.hget(self.key("job", job_id), "state")
            return "running" in (pipe.execute() if followers else [])

    def move_claim(self, study_instance_uid: str, *, server: str, job_id: str) -> bool:
        """The study is on ``server`` now and nowhere else: so is its claim, if it has one."""
        keys = [self.key("study", study_instance_uid), self.key("placed"), self.key("trail", study_instance_uid)]
        event = _event("claimed", job_id, server=server)
        return bool(self._move_claim(keys=keys, args=[server, event, self.keep_ms]))

    def deleting_for_s(self, job_id: str, server: str, study_instance_uid: str) -> float:
        """How long it is now that a job was told first that a server is deleting a study."""
        key, field, now_s = self.key("deleting", job_id), f"{server} {study_instance_uid}", self.clock_s()
        with self._redis.pipeline() as pipe:
            pipe.hsetnx(key, field, _ms(now_s))
            pipe.hget(key, field)
            pipe.pexpire(key, self.keep_ms)
            _, since_ms, _ = pipe.execute()
        return max(0.0, now_s - int(since_ms) / 1000)

    def forget_deleting(self, job_id: str) -> None:
        """The job waits no longer; done again, it begins anew."""
        self._redis.delete(self.key("deleting", job_id))

    def stored_last_s(self, server: str) -> float:
        """When a job of ours last stored an image on ``server``, by the clock of `clock_s`; 0 if none has."""
        return int(self._redis.hget(self.key("stored"), server) or 0) / 1_000_000

    def note_hang(self, server: str, files: Collection[str], *, times: int = 1) -> None:
        """``server`` hangs at a request with ``files``; -1 ``times``: it does not."""
        if files:
            self._note_hang(keys=[self.key("hangs", server)], args=[times, _ms(HANGS_KNOWN_S), *files])

    def note_answer(self, server: str) -> None:
        """``server``, which hung at some file, has answered a request to store."""
        self._note_answer(keys=[self.key("hangs", server)])

    def hangs(self, server: str, files: Collection[str]) -> tuple[bool, dict[str, Hang]]:
        """Whether ``server`` hung at any file within a day, and what is known of those of ``files`` at which it did."""
        names = list(files)
        troubled, *rows = self._hangs(keys=[self.key("hangs", server)], args=names)
        found = {name: Hang(int(count), bool(others)) for name, (count, others) in zip(names, rows, strict=True)}
        return bool(troubled), {name: one for name, one in found.items() if one.count}

    def claimed_server(self, study_instance_uid: str) -> str | None:
        return self._hash(self.key("study", study_instance_uid)).get("server")

    def write_intent(
        self, job_id: str, fence: int, checkpoint: Mapping[str, Any], *, decision: Mapping[str, Any] | None = None
    ) -> bool:
        """Write down what is about to be pushed and where, before the first byte. False: it was cancelled.

        ``decision``, to push an image that is on no server, is what a trace will say of it.
        """
        event = "" if decision is None else _event("routed", job_id, **decision)
        args: list[str | int] = [fence, _dump(checkpoint), event, self.keep_ms]
        answer = int(self._write_intent(keys=[self.key("job", job_id)], args=args))
        self._guard(answer >= 0)
        return bool(answer)

    def intend_push(self, job_id: str, intent: PushIntent) -> IntentResult:
        """`write_intent` of the push of one image, unless its server has hung at this very file."""
        args: list[str | int] = [intent.fence, *intent.texts(job_id), self.keep_ms, intent.file]
        keys = [self.key("job", job_id), self.key("hangs", intent.server)]
        result = _intent_result(self._intend_push(keys=keys, args=args))
        self._guard(result is not LOST_INTENT)
        return result

    def stored(
        self,
        sop_instance_uid: str,
        study_instance_uid: str,
        receipt: Receipt,
        *,
        series_instance_uid: str = "",
        checkpoint: StoredCheckpoint | None = None,
    ) -> bool:
        """Write the receipt; True if this job was the first to store anything of the study it had claimed.

        The ``checkpoint`` is written in the same step, unless the job was cancelled. `LeaseLost` if another attempt has
        taken the job over: then the receipt alone is written.
        """
        event = _event("stored", receipt.job_id, server=receipt.server, study_uid=study_instance_uid)
        args: list[str | int] = [receipt.job_id, receipt.server, self.keep_ms, event]
        args += ["", "", ""] if checkpoint is None else checkpoint.args()
        args += [sop_instance_uid, study_instance_uid, series_instance_uid, receipt.sha256, receipt.size_bytes]
        opened, state = self._stored(keys=[self.key("job", receipt.job_id)], args=args)
        self._guard(int(state) >= 0)
        return bool(opened)

    def stored_many(self, server: str, images: Iterable[StoredImage], *, job_id: str) -> None:
        """Write down that a batch has stored images on ``server``: for their studies, and where an image has a receipt.

        Receipts of all would take several times what the batch keeps of them itself, so of a new image there is none.
        """
        args: list[str | int] = [job_id, server, self.keep_ms, "", "", "", ""]
        for one in images:
            args += [one.sop_instance_uid, one.study_instance_uid, one.series_instance_uid, one.sha256, one.size_bytes]
        self._stored(keys=[self.key("job", job_id)], args=args)

    def uid_record(self, uid: str) -> UidRecord:
        """All that is known of an image, a series or a study."""
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.lrange(self.key("trail", uid), 0, -1)
            pipe.hget(self.key("hold", uid), "job_id")
            pipe.hget(self.key("gate", uid), "job_id")
            pipe.smembers(self.key("storing", uid))
            pipe.hgetall(self.key("study", uid))
            pipe.hgetall(self.key("receipt", uid))
            pipe.hgetall(self.key("pushes", uid))
            history, holder, deleter, writers, claim, receipt, pushes = pipe.execute()
        events = [_read_event(row) for row in history]
        voided = _voided(receipt, self._pushes(receipt)) if receipt else None
        return UidRecord(events, holder or deleter, sorted(writers), claim, receipt, voided, _study_pushes(pushes))

    def forget_study(self, study_instance_uid: str) -> bool:
        """Every server has said that it does not have the study: so its claim goes, unless a job is storing into it."""
        keys = [self.key("study", study_instance_uid), self.key("storing", study_instance_uid)]
        return bool(self._forget_study(keys=keys))

    # --- servers --------------------------------------------------------------------------------------------

    def placed(self) -> dict[str, int]:
        """How many new studies each server was given."""
        return {server: int(count) for server, count in self._hash(self.key("placed")).items()}

    def servers_of_workers(self) -> list[str]:
        """The servers that a worker has known within a day."""
        return sorted(cast(list[str], self._redis.zrange(self.key("servers"), 0, -1)))

    # --- workers --------------------------------------------------------------------------------------------

    def report_health(self, worker: str, report: str, *, servers: Iterable[str] = ()) -> int:
        """Keep what the watchdog of ``worker`` says (JSON), and which servers it knows; returns the ledger's schema.

        An older schema becomes ours; where it is newer, or none (0), nothing is kept.
        """
        keys = [self.key("schema"), self.key("workers"), self.key("servers")]
        return int(self._report_health(keys=keys, args=[SCHEMA, worker, report, *servers]))

    def workers(self, *, now_s: float | None = None) -> dict[str, dict[str, Any]]:
        """What the watchdog of each worker said last: ``ok``, ``complaint``, ``every_s``, ``at``; a day old at most.

        Since version 0.2 also ``version``, ``schema``, ``servers`` and ``servers_digest``. A row that no worker
        can have written is left out.
        """
        now_s = self.clock_s() if now_s is None else now_s
        rows = {name: _said(row) for name, row in self._hash(self.key("workers")).items()}
        reports = {name: said for name, said in rows.items() if said is not None}
        gone = [name for name, said in reports.items() if now_s - said["at"] > 86_400]
        self.forget_workers(gone)
        return {name: said for name, said in reports.items() if name not in gone}

    def forget_workers(self, workers: Iterable[str]) -> None:
        """These have ended."""
        if gone := list(workers):
            self._redis.hdel(self.key("workers"), *gone)

    def schema(self) -> int:
        """The shape of what is written here, as the first worker has noted it; 0 if what is there is none."""
        try:
            text = cast(str | None, self._redis.get(self.key("schema")))
        except redis.ResponseError as error:
            if str(error).startswith("WRONGTYPE"):
                return 0
            raise
        if text is None:
            return 1
        return int(text) if re.fullmatch(r"[1-9][0-9]{0,8}", text) else 0

    # --- the ledger itself ----------------------------------------------------------------------------------

    def clock_s(self) -> float:
        """The time by which all leases and waits are measured: that of the Redis server."""
        seconds, microseconds = self._redis.time()
        return seconds + microseconds / 1_000_000

    def load(self, *, overdue_s: float) -> Load:
        """How much there is to do; overdue is what has been due for more than ``overdue_s``."""
        latest_ms = _ms(self.clock_s() - overdue_s)
        with self._redis.pipeline() as pipe:  # as one, which a cluster refuses where the prefix has no hash tag
            pipe.zcard(self.key("due"))
            pipe.zcount(self.key("due"), "-inf", latest_ms)
            pipe.zcard(self.key("dead"))
            return Load(*pipe.execute())

    def oldest_message_s(self) -> float:
        """How long ago the oldest message was sent that no worker has taken; 0 if there is none.

        A job's first message counts once the sweeper has looked for it, a grace period after it was sent.
        """
        rows = cast(list[tuple[str, float]], self._redis.zrange(self.key("unanswered"), 0, 0, withscores=True))
        return max(0.0, self.clock_s() - rows[0][1] / 1000) if rows else 0.0

    def probe(self) -> None:
        """Have a script write a key that goes by itself; `redis.RedisError` if this ledger cannot be worked with."""
        script = "return redis.call('SET', KEYS[1], '', 'PX', 1000)"
        self._redis.eval(script, 1, self.key("probe"))

    def safekeeping(self) -> dict[str, str]:
        """What Redis does to keep what it is given (``appendonly``, ``maxmemory``, ``maxmemory-policy``).

        {} where the server does not let itself be asked, as hosted ones do.
        """
        try:
            return cast(dict[str, str], self._redis.config_get("appendonly", "maxmemory", "maxmemory-policy"))
        except redis.ResponseError:
            return {}

    def key(self, *parts: str) -> str:
        """The key in Redis that is named by ``parts``, such as ``job`` and an id."""
        return self._prefix + ":".join(parts)

    def _crash_count_key(self, task: str, job: Mapping[str, Any]) -> str:
        return self.key("died", content_digest(task, job))

    def _uploads(self, url: str) -> str:
        return self.key("uploads", hashlib.sha256(url.encode()).hexdigest())

    def _store(self, place: str) -> str:
        return self.key("store", hashlib.sha256(place.encode()).hexdigest())

    def _hash(self, key: str) -> dict[str, str]:
        return cast(dict[str, str], self._redis.hgetall(key))  # decode_responses makes both text

    @staticmethod
    def _guard(held: object) -> None:
        if not held:
            raise LeaseLost


def _event(event: str, job_id: str, **details: Any) -> str:
    return _dump({"event": event, "job_id": job_id, **details})


def _read_event(row: str) -> Event:
    at_ms, _, text = row.partition(" ")
    details = json.loads(text)
    return Event(int(at_ms), details.pop("event"), details.pop("job_id"), details)


def _voided(receipt: Mapping[str, str], pushes: Mapping[str, str]) -> Voided | None:
    """What has happened since to the image that a receipt is of, as far as our jobs have done it."""
    server, series = receipt["server"], receipt.get("series_uid", "")
    deletions = [receipt.get("gone"), pushes.get(f"gone:{server}"), pushes.get(f"gone:{server} {series}")]
    stored_us = int(receipt.get("stored_us", 0))
    return _latest("deleted", deletions, stored_us) or _latest("replaced", [pushes.get(f"copying:{server}")], stored_us)


def _latest(how: Literal["deleted", "replaced"], moments: Iterable[str | None], after_us: int) -> Voided | None:
    parted = [moment.partition(" ") for moment in moments if moment]  # a job's id may hold blanks
    later = [(int(at_us), job_id) for at_us, _, job_id in parted if int(at_us) > after_us]
    if not later:
        return None
    at_us, job_id = max(later)
    return Voided(how, at_us // 1000, job_id)


def _study_pushes(pushes: Mapping[str, str]) -> list[StudyPush]:
    found = []
    for what, moment in pushes.items():
        name, _, server = what.partition(":")
        if name in ("at", "copying"):
            kind: Literal["upload", "copy"] = "upload" if name == "at" else "copy"
            copied = pushes.get(f"copied:{server}") if kind == "copy" else None
            last, _, images = copied.rpartition(" ") if copied else (moment, "", "")
            at_us, _, job_id = last.partition(" ")  # a job's id may hold blanks
            voided = _latest("deleted", [pushes.get(f"gone:{server}")], int(at_us))
            count = int(images) if images else None
            found.append(StudyPush(kind, server, job_id, int(at_us) // 1000, count, voided))
    return sorted(found, key=lambda push: push.at_ms)


def _taken(answer: Sequence[Any]) -> TakeResult:
    state = TakeState(answer[0])
    if state is TakeState.YOURS:
        fence, attempt, crash_count, checkpoint, cancelled, waited_ms, wants, *rest, sender, servers = answer[1:]
        known = json.loads(checkpoint) if checkpoint else None
        return TakeResult(
            state,
            fence,
            attempt,
            crash_count,
            known,
            bool(cancelled),
            waited_ms / 1000,
            tuple(wants.split()),
            tuple(servers),
            attachments=Attachments(*rest),
            sender=sender,
        )
    if state in (TakeState.OTHER, TakeState.FULL):
        return TakeResult(state, attachments=Attachments(headers=answer[1]))
    outcome = json.loads(answer[1]) if len(answer) > 1 else None
    if len(answer) > 2:
        return TakeResult(state, outcome=outcome, pending=PendingFollowUps(answer[3], int(answer[2]), int(answer[4])))
    return TakeResult(state, outcome=outcome)


def _intent_result(answer: Sequence[Any]) -> IntentResult:
    state, troubled = answer
    result = IntentResult(IntentState(int(state)), bool(troubled))
    return LOST_INTENT if result.state is IntentState.LOST else result


def _headers(text: str) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(text)) if text else {}


def _gist(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """What a history says of an outcome: the sentence and the server, none of the metadata."""
    told = outcome.get("error") or outcome.get("payload") or {}
    return {name: told[name] for name in ("message", "server_name") if told.get(name)}


#: What is read of a job to say where it stands.
_STANDING: Final = (
    *("state", "outcome", "attempts", "code", "message", "server", "since_ms", "parked", "sent", "lease_ms"),
    *("created_ms", "replayed_ms"),
)


def _standing(row: Mapping[str, str | None], wait: dict[str, Any] | None) -> JobStanding:
    state, outcome = row["state"] or "", row["outcome"]
    ended = json.loads(outcome) if outcome and state in ("done", "dead") else None
    return JobStanding(state, ended, int(row["attempts"] or 0), wait)


def _wait(
    row: Mapping[str, Any], *, now_ms: float, due_ms: float | None, woken_ms: float | None, until_ms: float | None
) -> dict[str, Any] | None:
    """Why a job that has not ended waits; None if it runs.

    ``due_ms`` is when the sweeper looks at it next, ``woken_ms`` when a message was sent for it that no worker has
    taken, ``until_ms`` the end of the pause of the circuit breaker that it waits for.
    """
    since_ms = float(row["since_ms"] or row["replayed_ms"] or row["created_ms"] or now_ms)
    if row["state"] == "running":
        lease_ms = float(row["lease_ms"] or 0)
        return LOST.as_json(since_ms=lease_ms, next_ms=due_ms) if lease_ms < now_ms else None
    if row["state"] == "queued" or row["sent"]:
        return IN_QUEUE.as_json(since_ms=woken_ms or since_ms, next_ms=None if row["sent"] else due_ms)
    reason = WaitReason(row["code"] or "", row["message"] or "", row["server"] or "")
    parked_ms = until_ms or (None if is_suspension(row["parked"]) else now_ms)
    next_ms = parked_ms if row["parked"] else due_ms
    return reason.as_json(since_ms=since_ms, next_ms=next_ms)


def _clock_ms(clock: tuple[int, int]) -> float:
    """What `TIME` answers, in milliseconds."""
    return clock[0] * 1000 + clock[1] // 1000


def _grown_ms(delay_ms: int, waits: int) -> float:
    """How long a wait is that gets longer each time, after so many in a row (`_PARK`)."""
    return max(delay_ms, min(delay_ms * 2.0 ** min(waits, 19), 8000))


def _letter(job_id: str, row: Mapping[str, str]) -> DeadLetter:
    locks = " ".join(row.get(name, "") for name in ("hold", "gates", "storing")).split()
    return DeadLetter(
        job_id=job_id,
        task=row.get("task", ""),
        about=redact_job(json.loads(row.get("job") or "{}")),
        error=json.loads(row["outcome"]).get("error", {}),
        attempts=int(row.get("attempts", 0)),
        crash_count=int(row.get("deaths", 0)),
        replays=int(row.get("replays", 0)),
        created_ms=int(float(row.get("created_ms", 0))),
        died_ms=int(float(row.get("ended_ms", 0))),
        begun="memo" in row,
        requested_by=row.get("requested_by", ""),
        reason=row.get("reason", ""),
        uids=list(dict.fromkeys(key.rpartition(":")[2] for key in locks)),
    )


def _order_digest(task: str, job: Mapping[str, Any]) -> str:
    """What has to be the same in all jobs that bear one idempotency key, or one id.

    A job that is sent again may have its URL signed anew, name a field that is as it would be without, or be
    requested by another person for another reason.
    """
    said = {
        name: _unsigned(value)
        for name, value in job.items()
        if value is not None and name not in ("version", *_TOLD_OF_IT)
    }
    return hashlib.sha256(f"{task}\n{_dump(said)}".encode()).hexdigest()


def _unsigned(value: Any, *, depth: int = 3) -> Any:
    """``value`` with its URLs as they are before they are signed; a URL of a job stands no deeper than in an item."""
    if isinstance(value, str):
        return unsigned(value) if is_url(value) else without_queries(value)
    if not depth or not isinstance(value, dict | list):
        return value
    if isinstance(value, dict):
        return {name: _unsigned(one, depth=depth - 1) for name, one in value.items()}
    return [_unsigned(one, depth=depth - 1) for one in value]


def _stamp(header: str, value: str) -> str:
    return hashlib.sha256(f"{header}\n{value}".encode()).hexdigest()


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)
