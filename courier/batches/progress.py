"""How fast a batch goes and when it will be done, from what it looked like a while ago and now. Pure; no clock here."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from courier.batches.store import ACTIVE, NOT_DONE, Batch, Pass
from courier.windows import Window

#: The pace is that of the last so many seconds: long enough for a slow server, short enough to show a change.
WINDOW_S = 30.0


@dataclass(frozen=True)
class Throughput:
    """``left_s`` is None while nobody can say."""

    items_per_s: float = 0.0
    bytes_per_s: float = 0.0
    left_s: float | None = None


class Meter:
    """Looks at one batch again and again."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int, int]] = deque()
        self._about: object = None

    def measure(self, at_s: float, *, about: object, settled: int, carried_bytes: int, items: int) -> Throughput:
        """The pace, with a further look at ``at_s`` seconds of any clock.

        ``about`` is what the counts belong to: when it changes, as from one pass to the next, counting begins anew.
        """
        if about != self._about or (self._samples and settled < self._samples[-1][1]):
            self._samples.clear()
            self._about = about
        self._samples.append((at_s, settled, carried_bytes))
        while len(self._samples) > 2 and self._samples[1][0] <= at_s - WINDOW_S:
            self._samples.popleft()
        began_s, began_settled, began_bytes = self._samples[0]
        elapsed_s = at_s - began_s
        if elapsed_s <= 0:
            return Throughput()
        items_per_s = (settled - began_settled) / elapsed_s
        left_s = (items - settled) / items_per_s if items_per_s > 0 else None
        return Throughput(items_per_s, max(carried_bytes - began_bytes, 0) / elapsed_s, left_s)


def is_at_work(batch: Batch, now_s: float) -> bool:
    """Whether items of the batch are to be settled now: it has a plan, is in a pass, and its window is open."""
    window = batch.order.get("window")
    is_shut = bool(window) and Window.read(str(window)).opens_in_s(now_s) > 0
    return batch.state in ACTIVE and batch.state != "planning" and not is_shut


def of_how_many(batch: Batch, which: Pass | None) -> int:
    """The items that a pass is about."""
    applied = batch.of("apply").totals
    if which in ("verify", "undo"):
        return sum(n for status, n in applied.items() if status not in NOT_DONE)
    return batch.items - (applied.get("skipped", 0) if which == "survey" else 0)
