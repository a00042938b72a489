"""How a plan is made: items one by one into chunks, each item once, in memory that does not grow with them.

For whoever makes a plan, a producer that reads a file or a worker that lists a server. What is stored is said in
`courier.batches.store`; what an item means, by the batch's kind.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from types import TracebackType
from typing import Final, Self

from courier.batches.store import CHUNK_ITEMS, Batches, ItemStatus, left_out_as
from courier.errors import Cancelled, InvalidRequest

#: So many chunks are sent to Redis at a time.
_CHUNKS_SENT: Final = 20
_CACHE_KIB: Final = 4_096


@dataclass(frozen=True, slots=True)
class Planned:
    """An item as a plan has it: ``text`` without line breaks, at ``server`` ("" if that is not known yet).

    ``skip`` is why nothing shall be done with it; it is in the plan and in the report all the same. With the ``code``
    of an error it ends as refused, and not as skipped.
    """

    text: str
    server: str = ""
    size_bytes: int | None = None
    skip: str = ""
    code: str = ""


class Planner:
    """Writes one plan. A new one for the same batch begins from the start, and the older one can write no more.

    ::

        with Planner(batches, batch_id) as planner:
            planner.add_all(page)          # as often as there are pages
            planner.freeze()               # then the batch's coordinator may begin

    Left without `freeze`, nothing is planned. Not for several threads.
    """

    def __init__(self, batches: Batches, batch_id: str) -> None:
        self._batches, self._id = batches, batch_id
        batch = batches.get(batch_id)
        self._types = {name: batch.types[name] for name in batch.servers} if batch else {}
        self._positions = {name: str(place) for place, name in enumerate(self._types)}
        self._token = batches.begin_plan(batch_id)
        self._seen = _PlannedItems()
        self._lines: list[str] = []
        self._chunks: dict[int, str] = {}
        self._left_out: dict[int, tuple[str, str]] = {}  # code ("": skipped) and reason
        self._written = 0  # chunks
        self.items = 0
        self.bytes = 0
        self.repeated = 0
        self.planned: dict[str, int] = {}
        self.left_out: dict[tuple[str, ItemStatus], int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seen.close()

    def add(self, item: Planned) -> bool:
        """Plan an item; False if it is in the plan already, with the same server.

        Raises
        ------
        InvalidRequest
            Its text is empty or has a line break.
        """
        return self.add_all([item]) == 1

    def add_all(self, items: Iterable[Planned]) -> int:
        """Plan the items; how many were new."""
        before = self.items
        for item in items:
            if not item.text or "\n" in item.text:
                raise InvalidRequest("An item of a batch is one line of text; this one is empty or has a line break.")
            if self._is_new(item):
                self._take(item)
            else:
                self.repeated += 1
        return self.items - before

    def _is_new(self, item: Planned) -> bool:
        try:
            return self._seen.add(f"{item.server}\t{item.text}".encode())
        except UnicodeEncodeError:
            raise InvalidRequest("An item of a batch is text that UTF-8 can say; this one is not.") from None

    def _take(self, item: Planned) -> None:
        position = self._positions.get(item.server, "-") if item.server else "-"
        if item.server and position == "-":
            position = self._positions[item.server] = str(len(self._positions))
            self._types[item.server] = ""
        size = "-" if item.size_bytes is None else str(item.size_bytes)
        self._lines.append(f"{position}\t{size}\t{item.text}")
        self.planned[item.server] = self.planned.get(item.server, 0) + 1
        if item.skip:
            self._left_out[self.items] = (item.code, item.skip[:300])
            key: tuple[str, ItemStatus] = (item.server, left_out_as(item.code))
            self.left_out[key] = self.left_out.get(key, 0) + 1
        else:
            self.bytes += item.size_bytes or 0
        self.items += 1
        if len(self._lines) == CHUNK_ITEMS:
            self._close_chunk()

    def _close_chunk(self) -> None:
        self._chunks[self._written + len(self._chunks)] = "\n".join(self._lines)
        self._lines.clear()
        if len(self._chunks) == _CHUNKS_SENT:
            self._send()

    def _send(self) -> None:
        if self._chunks:
            self._batches.plan_chunks(self._id, self._token, self._chunks)
            self._written += len(self._chunks)
            self._chunks = {}
        if self._left_out:
            self._batches.leave_out_planned(self._id, self._token, self._left_out)
            self._left_out = {}

    def freeze(self, *, warnings: Sequence[str] = ()) -> None:
        """The plan is complete.

        Raises
        ------
        Cancelled
            Somebody has ended the batch, or begun to plan it anew.
        """
        if self._lines:
            self._close_chunk()
        self._send()
        frozen = self._batches.freeze(
            self._id,
            self._token,
            items=self.items,
            planned=self.planned,
            servers=self._types,
            size_bytes=self.bytes,
            left_out=self.left_out,
            warnings=warnings,
        )
        if not frozen:
            raise Cancelled("The batch was cancelled, or planned by another, before its plan was complete.")


def count_distinct(texts: Iterable[str]) -> int:
    """How many different ``texts`` there are, in memory that does not grow with them."""
    seen = _PlannedItems()
    try:
        return sum(seen.add(text.encode()) for text in texts)
    finally:
        seen.close()


class _PlannedItems:
    """What has been planned already, in a temporary file: SQLite keeps some of it in memory and unlinks the file."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{_CACHE_KIB}"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def add(self, text: bytes) -> bool:
        digest = blake2b(text, digest_size=16).digest()
        return self._db.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1

    def close(self) -> None:
        self._db.close()
