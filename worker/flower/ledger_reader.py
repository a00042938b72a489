"""Asks the ledger on threads of its own: a Redis that is away must not hold up Flower's loop, nor a page for long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Final, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from courier.ledger.jobs import Ledger, words_of
from worker.app import LEDGER_OPTIONS, settings

#: How long a page waits for the ledger; and how long one command of Redis may take.
ANSWER_S: Final = 5.0
_SOCKET_S: Final = 3.0
_THREADS: Final = 4

Answer = TypeVar("Answer")


class LedgerAway(Exception):
    """The ledger did not answer. ``str`` of it is a sentence for the page."""


class LedgerReader:
    """A few threads, and the connections of one ledger."""

    def __init__(self, url: str = settings.queue.ledger_url, *, answer_s: float = ANSWER_S) -> None:
        self._url = url
        self._answer_s = answer_s
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="ledger")

    @cached_property
    def ledger(self) -> Ledger:
        client = redis.Redis.from_url(
            self._url,
            decode_responses=True,
            socket_timeout=_SOCKET_S,
            socket_connect_timeout=_SOCKET_S,
            retry=Retry(NoBackoff(), 1),
        )
        return Ledger(client, **LEDGER_OPTIONS)

    async def ask(self, question: Callable[[Ledger], Answer]) -> Answer:
        """What ``question`` answers, which runs on a thread.

        Raises
        ------
        LedgerAway
            It cannot be reached, or did not answer in time; what was to be changed may be changed or not.
        """
        waiting = asyncio.wrap_future(self._pool.submit(question, self.ledger))
        try:
            return await asyncio.wait_for(waiting, self._answer_s)
        except TimeoutError:
            raise LedgerAway(f"The ledger has not answered within {self._answer_s:g} s.") from None
        except redis.RedisError as error:
            raise LedgerAway(f"The ledger does not answer ({words_of(error)}).") from None
