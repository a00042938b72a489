"""How a server is talked to when it, or the network, misbehaves: against a scripted server on loopback."""

from __future__ import annotations

import base64
import contextlib
import datetime
import io
import ipaddress
import json
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from courier.errors import CourierError, PacsMisanswered, PacsUnauthorized, PacsUnavailable
from courier.settings import AuthSettings, ServerSettings, SettingsError
from worker.dicom.instances import Instance
from worker.pacs import transport as transport_module
from worker.pacs.protocol import Fate, Found, Pacs, Part
from worker.pacs.registry import connect
from worker.runtime import urllib3_internals

SECRET = "swordfish"
EMPTY = b"HTTP/1.1 200 OK\r\nContent-Type: application/dicom+json\r\nContent-Length: 2\r\n\r\n[]"
OAuth2 = Callable[[str], AuthSettings]
Reply = bytes | Callable[["Scripted", socket.socket], None]


def http(status: int, body: bytes = b"", *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def stored(*uids: str) -> bytes:
    items = [{"00081155": {"vr": "UI", "Value": [uid]}} for uid in uids]
    return http(200, json.dumps({"00081199": {"vr": "SQ", "Value": items}}).encode())


def drop(_: Scripted, connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)


def hang(server: Scripted, _: socket.socket) -> None:
    server.ending.wait()


@dataclass
class ReceivedRequest:
    line: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Scripted:
    """Answers each request with the next reply, and keeps on with the last one."""

    replies: list[Reply]
    tls: ssl.SSLContext | None = None
    asked: list[ReceivedRequest] = field(default_factory=list)
    connections: int = 0
    ending: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self.ending.set()
        for one in [self._listener, *self._open]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(timeout=5)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=[connection])
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        self._open.append(connection)
        try:
            if self.tls is not None:
                connection = self.tls.wrap_socket(connection, server_side=True)
                self._open.append(connection)
            with connection, connection.makefile("rb") as stream:
                while self._one(connection, stream):
                    pass
        except OSError:
            pass

    def _one(self, connection: socket.socket, stream: io.BufferedReader) -> bool:
        line = stream.readline().decode().strip()
        if not line:
            return False
        headers = {}
        while field_line := stream.readline().decode().strip():
            name, _, value = field_line.partition(":")
            headers[name.lower()] = value.strip()
        body = stream.read(int(headers.get("content-length", 0)))
        with self._lock:
            self.asked.append(ReceivedRequest(line, headers, body))
            reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if callable(reply):
            reply(self, connection)
            return False
        connection.sendall(reply)
        return True


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    running: list[Scripted] = []

    def start(*replies: Reply, tls: ssl.SSLContext | None = None) -> Scripted:
        running.append(Scripted(list(replies), tls))
        return running[-1]

    yield start
    for server in running:
        server.close()


def pacs(url: str, **settings: Any) -> Pacs:
    defaults = {"name": "ward", "type": "dicomweb", "url": f"{url}/dw", "read_timeout_s": 5}
    return connect(ServerSettings(**(defaults | settings)))


def part(content: bytes = b"content", uid: str = "1.3") -> Part:
    instance = Instance("1.1", "1.2", uid, "1.4", "1.2.840.10008.1.2.1")
    return Part(instance, lambda: io.BytesIO(content), len(content))


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_nobody_listening_is_unavailable_and_cannot_have_seen_the_request() -> None:
    with pytest.raises(PacsUnavailable) as error:
        pacs(f"http://127.0.0.1:{closed_port()}").find("study", "1.1")
    assert error.value.details["phase"] == "connect"
    assert (error.value.server_name, error.value.server_type) == ("ward", "dicomweb")


