"""All configured servers, in order of preference, and how to ask several at once. No dialect's habit lives here."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from copy import copy
from typing import TypeVar

from courier.errors import CourierError, InvalidRequest
from worker.pacs.protection import protected
from worker.pacs.protocol import Pacs
from worker.runtime.shortage import start_threads

T = TypeVar("T")


class Fleet:
    """The servers by name, each behind its protection from deletions.

    ``threads`` bounds how many questions are under way at once in this process.
    """

    def __init__(self, servers: Iterable[Pacs], *, threads: int = 32) -> None:
        self._by_name = {pacs.server.name: protected(pacs) for pacs in servers}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ask")
        self._threads = threads

    def start(self) -> None:
        """Start all threads now: one that cannot be started later would leave its question in the line."""
        start_threads(self._pool, self._threads)

    def __iter__(self) -> Iterator[Pacs]:
        return iter(self._by_name.values())

    def __getitem__(self, name: str) -> Pacs:
        """The server called ``name``; `InvalidRequest` lists the known names."""
        try:
            return self._by_name[name]
        except KeyError:
            known = ", ".join(self._by_name)
            raise InvalidRequest(f"No server is called {name!r}; configured are: {known}.") from None

    def known(self, names: Iterable[str]) -> list[Pacs]:
        """Those of the servers called ``names`` that are still configured."""
        return [self._by_name[name] for name in names if name in self._by_name]

    def through(self, wrap: Callable[[Pacs], Pacs]) -> Fleet:
        """The same servers, each as ``wrap`` gives it back, asked by the same threads; close the first fleet only."""
        other = copy(self)
        other._by_name = {name: wrap(pacs) for name, pacs in self._by_name.items()}
        return other

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def gather(self, questions: Sequence[Callable[[], T]]) -> list[T | CourierError]:
        """Ask everything at the same time; an error of ours stands in the place of its answer."""
        futures = [self._ask(question) for question in questions[1:]]
        first = [_answer(question) for question in questions[:1]]
        return first + [future.result() for future in futures]

    def in_order(self, questions: Sequence[Callable[[], T]]) -> Generator[T | CourierError]:
        """As `gather`, one answer after the other; whoever stops listening does not wait for the rest."""
        futures = [self._ask(question) for question in questions]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

    def _ask(self, question: Callable[[], T]) -> Future[T | CourierError]:
        """In the context of whoever asks: its lines in the log are those of the same job."""
        return self._pool.submit(copy_context().run, _answer, question)

    def close(self) -> None:
        self._pool.shutdown()


def _answer(question: Callable[[], T]) -> T | CourierError:
    try:
        return question()
    except CourierError as error:
        return error
