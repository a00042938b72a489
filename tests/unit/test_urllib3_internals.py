"""The parts of urllib3 and http.client that their manuals do not name do what our connections take them to do.

A test that fails with a new version of urllib3 or Python names the function of ours that has to be looked at, in
``worker/runtime/urllib3_internals.py`` or ``worker/runtime/http_client_internals.py``.
"""

from __future__ import annotations

import http.client
import inspect
import io
import itertools
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any

import pytest
import trustme
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import NewConnectionError, SSLError

from tests.servers.peer import HANG_UP, OK, peer
from worker.runtime.deadlines import timed
from worker.runtime.http_client_internals import FinalResponse, attach_stream, detach_stream
from worker.runtime.urllib3_internals import (
    Deadline,
    Stale,
    answer_with,
    dialled_pools,
    extend,
    limited_pools,
    noted_pools,
    use_pools,
)


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def limited(port: int, *, idle_s: float = 15.0, **more: Any) -> Any:
    options = {"send_timeout_s": 7.0, "idle_limit_s": lambda _: idle_s, "maxsize": 1, "block": True, **more}
    return limited_pools()["https" if "tls" in more else "http"]("127.0.0.1", port, **options)


def get(pool: Any, **more: Any) -> Any:
    return pool.urlopen("GET", "/", retries=False, timeout=urllib3.Timeout(connect=5, read=5), **more)


def connect(host: str, port: int, timeout_s: float | None) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout_s)


# --- dialled_pools ----------------------------------------------------------------------------------------------------


def test_dialled_pools_depends_on_how_a_connection_gets_its_socket() -> None:
    assert parameters(HTTPConnection._new_conn) == ["self"]
    dialled: list[Any] = []

    def dial(host: str, port: int, timeout_s: float | None) -> socket.socket:
        dialled.append((host, timeout_s))
        return connect(host, port, timeout_s)

    classes = dialled_pools(dial, request_target=lambda: "/as%2fgiven", answer=http.client.HTTPResponse)
    with peer(OK) as server, classes["http"]("a.host.invalid.", server.port) as pool:
        assert get(pool).data == b"ok"
    assert dialled == [("a.host.invalid.", 5)], "urllib3 takes the host's last point, without which a name is relative"
    assert server.heads[0].startswith("GET /as%2fgiven HTTP/1.1\r\n"), "the request line is not what putrequest says"


def test_dialled_pools_depends_on_where_tls_gets_its_socket() -> None:
    authority = trustme.CA()
    theirs, ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("a.host.invalid").configure_cert(theirs)
    authority.configure_trust(ours)
    classes = dialled_pools(connect, request_target=lambda: "/", answer=http.client.HTTPResponse)
    with peer(OK, tls=theirs) as server, classes["https"]("a.host.invalid", server.port, ssl_context=ours) as pool:
        assert get(pool).data == b"ok"


def test_dialled_pools_depends_on_who_makes_an_answer() -> None:
    made: list[http.client.HTTPResponse] = []

    def answer(*args: Any, **kwargs: Any) -> http.client.HTTPResponse:
        made.append(http.client.HTTPResponse(*args, **kwargs))
        return made[-1]

    classes = dialled_pools(connect, request_target=lambda: "/", answer=answer)
    with peer(OK, OK) as server, classes["http"]("127.0.0.1", server.port) as pool:
        get(pool)
        get(pool)
    assert len(made) == 2
    assert parameters(http.client.HTTPResponse.__init__)[:2] == ["self", "sock"], "`answer` is called with the socket"


def test_dialled_pools_depends_on_how_the_failure_of_a_connection_is_told() -> None:
    def refuse(*_: Any) -> socket.socket:
        raise ConnectionResetError

    classes = dialled_pools(refuse, request_target=lambda: "/", answer=http.client.HTTPResponse)
    with classes["http"]("127.0.0.1", 9) as pool, pytest.raises(NewConnectionError):
        get(pool)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "manager", [urllib3.PoolManager(), urllib3.ProxyManager("http://127.0.0.1:9")], ids=["direct", "proxy"]
)
def test_use_pools_depends_on_where_a_manager_finds_its_classes(manager: urllib3.PoolManager, scheme: str) -> None:
    classes = noted_pools(lambda _: None)
    use_pools(manager, classes)
    pool = manager.connection_from_host("a.host.invalid", 80, scheme)
    assert type(pool) is classes[scheme]
    assert issubclass(pool.ConnectionCls, HTTPSConnection if scheme == "https" else HTTPConnection)


def test_noted_pools_depends_on_where_a_connection_keeps_its_socket() -> None:
    noted: list[socket.socket] = []
    with peer(OK) as server, noted_pools(noted.append)["http"]("127.0.0.1", server.port) as pool:
        get(pool)
    assert [type(one) for one in noted] == [socket.socket]


# --- limited_pools ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("idle_s", "connections"), [(15.0, 1), (-1.0, 2)])
def test_deadline_depends_on_who_asks_whether_a_connection_is_alive(idle_s: float, connections: int) -> None:
    assert isinstance(HTTPConnection.is_connected, property)
    with peer(OK, OK) as server, limited(server.port, idle_s=idle_s) as pool:
        get(pool)
        get(pool)
    assert server.connections == connections


