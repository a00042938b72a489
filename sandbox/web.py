"""HTTP mechanics both dialects share: serving, bodies streamed in and out, and what a fault does to a connection.

No dialect's rules here: which status, which header and which part is acceptable is decided by ``msdicom.py`` and
``dcm4chee.py``. A handler is an aiohttp handler marked with `operation`; it returns an ordinary
`aiohttp.web.Response` or, for a long body, a `Streamed`. The `door` in front of all handlers applies the fault of
(dialect, operation) and leaves it in ``request[FAULT]`` for the parts of it that are the dialect's business.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import ClientPayloadError, web
from aiohttp.typedefs import Middleware
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser

from sandbox.faults import Clock, Faults, InjectedFault
from sandbox.store import Spool, Store

log = logging.getLogger(__name__)

CHUNK_BYTES = 256 * 1024
#: So much of a request's parts may wait in memory; further ones wait on disk, however small.
HELD_BYTES = 16 * 1024 * 1024
DICOM_JSON = "application/dicom+json"
FAULT: web.RequestKey[InjectedFault] = web.RequestKey("fault", InjectedFault)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Authorize = Callable[[web.Request, str, InjectedFault], web.Response | None]
H = TypeVar("H", bound=Callable[..., Any])


def _anyone(_request: web.Request, _operation: str, _fault: InjectedFault) -> web.Response | None:
    return None


@dataclass
class RequestLoad:
    """How many requests a dialect has had, has at this moment, and had at once at most."""

    total: int = 0
    now: int = 0
    most: int = 0

    @contextmanager
    def one_more(self) -> Iterator[None]:
        self.total += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            yield
        finally:
            self.now -= 1

    def begin_anew(self) -> None:
        """Those that are under way go on counting."""
        self.total, self.most = 0, self.now


@dataclass(frozen=True)
class Site:
    """What a dialect's application is built from.

    ``authorize`` returns the 401 or 403 that a request for an operation deserves, or None; ``token_issued_at_s`` tells
    when the token in an Authorization header was issued by the built-in endpoint, None for a foreign one.
    """

    dialect: str
    store: Store
    faults: Faults
    authorize: Authorize = _anyone
    token_issued_at_s: Callable[[str | None], float | None] = field(default=lambda _header: None)
    load: RequestLoad = field(default_factory=RequestLoad)

    @property
    def clock(self) -> Clock:
        return self.faults.clock


def operation(name: str) -> Callable[[H], H]:
    """Mark a handler with the operation whose fault applies to it."""

    def mark(handler: H) -> H:
        handler.operation = name  # type: ignore[attr-defined]  # functions bear attributes, their type does not say so
        return handler

    return mark


# -- answers --------------------------------------------------------------------------------------------------------


def dicom_json(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(
        status=status,
        body=json.dumps(value).encode(),
        headers={"Content-Type": DICOM_JSON, **(headers or {})},
    )


class Streamed(web.StreamResponse):
    """An answer whose body comes in chunks, sent chunked; an error in mid body closes the connection."""

    def __init__(
        self, chunks: AsyncIterator[bytes], *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status=status, headers=headers)
        self.chunks = chunks


async def file_chunks(path: Path, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
    """The bytes of a file from ``start`` up to ``end``."""
    with path.open("rb") as file:
        file.seek(start)
        left = (path.stat().st_size if end is None else end) - start
        while left > 0:
            chunk = file.read(min(CHUNK_BYTES, left))
            if not chunk:
                raise OSError(f"{path.name} is shorter than it was")
            left -= len(chunk)
            yield chunk


async def once(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def multipart(
    parts: Iterable[tuple[Mapping[str, str], AsyncIterator[bytes]]], boundary: str
) -> AsyncIterator[bytes]:
    """A multipart body (RFC 2046) of (headers, content) pairs; only one chunk is in memory at a time."""
    opening = f"--{boundary}\r\n"
    for headers, content in parts:
        yield (opening + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n").encode()
        async for chunk in content:
            yield chunk
        opening = f"\r\n--{boundary}\r\n"
    yield f"{opening[:-2]}--\r\n".encode()


# -- request bodies -------------------------------------------------------------------------------------------------


class Reset(ConnectionResetError):
    """The fault ``reset_after_bytes`` came true: the connection is gone."""


class BrokenMultipart(Exception):
    """The body is not, or is no longer, multipart. ``inside_part``: it ended within a part's content."""

    def __init__(self, *, inside_part: bool) -> None:
        super().__init__("the multipart body is broken")
        self.inside_part = inside_part


