"""The pooled connections to one server, how long each is waited for and trusted, and its TLS.

urllib3's pools, with the limits of `worker.runtime.urllib3_internals` and a rotating client certificate added; what is
said over a connection is none of this module's business.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from urllib3.connectionpool import HTTPConnectionPool
from urllib3.util import parse_url

from courier.settings import ServerSettings, SettingsError
from worker.runtime.urllib3_internals import limited_pools

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

log = logging.getLogger(__name__)


def pool(server: ServerSettings) -> HTTPConnectionPool:
    """The connections to ``server``: ``max_concurrency`` of them, and whoever wants one more waits."""
    url = parse_url(server.url)
    options: dict[str, Any] = {
        "maxsize": server.max_concurrency,
        "block": True,
        "send_timeout_s": server.read_timeout_s,
        "idle_limit_s": idle_limit_s,
    }
    if url.scheme == "https":
        options["tls"] = Tls(server).context
    return limited_pools()[str(url.scheme)](str(url.host), url.port, **options)


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


def tls_error_reason(error: BaseException) -> str:
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
