"""Which UID was seen on which servers, for more UIDs than memory should hold. Nothing is asked of a server here."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Self

_NOTE = (
    "INSERT INTO seen VALUES (?, ?) ON CONFLICT (uid) DO UPDATE SET servers = servers | excluded.servers "
    "WHERE servers & excluded.servers = 0"
)
#: More than one bit is set.
_SHARED = "servers & (servers - 1) != 0"


class UidIndex:
    """UIDs, each with the servers it was seen on, in a private file of SQLite's that vanishes with it.

    ``names`` are at most 63 servers, in order of preference. `note` may be called from several threads.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._lock = threading.Lock()
        self._db = sqlite3.connect("", check_same_thread=False)
        self._db.execute("CREATE TABLE seen (uid TEXT PRIMARY KEY, servers INTEGER NOT NULL) WITHOUT ROWID")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def note(self, name: str, uids: Iterable[str]) -> int:
        """They are on the server ``name``; returns how many of them were not known to be."""
        bit = 1 << self._names.index(name)
        with self._lock, self._db:
            before = self._db.total_changes
            self._db.executemany(_NOTE, ((uid, bit) for uid in uids))
            return self._db.total_changes - before

    def groups(self) -> list[tuple[list[str], int]]:
        """How many UIDs are on exactly these servers, for each set of servers that occurs."""
        rows = self._rows("SELECT servers, count(*) FROM seen GROUP BY servers ORDER BY servers")
        return [(self._on(servers), count) for servers, count in rows]

    def shared(self, *, after: str, limit: int) -> list[tuple[str, list[str]]]:
        """The next ``limit`` UIDs, in their order, that are on more than one server, with those servers."""
        query = f"SELECT uid, servers FROM seen WHERE {_SHARED} AND uid > ? ORDER BY uid LIMIT ?"  # noqa: S608 - a constant
        return [(uid, self._on(servers)) for uid, servers in self._rows(query, after, limit)]

    def missing_somewhere(self, holders: Sequence[str], *, after: str, limit: int) -> list[tuple[str, list[str]]]:
        """The next ``limit`` UIDs, in their order, that not all ``holders`` have, with the servers that have them."""
        everywhere = sum(1 << self._names.index(name) for name in holders)
        query = "SELECT uid, servers FROM seen WHERE servers != ? AND uid > ? ORDER BY uid LIMIT ?"
        return [(uid, self._on(servers)) for uid, servers in self._rows(query, everywhere, after, limit)]

    def _rows(self, query: str, *values: str | int) -> list[tuple[Any, int]]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def _on(self, servers: int) -> list[str]:
        return [name for place, name in enumerate(self._names) if servers >> place & 1]
