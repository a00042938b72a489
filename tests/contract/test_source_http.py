"""Images over real sockets: servers that answer well, badly, slowly, forever or not at all."""

from __future__ import annotations

import contextlib
import datetime
import errno
import gzip
import hashlib
import ipaddress
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from courier.errors import (
    CourierError,
    SourceDenied,
    SourceNotAllowed,
    SourceNotFound,
    SourceTooLarge,
    SourceTruncated,
    SourceUnreachable,
)
from courier.settings import SourceSettings
from sandbox.images import ImageServer
from worker.storage.sources import Sources

HOST = "127.0.0.1"
OPEN = SourceSettings(allow_hosts=(f"{HOST}:*",), allow_private_networks=True)


def sources(resolve: Callable[..., Any] | None = None, **changes: Any) -> Sources:
    settings = SourceSettings.model_validate({**OPEN.model_dump(), **changes})
    return Sources(settings) if resolve is None else Sources(settings, resolve=resolve)


def refused(url: str, kind: type[CourierError], **changes: Any) -> CourierError:
    """The error of ``kind`` that a fetch ends with; its sentence quotes no query."""
    fetching = sources(**changes)
    with pytest.raises(kind) as caught:
        fetching.fetch(url)
    fetching.close()
    assert "s3cret" not in str(caught.value)
    return caught.value


