"""One server's HTTP connections: sending, waiting, and turning every failure into one of our errors.

Nothing here knows DICOM. Nothing here sleeps, follows a redirect or reads the environment, or retries, with
two exceptions: one fresh token after a 401, and a question that met a connection closed while idle (RFC 9112
9.3.1). urllib3 is used without requests on top: its pools are made for threads, and a query costs two thirds
of the processor time.
"""

from __future__ import annotations

import email.utils
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import urllib3
from urllib3 import exceptions as wire
from urllib3.response import BaseHTTPResponse

from courier.errors import CourierError, PacsMisanswered, PacsRejected, PacsUnauthorized, PacsUnavailable, TryAgain
from courier.settings import ServerSettings
from courier.telemetry import CallEvent, carrier, observe
from worker.pacs.connections import pool, refused_certificate, tls_error_reason
from worker.pacs.server_rates import asks_to_slow_down
from worker.runtime.urllib3_internals import Stale, extend

BLOCK_BYTES = 256 * 1024
#: More than this is no answer to a question; images are streamed and have no such limit.
MAX_ANSWER_BYTES = 256 * 1024**2
#: What nginx, as a proxy before a server, says in the page of a 400 where a client's certificate is missing or refused.
_NGINX_ON_CERTIFICATES = b"SSL certificate"

ErrorKind = TypeVar("ErrorKind", bound=CourierError)


#: Called when the whole body of a request has gone out.
_when_sent: ContextVar[Callable[[], None] | None] = ContextVar("when_sent", default=None)


@contextmanager
def when_sent(call: Callable[[], None]) -> Iterator[None]:
    """Inside, on this thread, ``call`` is called when a request's whole body has gone out."""
    token = _when_sent.set(call)
    try:
        yield
    finally:
        _when_sent.reset(token)


def _noticed(body: Iterable[bytes]) -> Iterator[bytes]:
    yield from body
    if (call := _when_sent.get()) is not None:
        call()


class Credentials(Protocol):
    """What to put into ``Authorization``. SHALL be safe to use from several threads at once."""

    def authorization(self) -> str | None: ...

    def renew(self, refused: str | None) -> bool:
        """After a 401 to ``refused``: whether another value can be tried now."""
        ...


@dataclass(frozen=True)
class Request:
    """One call. ``target`` is path and query on the server; ``body`` is iterated afresh for every sending.

    ``expected`` are the statuses that the caller understands; any other becomes an error. ``only_asks`` marks a POST
    that changes nothing: a connection closed while idle is no reason to fail, as with a GET.
    """

    method: str
    target: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Iterable[bytes] | None = None
    expected: Collection[int] = (200,)
    read_timeout_s: float | None = None
    only_asks: bool = False


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


