"""How fast a batch may go, over all workers: its window of the day, its requests and bytes per second.

The rates are kept by the library `limits` in the ledger's Redis; here stands how a group of items pays for itself: what
is known of it before it begins, the rest before the next one does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from limits import RateLimitItemPerSecond
from limits.storage import RedisStorage
from limits.strategies import MovingWindowRateLimiter

from worker.batches import Batch, Item, Settled
from worker.jobs.batches import Spent
from worker.jobs.run import NotYet, Run
from worker.jobs.tools import Tools
from worker.ledger import PREFIX
from worker.windows import Window

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


class Pace:
    """The pace of a batch for one attempt at one of its chunks."""

    def __init__(self, batch: Batch, run: Run, tools: Tools) -> None:
        self._tools = tools
        window = batch.order.get("window")
        self._window = Window.read(window) if window else None
        wanted = {unit: batch.order.get(f"{unit}_per_s") for unit in ("requests", "bytes")}
        self._per_s: dict[str, float] = {unit: float(per_s) for unit, per_s in wanted.items() if per_s}
        self._rates = {unit: Rate.of(per_s) for unit, per_s in self._per_s.items()}
        owed = (run.memo or {}).get("owed", {})
        self._owed: dict[str, float] = {unit: float(owed.get(unit, 0)) for unit in self._rates}
        self._paid: dict[str, float] = {}
        self._batch_id = batch.id
        self._limiter = _limiter(tools) if self._rates else None

    def group_items(self, items: int) -> int:
        """How many items a group may have: no more than a second's requests."""
        return max(1, min(items, int(self._per_s.get("requests", items))))

    @property
    def memo(self) -> dict[str, Any]:
        """What the next attempt has to know."""
        return {"owed": self._owed} if any(self._owed.values()) else {}

    def wait(self, group: Sequence[Item]) -> float:
        """Return when ``group`` may begin, after so many seconds.

        Raises
        ------
        NotYet
            That is too long to wait for it here.
        """
        if self._window and (closed_s := self._window.opens_in_s(self._tools.now())):
            raise NotYet("the batch's window is closed", delay_s=min(closed_s, _LOOK_S), steady=True)
        self._paid = {"requests": float(len(group)), "bytes": float(sum(item.size_bytes or 0 for item in group))}
        for unit in self._owed:
            self._owed[unit] += self._paid[unit]
        waited_s = 0.0
        while not self._pay():
            if waited_s >= _STAY_S:
                left_s = max(self._owed[unit] / self._per_s[unit] for unit in self._owed)
                # The group does not begin: what was taken for it already is a credit.
                self._owed = {unit: owed - self._paid[unit] for unit, owed in self._owed.items()}
                delay_s = min(max(left_s, _STAY_S / 2), _LOOK_S)
                raise NotYet("the batch goes as fast as it may", delay_s=delay_s, steady=True)
            pause_s = min(rate.window_s for rate in self._rates.values()) / _PIECES
            self._tools.sleep(pause_s)
            waited_s += pause_s
        return waited_s

    def account(self, settled: Sequence[Settled], spent: Spent) -> None:
        """What the group really took is paid for before the next one begins."""
        carried = sum(int(one.result.get("size_bytes") or one.item.size_bytes or 0) for one in settled)
        took = {
            "requests": self._paid.get("requests", 0.0) if spent.requests is None else spent.requests,
            "bytes": float(carried if spent.size_bytes is None else spent.size_bytes),
        }
        for unit in self._owed:
            self._owed[unit] += took[unit] - self._paid[unit]

    def _pay(self) -> bool:
        """Take tickets for what is owed; False if there are not enough of them now."""
        for unit, rate in self._rates.items():
            limit = RateLimitItemPerSecond(rate.amount, rate.window_s, namespace="batch")
            while (tickets := math.floor(self._owed[unit] / rate.worth + 1e-9)) > 0:
                piece = min(tickets, max(1, rate.amount // _PIECES))
                if not self._limiter or not self._limiter.hit(limit, self._batch_id, unit, cost=piece):
                    return False
                self._owed[unit] -= piece * rate.worth
        return True


def _limiter(tools: Tools) -> MovingWindowRateLimiter:
    """One that counts in the ledger's database, over its connections."""
    pool = tools.ledger.client.connection_pool
    return MovingWindowRateLimiter(RedisStorage("redis://", connection_pool=pool, key_prefix=f"{PREFIX}rate"))
