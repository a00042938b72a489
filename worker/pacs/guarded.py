"""A server's transport behind the `Guard`: each request passes its breakers and holds a slot until its answer is read.

The one place where the two meet, so that no dialect knows of either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

from courier.errors import CourierError, PacsUnauthorized, PacsUnavailable
from courier.settings import ServerSettings
from worker.pacs.guard import Guard
from worker.pacs.server_rates import STAY_S
from worker.pacs.transport import Answer, Credentials, Request, Transport

Sent = TypeVar("Sent")


class GuardedTransport(Transport):
    def __init__(self, server: ServerSettings, credentials: Credentials, *, guard: Guard, **more: Any) -> None:
        super().__init__(server, credentials, **more)
        self._guard = guard
        #: The last short question that the server answered: asked once more where it refuses another one.
        self._accepted: Request | None = None

    def exchange(self, request: Request) -> Answer:
        return self._patiently(request, lambda: self._exchanged(request))

    @contextmanager
    def stream(self, request: Request) -> Iterator[tuple[Answer, Iterator[bytes]]]:
        """As the plain one. The slot is held until the stream is closed; the server counts as well once it answers."""
        with ExitStack() as stack:
            yield self._patiently(request, lambda: stack.enter_context(self._streamed(request)))

    def _exchanged(self, request: Request) -> Answer:
        with self._guard.call(self.server, changes=_changes(request)), self._scoped(request):
            answer = super().exchange(request)
            if request.method == "GET" and answer.status < 300 and len(answer.body) < _SHORT_BYTES:
                self._accepted = request
            return answer

    @contextmanager
    def _streamed(self, request: Request) -> Iterator[tuple[Answer, Iterator[bytes]]]:
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

    def _patiently(self, request: Request, send: Callable[[], Sent]) -> Sent:
        """What ``send`` gives. A question that is answered "fewer requests" is asked again when its turn comes soon.

        So a list of many pages does not begin anew with each such answer. What changes something is left to the job.
        """
        until_s = time.monotonic() + STAY_S
        while True:
            try:
                return send()
            except PacsUnavailable as error:
                after_s = error.retry_after_s
                if _changes(request) or not error.slow_down or after_s is None or time.monotonic() + after_s > until_s:
                    raise


#: No longer answer is asked for again.
_SHORT_BYTES = 65_536


def _changes(request: Request) -> bool:
    return request.method != "GET" and not request.only_asks
