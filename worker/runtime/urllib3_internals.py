"""The parts of urllib3 that we override or set although its manual does not name them; its version has a ceiling.

A connection here is urllib3's with limits that urllib3 does not have, a TLS context that may change, a caller who hears
of its socket, or a socket and a request line of the caller's own. What is said over it is not this module's business.
``tests/unit/test_urllib3_internals.py`` fails when one of the parts changes.
"""

from __future__ import annotations

import errno
import functools
import http.client
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import NewConnectionError, ProtocolError

from worker.runtime.deadlines import TimedReader, timed

#: How urllib3 names its pools: by the scheme of the URL.
PoolClasses = dict[str, type[HTTPConnectionPool]]

_clock = time.monotonic


class Stale(ProtocolError):
    """A connection that had served before was closed by the server without a word to this request."""


# --- limits that urllib3 does not have --------------------------------------------------------------------------------


class Deadline:
    """A connection with three limits that urllib3 does not have.

    A pooled connection counts as dead before the server is likely to close it: one that is closed at the very
    moment a STOW is sent leaves it open whether the image was stored or not. Oddity: "Connections are kept for one
    second". And a body has the time of an answer to be sent in, not that of a connect: DCM4CHEE stores while it reads.
    And an answer's head has to be whole when that time is over; urllib3 limits the single wait alone. What comes after
    the head has the time that `extend` gives it.

    ``idle_limit_s`` says how long to trust an idle connection, by the server's ``Keep-Alive``.
    """

    timeout: Any
    sock: Any
    _reader: TimedReader

    def __init__(
        self, *args: Any, send_timeout_s: float, idle_limit_s: Callable[[str | None], float], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._send_timeout_s = send_timeout_s
        self._idle_limit_s = idle_limit_s
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
        self._trusted_until = _clock() + self._idle_limit_s(response.headers.get("Keep-Alive"))
        return response


class RenewedTls:
    """A TLS connection whose context is asked for anew before each handshake."""

    def __init__(self, *args: Any, tls: Callable[[], ssl.SSLContext], **kwargs: Any) -> None:
        self._tls = tls
        super().__init__(*args, ssl_context=tls(), **kwargs)  # type: ignore[call-arg]  # as below

    def connect(self) -> None:
        self.ssl_context = self._tls()
        super().connect()  # type: ignore[misc]  # a mixin: urllib3's connection comes next

    def request(self, *args: Any, **kwargs: Any) -> None:
        """As over plain TCP: urllib3 then looks whether the server said something before it closed."""
        try:
            super().request(*args, **kwargs)  # type: ignore[misc]  # as above
        except ssl.SSLEOFError as error:
            raise BrokenPipeError(errno.EPIPE, "closed while the request was sent") from error


@functools.cache
def limited_pools() -> PoolClasses:
    """Pools of `Deadline` connections, whose options they take; for https `RenewedTls` ones too."""
    return {**_pools(Deadline), "https": _pools(RenewedTls, Deadline)["https"]}


def extend(response: Any, timeout_s: float) -> None:
    """Give what is read of ``response`` from now on so much time, in all; it came over a `Deadline` connection."""
    response.reader.deadline_s = time.monotonic() + timeout_s


# --- sockets ----------------------------------------------------------------------------------------------------------


@functools.cache
def noted_pools(note: Callable[[socket.socket], None]) -> PoolClasses:
    """Pools that call ``note`` with the socket of each connection once it is connected, on the thread that asks."""

    class Noted:
        sock: Any

        def connect(self) -> None:
            super().connect()  # type: ignore[misc]  # a mixin: urllib3's connection comes next
            note(self.sock)

    return _pools(Noted)


def dialled_pools(
    dial: Callable[[str, int, float | None], socket.socket],
    *,
    request_target: Callable[[], str],
    answer: Callable[..., http.client.HTTPResponse],
) -> PoolClasses:
    """Pools whose connections have the socket that ``dial`` makes of host, port and time-out; ``answer`` makes their
    answers.

    The request line bears ``request_target``, asked on the thread that sends, as it is: urllib3 would write
    percent-encodings anew, which a signature may cover. The name that TLS sends and verifies stays the URL's host.
    """

    class Dialled:
        response_class = staticmethod(answer)

        def _new_conn(self) -> socket.socket:
            return _dialled(self, dial)

        def putrequest(self, method: str, url: str, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002 - urllib3's
            super().putrequest(method, request_target(), *args, **kwargs)  # type: ignore[misc]  # as above

    return _pools(Dialled)


def _dialled(connection: Any, dial: Callable[[str, int, float | None], socket.socket]) -> socket.socket:
    """A new connection's socket; its failure is told as urllib3 tells it, which takes a bare reset for an answer's."""
    try:
        return dial(connection._dns_host, connection.port, connection.timeout)
    except ConnectionError as error:
        raise NewConnectionError(connection, "there is no connection") from error


def use_pools(manager: urllib3.PoolManager, classes: PoolClasses) -> None:
    """Have ``manager``, which has connected nowhere yet, make its pools of ``classes``."""
    manager.pool_classes_by_scheme = classes


def answer_with(pool: type[Any], answer: Callable[..., http.client.HTTPResponse]) -> type[Any]:
    """``pool``, a class of urllib3's or of boto's, whose connections have their answers made by ``answer``."""
    connection = type("AnsweredConnection", (pool.ConnectionCls,), {"response_class": staticmethod(answer)})
    return type("AnsweredPool", (pool,), {"ConnectionCls": connection})


def _pools(*mixins: type[Any]) -> PoolClasses:
    """urllib3's pools, of its own connections with ``mixins`` before them."""
    bases: dict[str, tuple[type[Any], type[HTTPConnectionPool]]] = {
        "http": (HTTPConnection, HTTPConnectionPool),
        "https": (HTTPSConnection, HTTPSConnectionPool),
    }
    return {
        scheme: type(pool.__name__, (pool,), {"ConnectionCls": type(connection.__name__, (*mixins, connection), {})})
        for scheme, (connection, pool) in bases.items()
    }
