"""The studies into which images were stored elsewhere while a server was in maintenance, and was not asked.

That server may have the study too, or the very image. When it is back, an audit of just these studies finds what is
split or there twice. The audit is a job as any other (`pacs.audit`), written down with the first study; as it is about
a server that is out of service, it waits until that is back.

Keys, beside the ledger's:

    elsewhere:NAME        set   UIDs of studies, `MOST_STUDIES` at most
    elsewhere:NAME:audit  hash  added (how many UIDs were noted), left_out (studies beyond the bound); pending, the job
                                that is to audit them; then job, at_ms, studies and split: what the last audit found

Both go 90 days after the last study. The studies of an audit that has ended stay until the next one is noted.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import redis

from courier.settings import PREFIX
from courier.waits import utc

#: More studies are counted, and not kept: about ten megabytes of Redis for each server.
MOST_STUDIES: Final = 100_000
KEPT_S: Final = 90 * 86_400
#: So many are read at a time.
_PAGE: Final = 1000

_NOW = "local t = redis.call('TIME'); local now = t[1] * 1000 + math.floor(t[2] / 1000)\n"

# KEYS: set, hash. ARGV: a new job's id, the bound, how long they are kept, then the studies. Gives the pending job.
_NOTE = """
local pending = redis.call('HGET', KEYS[2], 'pending')
if not pending then
  pending = ARGV[1]
  redis.call('DEL', KEYS[1])
  redis.call('HDEL', KEYS[2], 'left_out')
  redis.call('HSET', KEYS[2], 'pending', pending)
end
for i = 4, #ARGV do
  if redis.call('SISMEMBER', KEYS[1], ARGV[i]) == 0 then
    if redis.call('SCARD', KEYS[1]) < tonumber(ARGV[2]) then
      redis.call('SADD', KEYS[1], ARGV[i])
    else
      redis.call('HINCRBY', KEYS[2], 'left_out', 1)
    end
    redis.call('HINCRBY', KEYS[2], 'added', 1)
  end
end
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[3])
return pending
"""

# ARGV: how many were noted when the audit began, its job, studies, split. 0 if more have been noted since.
_AUDITED = (
    _NOW
    + """
if redis.call('EXISTS', KEYS[1]) == 0 then return 1 end
if (redis.call('HGET', KEYS[1], 'added') or '0') ~= ARGV[1] then return 0 end
redis.call('HDEL', KEYS[1], 'pending')
redis.call('HSET', KEYS[1], 'job', ARGV[2], 'studies', ARGV[3], 'split', ARGV[4], 'at_ms', string.format('%.0f', now))
return 1
"""
)


@dataclass(frozen=True)
class ElsewhereAudit:
    """The audit after a maintenance of ``server``: of so many ``studies``, by the job ``job_id``.

    ``left_out`` studies are beyond the bound. ``split`` is how many of them are on more than one server; None while the
    audit is still to come.
    """

    server: str
    studies: int
    left_out: int
    job_id: str
    split: int | None = None
    at_ms: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "studies": self.studies,
            "left_out": self.left_out,
            "job_id": self.job_id,
            "split": self.split,
            "at": None if self.at_ms is None else utc(self.at_ms),
        }

    def __str__(self) -> str:
        count = "1 study was" if self.studies == 1 else f"{self.studies:,} studies were"
        more = f", and {self.left_out:,} more that are not kept (audit all servers)" if self.left_out else ""
        again = f"pacs audit --maintenance {self.server}"
        if self.split is None:
            return f"{count} stored elsewhere during its maintenance{more}; job {self.job_id} looks what is split"
        found = "none is" if self.split == 0 else f"{self.split:,} {'is' if self.split == 1 else 'are'}"
        return f"{count} stored elsewhere during its maintenance{more}; {found} on more than one server: {again}"


class ElsewhereStudies:
    """The studies stored elsewhere, by the server that was not asked."""

    def __init__(self, client: redis.Redis, *, prefix: str = PREFIX, most: int = MOST_STUDIES) -> None:
        self._redis, self._prefix, self._most = client, prefix, most
        self._note, self._audited = client.register_script(_NOTE), client.register_script(_AUDITED)

    def note(self, server: str, study_uids: Sequence[str]) -> str:
        """Images are about to be stored into these studies elsewhere; returns the id of the job that is to audit them.

        That job has to be written down by who noted them: it is the same until an audit has ended.
        """
        args: list[str | int] = [str(uuid.uuid4()), self._most, KEPT_S, *study_uids]
        return str(self._note(keys=self._keys(server), args=args))

    def studies(self, server: str) -> list[str]:
        """Their UIDs, in order."""
        found: set[str] = set()
        for uid in self._redis.sscan_iter(self._keys(server)[0], count=_PAGE):
            found.add(str(uid))
        return sorted(found)

    def added(self, server: str) -> int:
        """How many studies were noted, ever; it tells whether one was since."""
        return int(self._redis.hget(self._keys(server)[1], "added") or 0)

    def audited(self, server: str, *, added: int, job_id: str, studies: int, split: int) -> bool:
        """An audit that began when ``added`` studies were noted has ended; False if more were noted since."""
        return bool(self._audited(keys=self._keys(server)[1:], args=[added, job_id, studies, split]))

    def read(self, server: str) -> ElsewhereAudit | None:
        """The audit that is to come, or else the last one; None if nothing was stored elsewhere."""
        studies, state = self._keys(server)
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(state)
            pipe.scard(studies)
            row, count = cast(tuple[dict[str, str], int], tuple(pipe.execute()))
        left_out = int(row.get("left_out", 0))
        if "pending" in row:
            return ElsewhereAudit(server, count, left_out, row["pending"])
        if "job" not in row:
            return None
        done = (int(row["studies"]), left_out, row["job"], int(row["split"]), int(row["at_ms"]))
        return ElsewhereAudit(server, *done)

    def _keys(self, server: str) -> list[str]:
        key = f"{self._prefix}elsewhere:{server}"
        return [key, f"{key}:audit"]
