"""How many released jobs a worker has at a time: as many as leave room for what was enqueued just now.

A worker whose processor is busy does hardly more jobs by having more of them at once: each takes longer, and so does
a look-up beside them. A thread that sleeps shows it, for it comes back late. So while other jobs come in, the number
falls when the sweeper comes back later than it does where nothing is released, and grows again when it does not.
"""

from __future__ import annotations

import threading
import time
from typing import Final

#: A sleep is late if it lasts so much longer than it should, and so many times as much longer as is usual here.
LATE_S: Final = 0.001
LATE_TIMES: Final = 2.0
#: So many sleeps in time make room for one more job; one that is late takes the room of one.
IN_TIME: Final = 10
#: So long after the last one that was enqueued just now, released jobs have the worker to themselves.
ALONE_S: Final = 10.0
#: The share of the latest sleep in what is usual.
_SHARE: Final = 0.1


class Room:
    """Room for up to ``most`` released jobs, and for one at first. For one thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._steps = IN_TIME
        self._usual_s = 0.0

    @property
    def size(self) -> int:
        return self._steps // IN_TIME

    def wait(self, stop: threading.Event, for_s: float, *, releasing: bool, alone: bool) -> bool:
        """Sleep, unless it is time to ``stop``; ``releasing``: while jobs stand in line, ``alone``: no others come."""
        begun = time.monotonic()
        stopped = stop.wait(for_s)
        self.slept(time.monotonic() - begun - for_s, releasing=releasing, alone=alone)
        return stopped

    def slept(self, late_s: float, *, releasing: bool, alone: bool = False) -> None:
        """A sleep has ended ``late_s`` after its time."""
        if not releasing:
            self._usual_s += _SHARE * (late_s - self._usual_s)
        elif late_s > max(LATE_S, LATE_TIMES * self._usual_s) and not alone:
            self._steps = max(IN_TIME, self._steps - IN_TIME)
        else:
            self._steps = min(IN_TIME * self._most, self._steps + 1)
