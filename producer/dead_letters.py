"""Dead letters from a program: which there are, why, and what is to become of them.

What a dead letter is, and its transitions, are in the ledger; how it is shown is elsewhere.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import redis

from courier.ledger.jobs import DeadLetter, DueJob, Event, Ledger
from courier.queues import IN_LINE
from producer.errors import BrokerUnavailable, NotFound


@dataclass(frozen=True)
class DeadLetterClient:
    """All dead letters of a ledger. They are kept until somebody replays or purges them."""

    ledger: Ledger
    forget: Callable[[str], None]
    send: Callable[[DueJob], None]

    def list(
        self,
        *,
        code: str | None = None,
        since: datetime | None = None,
        before: datetime | None = None,
        limit: int | None = None,
    ) -> Iterator[DeadLetter]:
        """The latest first: of one code, dead since ``since`` and ``before`` (both with a time zone)."""
        letters = self.ledger.dead_letters(
            code=code,
            since_s=since.timestamp() if since else None,
            before_s=before.timestamp() if before else None,
        )
        with _reachable():
            yield from itertools.islice(letters, limit)

    def get(self, job_id: str) -> DeadLetter:
        """The dead letter as it stands; `NotFound` if there is none of that id."""
        with _reachable():
            letter = self.ledger.dead_letter(job_id)
        if letter is None:
            raise NotFound(f"No dead letter is called {job_id}; pacs result says what became of a job.")
        return letter

    def history(self, job_id: str) -> tuple[Event, ...]:
        """What was decided about the job, as far as it had got hold of an image, a series or a study."""
        letter = self.get(job_id)
        with _reachable():
            return tuple(self.ledger.events_of(letter))

    trail = history  # as version 0.1 named it

    def replay(self, job_id: str) -> bool:
        """Queue the job again under its id, its attempts and crashes forgotten; False if it is no dead letter.

        It knows how far it came. Its old failure is forgotten, and it ends like any job.
        """
        with _reachable():
            due = self.ledger.replay(job_id)
        if due is None:
            return False
        # In this order: should the job have ended again already, the message brings its outcome once more.
        self.forget(job_id)
        if due.task in IN_LINE:
            with _reachable():
                self.ledger.due_now(job_id)
        else:
            self.send(due)
        return True

    def purge(self, job_id: str) -> bool:
        """Drop the letter and its message; False if it is no dead letter. Its history stays."""
        with _reachable():
            return self.ledger.purge(job_id)


def letter_json(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter as ``--json`` prints it: no message, no credential."""
    return {
        "job_id": letter.job_id,
        "task": letter.task,
        "about": letter.about,
        "server_name": letter.error.get("server_name"),
        "server_type": letter.error.get("server_type"),
        "code": letter.code,
        "message": letter.message,
        "attempts": letter.attempts,
        "deaths": letter.crash_count,
        "replays": letter.replays,
        "requested_by": letter.requested_by or None,
        "reason": letter.reason or None,
        "created_at": at(letter.created_ms),
        "died_at": at(letter.died_ms),
    }


def at(moment_ms: int) -> str:
    """RFC 3339, UTC, milliseconds, by the clock of Redis."""
    moment = datetime.fromtimestamp(moment_ms / 1000, tz=UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise BrokerUnavailable(f"The ledger cannot be reached ({type(error).__name__}); check LEDGER_URL.") from error