class TooLarge(Exception):
    """The body is longer than the server takes."""


@dataclass
class BodyPart:
    """One part of a request as it lies on disk; ``headers`` have lower-case names."""

    headers: dict[str, str]
    spool: Spool


async def body(request: web.Request) -> AsyncIterator[bytes]:
    """The request's body as it arrives. Raises `Reset` where the fault says so, ConnectionError if the client goes."""
    left = request[FAULT].reset_after_bytes
    async for chunk in request.content.iter_any():
        if left is not None:
            if len(chunk) >= left:
                if left:
                    yield chunk[:left]
                reset(request)
                raise Reset
            left -= len(chunk)
        yield chunk


async def spool_body(request: web.Request, store: Store, *, max_bytes: int | None = None) -> Spool:
    """The whole body as one file. Raises `TooLarge` and what `body` raises."""
    spool = store.spool()
    try:
        async for chunk in body(request):
            spool.write(chunk)
            if max_bytes is not None and spool.size_bytes > max_bytes:
                raise TooLarge
    except BaseException:
        spool.discard()
        raise
    return spool


async def read_parts(
    request: web.Request, boundary: str, store: Store, *, max_bytes: int | None = None
) -> AsyncIterator[BodyPart]:
    """The parts of a multipart body, each as soon as it has arrived.

    Raises `BrokenMultipart`, `TooLarge` and what `body` raises; the part that was under way is discarded then. The
    parts yielded are the caller's to keep or discard.
    """
    splitter = Splitter(boundary, store)
    received = 0
    try:
        async for chunk in body(request):
            received += len(chunk)
            if max_bytes is not None and received > max_bytes:
                raise TooLarge
            for part in splitter.feed(chunk):
                yield part
        splitter.end()
    finally:
        splitter.discard()


class Splitter:
    """python-multipart's parser, from callbacks to parts."""

    def __init__(self, boundary: str, store: Store) -> None:
        self._delimiter = f"--{boundary}".encode("latin-1")
        self._store = store
        self._preamble: bytes | None = b""
        self._headers: dict[str, str] = {}
        self._name = self._value = b""
        self._spool: Spool | None = None
        self._done: list[BodyPart] = []
        self._ended = False
        self._held_bytes = 0
        try:
            self._parser = MultipartParser(
                boundary.encode("latin-1"),
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._on_name,
                    "on_header_value": self._on_value,
                    "on_header_end": self._on_header,
                    "on_headers_finished": self._on_headers,
                    "on_part_data": self._on_data,
                    "on_part_end": self._on_end,
                    "on_end": self._on_finish,
                },
            )
        except FormParserError as error:
            raise BrokenMultipart(inside_part=False) from error

    def feed(self, chunk: bytes) -> list[BodyPart]:
        """The parts that this chunk completes."""
        if self._preamble is not None:
            chunk = self._preamble + chunk
            start = chunk.find(self._delimiter)
            if start < 0:
                if len(chunk) > CHUNK_BYTES:
                    raise BrokenMultipart(inside_part=False)
                self._preamble = chunk
                return []
            chunk, self._preamble = chunk[start:], None
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise BrokenMultipart(inside_part=False) from error
        done, self._done = self._done, []
        return done

    def end(self) -> None:
        if not self._ended:
            raise BrokenMultipart(inside_part=self._spool is not None)

    def discard(self) -> None:
        for spool in [self._spool, *(part.spool for part in self._done)]:
            if spool is not None:
                spool.discard()

    def _begin(self) -> None:
        self._headers = {}

    def _on_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header(self) -> None:
        self._headers[self._name.decode("latin-1").lower()] = self._value.decode("latin-1").strip()
        self._name = self._value = b""

    def _on_headers(self) -> None:
        self._spool = self._store.spool()

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        assert self._spool is not None
        self._spool.write(memoryview(data)[start:end])

    def _on_end(self) -> None:
        assert self._spool is not None
        self._spool.rest(in_memory=self._held_bytes <= HELD_BYTES)
        self._held_bytes += self._spool.size_bytes
        self._done.append(BodyPart(self._headers, self._spool))
        self._spool = None

    def _on_finish(self) -> None:
        self._ended = True


