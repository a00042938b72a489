"""A server's transport behind the `Guard`: each request passes its breakers and holds a slot until its answer is read.

The one place where the two meet, so that no dialect knows of either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from worker.errors import CourierError, PacsUnauthorized
from worker.pacs.guard import Guard
from worker.pacs.transport import Answer, Credentials, Request, Transport
from worker.settings import ServerSettings


class GuardedTransport(Transport):
    def __init__(self, server: ServerSettings, credentials: Credentials, *, guard: Guard, **more: Any) -> None:
        super().__init__(server, credentials, **more)
        self._guard = guard
        #: The last short question that the server answered: asked once more where it refuses another one.
        self._accepted: Request | None = None

    def exchange(self, request: Request) -> Answer:
        with self._guard.call(self.server, changes=_changes(request)), self._scoped(request):
            answer = super().exchange(request)
            if request.method == "GET" and answer.status < 300 and len(answer.body) < _SHORT_BYTES:
                self._accepted = request
            return answer

    @contextmanager
    def stream(self, request: Request) -> Iterator[tuple[Answer, Iterator[bytes]]]:
        """As the plain one. The slot is held until the stream is closed; the server counts as well once it answers."""
        with (
            self._guard.call(self.server, changes=_changes(request)) as call,
            self._scoped(request),
            super().stream(request) as opened,
        ):
            call.answered()
            yield opened

    @contextmanager
    def _scoped(self, request: Request) -> Iterator[None]:
        """Say of a 403 what is refused: the credential, or this one request for want of a right.

        It is the credential if the server now refuses what it has answered before; or, where it has answered nothing
        yet, if it refuses a plain question of DICOMweb.
        """
        try:
            yield
        except PacsUnauthorized as error:
            if error.scope == "request" and error.details.get("status") == HTTPStatus.FORBIDDEN:
                refused = self._is_plain(request) if self._accepted is None else self._is_refused(self._accepted)
                error.scope = "credential" if refused else "request"
            raise

    def _is_plain(self, request: Request) -> bool:
        path = urlsplit(request.target).path.removeprefix(self.base_path)
        return request.method == "GET" and path.startswith(("/studies", "/series", "/instances"))

    def _is_refused(self, request: Request) -> bool:
        try:
            super().exchange(request)
        except PacsUnauthorized:
            return True
        except CourierError:
            return False
        return False


#: No longer answer is asked for again.
_SHORT_BYTES = 65_536


def _changes(request: Request) -> bool:
    return request.method != "GET" and not request.only_asks