def test_deadline_depends_on_which_time_out_a_body_is_sent_with() -> None:
    limits: list[float | None] = []
    with peer(OK, OK) as server, limited(server.port) as pool:
        get(pool)
        connection = pool._get_conn()
        pool._put_conn(connection)

        def body() -> Iterator[bytes]:
            limits.append(connection.sock.gettimeout())
            yield b""

        get(pool, body=body())
        limits.append(connection.sock.gettimeout())
    assert limits[0] == 7.0, "a body is sent within the limit for connecting"
    assert limits[1] is not None
    assert limits[1] <= 5.0, "an answer is awaited with the limit for sending"


def test_deadline_depends_on_which_time_out_an_answer_has() -> None:
    drip = (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n", b"ab")
    with peer(drip[0] + drip[1]) as server, limited(server.port) as pool:
        answer = get(pool, preload_content=False)
        assert 0 < answer.reader.deadline_s - time.monotonic() <= 5.0
        extend(answer, 0.1)
        with pytest.raises(urllib3.exceptions.ReadTimeoutError):
            answer.read()


def test_deadline_depends_on_how_a_closed_connection_is_told() -> None:
    with peer(OK, HANG_UP) as server, limited(server.port) as pool:
        get(pool)
        with pytest.raises(Stale):
            get(pool)


def test_renewed_tls_depends_on_when_a_connection_looks_at_its_context() -> None:
    authority = trustme.CA()
    theirs, ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(theirs)
    contexts = itertools.chain([ours], itertools.repeat(trusting(authority)))
    with peer(OK, tls=theirs) as server, limited(server.port, tls=lambda: next(contexts)) as pool:
        assert get(pool).data == b"ok", "the context that counts is the one of __init__"
    with peer(OK, tls=theirs) as server, limited(server.port, tls=lambda: ours) as pool, pytest.raises(SSLError):
        get(pool)


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def test_renewed_tls_depends_on_an_answer_being_read_after_a_broken_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what a server says before it closes, such as a 413, is seen over TLS as it is over plain TCP."""
    authority = trustme.CA()
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(theirs)
    asked = Deadline.request

    def broken(connection: Any, *args: Any, **kwargs: Any) -> None:
        asked(connection, *args, **kwargs)
        raise ssl.SSLEOFError

    monkeypatch.setattr(Deadline, "request", broken)
    with peer(OK, tls=theirs) as server, limited(server.port, tls=lambda: trusting(authority)) as pool:
        assert get(pool).data == b"ok"


def test_the_mixins_depend_on_these_methods_and_their_parameters() -> None:
    assert parameters(HTTPConnection.connect) == ["self"]
    assert parameters(HTTPConnection.getresponse) == ["self"]
    assert parameters(HTTPConnection.putrequest)[:3] == ["self", "method", "url"]
    assert HTTPSConnection.connect is not HTTPConnection.connect


def test_answer_with_depends_on_where_a_pool_names_its_connections() -> None:
    made: list[Any] = []

    def answer(*args: Any, **kwargs: Any) -> http.client.HTTPResponse:
        made.append(args)
        return http.client.HTTPResponse(*args, **kwargs)

    with peer(OK) as server, answer_with(urllib3.HTTPConnectionPool, answer)("127.0.0.1", server.port) as pool:
        get(pool)
    assert len(made) == 1


# --- http.client ------------------------------------------------------------------------------------------------------


def answered(kind: type[http.client.HTTPResponse], told: bytes) -> Any:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(told)
        answer = kind(near)
        answer.begin()
        body = answer.read() if answer.status == 200 else b""
        answer.close()
    return answer.status, body


@pytest.mark.parametrize("status", [102, 103])
def test_final_response_depends_on_who_reads_the_status(status: int) -> None:
    assert parameters(http.client.HTTPResponse._read_status) == ["self"]
    told = b"HTTP/1.1 %d Wait\r\nLink: </a>\r\n\r\n" % status + OK
    assert answered(FinalResponse, told) == (200, b"ok")
    assert answered(http.client.HTTPResponse, told)[0] == status, "http.client skips it: FinalResponse is needless now"


def test_final_response_takes_a_change_of_protocol_for_the_final_answer() -> None:
    assert answered(FinalResponse, b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + OK)[0] == 101


def test_detach_stream_depends_on_where_an_answer_reads_from() -> None:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(OK)
        answer = http.client.HTTPResponse(near)
        raw = detach_stream(answer)
        attach_stream(answer, io.BufferedReader(raw))
        answer.begin()
        assert (answer.status, answer.read()) == (200, b"ok")


def test_timed_depends_on_the_head_being_read_from_there_too() -> None:
    near, far = socket.socketpair()
    with near, far:
        answer = http.client.HTTPResponse(near)
        reader = timed(answer, near, deadline_s=time.monotonic() + 0.2)
        far.sendall(b"HTTP/1.1 200 OK\r\nX-Never")
        with pytest.raises(TimeoutError):
            answer.begin()
        answer.close()
        assert reader.closed