class Talker:
    """A server that says to each connection what its script says, byte by byte if it likes."""

    def __init__(self, script: Callable[[socket.socket], None], tls: ssl.SSLContext | None = None) -> None:
        self._script = script
        self._tls = tls
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self.over = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def connections(self) -> int:
        return len(self._open)

    def url(self, path: str = "/image.dcm?sig=s3cret") -> str:
        return f"http://{HOST}:{self.port}{path}"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            thread = threading.Thread(target=self._talk, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _talk(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:  # a client that hangs up is what most tests here are about
            if self._tls is None:
                self._script(connection)
                return
            with self._tls.wrap_socket(connection, server_side=True, suppress_ragged_eofs=False) as encrypted:
                self._script(encrypted)

    def close(self) -> None:
        self.over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def talker() -> Iterator[Callable[..., Talker]]:
    talkers: list[Talker] = []

    def start(script: Callable[[socket.socket], None], tls: ssl.SSLContext | None = None) -> Talker:
        talkers.append(Talker(script, tls))
        return talkers[-1]

    yield start
    for one in talkers:
        one.close()


def read_request(connection: socket.socket) -> bytes:
    request = b""
    while not request.endswith(b"\r\n\r\n"):
        received = connection.recv(65_536)
        if not received:
            return b""
        request += received
    return request


def say(answer: bytes) -> Callable[[socket.socket], None]:
    def script(connection: socket.socket) -> None:
        while read_request(connection):
            connection.sendall(answer)

    return script


def say_and_hang_up(answer: bytes) -> Callable[[socket.socket], None]:
    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(answer)

    return script


# --- what arrives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", [0, 1, 65_535, 65_536, 65_537, 8 * 1_048_576 + 1])
def test_the_bytes_and_their_digest_are_those_of_the_source(image_server: ImageServer, size_bytes: int) -> None:
    body = (b"0123456789abcdef" * (size_bytes // 16 + 1))[:size_bytes]
    url = image_server.put("folder/a b.dcm", body)
    with sources().fetch(f"{url}?sig=s3cret#part") as fetched:
        assert fetched.stream.read() == body
        assert fetched.size_bytes == size_bytes
        assert fetched.sha256 == hashlib.sha256(body).hexdigest()
        assert fetched.source == url
    assert image_server.requests == ["/folder/a%20b.dcm?sig=s3cret"]


def test_a_chunked_body_is_put_together(talker: Callable[..., Talker]) -> None:
    server = talker(say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n"))
    with sources().fetch(server.url()) as fetched:
        assert fetched.stream.read() == b"abcde"


def test_an_address_of_ip_version_6_is_fetched_from() -> None:
    class Six(HTTPServer):
        address_family = socket.AF_INET6

    class Ipv6Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(str(self.headers["Host"]).encode())

        def log_message(self, format: str, *args: object) -> None:
            """Not needed."""

    try:
        server = Six(("::1", 0), Ipv6Handler)
    except OSError:
        pytest.skip("this machine has no IPv6")
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    port = server.server_address[1]
    with sources(allow_hosts=("[::1]:*",)).fetch(f"http://[::1]:{port}/a.dcm") as fetched:
        assert fetched.stream.read() == f"[::1]:{port}".encode()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("/a b.dcm", "/a%20b.dcm"),
        ("/é.dcm?x=é", "/%C3%A9.dcm?x=%C3%A9"),
        ("/a%20b%2Fc.dcm?sig=a%2Bb%3D", "/a%20b%2Fc.dcm?sig=a%2Bb%3D"),
        ("/a//b/../c.dcm", "/a//b/../c.dcm"),
        ("/a%2fb%7Ec%c3%A9?sig=a%2bb%3d&x=%7e", "/a%2fb%7Ec%c3%A9?sig=a%2bb%3d&x=%7e"),
        ("/100%/a%zz.dcm", "/100%/a%zz.dcm"),
        ('/a|"b".dcm', "/a%7C%22b%22.dcm"),
        ("//c.dcm", "//c.dcm"),
        ("", "/"),
        ("?a=b", "/?a=b"),
    ],
)
def test_a_path_is_asked_for_as_it_was_written(talker: Callable[..., Talker], written: str, asked: str) -> None:
    requests: list[bytes] = []

    def script(connection: socket.socket) -> None:
        requests.append(read_request(connection))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    sources().fetch(talker(script).url(written)).close()
    assert requests[0].split(b" ")[1] == asked.encode()


@pytest.mark.parametrize(
    ("location", "asked"), [(b"/\xc3\xa9.dcm", b"/%C3%A9.dcm"), (b"/a%2fb?sig=%2b%3D", b"/a%2fb?sig=%2b%3D")]
)
def test_the_location_of_a_redirect_is_asked_for_as_it_was_written(
    talker: Callable[..., Talker], location: bytes, asked: bytes
) -> None:
    requests: list[bytes] = []

    def script(connection: socket.socket) -> None:
        requests.append(read_request(connection))
        first = b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\nConnection: close\r\n\r\n"
        last = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        connection.sendall(first if len(requests) == 1 else last)

    sources().fetch(talker(script).url()).close()
    assert requests[1].startswith(b"GET " + asked + b" ")


@pytest.mark.parametrize("interim", [b"103 Early Hints\r\nLink: </a>", b"102 Processing", b"100 Continue\r\nX-A: b"])
@pytest.mark.parametrize("times", [1, 3])
def test_interim_answers_are_passed_over(talker: Callable[..., Talker], interim: bytes, times: int) -> None:
    before = (b"HTTP/1.1 " + interim + b"\r\n\r\n") * times
    server = talker(say(before + b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"))
    with sources().fetch(server.url()) as fetched:
        assert fetched.stream.read() == b"abc"


def test_interim_answers_without_end_are_ended_by_the_total_time(talker: Callable[..., Talker]) -> None:
    def script(connection: socket.socket) -> None:
        read_request(connection)
        while True:
            connection.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n")

    refused(talker(script).url(), SourceUnreachable, total_timeout_s=0.5)


@pytest.mark.parametrize(
    ("content_range", "is_whole"),
    [
        (b"bytes 0-2/3", True),
        (b"bytes 0-2/4", False),
        (b"bytes 0-9/10", False),
        (b"bytes 1-2/3", False),
        (b"bytes 0-2/*", False),
        (b"items 0-2/3", False),
        (b"", False),
    ],
)
def test_a_part_is_an_image_where_it_is_the_whole(
    talker: Callable[..., Talker], content_range: bytes, is_whole: bool
) -> None:
    head = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 3\r\nContent-Range: " + content_range
    server = talker(say(head + b"\r\n\r\nabc"))
    if is_whole:
        with sources().fetch(server.url()) as fetched:
            assert fetched.stream.read() == b"abc"
    else:
        refused(server.url(), SourceTruncated)


def test_a_whole_part_that_is_shorter_than_its_range_is_truncated(talker: Callable[..., Talker]) -> None:
    head = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-9/10\r\nConnection: close\r\n\r\n"
    refused(talker(say_and_hang_up(head + b"abc")).url(), SourceTruncated)


def test_a_body_stored_as_gzip_is_unpacked(image_server: ImageServer) -> None:
    url = image_server.put("a.dcm", gzip.compress(b"image" * 1000), headers={"Content-Encoding": "gzip"})
    with sources().fetch(url) as fetched:
        assert fetched.stream.read() == b"image" * 1000


def test_nobody_is_asked_to_compress_and_nothing_of_the_worker_is_told(talker: Callable[..., Talker]) -> None:
    requests: list[bytes] = []

    def script(connection: socket.socket) -> None:
        requests.append(read_request(connection))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nSet-Cookie: a=b\r\nConnection: close\r\n\r\n")

    server, fetching = talker(script), sources()
    for _ in range(2):
        fetching.fetch(server.url()).close()
    assert b"accept-encoding: identity" in requests[1].lower()
    assert b"cookie" not in requests[1].lower()
    assert b"authorization" not in requests[1].lower()


def test_connections_are_kept_and_shared_by_threads(talker: Callable[..., Talker]) -> None:
    body = bytes(100_000)
    server = talker(say(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + body))
    fetching = sources()

    def fetch(number: int) -> bool:
        with fetching.fetch(server.url(f"/{number}")) as fetched:
            return fetched.stream.read() == body

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(fetch, range(200)))
    fetching.close()
    assert server.connections <= 8


def test_a_proxy_of_the_environment_is_not_used(image_server: ImageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    sources().fetch(image_server.put("a.dcm", b"image")).close()


# --- what does not arrive whole ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 206 Partial Content\r\nContent-Length: 3\r\nContent-Range: bytes 0-2/9\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nConnection: close\r\n\r\n"
        + gzip.compress(b"abc" * 99, mtime=0)[:-3],
    ],
)
def test_a_body_that_ends_too_early_is_truncated(talker: Callable[..., Talker], answer: bytes) -> None:
    refused(talker(say_and_hang_up(answer)).url(), SourceTruncated)


def test_a_connection_reset_in_the_middle_is_truncated(talker: Callable[..., Talker]) -> None:
    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + bytes(1000))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    refused(talker(script).url(), SourceTruncated)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffff\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nffffffffff\r\n",
    ],
)
def test_a_body_without_end_is_cut_off_at_the_limit(talker: Callable[..., Talker], head: bytes) -> None:
    sent_bytes = [0]

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(head)
        while True:
            sent_bytes[0] += connection.send(bytes(65_536))

    refused(talker(script).url(), SourceTooLarge, max_bytes=1_048_576)
    assert sent_bytes[0] < 32 * 1_048_576


