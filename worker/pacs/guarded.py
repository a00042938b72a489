"""A server's transport behind the `Guard`: each request passes its breakers and holds a slot until its answer is read.

The one place where the two meet, so that no dialect knows of either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from worker.pacs.guard import Guard
from worker.pacs.transport import Answer, Credentials, Request, Transport
from worker.settings import ServerSettings


class GuardedTransport(Transport):
    def __init__(self, server: ServerSettings, credentials: Credentials, *, guard: Guard, **more: Any) -> None:
        super().__init__(server, credentials, **more)
        self._guard = guard

    def exchange(self, request: Request) -> Answer:
        with self._guard.call(self.server, changes=_changes(request)):
            return super().exchange(request)

    @contextmanager
    def stream(self, request: Request) -> Iterator[tuple[Answer, Iterator[bytes]]]:
        """As the plain one. The slot is held until the stream is closed; the server counts as well once it answers."""
        with self._guard.call(self.server, changes=_changes(request)) as call, super().stream(request) as opened:
            call.answered()
            yield opened


def _changes(request: Request) -> bool:
    return request.method != "GET" and not request.only_asks
