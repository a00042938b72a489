"""Tell a program that waits for results when to read one: Celery's Redis back-end publishes each that it stores.

A message only says of which job there is something new; the result itself is read from the back-end. Each iterator that
waits has a connection of its own, so that threads share none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any, Final

import redis

from courier import celery_internals

log = logging.getLogger(__name__)

#: So many jobs are subscribed to, or read, at a time; an iterator that has more open polls.
MOST_JOBS: Final = 2000
POLL_S: Final = 0.1
#: How long Redis may take to confirm a subscription, and until the next try after a connection could not be used.
_CONFIRM_S: Final = 2.0
_RETRY_S: Final = 1.0
#: Messages are read together: so long for each job that is waited for, and no longer than in all.
_TOGETHER_S: Final = 0.0001
_MOST_TOGETHER_S: Final = 0.01
_MOST_MESSAGES: Final = 4000
#: The connection of a wait that has ended is used by the next one, unless it was idle for so long.
_IDLE_S: Final = 10.0
_UNSUBSCRIBE_S: Final = 0.5


class Rotation:
    """What is open of ``job_ids``, so many at a time, over and over: a round costs the same however many there are."""

    def __init__(self, job_ids: Collection[str]) -> None:
        self._open = job_ids
        self._ids = deque(job_ids)

    def next(self) -> list[str]:
        """Those whose turn it is."""
        turn = [self._ids.popleft() for _ in range(min(MOST_JOBS, len(self._ids)))]
        still_open = [job_id for job_id in turn if job_id in self._open]
        self._ids.extend(still_open)
        return still_open


class Notifications:
    """The subscriptions of one client to the Redis of its results.

    ``backend`` gives Celery's result back-end; of another kind than Redis it publishes nothing, and is polled.
    """

    def __init__(self, backend: Callable[[], Any]) -> None:
        self._backend = backend
        self._client: redis.Redis | None = None
        self._idle: deque[tuple[Any, int, float]] = deque()
        self._open: set[Subscription] = set()
        self.can_subscribe = True

    def subscription(self) -> Subscription:
        """One for the jobs of one iterator, which closes it. It connects once it waits."""
        subscription = Subscription(self)
        self._open.add(subscription)
        return subscription

    def close(self) -> None:
        """End all connections. What still waits polls from then on; if it is another thread, within a second."""
        self.can_subscribe = False
        for subscription in list(self._open):
            subscription.release(wait=False)
        while (idle := self._take_idle()) is not None:
            idle.close()

    def channels(self, job_ids: Iterable[str]) -> dict[bytes, str]:
        """The job of each channel."""
        backend = self._backend()
        return {celery_internals.result_channel(backend, job_id): job_id for job_id in job_ids}

    def connect(self) -> Any:
        """A connection that is subscribed to nothing; None where there are no messages to be had."""
        if not self.can_subscribe:
            return None
        if (idle := self._take_idle()) is not None:
            return idle
        if self._client is None:
            self._client = celery_internals.subscriber(self._backend())
            self.can_subscribe = self.can_subscribe and self._client is not None
        return None if self._client is None else self._client.pubsub()

    def _take_idle(self) -> Any:
        """The connection that the last wait has left. What is too old, or the parent process's, is closed."""
        while True:
            try:
                pubsub, pid, since = self._idle.pop()
            except IndexError:
                return None
            if pid == os.getpid() and time.monotonic() < since + _IDLE_S:
                return pubsub
            pubsub.close()

    def refused(self, error: redis.ResponseError) -> None:
        """Redis does not let this user subscribe: poll from now on."""
        if self.can_subscribe:
            log.debug("Redis refuses subscriptions to results (%s); they are polled", type(error).__name__)
        self.can_subscribe = False

    def ended(self, subscription: Subscription) -> None:
        self._open.discard(subscription)

    def give_back(self, pubsub: Any) -> None:
        """Unsubscribe from everything; keep one connection for whatever waits next."""
        if not self.can_subscribe or self._idle or not _unsubscribed(pubsub):
            pubsub.close()
            return
        self._idle.append((pubsub, os.getpid(), time.monotonic()))
        while len(self._idle) > 1 or (self._idle and not self.can_subscribe):  # other threads have come meanwhile
            with contextlib.suppress(IndexError):
                self._idle.popleft()[0].close()


def _unsubscribed(pubsub: Any) -> bool:
    """Whether Redis has confirmed the end of every subscription of the connection."""
    until = time.monotonic() + _UNSUBSCRIBE_S
    try:
        if pubsub.subscribed:
            pubsub.unsubscribe()
        while pubsub.subscribed and (left_s := until - time.monotonic()) > 0:
            pubsub.get_message(timeout=left_s)
    except redis.RedisError:
        return False
    return not pubsub.subscribed


