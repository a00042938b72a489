"""What the servers said when a worker asked them last: how they are and how much room they have.

The ledger does not know this. While the page of servers is looked at, a worker is asked once a minute.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from worker.app import BROKER_ERRORS, ask_a_worker

log = logging.getLogger(__name__)

#: How long an answer is good, and how long a worker may take for one.
FRESH_S: Final = 60.0
ANSWER_S: Final = 25.0

Entries = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Answers:
    """By server. ``age_s`` is how old they are; None where no worker has answered yet."""

    status: Entries = field(default_factory=dict)
    storage: Entries = field(default_factory=dict)
    age_s: float | None = None


class ServerAnswers:
    """Asks on a thread, once at a time, and never for a page that waits."""

    def __init__(
        self,
        ask: Callable[..., Mapping[str, Any] | None] = ask_a_worker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._clock = clock
        self._lock = threading.Lock()
        self._asked_at: float | None = None
        self._asking = False
        self._answered_at: float | None = None
        self._known: dict[str, Entries] = {}

    def last(self, *, ask_again: bool) -> Answers:
        """The last answers. With ``ask_again`` a worker is asked behind the page's back, if they are old."""
        with self._lock:
            now = self._clock()
            is_due = self._asked_at is None or now - self._asked_at >= FRESH_S
            if ask_again and is_due and not self._asking:
                self._asking, self._asked_at = True, now
                threading.Thread(target=self._ask_for_all, name="server answers", daemon=True).start()
            age_s = None if self._answered_at is None else now - self._answered_at
            return Answers(self._known.get("pacs.status", {}), self._known.get("pacs.storage", {}), age_s)

    def _ask_for_all(self) -> None:
        try:
            for task in ("pacs.status", "pacs.storage"):
                self._ask_for(task)
        finally:
            with self._lock:
                self._asking = False

    def _ask_for(self, task: str) -> None:
        try:
            answer = self._ask(task, timeout_s=ANSWER_S)
        except (*BROKER_ERRORS, OSError) as error:
            log.warning("No worker could be asked for %s: %s", task, type(error).__name__)
            return
        if answer is not None:
            entries = {str(entry.get("server_name")): entry for entry in answer.get("servers", ())}
            with self._lock:
                self._known[task], self._answered_at = entries, self._clock()
