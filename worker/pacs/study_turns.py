"""The first image of a study alone, for servers on which the first images of one study wait for each other."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

#: A request that has waited so long is sent all the same: a turn is worth speed, and nothing else depends on it.
WAIT_S = 10.0
#: So many studies are remembered as begun.
REMEMBERED = 10_000


class StudyTurns:
    """Which studies have been begun, and which are just being begun by requests of this process. Safe for threads."""

    def __init__(self, *, wait_s: float = WAIT_S, remembered: int = REMEMBERED) -> None:
        self._wait_s, self._remembered = wait_s, remembered
        self._changed = threading.Condition()
        self._begun: dict[str, None] = {}
        self._beginning: set[str] = set()

    def begun(self, study_instance_uids: Collection[str]) -> None:
        """They have an image now; who waits for that goes on."""
        with self._changed:
            for study in study_instance_uids:
                self._begun.pop(study, None)
                self._begun[study] = None
            while len(self._begun) > self._remembered:
                del self._begun[next(iter(self._begun))]
            self._changed.notify_all()

    @contextmanager
    def turn(self, study_instance_uids: Collection[str]) -> Iterator[None]:
        """Wait until no other request is beginning one of the studies; those not begun yet are begun by this one."""
        wanted = set(study_instance_uids)
        with self._changed:
            self._changed.wait_for(lambda: self._beginning.isdisjoint(wanted - self._begun.keys()), self._wait_s)
            mine = wanted - self._begun.keys() - self._beginning
            self._beginning |= mine
        try:
            yield
        finally:
            with self._changed:
                self._beginning -= mine
                self._changed.notify_all()