# -- the door -------------------------------------------------------------------------------------------------------


def door(site: Site) -> Middleware:
    """The middleware that stands in front of a dialect's handlers and lets its faults out on them."""

    @web.middleware
    async def through(request: web.Request, handler: Handler) -> web.StreamResponse:
        with site.load.one_more():
            name = getattr(request.match_info.handler, "operation", "*")
            fault = site.faults.take(site.dialect, name)
            request[FAULT] = fault
            early = await _before(site, request, name, fault)
            if early is not None:
                return early
            response = await _answer(request, handler)
            if fault.commit_then_drop:
                return drop(request)
            return await _send(request, response, fault)

    return through


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as refusal:
        return web.Response(status=refusal.status, text=refusal.text, headers=refusal.headers)
    except ConnectionError:
        return drop(request)


async def _before(site: Site, request: web.Request, name: str, fault: InjectedFault) -> web.StreamResponse | None:
    """What happens to a request before any handler sees it; None lets it in."""
    if fault.refuse:
        return drop(request)
    if fault.latency_ms is not None:
        await asyncio.sleep(fault.latency_s())
    if fault.hang:
        return await _hang(request)
    if fault.status is not None:
        headers = {} if fault.retry_after_s is None else {"Retry-After": f"{fault.retry_after_s:g}"}
        return web.Response(status=fault.status, headers=headers)
    if fault.unauthorized and _bears_old_token(site, request, name):
        return web.Response(status=401, headers={"WWW-Authenticate": 'Bearer error="invalid_token"'})
    return site.authorize(request, name, fault)


def _bears_old_token(site: Site, request: web.Request, name: str) -> bool:
    authorization = request.headers.get("Authorization")
    return site.faults.is_old_token(site.dialect, name, authorization, site.token_issued_at_s(authorization))


async def _hang(request: web.Request) -> web.StreamResponse:
    """Until the client leaves, or the server is stopped; the body is taken in, or the leaving would go unseen."""
    with suppress(ConnectionError, ClientPayloadError):
        async for _ in request.content.iter_any():
            pass
    while request.transport is not None and not request.transport.is_closing():
        await asyncio.sleep(0.02)
    return web.Response()


def drop(request: web.Request) -> web.StreamResponse:
    """Close the connection without another word; what is returned goes nowhere."""
    if request.transport is not None:
        request.transport.close()
    return web.Response()


def reset(request: web.Request) -> None:
    """Break the connection with a RST, as a crashed or overloaded server does."""
    transport = request.transport
    if transport is None:
        return
    connection: socket.socket | None = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


