"""Client credentials against a real authorization server: Authlib's, over HTTP and TLS on loopback.

It stands for both forms that are met: Entra's (``…/oauth2/v2.0/token``, a scope that ends in ``/.default``) and
Keycloak's (``…/protocol/openid-connect/token``, no scope). Beside them it has a DICOMweb root that asks for a token.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import flask
import pytest
import trustme
from authlib.integrations.flask_oauth2 import AuthorizationServer, ResourceProtector, current_token
from authlib.oauth2.rfc6749 import ClientMixin, TokenMixin, grants
from authlib.oauth2.rfc6750 import BearerTokenValidator
from werkzeug.serving import BaseWSGIServer, make_server

from courier.errors import CourierError, PacsMisanswered, PacsUnauthorized, PacsUnavailable
from courier.settings import AuthSettings, ServerSettings, SettingsError
from worker.pacs.oauth2 import ClientCredentials
from worker.pacs.protocol import Pacs
from worker.pacs.registry import connect

SECRET = "swordfish-7c1"
PATHS = {
    "msdicom": "/5f3c0a52-0000-4000-8000-000000000000/oauth2/v2.0/token",
    "dcm4chee": "/realms/dcm4che/protocol/openid-connect/token",
}
SCOPES = {"msdicom": "https://dicom.healthcareapis.azure.com/.default", "dcm4chee": None}
DIALECTS = tuple(PATHS)


class OAuthClient(ClientMixin):
    def get_client_id(self) -> str:
        return "courier"

    def get_allowed_scope(self, scope: str) -> str:
        return scope if scope in ("", SCOPES["msdicom"]) else ""

    def check_client_secret(self, client_secret: str) -> bool:
        return client_secret == SECRET

    def check_endpoint_auth_method(self, method: str, endpoint: str) -> bool:
        return method in ("client_secret_post", "client_secret_basic")

    def check_grant_type(self, grant_type: str) -> bool:
        return grant_type == "client_credentials"


@dataclass
class OAuthToken(TokenMixin):
    access_token: str
    good_until_s: float

    def is_expired(self) -> bool:
        return time.monotonic() >= self.good_until_s

    def is_revoked(self) -> bool:
        return False

    def get_scope(self) -> str:
        return ""


@dataclass
class Provider:
    """``life_s`` is that of the next tokens; ``before`` runs before an answer."""

    life_s: float = 3600
    issued: dict[str, OAuthToken] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)
    before: Callable[[], Any] = lambda: None
    server: BaseWSGIServer | None = None
    scheme: str = "http"

    @property
    def url(self) -> str:
        assert self.server is not None
        return f"{self.scheme}://127.0.0.1:{self.server.server_port}"

    def app(self) -> flask.Flask:
        app = flask.Flask("provider")
        app.config["OAUTH2_TOKEN_EXPIRES_IN"] = {"client_credentials": 3600}
        server = AuthorizationServer(app, query_client=lambda client_id: OAuthClient(), save_token=self._save)

        class Grant(grants.ClientCredentialsGrant):
            TOKEN_ENDPOINT_AUTH_METHODS = ("client_secret_basic", "client_secret_post")

        server.register_grant(Grant)
        provider, protected = self, ResourceProtector()

        class Validator(BearerTokenValidator):
            def authenticate_token(self, token_string: str) -> OAuthToken | None:
                return provider.issued.get(token_string)

        protected.register_token_validator(Validator())

        def token() -> Any:
            self.before()
            return server.create_token_response()

        for dialect, path in PATHS.items():
            app.add_url_rule(path, dialect, token, methods=["POST"])

        @app.get("/dicom/studies")
        @protected()
        def studies() -> Any:
            self.used.append(current_token.access_token)
            return "[]", 200, {"Content-Type": "application/dicom+json"}

        return app

    def _save(self, token: dict[str, Any], _request: Any) -> None:
        token["expires_in"] = self.life_s
        self.issued[token["access_token"]] = OAuthToken(token["access_token"], time.monotonic() + self.life_s)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def serve(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Provider]]:
    monkeypatch.setenv("AUTHLIB_INSECURE_TRANSPORT", "1")
    running: list[BaseWSGIServer] = []

    def start(*, certificate: trustme.LeafCert | None = None) -> Provider:
        provider = Provider()
        context = None
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate.configure_cert(context)
            provider.scheme = "https"
        provider.server = make_server("127.0.0.1", 0, provider.app(), threaded=True, ssl_context=context)
        provider.server.daemon_threads = True
        threading.Thread(target=provider.server.serve_forever, args=(0.02,), daemon=True).start()
        running.append(provider.server)
        return provider

    for theirs in ("werkzeug", "authlib"):  # what the provider logs is no concern of ours
        logging.getLogger(theirs).setLevel(logging.ERROR)
    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def provider(serve: Callable[..., Provider]) -> Provider:
    return serve()


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARD_SECRET", SECRET)


def pacs(provider: Provider, dialect: str = "msdicom", **changes: Any) -> Pacs:
    return connect(ward_of(provider, dialect, **changes))


def ward_of(
    provider: Provider, dialect: str = "msdicom", *, token_url: str | None = None, **changes: Any
) -> ServerSettings:
    auth = {
        "type": "oauth2",
        "token_url": token_url or provider.url + PATHS[dialect],
        "client_id": "courier",
        "client_secret_env": "WARD_SECRET",
        "scope": SCOPES[dialect],
        **changes.pop("auth", {}),
    }
    server = {"name": "ward", "type": dialect, "url": f"{provider.url}/dicom", "auth": AuthSettings(**auth), **changes}
    return ServerSettings(**server)


def ask(ward: Pacs) -> None:
    assert ward.find("study", "1.1") == []


def everything_said(error: CourierError) -> str:
    return "".join(traceback.format_exception(error)) + str(error.payload)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_token_opens_the_server_and_serves_until_it_is_about_to_expire(provider: Provider, dialect: str) -> None:
    ward = pacs(provider, dialect)
    for _ in range(3):
        ask(ward)
    assert len(provider.issued) == 1
    assert provider.used == list(provider.issued) * 3


@pytest.mark.parametrize("dialect", DIALECTS)
def test_many_threads_ask_for_one_token_once(provider: Provider, dialect: str) -> None:
    provider.before = lambda: time.sleep(0.2)
    ward = pacs(provider, dialect)
    threads = [threading.Thread(target=ask, args=[ward]) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(provider.used) == 16
    assert len(provider.issued) == 1


def test_a_token_is_fetched_anew_before_it_expires(provider: Provider) -> None:
    now = [1000.0]
    credentials = ClientCredentials(ward_of(provider), SECRET, clock=lambda: now[0])
    given = []
    for now[0] in (1000.0, 1000.0 + 3600 - 61, 1000.0 + 3600 - 59):
        given.append(credentials.authorization().removeprefix("Bearer "))
    first, second = provider.issued
    assert given == [first, first, second]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_token_that_died_early_is_replaced_once_after_a_401(provider: Provider, dialect: str) -> None:
    ward = pacs(provider, dialect)
    ask(ward)
    provider.issued.clear()  # as after a restart of the provider
    ask(ward)
    assert len(provider.issued) == 1
    provider.life_s = 0  # from now on each is dead on arrival
    provider.issued.clear()
    with pytest.raises(PacsUnauthorized, match="ward answered 401"):
        ask(ward)
    assert len(provider.issued) == 1


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_wrong_secret_needs_a_person_and_the_sentence_says_what_to_check(
    provider: Provider, dialect: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WARD_SECRET", "wrong-secret-3e")
    caplog.set_level(logging.DEBUG)
    with pytest.raises(PacsUnauthorized) as error:
        ask(pacs(provider, dialect))
    assert error.value.code == "pacs_unauthorized"
    assert error.value.server_name == "ward"
    assert error.value.message == (
        "The token endpoint of ward gives no token (status 401, invalid_client): "
        "check client_id, client_secret and scope."
    )
    assert "wrong-secret-3e" not in everything_said(error.value) + caplog.text


def test_neither_secret_nor_token_is_logged_at_any_level(provider: Provider, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    ask(pacs(provider))
    assert SECRET not in caplog.text
    assert next(iter(provider.issued)) not in caplog.text


def test_an_endpoint_that_is_down_is_a_server_that_does_not_answer(provider: Provider) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(PacsUnavailable, match="token endpoint of ward did not answer") as error:
        ask(pacs(provider, token_url=f"http://127.0.0.1:{port}/oauth2/v2.0/token"))
    assert error.value.server_name == "ward"


@pytest.mark.parametrize(
    ("status", "headers", "after_s"),
    [(429, {"Retry-After": "7"}, 7), (429, {}, None), (503, {"Retry-After": "7"}, 7), (503, {}, None)],
)
def test_an_endpoint_that_asks_for_fewer_requests_slows_its_server_down(
    provider: Provider, status: int, headers: dict[str, str], after_s: float | None
) -> None:
    provider.before = lambda: flask.abort(flask.Response("", status, headers))
    with pytest.raises(PacsUnavailable) as error:
        ask(pacs(provider))
    assert error.value.slow_down is (status == 429 or after_s is not None)
    assert error.value.details == ({"status": status} if error.value.slow_down else {})
    if error.value.slow_down:
        assert error.value.retry_after_s == after_s


def test_a_good_token_outlives_a_short_trouble_of_its_endpoint(provider: Provider) -> None:
    now = [1000.0]
    credentials = ClientCredentials(ward_of(provider), SECRET, clock=lambda: now[0])
    first = credentials.authorization()
    asked = []

    def trouble() -> None:
        asked.append(now[0])
        flask.abort(503)

    provider.before = trouble
    for now[0] in (4541.0, 4542.0, 4599.0):
        assert credentials.authorization() == first
    assert asked == [4541.0, 4599.0], "not for every call"
    now[0] = 4601.0
    with pytest.raises(PacsUnavailable, match="in trouble"):
        credentials.authorization()


def drip(connection: socket.socket, ending: threading.Event) -> None:
    while not ending.wait(0.05):
        connection.sendall(b"H")


def hang(_: socket.socket, ending: threading.Event) -> None:
    ending.wait()


def drip_body(connection: socket.socket, ending: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
    drip(connection, ending)


def endless(connection: socket.socket, ending: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{")
    while not ending.is_set():
        connection.sendall(b" " * 65536)


@pytest.fixture
def listener() -> Iterator[Callable[[Callable[..., None]], str]]:
    """Listens, reads a request and misbehaves; gives a token URL."""
    ending, sockets = threading.Event(), []

    def start(misbehave: Callable[..., None]) -> str:
        listening = socket.create_server(("127.0.0.1", 0))
        sockets.append(listening)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    threading.Thread(target=serve_one, args=[connection], daemon=True).start()

        def serve_one(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                misbehave(connection, ending)

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{listening.getsockname()[1]}/oauth2/v2.0/token"

    yield start
    ending.set()
    for one in sockets:
        one.shutdown(socket.SHUT_RDWR)
        one.close()


@pytest.mark.parametrize("misbehave", [hang, drip, drip_body, endless])
def test_an_endpoint_that_hangs_drips_or_never_ends_costs_all_threads_one_time_out(
    provider: Provider, misbehave: Callable[..., None], listener: Callable[[Callable[..., None]], str]
) -> None:
    ward = ward_of(provider, token_url=listener(misbehave))
    credentials = ClientCredentials(ward, SECRET, timeout_s=1)
    errors: list[CourierError] = []

    def one() -> None:
        try:
            credentials.authorization()
        except CourierError as error:
            errors.append(error)

    begun_s = time.monotonic()
    threads = [threading.Thread(target=one) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    took_s = time.monotonic() - begun_s
    kind = PacsMisanswered if misbehave is endless else PacsUnavailable
    assert [type(error) for error in errors] == [kind] * 20
    assert took_s < 15, "twenty time-outs are twenty seconds"


# TLS


def leaf(authority: trustme.CA, name: str = "127.0.0.1") -> trustme.LeafCert:
    return authority.issue_cert(name)


def test_an_authority_of_ones_own_vouches_for_server_and_token_endpoint(
    serve: Callable[..., Provider], authority: trustme.CA, tmp_path: Any
) -> None:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    provider = serve(certificate=leaf(authority))
    ask(pacs(provider, ca_file=tmp_path / "ca.pem"))
    assert len(provider.issued) == 1


@pytest.mark.parametrize(
    ("name", "trusted", "words"),
    [
        ("127.0.0.1", False, "its TLS certificate is not trusted .*; name its authority in ca_file"),
        ("other.example.org", True, "its TLS certificate is not trusted .*mismatch"),
    ],
)
def test_a_certificate_that_is_not_trusted_is_told_apart_for_server_and_endpoint(
    serve: Callable[..., Provider], authority: trustme.CA, tmp_path: Any, name: str, trusted: bool, words: str
) -> None:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    good, bad = serve(), serve(certificate=leaf(authority, name))
    trust = {"ca_file": tmp_path / "ca.pem"} if trusted else {}
    with pytest.raises(PacsUnavailable, match=f"token endpoint of ward did not answer: {words}"):
        ask(pacs(good, token_url=bad.url + PATHS["msdicom"], **trust))
    with pytest.raises(PacsUnavailable, match=f"ward did not answer: {words}"):
        ask(pacs(bad, token_url=good.url + PATHS["msdicom"], **trust))
    assert bad.issued == {}


# Settings


def test_a_secret_file_that_is_missing_or_no_text_stops_the_start(provider: Provider, tmp_path: Any) -> None:
    file = tmp_path / "secret"
    auth = {"client_secret_env": None, "client_secret_file": file}
    with pytest.raises(SettingsError, match="client_secret_file of server ward cannot be read"):
        pacs(provider, auth=auth)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="client_secret_file of server ward is no text"):
        pacs(provider, auth=auth)
    file.write_text(SECRET + "\n")
    ask(pacs(provider, auth=auth))


@pytest.mark.parametrize("url", ["ftp://host/token", "login.example.org/token", "https://me:secret@host/token"])
def test_a_token_url_that_is_none_stops_the_start(provider: Provider, url: str) -> None:
    with pytest.raises(ValueError, match="token_url"):
        pacs(provider, token_url=url)