@pytest.mark.parametrize("reply", [drop, hang, b"HTTP/1.1 200 OK\r\nContent-Len"])
def test_no_answer_is_unavailable_and_leaves_open_what_was_done(
    scripted: Callable[..., Scripted], reply: Reply
) -> None:
    server = scripted(reply)
    with pytest.raises(PacsUnavailable) as error:
        pacs(server.url, read_timeout_s=0.2).store([part()])
    assert error.value.details["phase"] == "answer"
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "reply",
    [
        http(200, b"<html>It works!</html>"),
        http(200, b'{"not": "a list"}'),
        http(200, b'["1.1"]'),
        http(200, b"[{}]"),
        http(200, b""),
        http(200, b"\xff\xfe"),
        http(200, b"[" * 100_000),
        http(404, b""),
        http(302, b"", "Location: http://127.0.0.1:1/elsewhere"),
    ],
)
def test_an_answer_to_something_else_is_never_taken_for_nothing_found(
    scripted: Callable[..., Scripted], reply: Reply
) -> None:
    with pytest.raises(PacsMisanswered):
        pacs(scripted(reply).url).find("study", "1.1")


def cut_off(_: Scripted, connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[]")
    connection.shutdown(socket.SHUT_RDWR)


def cut_off_chunked(_: Scripted, connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n")
    connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("reply", [cut_off, cut_off_chunked])
def test_an_answer_that_was_cut_off_is_no_answer(scripted: Callable[..., Scripted], reply: Reply) -> None:
    with pytest.raises(PacsMisanswered, match="cut off"):
        pacs(scripted(reply).url).find("study", "1.1")


@pytest.mark.parametrize("length", ["-5", "many", "3, 4", "1e3", ""])
def test_a_length_that_is_none_is_an_error_of_ours(scripted: Callable[..., Scripted], length: str) -> None:
    def answer(server: Scripted, connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n[".encode())
        drop(server, connection)

    ward = pacs(scripted(answer).url, max_concurrency=1)
    for _ in range(2):
        with pytest.raises((PacsMisanswered, PacsUnavailable)):
            ward.find("study", "1.1")


def stop_midway(server: Scripted, connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[]")
    server.ending.wait()


def test_an_answer_that_stops_midway_is_unavailable(scripted: Callable[..., Scripted]) -> None:
    with pytest.raises(PacsUnavailable, match="in the middle"):
        pacs(scripted(stop_midway).url, read_timeout_s=0.2).find("study", "1.1")


def test_a_redirect_is_not_followed(scripted: Callable[..., Scripted]) -> None:
    elsewhere = scripted(EMPTY)
    with pytest.raises(PacsMisanswered):
        pacs(scripted(http(302, b"", f"Location: {elsewhere.url}/dw/studies")).url).find("study", "1.1")
    assert elsewhere.asked == []


def test_a_server_that_asks_for_patience_says_for_how_long(scripted: Callable[..., Scripted]) -> None:
    with pytest.raises(PacsUnavailable) as error:
        pacs(scripted(http(503, b"", "Retry-After: 7")).url).find("study", "1.1")
    assert error.value.retry_after_s == 7


def test_a_connection_is_kept_for_the_next_call(scripted: Callable[..., Scripted]) -> None:
    server = scripted(EMPTY)
    ward = pacs(server.url)
    assert [ward.find("study", "1.1") for _ in range(5)] == [[]] * 5
    assert server.connections == 1


def test_a_connection_that_the_server_closed_is_not_used_again(scripted: Callable[..., Scripted]) -> None:
    def answer_and_close(server: Scripted, connection: socket.socket) -> None:
        connection.sendall(EMPTY)
        drop(server, connection)

    server = scripted(answer_and_close)
    ward = pacs(server.url)
    for _ in range(5):
        assert ward.find("study", "1.1") == []
    assert server.connections == 5


def answer_then_drop_the_next(server: Scripted, connection: socket.socket) -> None:
    """Closes the connection, without a word, once the next request on it is there."""
    connection.sendall(EMPTY)
    connection.recv(65536)
    drop(server, connection)


@pytest.mark.parametrize("server_type", ["dicomweb", "orthanc"])
def test_a_query_on_a_connection_closed_while_idle_is_asked_again(
    scripted: Callable[..., Scripted], server_type: str
) -> None:
    ward = pacs(scripted(answer_then_drop_the_next, EMPTY).url, type=server_type)
    assert ward.find("study", "1.1") == []
    assert ward.find("study", "1.1") == []


def test_a_push_on_a_connection_closed_while_idle_is_not_sent_again(scripted: Callable[..., Scripted]) -> None:
    server = scripted(answer_then_drop_the_next, stored("1.3"))
    ward = pacs(server.url)
    assert ward.find("study", "1.1") == []
    with pytest.raises(PacsUnavailable):
        ward.store([part()])
    assert server.connections == 1


def test_a_connection_is_not_used_when_the_server_may_be_closing_it(
    scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(urllib3_internals, "_clock", lambda: now[0])
    server = scripted(http(200, b"[]", "Keep-Alive: timeout=1"))
    ward = pacs(server.url)
    for now[0] in (100.0, 100.4, 100.95, 101.3):
        ward.find("study", "1.1")
    assert server.connections == 2


def test_no_more_connections_than_allowed_are_open(scripted: Callable[..., Scripted]) -> None:
    both_in = threading.Barrier(2, timeout=5)

    def together(_: Scripted, connection: socket.socket) -> None:
        both_in.wait()
        connection.sendall(http(200, b"[]", "Connection: close"))

    server = scripted(together)
    ward = pacs(server.url, max_concurrency=2)
    threads = [threading.Thread(target=ward.find, args=["study", "1.1"]) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(server.asked) == 6


def test_the_environments_proxy_is_not_used_for_a_server_or_its_tokens(
    scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch, oauth2: OAuth2
) -> None:
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("NO_PROXY", "")
    tokens = scripted(token("t1"))
    assert pacs(scripted(EMPTY).url, auth=oauth2(tokens.url)).find("study", "1.1") == []


class Reluctant(Scripted):
    """Lets some time pass, longer than connecting may take, before it reads a body."""

    def _one(self, connection: socket.socket, stream: io.BufferedReader) -> bool:
        self.ending.wait(0.4)
        return super()._one(connection, stream)


def test_a_body_may_take_longer_to_send_than_a_connection_to_make() -> None:
    server = Reluctant([stored("1.3")])
    try:
        ward = pacs(server.url, connect_timeout_s=0.1)
        for _ in range(2):
            assert [outcome.fate for outcome in ward.store([part(bytes(20_000_000))])] == [Fate.STORED]
    finally:
        server.close()
    assert server.connections == 1


def drip(server: Scripted, connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while not server.ending.wait(0.05):
        connection.sendall(b"[")


def endless(server: Scripted, connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while not server.ending.is_set():
        connection.sendall(bytes(65_536))


def test_an_answer_that_drips_is_unavailable(scripted: Callable[..., Scripted]) -> None:
    with pytest.raises(PacsUnavailable, match="within"):
        pacs(scripted(drip).url, read_timeout_s=0.3).find("study", "1.1")


def dripping(head: bytes, drop_of: bytes) -> Reply:
    """After ``head``, ``drop_of`` again and again: never silent for long, never at an end."""

    def reply(server: Scripted, connection: socket.socket) -> None:
        connection.sendall(head)
        while not server.ending.wait(0.03):
            connection.sendall(drop_of)

    return reply


@pytest.mark.parametrize(
    "reply",
    [
        dripping(b"HTTP/1.1 2", b"0"),
        dripping(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"a"),
        dripping(b"HTTP/1.1 200 OK\r\n", b"X-Slow: a\r\n"),
        dripping(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["status line", "one header", "many headers", "interim answers"],
)
def test_an_answer_whose_head_drips_is_unavailable(scripted: Callable[..., Scripted], reply: Reply) -> None:
    ward, started_at = pacs(scripted(reply, EMPTY).url, read_timeout_s=0.3, max_concurrency=1), time.monotonic()
    with pytest.raises(PacsUnavailable, match="within") as error:
        ward.store([part()])
    assert error.value.details["phase"] == "answer"
    assert time.monotonic() - started_at < 2
    assert ward.find("study", "1.1") == []


MULTIPART = "Content-Type: multipart/related; boundary=BB"
STUDY = f"HTTP/1.1 200 OK\r\n{MULTIPART}\r\n".encode()


@pytest.mark.parametrize(
    "reply",
    [
        dripping(STUDY + b"Content-Length: 100000000\r\n\r\n", b"x"),
        dripping(STUDY + b"Connection: close\r\n\r\n", b"x"),
        dripping(STUDY + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        dripping(STUDY + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
        dripping(STUDY + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-Slow: a\r\n"),
    ],
    ids=["length", "until closed", "chunks", "a chunk's length", "trailers"],
)
def test_a_retrieval_that_drips_is_unavailable(scripted: Callable[..., Scripted], reply: Reply) -> None:
    ward, started_at = pacs(scripted(reply, EMPTY).url, read_timeout_s=0.3, max_concurrency=1), time.monotonic()
    with pytest.raises(PacsUnavailable, match="256 KiB more were not there within") as error:
        retrieved(ward)
    assert error.value.details["phase"] == "answer"
    assert time.monotonic() - started_at < 2
    assert ward.find("study", "1.1") == []


@pytest.mark.parametrize("chunked", [False, True])
def test_a_retrieval_that_takes_long_and_goes_on_is_never_ended(
    scripted: Callable[..., Scripted], chunked: bool
) -> None:
    """Longer than any time-out in all; what its taker does between two blocks is not the server's time either."""
    block = bytes(transport_module.BLOCK_BYTES)
    image = block * 6
    body = b"--BB\r\nContent-Type: application/dicom\r\n\r\n" + image + b"\r\n--BB--\r\n"

    def slowly(server: Scripted, connection: socket.socket) -> None:
        connection.sendall(STUDY + (b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"\r\n"))
        for at in range(0, len(body), len(block)):
            server.ending.wait(0.2)
            piece = body[at : at + len(block)]
            connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        connection.sendall(b"0\r\n\r\n" if chunked else b"")
        drop(server, connection)

    came = bytearray()
    with pacs(scripted(slowly).url, read_timeout_s=0.5).retrieve(Found("study", "1.1")) as parts:
        for chunk in next(parts).chunks:
            if not came:
                time.sleep(0.6)
            came += chunk
    assert came == image


def test_an_answer_without_end_is_misanswered(
    scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport_module, "MAX_ANSWER_BYTES", 1_000_000)
    with pytest.raises(PacsMisanswered, match="no end"):
        pacs(scripted(endless).url).find("study", "1.1")


def test_a_body_larger_than_any_buffer_arrives_whole(scripted: Callable[..., Scripted]) -> None:
    server = scripted(stored("1.3"))
    (outcome,) = pacs(server.url).store([part(bytes(range(256)) * 40_000)])
    assert outcome.fate is Fate.STORED
    assert bytes(range(256)) * 40_000 in server.asked[0].body


def retrieved(ward: Pacs) -> list[bytes]:
    with ward.retrieve(Found("study", "1.1")) as parts:
        return [b"".join(one.chunks) for one in parts]


@pytest.mark.parametrize(
    "reply",
    [
        http(200, b"--BB\r\nContent-Type: application/dicom\r\n\r\nDICM\r\n--BB\r\n", MULTIPART),
        http(200, b"--BB\r\nContent-Type: application/dicom\r\n\r\nDI", MULTIPART),
        http(206, b"--BB--\r\n", MULTIPART),
        http(200, b"<html>", "Content-Type: text/html"),
        cut_off,
    ],
)
def test_a_retrieval_that_is_not_whole_is_misanswered(scripted: Callable[..., Scripted], reply: Reply) -> None:
    with pytest.raises(PacsMisanswered):
        retrieved(pacs(scripted(reply).url))


@pytest.mark.parametrize("reply", [drop, hang, cut_off, http(404, b"no"), http(401), http(503), http(302)])
def test_a_failure_gives_its_connection_back(scripted: Callable[..., Scripted], reply: Reply) -> None:
    ward = pacs(scripted(reply, EMPTY).url, max_concurrency=1, read_timeout_s=0.3)
    with pytest.raises(CourierError):
        ward.find("study", "1.1")
    assert ward.find("study", "1.1") == []


def test_a_retrieval_left_early_does_not_spoil_the_next_call(scripted: Callable[..., Scripted]) -> None:
    body = b"--BB\r\nContent-Type: application/dicom\r\n\r\n" + b"x" * 3_000_000 + b"\r\n--BB--\r\n"
    ward = pacs(scripted(http(200, body, MULTIPART), EMPTY).url, max_concurrency=1)
    with ward.retrieve(Found("study", "1.1")) as parts:
        next(parts)
    assert ward.find("study", "1.1") == []


# Logging in


def bearer(folder: Path) -> AuthSettings:
    (folder / "token").write_text(SECRET + "\n", encoding="utf-8")
    return AuthSettings(type="bearer", token_file=folder / "token")


def test_basic_credentials_are_sent(scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARD_PASSWORD", SECRET)
    server = scripted(EMPTY)
    auth = AuthSettings(type="basic", username="loader", password_env="WARD_PASSWORD")
    pacs(server.url, auth=auth).find("study", "1.1")
    assert server.asked[0].headers["authorization"] == "Basic bG9hZGVyOnN3b3JkZmlzaA=="


@pytest.mark.parametrize(
    ("username", "password", "sent"),
    [
        ("loader", "Grüße:ß€", "loader:Grüße:ß€"),
        ("Jürgen", "x", "Jürgen:x"),
        ("u", "e\u0301", "u:\u00e9"),  # a letter and its accent apart, as macOS writes them (RFC 7617: NFC)
        ("загрузка", "密码 pass", "загрузка:密码 pass"),
    ],
)
def test_names_and_passwords_beyond_ascii_are_sent_in_utf_8(
    scripted: Callable[..., Scripted], tmp_path: Path, username: str, password: str, sent: str
) -> None:
    (tmp_path / "password").write_text(password + "\n", encoding="utf-8")
    server = scripted(EMPTY)
    auth = AuthSettings(type="basic", username=username, password_file=tmp_path / "password")
    pacs(server.url, auth=auth).find("study", "1.1")
    given = server.asked[0].headers["authorization"].removeprefix("Basic ")
    assert base64.b64decode(given).decode("utf-8") == sent


@pytest.mark.parametrize("password", ["two\nlines", "bell\x07", "\udcfc of a Latin-1 environment"])
def test_a_password_with_control_characters_or_of_no_utf_8_stops_the_start_and_is_not_quoted(
    monkeypatch: pytest.MonkeyPatch, password: str
) -> None:
    monkeypatch.setenv("WARD_PASSWORD", password)
    with pytest.raises(SettingsError, match="password of server ward") as error:
        pacs("http://127.0.0.1:1", auth=AuthSettings(type="basic", username="u", password_env="WARD_PASSWORD"))
    assert password not in str(error.value)


@pytest.mark.parametrize("username", ["of:a:tree", "two\nlines", "\udcfc"])
def test_a_user_name_with_a_colon_or_a_control_character_stops_the_start(username: str) -> None:
    with pytest.raises(ValueError, match="user name has no colon"):
        AuthSettings(type="basic", username=username, password_env="WARD_PASSWORD")


def test_a_missing_secret_stops_the_start_and_is_named() -> None:
    auth = AuthSettings(type="bearer", token_env="NO_SUCH_VARIABLE")
    with pytest.raises(SettingsError, match="NO_SUCH_VARIABLE"):
        pacs("http://127.0.0.1:1", auth=auth)


def test_a_rotated_token_file_is_read_again_after_a_401_and_the_body_is_built_again(
    scripted: Callable[..., Scripted], tmp_path: Path
) -> None:
    server = scripted(http(401), stored("1.3"))
    ward = pacs(server.url, auth=bearer(tmp_path))
    (tmp_path / "token").write_text("fresh", encoding="utf-8")
    assert [outcome.fate for outcome in ward.store([part()])] == [Fate.STORED]
    assert [asked.headers["authorization"] for asked in server.asked] == [f"Bearer {SECRET}", "Bearer fresh"]
    assert server.asked[0].body == server.asked[1].body


def test_a_token_file_that_is_gone_stops_the_start_and_later_leaves_the_old_token(
    scripted: Callable[..., Scripted], tmp_path: Path
) -> None:
    server = scripted(http(401))
    auth = bearer(tmp_path)
    ward = pacs(server.url, auth=auth)
    (tmp_path / "token").unlink()
    with pytest.raises(PacsUnauthorized):
        ward.find("study", "1.1")
    with pytest.raises(SettingsError, match="token_file of server ward"):
        pacs(server.url, auth=auth)


def test_a_token_that_no_header_can_carry_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARD_TOKEN", "two\nlines")
    with pytest.raises(SettingsError) as error:
        pacs("http://127.0.0.1:1", auth=AuthSettings(type="bearer", token_env="WARD_TOKEN"))
    assert "lines" not in str(error.value)


def everything_said(error: CourierError) -> str:
    return "".join(traceback.format_exception(error)) + json.dumps(error.payload)


@pytest.mark.parametrize("status", [401, 403])
def test_a_login_that_stays_refused_needs_a_person_and_names_no_secret(
    scripted: Callable[..., Scripted], tmp_path: Path, status: int
) -> None:
    server = scripted(http(status))
    with pytest.raises(PacsUnauthorized) as error:
        pacs(server.url, auth=bearer(tmp_path)).find("study", "1.1")
    assert SECRET not in everything_said(error.value)
    assert len(server.asked) == 1


def token(value: str, *, expires_in: int | None = 300) -> bytes:
    document: dict[str, Any] = {"access_token": value, "token_type": "Bearer"}
    if expires_in is not None:
        document["expires_in"] = expires_in
    return http(200, json.dumps(document).encode(), "Content-Type: application/json")


@pytest.fixture
def oauth2(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], AuthSettings]:
    monkeypatch.setenv("WARD_SECRET", SECRET)

    def settings(url: str) -> AuthSettings:
        return AuthSettings(
            type="oauth2",
            token_url=f"{url}/token",
            client_id="courier",
            client_secret_env="WARD_SECRET",
            scope="dicom",
        )

    return settings


def bearers(server: Scripted) -> list[str]:
    return [asked.headers["authorization"].removeprefix("Bearer ") for asked in server.asked]


def test_a_token_is_fetched_once_for_many_calls_and_threads(scripted: Callable[..., Scripted], oauth2: OAuth2) -> None:
    tokens, server = scripted(token("t1")), scripted(EMPTY)
    ward = pacs(server.url, auth=oauth2(tokens.url))
    threads = [threading.Thread(target=ward.find, args=["study", "1.1"]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert bearers(server) == ["t1"] * 8
    assert len(tokens.asked) == 1
    assert b"grant_type=client_credentials" in tokens.asked[0].body
    assert b"scope=dicom" in tokens.asked[0].body


def test_a_token_is_fetched_again_before_it_expires(scripted: Callable[..., Scripted], oauth2: OAuth2) -> None:
    from worker.pacs.oauth2 import ClientCredentials  # noqa: PLC0415  # only these tests pay for loading it

    now = [1000.0]
    tokens = scripted(token("t1"), token("t2", expires_in=30), token("t3", expires_in=None), token("t4"))
    server = ServerSettings(name="ward", type="dicomweb", url=tokens.url, auth=oauth2(tokens.url))
    credentials = ClientCredentials(server, SECRET, clock=lambda: now[0])
    given = []
    for now[0] in (1000.0, 1239.0, 1241.0, 1259.0, 1262.0, 999_999.0):
        given.append(credentials.authorization().removeprefix("Bearer "))
    assert given == ["t1", "t1", "t2", "t2", "t3", "t3"]


def test_a_401_fetches_one_fresh_token_and_a_second_401_is_final(
    scripted: Callable[..., Scripted], oauth2: OAuth2
) -> None:
    tokens = scripted(token("t1"), token("t2"), token("t3"))
    server = scripted(http(401), EMPTY, http(401))
    ward = pacs(server.url, auth=oauth2(tokens.url))
    assert ward.find("study", "1.1") == []
    with pytest.raises(PacsUnauthorized):
        ward.find("study", "1.1")
    assert bearers(server) == ["t1", "t2", "t2", "t3"]


def test_a_token_that_cannot_be_renewed_gives_the_connection_back(
    scripted: Callable[..., Scripted], oauth2: OAuth2
) -> None:
    server, tokens = scripted(http(401), EMPTY), scripted(token("t1"), http(503), token("t2"))
    ward = pacs(server.url, auth=oauth2(tokens.url), max_concurrency=1, read_timeout_s=1)
    with pytest.raises(PacsUnavailable):
        ward.find("study", "1.1")
    assert ward.find("study", "1.1") == []


@pytest.mark.parametrize("reply", [drop, http(503), http(500, b"<html>"), http(429)])
def test_a_token_endpoint_in_trouble_is_a_server_that_does_not_answer(
    scripted: Callable[..., Scripted], oauth2: OAuth2, reply: Reply
) -> None:
    server = scripted(EMPTY)
    with pytest.raises(PacsUnavailable) as error:
        pacs(server.url, auth=oauth2(scripted(reply).url)).find("study", "1.1")
    assert error.value.server_name == "ward"
    assert server.asked == []


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (http(401, b'{"error": "invalid_client", "error_description": "swordfish"}'), PacsUnauthorized),
        (http(400, b'{"error": "invalid_scope"}'), PacsUnauthorized),
        (http(403, b"swordfish"), PacsUnauthorized),
        (http(200, b"<html>swordfish</html>"), PacsMisanswered),
        (http(404, b"swordfish"), PacsMisanswered),
        (http(302, b"", "Location: http://127.0.0.1:1/?secret=swordfish"), PacsMisanswered),
    ],
)
def test_a_token_that_is_refused_is_told_without_the_endpoints_words(
    scripted: Callable[..., Scripted], oauth2: OAuth2, reply: Reply, kind: type[CourierError]
) -> None:
    with pytest.raises(kind) as error:
        pacs(scripted(EMPTY).url, auth=oauth2(scripted(reply).url)).find("study", "1.1")
    assert SECRET not in everything_said(error.value)


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ward")])
    now = datetime.datetime.now(tz=datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "ward.pem"
    pem = serialization.Encoding.PEM
    pkcs8, bare = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(pem, pkcs8, bare) + signed.public_bytes(pem))
    return path


def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_a_certificate_is_checked_against_the_file_in_the_settings(
    scripted: Callable[..., Scripted], certificate: Path
) -> None:
    server = scripted(EMPTY, tls=tls(certificate))
    assert pacs(server.url, ca_file=certificate).find("study", "1.1") == []


def test_a_token_endpoint_is_checked_against_it_too(
    scripted: Callable[..., Scripted], certificate: Path, oauth2: OAuth2
) -> None:
    tokens = scripted(token("t1"), tls=tls(certificate))
    server = scripted(EMPTY)
    assert pacs(server.url, ca_file=certificate, auth=oauth2(tokens.url)).find("study", "1.1") == []
    with pytest.raises(PacsUnavailable, match="token endpoint"):
        pacs(server.url, auth=oauth2(tokens.url)).find("study", "1.1")


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_an_authority_that_cannot_be_read_stops_the_start(tmp_path: Path, content: bytes | None) -> None:
    ca_file = tmp_path / "ca.pem"
    if content is not None:
        ca_file.write_bytes(content)
    with pytest.raises(SettingsError, match="ca_file of server ward"):
        pacs("https://127.0.0.1:1", ca_file=ca_file)


def test_a_certificate_that_nobody_vouches_for_is_not_accepted(
    scripted: Callable[..., Scripted], certificate: Path
) -> None:
    server = scripted(EMPTY, tls=tls(certificate))
    with pytest.raises(PacsUnavailable, match="certificate"):
        pacs(server.url).find("study", "1.1")
    assert server.asked == []