async def _send(request: web.Request, response: web.StreamResponse, fault: InjectedFault) -> web.StreamResponse:
    """Put the answer on the wire, as well or badly as the fault will have it."""
    if fault.charset and response.headers.get("Content-Type") == DICOM_JSON:
        response.headers["Content-Type"] = f"{DICOM_JSON}; charset=utf-8"
    cut = fault.reset_answer if fault.truncate is False else fault.truncate
    spoiled = cut is not False or fault.drip_bytes_per_s is not None
    if not spoiled and not isinstance(response, Streamed):
        return response
    chunks = response.chunks if isinstance(response, Streamed) else once(_content(response))
    if cut is not False:
        chunks = _cut(chunks, cut)
    if fault.drip_bytes_per_s is not None:
        chunks = _drip(chunks, fault.drip_bytes_per_s)
    outgoing = web.StreamResponse(status=response.status, headers=response.headers)
    if isinstance(response, Streamed) or fault.truncate == "cleanly":
        outgoing.headers.pop("Content-Length", None)
        outgoing.enable_chunked_encoding()
    else:
        outgoing.content_length = len(_content(response))
    with suppress(ConnectionError):  # the client has left: nobody is there to be told
        await outgoing.prepare(request)
        try:
            async for chunk in chunks:
                await outgoing.write(chunk)
        except (_Cut, OSError):
            if fault.reset_answer:
                reset(request)
            return drop(request)
        await outgoing.write_eof()
    return outgoing


def _content(response: web.StreamResponse) -> bytes:
    return response.body if isinstance(response, web.Response) and isinstance(response.body, bytes) else b""


class _Cut(Exception):
    """The truncated answer has reached its end."""


async def _cut(chunks: AsyncIterator[bytes], where: bool | int | str) -> AsyncIterator[bytes]:
    """The first ``where`` bytes, or half of a single chunk, or the first chunk and half of the second."""
    left = _half(chunks) if isinstance(where, bool | str) else _first(chunks, where)
    async for chunk in left:
        yield chunk
    if where != "cleanly":
        raise _Cut


async def _half(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    held = b""
    async for chunk in chunks:
        if held:
            yield held
            held = chunk
            break
        held = chunk
    yield held[: len(held) // 2]


async def _first(chunks: AsyncIterator[bytes], size_bytes: int) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        yield chunk[:size_bytes]
        size_bytes -= len(chunk)
        if size_bytes <= 0:
            return


async def _drip(chunks: AsyncIterator[bytes], bytes_per_s: float) -> AsyncIterator[bytes]:
    """The same bytes, slowly, in at most twenty pieces a second."""
    piece = max(1, int(bytes_per_s / 20))
    async for chunk in chunks:
        for start in range(0, len(chunk), piece):
            part = chunk[start : start + piece]
            yield part
            await asyncio.sleep(len(part) / bytes_per_s)


# -- serving --------------------------------------------------------------------------------------------------------


class Listener:
    """One application on one port, of loopback unless told otherwise, which can be closed and opened again."""

    def __init__(self, application: web.Application, *, host: str = "127.0.0.1") -> None:
        self._host = host
        self._runner = web.AppRunner(
            application, access_log=None, keepalive_timeout=75, shutdown_timeout=1, max_line_size=16384
        )
        self._socket_site: web.TCPSite | None = None
        self.port = 0

    async def start(self, port: int) -> None:
        """Listen on ``port`` (0: a free one, kept from then on)."""
        await self._runner.setup()
        self.port = port
        await self.open()

    @property
    def origin(self) -> str:
        return f"http://{self._host}:{self.port}"

    async def open(self) -> None:
        if self._socket_site is not None:
            return
        self._socket_site = web.TCPSite(self._runner, self._host, self.port, reuse_address=True)
        await self._socket_site.start()
        self.port = self._runner.addresses[0][1]

    async def close(self) -> None:
        """New connections are refused, open ones are closed."""
        if self._socket_site is None:
            return
        await self._socket_site.stop()
        self._socket_site = None
        if self._runner.server is not None:
            for connection in list(self._runner.server.connections):
                if connection.transport is not None:
                    connection.transport.close()

    async def stop(self) -> None:
        await self._runner.cleanup()