class Subscription:
    """The channels of the open jobs of one iterator, on a connection of its own; to be closed."""

    def __init__(self, owner: Notifications) -> None:
        self._owner = owner
        self._lock = threading.Lock()  # held while it waits
        self._pid = os.getpid()
        self._pubsub: Any = None
        self._jobs: dict[bytes, str] = {}
        self._channels: dict[str, bytes] = {}
        self._unconfirmed: set[bytes] = set()
        self._since = 0.0
        self._retry_at = 0.0
        #: Whether the connection was left between two messages.
        self._intact = True

    def close(self) -> None:
        """Give up the channels."""
        self.release()
        self._owner.ended(self)

    def release(self, *, wait: bool = True) -> None:
        """End the connection, or leave it to the next that waits. ``wait=False``: not while another thread uses it."""
        if not self._lock.acquire(blocking=wait):
            return
        try:
            if self._pubsub is not None and self._intact and self._pid == os.getpid():
                pubsub, self._pubsub = self._pubsub, None
                self._owner.give_back(pubsub)
            else:
                self._drop()
        finally:
            self._lock.release()

    def wait(self, job_ids: Collection[str], read: Iterable[str], *, until: float) -> Collection[str] | None:
        """The jobs of which there may be something new to read, once there are some, or none by ``until``.

        ``job_ids`` is what is still open; of ``read``, which was read since the last time, some may have ended.
        None: it is not known of which, as after trouble with the connection, or because results are polled.
        """
        with self._lock:
            try:
                if not self._subscribe(job_ids, read):
                    time.sleep(POLL_S)
                    return None
                self._intact = False
                found = self._published(until)
                self._intact = True
            except redis.ResponseError as error:
                self._drop()
                self._owner.refused(error)
                return None
            except redis.RedisError:
                self._drop()
                return None
            # Until Redis has confirmed all, what is published may not be heard.
            return found if found or not self._unconfirmed else None

    def _subscribe(self, job_ids: Collection[str], read: Iterable[str]) -> bool:
        """Whether there is a connection that is subscribed to exactly these jobs, or just now asks to be."""
        now = time.monotonic()
        if self._pid != os.getpid():
            self._drop()
        if self._pubsub is not None and not self._owner.can_subscribe:
            self._drop()
        if self._pubsub is not None:
            if self._unconfirmed and now > self._since + _CONFIRM_S:
                raise redis.TimeoutError("Redis has not confirmed a subscription.")
            self._unsubscribe_ended(job_ids, read)
            return True
        if len(job_ids) > MOST_JOBS or now < self._retry_at:
            return False
        self._retry_at = now + _RETRY_S
        return self._begin(job_ids, now)

    def _begin(self, job_ids: Collection[str], now: float) -> bool:
        self._pid, self._pubsub, self._intact = os.getpid(), self._owner.connect(), False
        if self._pubsub is None:
            return False
        self._jobs = self._owner.channels(job_ids)
        self._channels = {job_id: channel for channel, job_id in self._jobs.items()}
        self._unconfirmed, self._since = set(self._jobs), now
        self._pubsub.subscribe(*self._jobs)
        return True

    def _unsubscribe_ended(self, job_ids: Collection[str], read: Iterable[str]) -> None:
        over = [job_id for job_id in read if job_id not in job_ids]
        ended = [self._channels.pop(job_id) for job_id in over if job_id in self._channels]
        for channel in ended:
            del self._jobs[channel]
        self._unconfirmed.difference_update(ended)
        if ended and self._pubsub is not None:
            self._intact = False
            self._pubsub.unsubscribe(*ended)

    def _published(self, until: float) -> set[str]:
        """Each confirmation of a subscription counts as a message: what was published before it was not heard."""
        found: set[str] = set()
        if self._unconfirmed:
            until = min(until, time.monotonic() + POLL_S)
        for _ in range(_MOST_MESSAGES):
            message = self._pubsub.get_message(timeout=max(0.0, until - time.monotonic()))
            if message is None:
                if time.monotonic() >= until:
                    break
                continue
            channel = message["channel"]
            if message["type"] == "subscribe":
                self._unconfirmed.discard(channel)
            elif message["type"] != "message":
                continue
            if channel in self._jobs:
                found.add(self._jobs[channel])
                if len(found) == 1:
                    until = min(until, time.monotonic() + min(_MOST_TOGETHER_S, _TOGETHER_S * len(self._jobs)))
        return found

    def _drop(self) -> None:
        """End the connection; of one that belongs to the parent process only this process's end."""
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            pubsub.close()
