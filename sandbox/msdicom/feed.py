"""MSDICOM's change feed: which of its entries a request asks for. No HTTP, no store."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any

Entry = tuple[int, float, dict[str, Any]]


class FeedError(ValueError):
    """The parameters are not ones the change feed takes; the sentence goes into its 400."""


@dataclass(frozen=True)
class FeedWindow:
    """Version 1 goes by sequence numbers (``limit`` bounds their range), version 2 by time."""

    version: int
    offset: int
    limit: int
    start_s: float
    end_s: float
    with_metadata: bool

    def choose(self, journal: Iterable[Entry]) -> list[Entry]:
        """The entries of this window, oldest first."""
        if self.version == 1:
            return [entry for entry in journal if self.offset < entry[0] <= self.offset + self.limit]
        timely = sorted(
            (entry for entry in journal if self.start_s <= entry[1] < self.end_s),
            key=lambda entry: (entry[1], entry[0]),
        )
        return list(islice(timely, self.offset, self.offset + self.limit))


def read_window(query: Mapping[str, str], version: int, *, latest: bool = False) -> FeedWindow:
    """Understand a query string. Raises `FeedError`."""
    given = {name.lower(): value for name, value in query.items()}
    with_metadata = _flag(given.get("includemetadata", "true"))
    if latest:
        return FeedWindow(version, 0, 1, float("-inf"), float("inf"), with_metadata)
    largest, usual = (100, 10) if version == 1 else (200, 100)
    limit = _whole("limit", given.get("limit", str(usual)))
    if not 1 <= limit <= largest:
        raise FeedError(f"The limit has to be from 1 to {largest}.")
    offset = _whole("offset", given.get("offset", "0"))
    if offset < 0:
        raise FeedError("The offset has to be 0 or more.")
    start_s, end_s = float("-inf"), float("inf")
    if version == 2:
        start_s, end_s = _time(given, "startTime", start_s), _time(given, "endTime", end_s)
        if start_s >= end_s:
            raise FeedError("The startTime has to be before the endTime.")
    return FeedWindow(version, offset, limit, start_s, end_s, with_metadata)


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise FeedError("includeMetadata has to be true or false.")
    return text.lower() == "true"


def _whole(name: str, text: str) -> int:
    if not re.fullmatch(r"[+-]?\d{1,18}", text):
        raise FeedError(f"The {name} has to be a whole number.")
    return int(text)


def _time(given: Mapping[str, str], name: str, otherwise: float) -> float:
    text = given.get(name.lower())
    if text is None:
        return otherwise
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise FeedError(f"The {name} is not a time.") from None
    if moment.tzinfo is None:
        raise FeedError(f"The {name} needs a time zone.")
    return moment.timestamp()
