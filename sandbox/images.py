"""A small HTTP server over bytes in memory: the place images are fetched from in runs and tests.

It answers what it was told to, true or false; it knows nothing of DICOM.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

from sandbox.processes import HOST


@dataclass(frozen=True)
class StubResponse:
    """What a GET gets. ``headers`` replace the ones that follow from ``body``.

    ``behave`` takes over altogether: it receives the request handler and may write, wait or hang up.
    """

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    behave: Callable[[BaseHTTPRequestHandler], None] | None = None


class ImageServer:
    """Serves from the moment it is made, on a free loopback port, until `close`. Unknown paths are 404."""

    def __init__(self) -> None:
        self._answers: dict[str, StubResponse] = {}
        #: Path and query of every request, in order of arrival.
        self.requests: list[str] = []
        self._server = _ImageHttpServer((HOST, 0), _ImageRequestHandler)
        self._server.images = self
        self.base = f"http://{HOST}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def url(self, path: str) -> str:
        return f"{self.base}/{quote(path.lstrip('/'))}"

    def put(self, path: str, body: bytes = b"", **answer: Any) -> str:
        """Serve ``body`` (or any `StubResponse`, by its fields) at ``path``; returns its URL."""
        self._answers["/" + path.lstrip("/")] = StubResponse(body, **answer)
        return self.url(path)

    def answer_to(self, path: str) -> StubResponse:
        self.requests.append(path)
        bare = unquote(urlsplit(path).path)
        return self._answers.get(bare, StubResponse(b"there is nothing here\n", status=404))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _ImageHttpServer(ThreadingHTTPServer):
    daemon_threads = True
    images: ImageServer

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is none of our concern."""


class _ImageRequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _ImageHttpServer

    def do_GET(self) -> None:
        answer = self.server.images.answer_to(self.path)
        if answer.behave is not None:
            self.close_connection = True
            answer.behave(self)
            return
        self.send_response(answer.status)
        headers = {"Content-Length": str(len(answer.body)), "Content-Type": "application/dicom"}
        for name, value in {**headers, **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Its requests are kept in `ImageServer.requests` instead of being written anywhere."""
