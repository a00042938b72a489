"""The pooled connections to one server, how long each is waited for and trusted, and its TLS.

urllib3's pools, with three limits and a rotating client certificate added; what is said over a connection is none of
this module's business.
"""

from __future__ import annotations

import errno
import http.client
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ProtocolError
from urllib3.util import parse_url

from courier.settings import ServerSettings, SettingsError
from worker.runtime.deadlines import TimedReader, timed

#: How long an idle connection is trusted when the server does not say how long it keeps one.
DEFAULT_IDLE_S = 15.0

#: Alerts (RFC 8446 6.2) by which a server refuses a client's certificate, as OpenSSL's reasons end.
_REFUSALS = (
    "CERTIFICATE_REQUIRED",
    "BAD_CERTIFICATE",
    "UNSUPPORTED_CERTIFICATE",
    "CERTIFICATE_REVOKED",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_UNKNOWN",
    "UNKNOWN_CA",
    "ACCESS_DENIED",
)

_clock = time.monotonic
log = logging.getLogger(__name__)


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
    def __init__(self, *args: Any, tls: Tls, **kwargs: Any) -> None:
        self._tls = tls
        super().__init__(*args, ssl_context=tls.context(), **kwargs)

    def connect(self) -> None:
        self.ssl_context = self._tls.context()
        super().connect()

    def request(self, *args: Any, **kwargs: Any) -> None:
        """As over plain TCP: urllib3 then looks whether the server said something before it closed."""
        try:
            super().request(*args, **kwargs)
        except ssl.SSLEOFError as error:
            raise BrokenPipeError(errno.EPIPE, "closed while the request was sent") from error


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
    return _TlsPool(str(url.host), url.port, tls=Tls(server), **options)


class Tls:
    """Whom ``server``'s connections trust, and the certificate that they show.

    The files are read again by the next connection after they have changed, because other programs renew them. A pair
    that cannot be used, such as one that is half written, leaves the one before in use.
    """

    def __init__(self, server: ServerSettings) -> None:
        self._server = server
        self._files = [file for file in (server.ca_file, server.client_cert_file, server.client_key_file) if file]
        self._lock = threading.Lock()
        self._seen = self._stamps()
        self._context = _context(server)

    def context(self) -> ssl.SSLContext:
        with self._lock:
            seen = self._stamps()
            if seen != self._seen:
                self._seen = seen
                try:
                    self._context = _context(self._server)
                except SettingsError as error:
                    log.warning("Connections to %s keep their certificates: %s", self._server.name, error)
                else:
                    log.info("Certificates of server %s were read again", self._server.name)
            return self._context

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(file) for file in self._files]


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """The same as long as the file is: of its content if there are links on the way, as Kubernetes makes them."""
    with suppress(OSError):
        found = os.stat(file)
        return found.st_ino, found.st_mtime_ns, found.st_size
    return None


def _context(server: ServerSettings) -> ssl.SSLContext:
    """
    Raises
    ------
    SettingsError
        A file cannot be read or used; the sentence names the key.
    """
    context = authorities(server)
    certificate, key = server.client_cert_file, server.client_key_file
    if certificate is None:
        return context
    for name, file in (("client_cert_file", certificate), ("client_key_file", key)):
        try:
            if file is not None:
                file.open("rb").close()
        except OSError as error:
            raise _unusable(server, name, file, f"cannot be read: {error.strerror}") from None
    is_encrypted = False

    def passphrase() -> str:
        nonlocal is_encrypted
        is_encrypted = True
        return ""

    try:
        context.load_cert_chain(certificate, key, password=passphrase)
    except (OSError, ValueError) as error:  # ssl's errors are OSErrors; ValueError: no passphrase that could be one
        with_key = ("client_key_file", key) if key else ("client_cert_file", certificate)
        if is_encrypted:
            raise _unusable(server, *with_key, "holds an encrypted key; store it without a passphrase") from None
        if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
            raise _unusable(server, *with_key, "holds the key of another certificate") from None
        what = "a certificate, or the key in client_key_file" if key else "a certificate with its key (client_key_file)"
        raise _unusable(server, "client_cert_file", certificate, f"cannot be read as PEM of {what}") from None
    return context


def _unusable(server: ServerSettings, key: str, file: Path | None, why: str) -> SettingsError:
    return SettingsError(f"{key} of server {server.name}: {file} {why}")


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
    for one in causes(error):
        if isinstance(one, ssl.SSLCertVerificationError):
            return f"its TLS certificate is not trusted ({one.verify_message}); name its authority in ca_file"
        if "_ALERT_" in _reason(one):
            return f"it ended the TLS handshake ({_spoken(one)}); check url, and client_cert_file if it asks for one"
        if isinstance(one, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return "it dropped the connection within TLS"
    return "TLS failed, its certificate may not be the one that ca_file vouches for"


def refused_certificate(error: BaseException) -> str:
    """The alert by which the server refused the client's certificate, or the lack of one; "" if it did not."""
    return next((_spoken(one) for one in causes(error) if _reason(one).endswith(_REFUSALS)), "")


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what is behind it: libraries wrap TLS's in several ways."""
    waiting: list[Any] = [error]
    for _ in range(20):
        one = waiting.pop() if waiting else None
        if isinstance(one, BaseException):
            yield one
            named = [getattr(one, name, None) for name in ("reason", "inner_exception")]
            waiting += [*one.args, one.__cause__, one.__context__, *named]


def _reason(error: BaseException) -> str:
    """What OpenSSL calls an alert that the server sent, such as ``TLSV1_ALERT_UNKNOWN_CA``; "" if it sent none."""
    reason = (error.reason or "") if isinstance(error, ssl.SSLError) else ""
    return reason if "_ALERT_" in reason else ""


def _spoken(error: BaseException) -> str:
    return _reason(error).partition("_ALERT_")[2].lower().replace("_", " ")


def idle_limit_s(keep_alive: str | None) -> float:
    """How long to trust an idle connection: half of what ``Keep-Alive: timeout=`` announces."""
    for parameter in (keep_alive or "").split(","):
        name, _, value = parameter.strip().partition("=")
        if name.lower() == "timeout" and value.isascii() and value.isdecimal():
            return min(float(value) / 2, DEFAULT_IDLE_S)
    return DEFAULT_IDLE_S
