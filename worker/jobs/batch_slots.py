"""How much of a worker batches may have, and who of those that found no room comes next. Nothing of what they do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class BatchSlots:
    """So many jobs at a time in this process; others stand in line. Safe for threads."""

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._line: dict[str, None] = {}
        self._lock = threading.Lock()

    def take(self, job_id: str) -> bool:
        """Take a slot; False: there is none, and the job stands in line."""
        with self._lock:
            if self._free > 0:
                self._free -= 1
                self._line.pop(job_id, None)
                return True
            self._line.setdefault(job_id)
            return False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """A slot that was taken is free again at the end."""
        try:
            yield
        finally:
            with self._lock:
                self._free += 1

    def next(self) -> str | None:
        """Who has stood in line longest, and stands there no more; it has to come again to take its slot."""
        with self._lock:
            job_id = next(iter(self._line), None)
            if job_id is not None:
                del self._line[job_id]
            return job_id
