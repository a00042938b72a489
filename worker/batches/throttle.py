"""How fast a batch may go, over all workers: its window of the day, its requests and bytes per second.

The rates are kept by the library `limits` in the ledger's Redis; here stands what a group of items costs, and how it
pays for itself: what is known of it before it begins, the rest before the next one does, or the chunk ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from limits import RateLimitItemPerSecond
from limits.storage import RedisStorage
from limits.strategies import MovingWindowRateLimiter

from courier.batches.store import Batch, Item, ItemOutcome
from courier.waits import BATCH_RATE, BATCH_WINDOW
from courier.windows import Window
from worker.batches.coordinator import Usage
from worker.jobs.attempt import Attempt, Postpone
from worker.jobs.services import Services
from worker.pacs.fleet import Fleet
from worker.pacs.protocol import Found, Pacs, Retrieved, View

#: A chunk waits so long where it is; then it makes room for others.
_STAY_S: Final = 2.0
#: A batch that is to wait for hours looks so often whether somebody has paused or ended it.
_LOOK_S: Final = 30.0
#: A second's allowance is given out in so many tickets at most, and a tenth of them at a time.
_TICKETS: Final = 50
_PIECES: Final = 10


@dataclass(frozen=True)
class Rate:
    """A rate as tickets: ``amount`` of them, worth ``worth`` each, in ``window_s`` seconds."""

    amount: int
    worth: float
    window_s: int

    @classmethod
    def of(cls, per_s: float) -> Rate:
        """Never faster than ``per_s``, as little slower as whole tickets in whole seconds allow."""
        if per_s >= _TICKETS:
            return cls(_TICKETS, per_s / _TICKETS, 1)
        if per_s < 0.1:
            return cls(1, 1.0, math.ceil(1 / per_s))
        windows = range(1, 11)
        window_s = max(windows, key=lambda s: (math.floor(per_s * s + 1e-9) / s, -s))
        return cls(math.floor(per_s * window_s + 1e-9), 1.0, window_s)


#: What a server is asked; an answer of several pages counts as one request.
_QUESTIONS: Final = frozenset(
    {"find", "present", "store", "store_stream", "metadata", "studies", "instances", "delete"}
)


class Metered:
    """A server, or whatever stands in for one; what it is asked, and the bytes that it sends, are counted."""

    def __init__(self, pacs: Pacs, usage: Usage) -> None:
        self._pacs = pacs
        self._usage = usage

    def __getattr__(self, name: str) -> Any:
        if name in _QUESTIONS:
            self._usage.add(requests=1)
        return getattr(self._pacs, name)

    @contextmanager
    def retrieve(self, found: Found, *, view: View = "as_set") -> Iterator[Iterator[Retrieved]]:
        self._usage.add(requests=1)
        with self._pacs.retrieve(found, view=view) as parts:
            yield (replace(part, chunks=self._counted(part.chunks)) for part in parts)

    def _counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self._usage.add(size_bytes=len(chunk))
            yield chunk


def metered(pacs: Pacs, usage: Usage) -> Pacs:
    return cast(Pacs, Metered(pacs, usage))


def metered_fleet(fleet: Fleet, usage: Usage) -> Fleet:
    return fleet.through(lambda pacs: metered(pacs, usage))


class Throttle:
    """The pace of a batch for one attempt at one of its chunks."""

    def __init__(self, batch: Batch, attempt: Attempt, services: Services) -> None:
        self._services = services
        window = batch.order.get("window")
        self._window = Window.read(window) if window else None
        wanted = {unit: batch.order.get(f"{unit}_per_s") for unit in ("requests", "bytes")}
        self._per_s: dict[str, float] = {unit: float(per_s) for unit, per_s in wanted.items() if per_s}
        self._rates = {unit: Rate.of(per_s) for unit, per_s in self._per_s.items()}
        deficit = (attempt.checkpoint or {}).get("owed", {})
        self._deficit: dict[str, float] = {unit: float(deficit.get(unit, 0)) for unit in self._rates}
        self._paid: dict[str, float] = {}
        self._carried = [0.0, 0.0]  # items in groups that are over, and their bytes
        self._batch_id = batch.id
        self._limiter = _limiter(services) if self._rates else None

    def group_items(self, most: int, items: Sequence[Item] = ()) -> int:
        """How many of the next ``items`` a group may have: no more than a second's requests, or a second's bytes.

        An item whose size nobody has said is taken for as large as those before it were, and the first goes alone.
        """
        most = max(1, min(most, int(self._per_s.get("requests", most))))
        left = self._per_s.get("bytes", math.inf)
        for at, item in enumerate(items[:most]):
            left -= self._size_bytes(item)
            if left < 0:
                return max(1, at)
        return most

    def _size_bytes(self, item: Item) -> float:
        if item.size_bytes is not None:
            return item.size_bytes
        count, size_bytes = self._carried
        return size_bytes / count if count else math.inf

    @property
    def checkpoint(self) -> dict[str, Any]:
        """What the next attempt has to know."""
        return {"owed": self._deficit} if any(self._deficit.values()) else {}

    def wait(self, group: Sequence[Item]) -> float:
        """Return when ``group`` may begin, after so many seconds.

        Raises
        ------
        Postpone
            That is too long to wait for it here.
        """
        if self._window and (closed_s := self._window.opens_in_s(self._services.now())):
            raise Postpone(
                "the batch's window is closed", delay_s=min(closed_s, _LOOK_S), steady=True, code=BATCH_WINDOW
            )
        self._paid = {"requests": float(len(group)), "bytes": float(sum(item.size_bytes or 0 for item in group))}
        for unit in self._deficit:
            self._deficit[unit] += self._paid[unit]
        try:
            return self.clear_deficit()
        except Postpone:
            # The group does not begin: what was taken for it already is a credit.
            self._deficit = {unit: deficit - self._paid[unit] for unit, deficit in self._deficit.items()}
            raise

    def clear_deficit(self) -> float:
        """Return when all that is owed is paid for, after so many seconds, whatever the time of the day.

        Raises
        ------
        Postpone
            That is too long to wait for it here.
        """
        waited_s = 0.0
        while not self._take_tickets():
            if waited_s >= _STAY_S:
                raise Postpone(
                    "the batch is at its rate limit", delay_s=self._refilled_s(), steady=True, code=BATCH_RATE
                )
            pause_s = min(rate.window_s for rate in self._rates.values()) / _PIECES
            self._services.sleep(pause_s)
            waited_s += pause_s
        return waited_s

    def _refilled_s(self) -> float:
        """When to look again: what is not taken within its window is lost, so a long wait would pay for little."""
        blocking = [rate.window_s for unit, rate in self._rates.items() if self._deficit[unit] >= rate.worth]
        return float(min([*blocking, _LOOK_S]))

    def account(self, outcomes: Sequence[ItemOutcome], usage: Usage) -> None:
        """What the group really took is paid for before the next one begins, or the chunk ends."""
        carried = sum(int(one.result.get("size_bytes") or one.item.size_bytes or 0) for one in outcomes)
        took = {
            "requests": self._paid.get("requests", 0.0) if usage.requests is None else usage.requests,
            "bytes": float(carried if usage.size_bytes is None else usage.size_bytes),
        }
        self._carried = [self._carried[0] + self._paid["requests"], self._carried[1] + took["bytes"]]
        for unit in self._deficit:
            self._deficit[unit] += took[unit] - self._paid[unit]

    def _take_tickets(self) -> bool:
        """Take tickets for what is owed, of each kind as many as there are now; False if that is not enough."""
        paid = True
        for unit, rate in self._rates.items():
            limit = RateLimitItemPerSecond(rate.amount, rate.window_s, namespace="batch")
            while (tickets := math.floor(self._deficit[unit] / rate.worth + 1e-9)) > 0:
                piece = min(tickets, max(1, rate.amount // _PIECES))
                if not self._limiter or not self._limiter.hit(limit, self._batch_id, unit, cost=piece):
                    paid = False
                    break
                self._deficit[unit] -= piece * rate.worth
        return paid


def _limiter(services: Services) -> MovingWindowRateLimiter:
    """One that counts in the ledger's database, over its connections."""
    pool = services.ledger.client.connection_pool
    return MovingWindowRateLimiter(
        RedisStorage("redis://", connection_pool=pool, key_prefix=services.ledger.key("rate"))
    )