class Transport:
    """The pooled connections to one server. Safe to use from several threads at once."""

    def __init__(
        self,
        server: ServerSettings,
        credentials: Credentials,
        *,
        statuses: Mapping[int, type[CourierError]] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.server = server
        self.base_path = urlsplit(server.url).path.rstrip("/")
        self._credentials = credentials
        self._statuses = statuses or {}
        self._now = now
        self._pool = pool(server)

    def exchange(self, request: Request) -> Answer:
        """Send ``request`` and read the whole answer."""
        with self._watched(request) as seen:
            response = self._open(request)
            seen.status = response.status
            try:
                body = self._whole(response, self._read_timeout_s(request))
                self._check_certificate(response, body)
                return Answer(response.status, response.headers, body)
            except PacsUnavailable as error:
                error.hung = request.body is not None
                _discard(response)
                raise
            except BaseException:  # a task's time limit too
                _discard(response)
                raise

    @contextmanager
    def stream(self, request: Request) -> Iterator[tuple[Answer, Iterator[bytes]]]:
        """Send ``request``; the body comes apart from the answer, in blocks read as they are asked for."""
        with self._watched(request) as seen:
            response = self._open(request)
            seen.status = response.status
            try:
                yield (
                    Answer(response.status, response.headers, b""),
                    self._blocks(response, self._read_timeout_s(request)),
                )
            finally:
                _discard(response)

    @contextmanager
    def _watched(self, request: Request) -> Iterator[CallEvent]:
        """Let whoever watches see this call; an error counts against this server only if it is of its making."""
        seen = CallEvent(self.server.name, self.server.type, request.method)
        with observe(seen):
            try:
                yield seen
            except CourierError as error:
                if error.payload.get("server_name") == self.server.name:
                    seen.code = error.payload["code"]
                    seen.status = error.payload["details"].get("status", seen.status)
                raise

    def error(self, kind: type[ErrorKind], sentence: str, **more: Any) -> ErrorKind:
        """An error of ``kind`` that names this server."""
        return kind(sentence, server_name=self.server.name, server_type=self.server.type, **more)

    def _open(self, request: Request) -> BaseHTTPResponse:
        authorization = self._credentials.authorization()
        response = self._send(request, authorization)
        if response.status == 401:
            _discard(response)
            if self._credentials.renew(authorization):
                response = self._send(request, self._credentials.authorization())
        if response.status in request.expected:
            return response
        try:
            if response.status == 400:
                self._check_certificate(response, self._first_bytes(response))
            raise self._refusal(request, response)
        finally:
            _discard(response)

    def _first_bytes(self, response: BaseHTTPResponse) -> bytes:
        try:
            return response.read1(BLOCK_BYTES)
        except wire.HTTPError:
            return b""

    def _check_certificate(self, response: BaseHTTPResponse, body: bytes) -> None:
        """
        Raises
        ------
        PacsUnauthorized
            A proxy before the server refuses the certificate. Oddity: "A proxy refuses a certificate by a 400".
        """
        is_page = response.status == 400 and response.headers.get("Content-Type", "").startswith("text/html")
        if is_page and self.server.url.startswith("https://") and _NGINX_ON_CERTIFICATES in body:
            raise self._certificate_refused("status 400 of a proxy", details={"status": 400})

    def _certificate_refused(self, how: str, **more: Any) -> PacsUnauthorized:
        what, advice = "a connection without a client certificate", "name one in client_cert_file"
        if self.server.client_cert_file is not None:
            what, advice = "the certificate of this worker", "renew what client_cert_file and client_key_file name"
        sentence = f"{self.server.name} refuses {what} ({how}): {advice}."
        return self.error(PacsUnauthorized, sentence, scope="credential", **more)

    def _send(self, request: Request, authorization: str | None) -> BaseHTTPResponse:
        try:
            try:
                return self._urlopen(request, authorization)
            except Stale:
                if request.method != "GET" and not request.only_asks:
                    raise
                return self._urlopen(request, authorization)
        except wire.HTTPError as error:
            if alert := refused_certificate(error):
                raise self._certificate_refused(f"TLS: {alert}") from error
            raise self._silence(error, request) from error

    def _silence(self, error: wire.HTTPError, request: Request) -> PacsUnavailable:
        """Made apart from where it is raised: an error in a local variable there would keep itself and the socket."""
        phase, reason = _reason(error, self.server, self._read_timeout_s(request))
        silent = self.error(PacsUnavailable, f"{self.server.name} did not answer: {reason}.", details={"phase": phase})
        silent.hung = request.body is not None and isinstance(error, wire.ReadTimeoutError)
        return silent

    def _urlopen(self, request: Request, authorization: str | None) -> BaseHTTPResponse:
        headers = {**request.headers, **carrier()}
        if authorization is not None:
            headers["Authorization"] = authorization
        read_timeout_s = self._read_timeout_s(request)
        return self._pool.urlopen(
            request.method,
            request.target,
            body=None if request.body is None else _noticed(request.body),
            headers=headers,
            retries=False,
            redirect=False,
            assert_same_host=False,
            timeout=urllib3.Timeout(connect=self.server.connect_timeout_s, read=read_timeout_s),
            pool_timeout=math.ceil(read_timeout_s),
            preload_content=False,
        )

    def _read_timeout_s(self, request: Request) -> float:
        return request.read_timeout_s or self.server.read_timeout_s

    def _whole(self, response: BaseHTTPResponse, timeout_s: float) -> bytes:
        """The body, if it comes within ``timeout_s`` of its head."""
        body = bytearray()
        with self._reading(f"it was not there within {timeout_s:g} s"):
            extend(response, timeout_s)
            while block := response.read1(BLOCK_BYTES):
                body += block
                if len(body) > MAX_ANSWER_BYTES:
                    raise self.error(PacsMisanswered, f"The answer of {self.server.name} has no end.")
        return bytes(body)

    def _blocks(self, response: BaseHTTPResponse, timeout_s: float) -> Iterator[bytes]:
        """The body as it comes, each `BLOCK_BYTES` within ``timeout_s``: it may take long, but not for ever.

        Only waiting for the server counts, not what is done with the blocks between.
        """
        with self._reading(f"{BLOCK_BYTES // 1024} KiB more were not there within {timeout_s:g} s"):
            left_s, came_bytes = timeout_s, 0
            while True:
                extend(response, left_s)
                asked_s = time.monotonic()
                block = response.read1(BLOCK_BYTES)
                if not block:
                    return
                left_s, came_bytes = left_s - (time.monotonic() - asked_s), came_bytes + len(block)
                if came_bytes >= BLOCK_BYTES:
                    left_s, came_bytes = timeout_s, 0
                yield block

    @contextmanager
    def _reading(self, too_slow: str) -> Iterator[None]:
        name = self.server.name
        try:
            yield
        except wire.ReadTimeoutError as error:
            sentence = f"{name} stopped or slowed down in the middle of its answer: {too_slow}."
            raise self.error(PacsUnavailable, sentence, details={"phase": "answer"}) from error
        except wire.HTTPError as error:
            raise self.error(PacsMisanswered, f"The answer of {name} was cut off.") from error

    def _refusal(self, request: Request, response: BaseHTTPResponse) -> CourierError:
        status, after_s = response.status, retry_after_s(response.headers.get("Retry-After"), now=self._now())
        kind = self._statuses.get(status) or kind_of_status(status)
        slow_down = kind is PacsUnavailable and asks_to_slow_down(status, after_s)
        said = "it asks for fewer requests" if slow_down else advice(kind)
        sentence = f"{self.server.name} answered {status} to {request.method} {urlsplit(request.target).path}: {said}."
        more: dict[str, Any] = {"retry_after_s": after_s} if issubclass(kind, TryAgain) else {}
        error = self.error(kind, sentence, details={"status": status}, **more)
        if isinstance(error, PacsUnavailable):
            error.slow_down = slow_down
        if isinstance(error, PacsUnauthorized) and status == HTTPStatus.UNAUTHORIZED:
            error.scope = "credential"
        return error


def kind_of_status(status: int) -> type[CourierError]:
    """What an HTTP status that the caller did not expect means for the job, where no dialect knows better."""
    if status in (401, 403):
        return PacsUnauthorized
    if status in (408, 424, 425, 429) or (status >= 500 and status not in (501, 505)):
        return PacsUnavailable
    if status in (404, 405, 410, 501, 505) or not 400 <= status < 600:
        return PacsMisanswered
    return PacsRejected


def advice(kind: type[CourierError]) -> str:
    """The second half of the sentence: what an operator makes of it."""
    return {
        PacsUnauthorized: "check its auth settings and the account's rights",
        PacsUnavailable: "it is in trouble or busy",
        PacsMisanswered: "that is no answer to this call, check the server's url",
    }.get(kind, "it refuses the request as it is")


def retry_after_s(header: str | None, *, now: float) -> float | None:
    """``Retry-After`` (RFC 9110 10.2.3), seconds or a date, in seconds from ``now``."""
    if not header:
        return None
    if header.isascii() and header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def _discard(response: BaseHTTPResponse) -> None:
    """Close the connection, whose answer is not wanted to its end, and give its place back to the pool."""
    response.close()
    response.release_conn()


def _reason(error: wire.HTTPError, server: ServerSettings, read_timeout_s: float) -> tuple[str, str]:
    """Where it failed, and in words. ``connect``: the server cannot have seen the request."""
    reasons: tuple[tuple[type[wire.HTTPError], str, str], ...] = (
        (wire.NameResolutionError, "connect", "its name could not be resolved"),
        (wire.NewConnectionError, "connect", "no connection could be made"),
        (wire.ConnectTimeoutError, "connect", f"no connection within {server.connect_timeout_s:g} s"),
        (wire.EmptyPoolError, "connect", f"all {server.max_concurrency} connections to it are in use"),
        (wire.SSLError, "answer", tls_error_reason(error)),
        (wire.ReadTimeoutError, "answer", f"no whole answer began within {read_timeout_s:g} s"),
    )
    for kind, phase, words in reasons:
        if isinstance(error, kind):
            return phase, words
    return "answer", "the connection was dropped before an answer"
