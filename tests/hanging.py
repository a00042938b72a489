"""A server that hangs at some files: it passes all else on to another one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

import urllib3

from tests.servers.loopback import LoopbackHandler, serving

#: Not passed on: they belong to one connection.
_HOP = {"connection", "transfer-encoding", "content-length", "host", "keep-alive"}


@dataclass
class Hanging:
    """In front of a DICOMweb root; a body that holds one of ``at`` is read, counted and never answered.

    ``limit``: so often, then no more.
    """

    at: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    limit: int | None = None

    def hangs_at(self, body: bytes) -> bool:
        marks = [mark for mark in self.at if mark in body]
        return bool(marks) and (self.limit is None or self.seen(marks[0]) <= self.limit)

    def seen(self, mark: bytes) -> int:
        """How many bodies with ``mark`` have come, whole."""
        return sum(mark in body for body in self.bodies)


def _body_of(request: BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    body = b""
    while size := int(request.rfile.readline(), 16):
        body += request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()
    return body


@contextmanager
def hanging(behind: str) -> Iterator[Hanging]:
    server = Hanging()
    pool = urllib3.PoolManager(retries=False)
    origin = f"{urlsplit(behind).scheme}://{urlsplit(behind).netloc}"

    class HangingHandler(LoopbackHandler):
        def _any(self) -> None:
            body = _body_of(self)
            if self.command == "POST":
                server.bodies.append(body)
                if server.hangs_at(body):
                    server.over.wait()
                    self.close_connection = True
                    return
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
            answer = pool.request(self.command, origin + self.path, body=body or None, headers=headers, redirect=False)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in (*_HOP, "content-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.data)))
            self.end_headers()
            self.wfile.write(answer.data)

        do_GET = do_POST = do_DELETE = do_PUT = _any

    with serving(HangingHandler) as url:
        server.url = f"{url}{urlsplit(behind).path}"
        try:
            yield server
        finally:
            server.over.set()
