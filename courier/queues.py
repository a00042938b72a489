"""The queues: which task's messages go where, and what still lies in the queues of version 0.1.

Version 0.1 called its queues as Celery's default queue is called, and as many other applications call theirs. So what
lies there is looked at where it is, and only messages of our own tasks are moved: those of others are never taken out.
"""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from courier import telemetry

log = logging.getLogger(__name__)

JOBS: Final = "pacs"
BATCHES: Final = "pacs.batches"
ADMIN: Final = "pacs.admin"
#: What workers alone send to: single jobs that were put aside, or whose message was lost, once they are due again. A
#: worker that reads `JOBS` reads it, too, and takes from each in turn, so that neither waits for the end of the other.
DUE: Final = "pacs.due"
#: Those that an operator names with -Q, and all.
NAMED: Final = (JOBS, BATCHES, ADMIN)
QUEUES: Final = (*NAMED, DUE)

#: The queue of each task; `courier/celery_settings.py` routes by it, and no other task is one of ours.
QUEUE_OF: Final = {
    **dict.fromkeys(
        (
            "pacs.upload",
            "pacs.exists",
            "pacs.metadata",
            "pacs.delete",
            "pacs.download",
            "pacs.list_studies",
            "pacs.trace",
            "pacs.delete_all",
        ),
        JOBS,
    ),
    **dict.fromkeys(
        (
            "pacs.audit",
            "pacs.batch.upload",
            "pacs.batch.delete",
            "pacs.batch.download",
            "pacs.batch.migrate",
            "pacs.batch.chunk",
            "pacs.batch.show",
            "pacs.batch.pause",
            "pacs.batch.resume",
            "pacs.batch.cancel",
            "pacs.batch.apply",
            "pacs.batch.retry",
            "pacs.batch.verify",
            "pacs.batch.undo",
        ),
        BATCHES,
    ),
    **dict.fromkeys(("pacs.status", "pacs.storage", "pacs.database"), ADMIN),
}

#: The tasks whose jobs stand in line for `DUE` (``courier/ledger/line.py``). A caller waits for the answers of the
#: others of `JOBS`, and what is under way of a batch is limited by the batch.
IN_LINE: Final = frozenset({"pacs.upload", "pacs.delete", "pacs.download"})

#: Where Celery sends a task whose application names no queue: so do follow-ups (`link`, `chain`) of other applications.
CELERYS_OWN: Final = "celery"
#: What version 0.1 called each of the queues.
OLD_QUEUES: Final = {CELERYS_OWN: JOBS, "batches": BATCHES, "admin": ADMIN}

#: How many messages of a list are counted at most, and how many are read at a time: those of others may be large.
LOOK: Final = 200
PORTION: Final = 20
#: How many messages are moved out of a list before the next list has its turn.
MOVED_AT_ONCE: Final = 1000

# The head of the first list goes to the end of the second, if it still is what was looked at. ARGV: for each message as
# it is, and as it is to be. What fails between two commands leaves a message twice: a job is done once, whatever comes.
_MOVE = """
for i = 1, #ARGV, 2 do
  if redis.call('LINDEX', KEYS[1], -1) ~= ARGV[i] then return (i - 1) / 2 end
  redis.call('LPUSH', KEYS[2], ARGV[i + 1])
  redis.call('RPOP', KEYS[1])
end
return #ARGV / 2
"""

