"""The pooled connections to one server, and how long each is waited for and trusted.

urllib3's pools, with three limits added; what is said over a connection is none of this module's business.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from typing import Any

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ProtocolError
from urllib3.util import parse_url

from worker.deadlines import TimedReader, timed
from worker.settings import ServerSettings, SettingsError

#: How long an idle connection is trusted when the server does not say how long it keeps one.
DEFAULT_IDLE_S = 15.0

_clock = time.monotonic


class Stale(ProtocolError):
    """A connection that had served before was closed by the server without a word to this request."""


class _Patience:
    """Three limits that urllib3 does not have.

    A pooled connection counts as dead before the server is likely to close it: one that is closed at the very
    moment a STOW is sent leaves it open whether the image was stored or not. Oddity: "Connections are kept for one
    second". And a body has the time of an answer to be sent in, not that of a connect: DCM4CHEE stores while it reads.
    And an answer's head has to be whole when that time is over; urllib3 limits the single wait alone. What comes after
    the head has the time that `allow` gives it.
    """

    timeout: Any
    sock: Any
    _reader: TimedReader

    def __init__(self, *args: Any, send_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._send_timeout_s = send_timeout_s
        self._trusted_until = float("inf")
        self._has_served = False

    @property
    def is_connected(self) -> bool:
        alive: bool = super().is_connected  # type: ignore[misc]  # a mixin: urllib3's connection comes next
        return alive and _clock() < self._trusted_until

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]  # as above
        self.sock.settimeout(self._send_timeout_s)
        self._trusted_until = float("inf")
        self._has_served = False

    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is not None:  # connected: what urllib3 sets now is the limit for sending
            self.timeout = self._send_timeout_s
        super().request(*args, **kwargs)  # type: ignore[misc]  # as above

    def _answer(self, sock: socket.socket, *args: Any, **kwargs: Any) -> http.client.HTTPResponse:
        """An answer of which nothing has been read; by now ``timeout`` is the limit for reading."""
        answer = http.client.HTTPResponse(sock, *args, **kwargs)
        self._reader = timed(answer, sock, deadline_s=time.monotonic() + self.timeout)
        return answer

    response_class: Any = _answer  # as http.client calls what makes its answers

    def getresponse(self) -> Any:
        try:
            response = super().getresponse()  # type: ignore[misc]  # as above
        except ConnectionError as error:
            raise (Stale("closed while idle") if self._has_served else error) from error
        response.reader = self._reader
        self._has_served = True
        self._trusted_until = _clock() + idle_limit_s(response.headers.get("Keep-Alive"))
        return response


class _PlainConnection(_Patience, HTTPConnection):
    pass


class _TlsConnection(_Patience, HTTPSConnection):
    pass


def allow(response: Any, timeout_s: float) -> None:
    """Give what is read of ``response`` from now on so much time, in all."""
    response.reader.deadline_s = time.monotonic() + timeout_s


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _PlainConnection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


def pool(server: ServerSettings) -> HTTPConnectionPool:
    """The connections to ``server``: ``max_concurrency`` of them, and whoever wants one more waits."""
    url = parse_url(server.url)
    options: dict[str, Any] = {
        "maxsize": server.max_concurrency,
        "block": True,
        "send_timeout_s": server.read_timeout_s,
    }
    if url.scheme == "http":
        return _PlainPool(str(url.host), url.port, **options)
    return _TlsPool(str(url.host), url.port, ssl_context=authorities(server), **options)


def authorities(server: ServerSettings) -> ssl.SSLContext:
    """The system's authorities, and the operator's own where one is named. Reading them takes a while.

    Raises
    ------
    SettingsError
        ``ca_file`` cannot be read.
    """
    context = ssl.create_default_context()
    try:
        if server.ca_file is not None:
            context.load_verify_locations(cafile=server.ca_file)
    except OSError as error:  # ssl's errors are OSErrors too
        sentence = f"ca_file of server {server.name}: {server.ca_file} cannot be read as PEM: {error.strerror}"
        raise SettingsError(sentence) from None
    return context


def mistrust(error: BaseException) -> str:
    """Why TLS failed, in words: what OpenSSL says of the certificate, if that was it."""
    waiting: list[Any] = [error]  # libraries wrap it in several ways
    for _ in range(20):
        one = waiting.pop() if waiting else None
        if isinstance(one, ssl.SSLCertVerificationError):
            return f"its TLS certificate is not trusted ({one.verify_message}); name its authority in ca_file"
        if isinstance(one, BaseException):
            waiting += [*one.args, one.__cause__, one.__context__, getattr(one, "reason", None)]
    return "TLS failed, its certificate may not be the one that ca_file vouches for"


def idle_limit_s(keep_alive: str | None) -> float:
    """How long to trust an idle connection: half of what ``Keep-Alive: timeout=`` announces."""
    for parameter in (keep_alive or "").split(","):
        name, _, value = parameter.strip().partition("=")
        if name.lower() == "timeout" and value.isascii() and value.isdecimal():
            return min(float(value) / 2, DEFAULT_IDLE_S)
    return DEFAULT_IDLE_S