def test_a_body_announced_too_large_is_not_read_at_all(talker: Callable[..., Talker]) -> None:
    server = talker(say(b"HTTP/1.1 200 OK\r\nContent-Length: 1048577\r\n\r\n"))
    started = time.monotonic()
    refused(server.url(), SourceTooLarge, max_bytes=1_048_576)
    assert time.monotonic() - started < 2


def test_a_gzip_bomb_is_cut_off_at_the_limit(image_server: ImageServer) -> None:
    bomb = gzip.compress(bytes(32 * 1_048_576))
    url = image_server.put("a.dcm", bomb, headers={"Content-Encoding": "gzip"})
    refused(url, SourceTooLarge, max_bytes=1_048_576)


# --- what takes too long ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "drop"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
        (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_a_source_that_drips_is_ended_by_the_total_time(
    talker: Callable[..., Talker], head: bytes, drop: bytes
) -> None:
    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(head)
        while not server.over.wait(0.02):
            connection.sendall(drop)

    server = talker(script)
    started = time.monotonic()
    error = refused(server.url(), SourceUnreachable, total_timeout_s=0.5, idle_timeout_s=0.4)
    assert time.monotonic() - started < 2
    assert "total_timeout_s" in error.message


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc"])
def test_a_source_that_falls_silent_is_ended_by_the_idle_time(talker: Callable[..., Talker], head: bytes) -> None:
    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(head)
        server.over.wait(10)

    server = talker(script)
    started = time.monotonic()
    assert "silent" in refused(server.url(), SourceUnreachable, idle_timeout_s=0.2).message
    assert time.monotonic() - started < 2


def test_nobody_listening_is_unreachable() -> None:
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
    refused(f"http://{HOST}:{port}/a?sig=s3cret", SourceUnreachable)


@pytest.mark.parametrize("failure", [ConnectionResetError, BrokenPipeError, ConnectionAbortedError])
def test_a_connection_that_breaks_while_it_is_made_is_unreachable(
    failure: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(_: socket.socket, address: object) -> None:
        raise failure(errno.ECONNRESET, "broken")  # what a full queue of a busy server may lead to

    monkeypatch.setattr(socket.socket, "connect", connect)
    refused(f"http://{HOST}:9/a?sig=s3cret", SourceUnreachable)


@pytest.mark.parametrize("length", [b"9" * 5000, b"abc", b"-3", b"3, 4", b"", b"0x3"])
def test_a_length_that_is_no_number_is_not_taken_for_none_given(talker: Callable[..., Talker], length: bytes) -> None:
    answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: " + length + b"\r\n\r\nabc"
    refused(talker(say_and_hang_up(answer)).url(), SourceUnreachable)


def test_a_length_that_is_said_twice_is_taken_once(talker: Callable[..., Talker]) -> None:
    server = talker(say_and_hang_up(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc"))
    sources().fetch(server.url()).close()


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", bytes(100_000)])
def test_something_that_does_not_speak_http_is_unreachable(talker: Callable[..., Talker], answer: bytes) -> None:
    refused(talker(say_and_hang_up(answer)).url(), SourceUnreachable)


# --- what the source says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, SourceDenied),
        (403, SourceDenied),
        (404, SourceNotFound),
        (410, SourceNotFound),
        (429, SourceUnreachable),
        (500, SourceUnreachable),
        (503, SourceUnreachable),
    ],
)
def test_a_status_becomes_its_error_and_retry_after_is_kept(
    image_server: ImageServer, status: int, kind: type[CourierError]
) -> None:
    url = image_server.put("a.dcm", b"<html>no", status=status, headers={"Retry-After": "7"})
    error = refused(f"{url}?sig=s3cret", kind)
    assert str(status) in error.message
    assert getattr(error, "retry_after_s", 7) == 7


# --- redirects --------------------------------------------------------------------------------------------------------


def redirect(image_server: ImageServer, path: str, location: str, status: int = 302) -> str:
    return image_server.put(path, b"", status=status, headers={"Location": location})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_and_the_result_names_the_url_that_was_given(
    image_server: ImageServer, status: int
) -> None:
    image_server.put("b.dcm", b"image")
    url = redirect(image_server, "a.dcm", "./b.dcm?token=s3cret", status)
    with sources().fetch(url) as fetched:
        assert fetched.stream.read() == b"image"
        assert fetched.source == url
    assert image_server.requests == ["/a.dcm", "/b.dcm?token=s3cret"]


@pytest.mark.parametrize(
    "location",
    [
        "http://evil.example/a?token=s3cret",
        "//evil.example/a",
        "http://127.0.0.1.evil.example/",
        "http://user:s3cret@127.0.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::ffff:169.254.169.254]/",
        "http://2130706433/",
        "file:///etc/passwd",
        "ftp://127.0.0.1/a",
        "s3://bucket/key",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "javascript:alert(1)",
        "http://[::1",
        "http://127.0.0.1:99999/",
    ],
)
def test_a_redirect_to_where_no_image_comes_from_is_refused(image_server: ImageServer, location: str) -> None:
    refused(redirect(image_server, "a.dcm", location), SourceNotAllowed)
    assert image_server.requests == ["/a.dcm"]


def test_a_redirect_to_a_port_that_is_not_listed_is_refused_without_a_connection(
    image_server: ImageServer, talker: Callable[..., Talker]
) -> None:
    hidden = talker(say(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
    url = redirect(image_server, "a.dcm", hidden.url())
    refused(url, SourceNotAllowed, allow_hosts=(image_server.base.removeprefix("http://"),))
    assert hidden.connections == 0


def test_redirects_are_counted(image_server: ImageServer) -> None:
    url = redirect(image_server, "0", "/1")
    for number in range(1, 5):
        redirect(image_server, str(number), f"/{number + 1}")
    image_server.put("5", b"image")
    sources(max_redirects=5).fetch(url).close()
    assert "4 times" in refused(url, SourceUnreachable, max_redirects=4).message
    assert "0 times" in refused(url, SourceUnreachable, max_redirects=0).message


def test_a_redirect_to_nowhere_and_a_circle_end(image_server: ImageServer) -> None:
    refused(image_server.put("a", b"", status=302), SourceUnreachable)
    refused(redirect(image_server, "b", "/b"), SourceUnreachable)


def test_the_body_of_a_redirect_is_not_read(image_server: ImageServer, talker: Callable[..., Talker]) -> None:
    target = image_server.put("b.dcm", b"image")

    def script(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: {target}\r\n\r\n".encode())
        while True:
            connection.sendall(bytes(65_536))

    sources().fetch(talker(script).url()).close()


# --- names and addresses ----------------------------------------------------------------------------------------------


def answering(*addresses: str) -> Callable[[str, int], list[tuple[Any, ...]]]:
    def resolve(_: str, port: int) -> list[tuple[Any, ...]]:
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in addresses
        ]

    return resolve


@pytest.mark.parametrize(
    "addresses",
    [
        ("127.0.0.1",),
        ("93.184.216.34", "127.0.0.1"),
        ("127.0.0.1", "93.184.216.34"),
        ("::1",),
        ("::ffff:127.0.0.1",),
        ("10.0.0.1",),
        ("169.254.169.254",),
    ],
)
def test_a_listed_name_that_leads_inside_is_refused_without_a_connection(
    talker: Callable[..., Talker], addresses: tuple[str, ...]
) -> None:
    server = talker(say(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
    fetching = sources(answering(*addresses), allow_hosts=("images.test:*",), allow_private_networks=False)
    with pytest.raises(SourceNotAllowed, match=r"images\.test leads to"):
        fetching.fetch(f"http://images.test:{server.port}/")
    assert server.connections == 0


def test_the_address_that_was_judged_is_the_one_connected_to(image_server: ImageServer) -> None:
    """A name server that answers harmlessly at first is asked once, and never by the socket."""
    asked: list[str] = []

    def resolve(host: str, port: int) -> list[tuple[Any, ...]]:
        asked.append(host)
        return answering(HOST if len(asked) == 1 else "192.0.2.1")(host, port)

    image_server.put("a.dcm", b"image")
    port = image_server.base.rpartition(":")[2]
    fetching = sources(resolve, allow_hosts=("images.test:*",))
    fetching.fetch(f"http://images.test:{port}/a.dcm").close()
    assert asked == ["images.test"]


def test_the_next_address_is_tried_where_the_first_is_down(image_server: ImageServer) -> None:
    image_server.put("a.dcm", b"image")
    port = image_server.base.rpartition(":")[2]
    fetching = sources(answering("127.99.99.99", HOST), allow_hosts=("images.test:*",))
    fetching.fetch(f"http://images.test:{port}/a.dcm").close()


def test_a_name_that_cannot_be_resolved_is_unreachable() -> None:
    def resolve(host: str, port: int) -> list[tuple[Any, ...]]:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    with pytest.raises(SourceUnreachable, match="name"):
        sources(resolve, allow_hosts=("images.test:*",)).fetch("http://images.test/a?sig=s3cret")


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for images.test, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "images.test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("images.test"), x509.IPAddress(ipaddress.ip_address(HOST))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "images.test.pem"
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(made.public_bytes(pem) + secret)
    return path


@pytest.fixture
def tls_server(talker: Callable[..., Talker], certificate: Path, image_server: ImageServer) -> Talker:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    target = image_server.put("plain.dcm", b"image").encode()

    def script(connection: socket.socket) -> None:
        while request := read_request(connection):
            if request.startswith(b"GET /down"):
                connection.sendall(b"HTTP/1.1 302 OK\r\nContent-Length: 0\r\nLocation: " + target + b"\r\n\r\n")
            else:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nimage")

    return talker(script, context)


def test_https_trusts_the_authority_that_is_named_and_keeps_its_connection(
    tls_server: Talker, certificate: Path
) -> None:
    fetching = sources(answering(HOST), allow_hosts=("images.test:*",), ca_file=certificate)
    for _ in range(3):
        with fetching.fetch(f"https://images.test:{tls_server.port}/a.dcm") as fetched:
            assert fetched.stream.read() == b"image"
    fetching.close()
    assert tls_server.connections == 1


def test_https_refuses_a_certificate_that_nobody_vouches_for(tls_server: Talker) -> None:
    fetching = sources(answering(HOST), allow_hosts=("images.test:*",))
    with pytest.raises(SourceUnreachable, match="certificate"):
        fetching.fetch(f"https://images.test:{tls_server.port}/a.dcm")


def test_https_refuses_a_certificate_of_another_name(tls_server: Talker, certificate: Path) -> None:
    fetching = sources(answering(HOST), allow_hosts=("other.test:*",), ca_file=certificate)
    with pytest.raises(SourceUnreachable, match="certificate"):
        fetching.fetch(f"https://other.test:{tls_server.port}/a.dcm")


def test_a_redirect_from_https_to_http_is_refused(tls_server: Talker, certificate: Path) -> None:
    fetching = sources(answering(HOST), allow_hosts=("images.test:*", f"{HOST}:*"), ca_file=certificate)
    with pytest.raises(SourceNotAllowed, match="https to http"):
        fetching.fetch(f"https://images.test:{tls_server.port}/down?sig=s3cret")
    fetching.close()


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_no_log_line_has_a_query_in_it_whatever_the_level(
    image_server: ImageServer, talker: Callable[..., Talker], caplog: pytest.LogCaptureFixture
) -> None:
    def odd(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n: no name\r\nContent-Length: 5\r\nTransfer-Encoding: x\r\n\r\nimage")

    urls = [
        image_server.put("a.dcm", b"image"),
        redirect(image_server, "b.dcm", "/a.dcm?sig=s3cret"),
        image_server.put("c.dcm", b"", status=503),
        image_server.put("d.dcm", b"", behave=odd),
    ]
    with caplog.at_level(logging.DEBUG, logger="root"):
        for url in urls:
            try:
                sources().fetch(f"{url}?sig=s3cret").close()
            except CourierError as error:
                assert "s3cret" not in error.message  # noqa: PT017 (some of these succeed)
    assert "s3cret" not in caplog.text
