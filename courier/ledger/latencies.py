"""How fast the servers answer, as the workers' own questions have measured it: for people who look, for no decision.

Key, beside the ledger's:

    latency         hash   server → mean time (ms) of the questions that a worker asked lately, and when it wrote that
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, cast

import redis

from courier.settings import PREFIX

LATENCY: Final = "latency"
#: What is older says nothing of a server any more.
FRESH_S: Final = 120.0

_NOW = "local t = redis.call('TIME'); local now = t[1] * 1000 + math.floor(t[2] / 1000)\n"

# ARGV: server and milliseconds, of each.
_NOTE = (
    _NOW
    + """
for i = 1, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1] .. ' ' .. string.format('%.0f', now)) end
redis.call('PEXPIRE', KEYS[1], 86400000)
"""
)

# ARGV: how old it may be, servers. Gives "" for those of which nothing is known.
_READ = (
    _NOW
    + """
local found = {}
for i = 2, #ARGV do
  local ms, at = string.match(redis.call('HGET', KEYS[1], ARGV[i]) or '', '([%d.]+) (%d+)')
  found[i - 1] = ms and now - tonumber(at) <= tonumber(ARGV[1]) and ms or ''
end
return found
"""
)


class Latencies:
    """The latencies in the ledger's Redis. Safe for threads."""

    def __init__(self, client: redis.Redis, *, prefix: str = PREFIX) -> None:
        self._key = prefix + LATENCY
        self._note, self._read = client.register_script(_NOTE), client.register_script(_READ)

    def note(self, measured_ms: Mapping[str, float]) -> None:
        """Write down what this process has measured, by server; it replaces what another has."""
        args: list[str] = [text for name, ms in measured_ms.items() for text in (name, f"{ms:.1f}")]
        if args:
            self._note(keys=[self._key], args=args)

    def read(self, servers: Iterable[str]) -> dict[str, float]:
        """The latency (ms) of those servers that a worker has asked within `FRESH_S`."""
        names = list(servers)
        rows = cast(list[str], self._read(keys=[self._key], args=[int(FRESH_S * 1000), *names]) if names else [])
        return {name: float(ms) for name, ms in zip(names, rows, strict=True) if ms}