# A message that a worker had taken, and did not acknowledge, goes to the end of the list, if it is there still.
_TAKE_OVER = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('LPUSH', KEYS[3], ARGV[3])
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
"""

#: What kombu calls these by default, as version 0.1 left it.
_UNACKED: Final = ("unacked", "unacked_index")


def task_of(message: Any) -> str:
    """The task that a message (as Redis has it, read) names; "" if it names none."""
    try:
        headers = message["headers"]
        if isinstance(headers, dict) and "task" in headers:
            return str(headers["task"])
        return str(json.loads(base64.b64decode(message["body"]))["task"])  # the first version of Celery's protocol
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""


def _read(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


@dataclass(frozen=True)
class QueueContents:
    """What lies in one old queue; there is ``more`` if not all of it was looked at.

    ``foreign`` is the task of the first message that is not ours, "" if none was seen or it names none.
    """

    queue: str
    ours: int
    others: int
    more: bool
    foreign: str

    def __str__(self) -> str:
        most = "at least " if self.more else ""
        found = f"{most}{self.ours} messages for tasks of PACS Courier wait in {self.queue}, a queue of version 0.1"
        return found + f", and {most}{self.others} of another application" * bool(self.others)

    def advice(self, *, reads: bool) -> str:
        """What to do, where workers ``reads`` the old queues, or do not."""
        senders = f"Let their senders name the queue {OLD_QUEUES[self.queue]}"
        if not reads:
            also = ", which moves those that are ahead of the other application's" * bool(self.others)
            return f"{senders}; for what waits set queue.read_old_queues and restart a worker{also} (docs/upgrade.md)."
        if self.others:
            task = _shown(self.foreign)
            return f"{senders}; workers leave a queue alone whose first message is not ours (task {task})."
        return "The workers move them; look again in a minute."


def count(channel: Any) -> list[QueueContents]:
    """What lies in the old queues of a Redis broker (``channel`` is kombu's), as far as any of it is ours."""
    return [found for queue in OLD_QUEUES if (found := _count(channel, queue)).ours]


def left_by_killed_workers(channel: Any) -> int:
    """How many messages workers of 0.1 have taken, and not acknowledged."""
    return sum(1 for _ in _left_unacknowledged(channel.client))


def _count(channel: Any, queue: str) -> QueueContents:
    ours, others, more, first = 0, 0, False, ""
    for key, _ in _lists(channel, queue, queue):
        seen = 0
        for task in _tasks(channel.client, key):
            seen += 1
            if task in QUEUE_OF:
                ours += 1
            else:
                first = first if others else task
                others += 1
        more = more or channel.client.llen(key) > seen
    return QueueContents(queue, ours, others, more, first)


def _shown(task: str) -> str:
    return task if re.fullmatch(r"[\w.:-]{1,200}", task, re.ASCII) else "-"


def _tasks(client: Any, key: str) -> Iterator[str]:
    """The tasks of the messages of a list, in the order in which they would be taken; of `LOOK` at most."""
    for start in range(0, LOOK, PORTION):
        portion = client.lrange(key, -start - PORTION, -start - 1)
        yield from (task_of(_read(raw)) for raw in reversed(portion))
        if len(portion) < PORTION:
            return


def _lists(channel: Any, queue: str, new_queue: str) -> Iterator[tuple[str, str]]:
    """The list of each priority, and the one of the same priority of the other queue.

    Another application may have something else under such a name.
    """
    for step in channel.priority_steps:
        key = _list_name(channel, queue, step)
        if _is(channel.client, key, b"list"):
            yield key, _list_name(channel, new_queue, step)


def _list_name(channel: Any, queue: str, step: int) -> str:
    """As Celery's manual has it: the queue's own name for the first step, then that with ``sep`` and the step."""
    return f"{queue}{channel.sep}{step}" if step else queue


def _is(client: Any, key: str, kind: bytes) -> bool:
    return bool(client.type(key) == kind)


class OldQueues:
    """Says what lies in the old queues, and where it ``reads`` them moves what is ours from the head of each.

    A message at the head that is not ours stays where it is, and its queue is not read again by this process: another
    application lives there.
    """

    def __init__(self, *, reads: bool) -> None:
        self.reads = reads
        self.stopped: list[str] = []
        self._reported = False

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to do, so that no channel is needed."""
        return self._reported and not (self.reads and len(self.stopped) < len(OLD_QUEUES))

    def report_and_move(self, channel: Any) -> None:
        """Report, the first time; then move. ``channel`` is kombu's, to a Redis."""
        if not self._reported:
            for found in count(channel):
                log.warning("%s. %s", found, found.advice(reads=self.reads))
            if self.reads and (number := _take_over(channel.client)):
                log.info("Moved %d messages that killed workers of version 0.1 had taken", number)
            self._reported = True
        for queue, new_queue in OLD_QUEUES.items() if self.reads else ():
            for key, new_key in _lists(channel, queue, new_queue):
                if queue not in self.stopped:
                    self._move(channel.client, (queue, key), (new_queue, new_key))

    def _move(self, client: Any, old: tuple[str, str], new: tuple[str, str]) -> None:
        number, foreign = _move(client, old[1], new[1], new[0])
        if number:
            log.info("Moved %d messages from the old queue %s to %s", number, old[0], new[0])
        if foreign is not None:
            self.stopped.append(old[0])
            telemetry.count("old_queue_stopped")
            log.error(
                "The first message in the old queue %s is of another application (task %s). It stays there, and this"
                " worker does not read the queue again until it is restarted; if no messages of PACS Courier are behind"
                " it (pacs doctor), set queue.read_old_queues = false",
                old[0],
                _shown(foreign),
            )


def _take_over(client: Any) -> int:
    """Move messages that a worker of 0.1 had taken when it was killed: no worker of today looks for them there.

    One that lives may still be at work with them; the ledger knows those jobs then, and no job is done twice.
    """
    moved = 0
    for tag, raw, message in _left_unacknowledged(client):
        keys = [*_UNACKED, QUEUE_OF[task_of(message)]]
        moved += int(client.eval(_TAKE_OVER, len(keys), *keys, tag, raw, _addressed(message, raw, keys[-1])))
    return moved


def _left_unacknowledged(client: Any) -> Iterator[tuple[bytes, bytes, Any]]:
    """Tag, content and message of each message for one of our tasks that a worker of 0.1 has taken."""
    if not _is(client, _UNACKED[0], b"hash"):
        return
    for tag, raw in client.hscan_iter(_UNACKED[0], count=PORTION):
        content = _read(raw)
        message = content[0] if isinstance(content, list) and content else None
        if task_of(message) in QUEUE_OF:
            yield tag, raw, message


def _move(client: Any, key: str, new_key: str, new_queue: str) -> tuple[int, str | None]:
    """How many were moved, and the task of the message that is none of ours, if it lies at the head now."""
    moved = 0
    for _ in range(MOVED_AT_ONCE // PORTION):
        portion = list(reversed(client.lrange(key, -PORTION, -1)))
        pairs: list[bytes] = []
        foreign = None
        for raw in portion:
            message = _read(raw)
            if task_of(message) not in QUEUE_OF:
                foreign = task_of(message)
                break
            pairs += [raw, _addressed(message, raw, new_queue)]
        number = int(client.eval(_MOVE, 2, key, new_key, *pairs)) if pairs else 0
        moved += number
        if number == len(pairs) // 2 and (foreign is not None or len(portion) < PORTION):
            return moved, foreign
    return moved, None


def _addressed(message: Any, raw: bytes, queue: str) -> bytes:
    """The same message; should it be put back, then into ``queue``. One without an address stays as it is."""
    try:
        message["properties"]["delivery_info"] |= {"exchange": "", "routing_key": queue}
        return json.dumps(message).encode()
    except (LookupError, TypeError):
        return raw


def not_ours(names: Iterable[str]) -> list[str]:
    """Those queues that a worker must not read as its own: what other applications have there would be lost."""
    return [name for name in names if name in OLD_QUEUES]
