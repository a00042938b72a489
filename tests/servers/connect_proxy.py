"""A small HTTP proxy: CONNECT for https, absolute URLs for http (RFC 9110, 9.3.6; RFC 9112, 3.2.2).

It leads every name to loopback, so that a name that resolves nowhere is reached through it and in no other way.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

HOST = "127.0.0.1"
#: Headers that are not the far server's business.
_OWN = frozenset(("connection", "expect", "proxy-authorization", "proxy-connection"))


@dataclass
class ConnectProxy:
    """Serves from the moment it is made until `close`.

    ``authorization`` is the ``Proxy-Authorization`` that it wants, ``status`` what it answers instead of connecting.
    """

    authorization: str | None = None
    status: int | None = None
    #: Method and target of every request, in order of arrival; what was in ``Proxy-Authorization``.
    requests: list[tuple[str, str]] = field(default_factory=list)
    credentials: list[str | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._server = _ProxyServer((HOST, 0), _ConnectHandler)
        self._server.proxy = self
        self.port = int(self._server.server_address[1])
        self.url = f"http://{HOST}:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def refusal(self, handler: BaseHTTPRequestHandler) -> int | None:
        self.requests.append((handler.command, handler.path))
        told = handler.headers.get("Proxy-Authorization")
        self.credentials.append(told)
        if self.authorization is not None and told != self.authorization:
            return 407
        return self.status


class _ProxyServer(ThreadingHTTPServer):
    daemon_threads = True
    proxy: ConnectProxy

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is none of its concern."""


class _ConnectHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _ProxyServer

    def do_CONNECT(self) -> None:
        self.close_connection = True
        if self._is_refused():
            return
        with socket.create_connection((HOST, int(self.path.rpartition(":")[2]))) as far:
            self.send_response(200, "Connection established")
            self.end_headers()
            self._pump(far)

    def do_GET(self) -> None:
        self.close_connection = True
        if self._is_refused():
            return
        parts = urlsplit(self.path)
        target = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
        passed = [(name, value) for name, value in self.headers.items() if name.lower() not in _OWN]
        head = [f"{self.command} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in passed)]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with socket.create_connection((HOST, parts.port or 80)) as far:
            far.sendall("\r\n".join([*head, "Connection: close", "", ""]).encode("latin-1") + body)
            self._pump(far)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _is_refused(self) -> bool:
        status = self.server.proxy.refusal(self)
        if status is not None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
        return status is not None

    def _pump(self, far: socket.socket) -> None:
        near = self.connection
        ends: dict[Any, socket.socket] = {near: far, far: near}
        with contextlib.suppress(OSError):
            while True:
                for end in select.select(list(ends), [], [], 30)[0]:
                    data = end.recv(65_536)
                    if not data:
                        return
                    ends[end].sendall(data)

    def log_message(self, format: str, *args: object) -> None:
        """Its requests are kept in `ConnectProxy.requests` instead of being written anywhere."""
