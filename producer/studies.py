"""The list of all studies, as a program wants it: every study once, with all the servers that have it.

The pages of `pacs.list_studies` each know only themselves, so a study on two servers may stand on two of them. They
are merged here, in a private file of SQLite's that vanishes when it is closed: memory stays flat however many there
are. No table, no colour.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from producer.client import Courier
from producer.results import StudiesResult

Page = Mapping[str, Any]

#: Of a list in server order: one study of each server in turn.
_SERVER_ORDER = "ORDER BY place, server"
_ORDER = "ORDER BY json_extract(entry, '$.study_date') DESC, json_extract(entry, '$.study_time') DESC, uid"


def walk(  # noqa: PLR0913 - each option by its name
    courier: Courier,
    *,
    mode: str = "both",
    filters: Mapping[str, str] | None = None,
    limit: int = 500,
    cursor: str | None = None,
    newest_first: bool = False,
    timeout_s: float | None = None,
) -> Iterator[StudiesResult]:
    """The pages of the list, one after the other; ``limit`` and ``timeout_s`` are of one page.

    Raises
    ------
    CourierError
        A page could not be had. A server that stays silent ends the walk so, never as if it had no more studies.
    """
    while True:
        page = courier.studies(
            mode=mode, filters=filters, limit=limit, cursor=cursor, newest_first=newest_first
        ).result(timeout_s=timeout_s)
        yield page
        cursor = page["cursor"]
        if cursor is None:
            return


class StudyList:
    """Pages, merged. Iterating gives every study once, the newest first; ``len`` counts them.

    While a server that does not sort its list has more studies, `in_server_order`, which newer ones there are cannot be
    known; then each server's studies come in its own order.
    """

    def __init__(self) -> None:
        self._db = sqlite3.connect("")  # SQLite's own temporary file, which nobody else can open
        self._db.execute("CREATE TABLE study (uid TEXT PRIMARY KEY, entry TEXT, place INT, server INT) WITHOUT ROWID")
        self._counts: Counter[str] = Counter()
        self._servers: dict[str, dict[str, Any]] = {}
        self.cursor: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM study").fetchone()[0])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = _SERVER_ORDER if self.in_server_order else _ORDER
        for (entry,) in self._db.execute(f"SELECT entry FROM study {order}"):  # noqa: S608 - a constant
            yield json.loads(entry)

    @property
    def in_server_order(self) -> bool:
        return any(one["status"] == "more" and not one.get("newest_first") for one in self._servers.values())

    def add(self, page: Page) -> None:
        """Lay a further page over those that are there."""
        self.cursor = page["cursor"]
        for server in page["servers"]:
            before = self._servers.get(server["server_name"], {})
            dropped = before.get("dropped", 0) + server.get("dropped", 0)
            lacking = [name for name in server.get("lacking", ()) if name in before.get("lacking", (name,))]
            cut = before.get("may_be_cut", False) or server.get("may_be_cut", False)
            told = {"count": 0, "dropped": dropped, "lacking": lacking, "may_be_cut": cut}
            self._servers[server["server_name"]] = {**server, **told}
        with self._db:
            for entry in page["studies"]:
                self._merge(entry)

    def extend(self, pages: Iterable[Page], *, at_most: int | None = None) -> Iterator[int]:
        """Add ``pages`` until the list is whole, ``at_most`` studies are there, or only silent servers are left.

        Of servers that sort their lists so many studies each are needed before the newest of all are known.

        Gives the number of studies after each page.
        """
        for page in pages:
            self.add(page)
            yield len(self)
            if (at_most is not None and self._has(at_most)) or self._only_silent(page):
                return

    def _has(self, at_most: int) -> bool:
        """Whether the first ``at_most`` studies are known."""
        if len(self) < at_most or self.in_server_order:
            return len(self) >= at_most
        return all(server["status"] != "more" or server["count"] >= at_most for server in self.servers())

    def servers(self) -> list[dict[str, Any]]:
        """What became of each server's list; ``count`` is over all pages, each study once."""
        counts = "SELECT json_extract(value, '$.server_name'), count(*) FROM study, json_each(entry, '$.servers')"
        for name, count in self._db.execute(f"{counts} GROUP BY 1"):
            self._servers[name]["count"] = count
        return list(self._servers.values())

    def _merge(self, entry: dict[str, Any]) -> None:
        uid = entry["study_uid"]
        row = self._db.execute("SELECT entry FROM study WHERE uid = ?", (uid,)).fetchone()
        merged = entry if row is None else self._merged(json.loads(row[0]), entry)
        server = entry["servers"][0]["server_name"]
        self._counts[server] += 1
        place = (self._counts[server], list(self._servers).index(server))
        sql = "INSERT INTO study VALUES (?, ?, ?, ?) ON CONFLICT (uid) DO UPDATE SET entry = excluded.entry"
        self._db.execute(sql, (uid, json.dumps(merged), *place))

    def _merged(self, known: dict[str, Any], further: dict[str, Any]) -> dict[str, Any]:
        places = {place["server_name"]: place for place in (*known["servers"], *further["servers"])}
        in_order = [places[name] for name in self._servers if name in places]
        modalities = sorted({*known["modalities"], *further["modalities"]})
        told = {name: further[name] if value is None else value for name, value in known.items()}
        return {**told, "servers": in_order, "modalities": modalities}

    @staticmethod
    def _only_silent(page: Page) -> bool:
        statuses = {server["status"] for server in page["servers"]}
        return "unavailable" in statuses and "more" not in statuses
