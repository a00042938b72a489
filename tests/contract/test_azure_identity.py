"""``auth = { type = "azure_identity" }`` against token endpoints on loopback.

They stand for Azure's metadata service (a virtual machine), an App Service's endpoint, and Entra, where a pod trades
the token that its cluster gave it (workload identity). Beside them stands a DICOMweb root that asks for a token.
"""

from __future__ import annotations

import json
import logging
import ssl
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import trustme

from courier.errors import CourierError, PacsMisanswered, PacsUnauthorized, PacsUnavailable
from courier.settings import AuthSettings, ServerSettings, SettingsError
from worker.pacs.azure_identity import AzureIdentity
from worker.pacs.protocol import Pacs
from worker.pacs.registry import connect

RESOURCE = "https://dicom.healthcareapis.azure.com"
SCOPE = f"{RESOURCE}/.default"
TENANT = "5f3c0a52-0000-4000-8000-000000000000"
HEADER = "swordfish-header"
POD_TOKEN = "swordfish-pod"
VARIABLES = ("AZURE_AUTHORITY_HOST", "AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_FEDERATED_TOKEN_FILE")
VARIABLES += ("IDENTITY_ENDPOINT", "IDENTITY_HEADER", "MSI_ENDPOINT", "AZURE_POD_IDENTITY_AUTHORITY_HOST")


class Endpoint(ThreadingHTTPServer):
    """Gives tokens ``t1``, ``t2`` …, each good for ``life_s``, and serves an empty DICOMweb root that takes them.

    ``answer`` is what it says instead: a status and a body. ``before`` runs before a token is given.
    """

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _IdentityHandler)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.scheme = "https" if context else "http"
        self.life_s = 3600
        self.answer: tuple[int, bytes] | None = None
        self.before: Callable[[], object] = lambda: None
        self.asked: list[dict[str, Any]] = []
        self.used: list[str] = []
        self.refused: set[str] = set()
        self.same = False

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}"

    def token(self, asked: dict[str, Any]) -> tuple[int, bytes]:
        self.asked.append(asked)
        number = 1 if self.same else len(self.asked)
        self.before()
        if self.answer is not None:
            return self.answer
        document = {
            "access_token": f"swordfish-t{number}",
            "expires_in": str(self.life_s),
            "expires_on": str(int(time.time()) + self.life_s),
            "resource": RESOURCE,
            "token_type": "Bearer",
        }
        return 200, json.dumps(document).encode()


class _IdentityHandler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if url.path.startswith("/dicom/"):
            return self._say(*self._studies())
        asked = {key: value[0] for key, value in (parse_qs(url.query) | parse_qs(body.decode())).items()}
        heads = {key.lower(): value for key, value in self.headers.items()}
        return self._say(*self.server.token({**asked, "path": url.path, "headers": heads}))

    do_POST = do_GET

    def _studies(self) -> tuple[int, bytes]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.server.used.append(token.removeprefix("swordfish-"))
        return (401, b"") if not token or token in self.server.refused else (200, b"[]")

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def start(authority: trustme.CA) -> Iterator[Callable[..., Endpoint]]:
    running: list[Endpoint] = []

    def begin(*, tls: bool = False) -> Endpoint:
        context = None
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            authority.issue_cert("127.0.0.1").configure_cert(context)
        running.append(Endpoint(context))
        threading.Thread(target=running[-1].serve_forever, args=(0.02,), daemon=True).start()
        return running[-1]

    yield begin
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(start: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    """A virtual machine's metadata service."""
    endpoint = start()
    monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", endpoint.url)
    return endpoint


@pytest.fixture
def pod(
    start: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, authority: trustme.CA
) -> Endpoint:
    """Entra, and a pod with a workload identity."""
    endpoint = start(tls=True)
    (tmp_path / "token").write_text(POD_TOKEN, encoding="utf-8")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name, value in zip(VARIABLES, (endpoint.url, TENANT, "of-the-pod", str(tmp_path / "token")), strict=False):
        monkeypatch.setenv(name, value)
    return endpoint


def settings(endpoint: Endpoint, **changes: Any) -> ServerSettings:
    auth = AuthSettings(type="azure_identity", scope=SCOPE, **changes.pop("auth", {}))
    return ServerSettings(
        **{"name": "ward", "type": "msdicom", "url": f"{endpoint.url}/dicom", "auth": auth, **changes}
    )


def ward_of(endpoint: Endpoint, **changes: Any) -> Pacs:
    return connect(settings(endpoint, **changes))


def ask(ward: Pacs) -> None:
    assert ward.find("study", "1.1") == []


def everything_said(error: CourierError) -> str:
    return "".join(traceback.format_exception(error)) + str(error.payload)


def test_a_machines_identity_opens_the_server_and_its_token_serves_until_it_is_about_to_expire(
    machine: Endpoint,
) -> None:
    ward = ward_of(machine)
    for _ in range(3):
        ask(ward)
    (asked,) = machine.asked
    assert (asked["path"], asked["resource"]) == ("/metadata/identity/oauth2/token", RESOURCE)
    assert asked["headers"]["metadata"] == "true"
    assert "client_id" not in asked
    assert machine.used == ["t1"] * 3


def test_client_id_names_one_of_several_identities(machine: Endpoint) -> None:
    ask(ward_of(machine, auth={"client_id": "of-courier"}))
    assert machine.asked[0]["client_id"] == "of-courier"


def test_an_app_services_identity_is_asked_for_at_its_own_endpoint(
    start: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = start()
    monkeypatch.setenv("IDENTITY_ENDPOINT", f"{endpoint.url}/msi/token")
    monkeypatch.setenv("IDENTITY_HEADER", HEADER)
    ask(ward_of(endpoint))
    (asked,) = endpoint.asked
    assert (asked["path"], asked["headers"]["x-identity-header"]) == ("/msi/token", HEADER)


def test_a_pod_trades_its_token_at_entra_whose_authority_ca_file_names(pod: Endpoint, tmp_path: Path) -> None:
    ward = ward_of(pod, ca_file=tmp_path / "ca.pem")
    ask(ward)
    (asked,) = pod.asked
    assert asked["path"] == f"/{TENANT}/oauth2/v2.0/token"
    assert (asked["client_id"], asked["client_assertion"], asked["scope"]) == ("of-the-pod", POD_TOKEN, SCOPE)
    assert "client_secret" not in asked


def test_a_pods_token_that_its_cluster_has_renewed_is_the_one_that_is_traded_next(
    pod: Endpoint, tmp_path: Path
) -> None:
    pod.refused.add("swordfish-t1")
    ward = ward_of(pod, ca_file=tmp_path / "ca.pem", auth={"client_id": "named"})
    ward_before = len(pod.asked)
    pod.before = lambda: (tmp_path / "token").write_text("swordfish-renewed", encoding="utf-8")
    ask(ward)
    assert [asked["client_assertion"] for asked in pod.asked[ward_before:]] == [POD_TOKEN, "swordfish-renewed"]
    assert {asked["client_id"] for asked in pod.asked} == {"named"}


def test_many_threads_ask_for_one_token_once(machine: Endpoint) -> None:
    machine.before = lambda: time.sleep(0.2)
    ward = ward_of(machine, max_concurrency=16)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: ask(ward), range(32)))
    assert len(machine.asked) == 1
    assert machine.used == ["t1"] * 32


def test_a_token_is_fetched_anew_before_it_expires(machine: Endpoint) -> None:
    now = [1000.0]
    credentials = AzureIdentity(settings(machine), clock=lambda: now[0])
    given = []
    for now[0] in (1000.0, 4500.0, 4545.0, 8050.0, 8100.0):
        given.append(credentials.authorization().removeprefix("Bearer swordfish-"))
    assert given == ["t1", "t1", "t2", "t2", "t3"]


def test_a_401_fetches_one_fresh_token_for_all_threads_and_a_second_401_is_final(machine: Endpoint) -> None:
    machine.refused.add("swordfish-t1")
    ward = ward_of(machine, max_concurrency=8)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ask(ward), range(8)))
    assert len(machine.asked) == 2
    machine.refused |= {"swordfish-t2", "swordfish-t3"}
    with pytest.raises(PacsUnauthorized):
        ask(ward)
    assert machine.used[-2:] == ["t2", "t3"]


def test_the_same_token_after_a_401_is_not_sent_a_second_time(machine: Endpoint) -> None:
    """The metadata service keeps tokens itself."""
    machine.same = True
    machine.refused.add("swordfish-t1")
    with pytest.raises(PacsUnauthorized):
        ask(ward_of(machine))
    assert machine.used == ["t1"]


def _given(token: str) -> bytes:
    return json.dumps({"access_token": token, "expires_in": 3600, "expires_on": "4102444800"}).encode()


@pytest.mark.parametrize("kind", ["machine", "pod"])
@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ((400, b'{"error": "invalid_request", "error_description": "swordfish"}'), PacsUnauthorized, "invalid_request"),
        ((401, b'{"error": "swordfish"}'), PacsUnauthorized, "status 401"),
        ((403, b"swordfish"), PacsUnauthorized, "status 403"),
        ((404, b"swordfish"), PacsUnavailable, "in trouble"),
        ((429, b'{"error": "swordfish"}'), PacsUnavailable, "in trouble"),
        ((500, b"swordfish"), PacsUnavailable, "in trouble"),
        ((200, b"swordfish"), PacsMisanswered, "holds no token"),
        ((200, b'["swordfish"]'), PacsMisanswered, "holds no token"),
        ((200, b'{"access_token": "swordfish"}'), PacsMisanswered, "holds no token"),
        ((200, b'{"access_token": "swordfish", "expires_in": "soon"}'), PacsMisanswered, "holds no token"),
        ((200, b""), PacsMisanswered, "holds no token"),
        ((200, _given("swordfish\r\nX: 1")), PacsMisanswered, "no header can carry"),
        ((200, _given("swordfish\u20ac")), PacsMisanswered, "no header can carry"),
        ((302, b"swordfish"), PacsMisanswered, "holds no token"),
    ],
)
def test_what_an_endpoint_says_instead_of_a_token_decides_and_is_not_quoted(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    kind: str,
    answer: tuple[int, bytes],
    error: type[CourierError],
    words: str,
) -> None:
    endpoint: Endpoint = request.getfixturevalue(kind)
    endpoint.answer = answer
    ward = ward_of(endpoint, ca_file=tmp_path / "ca.pem" if kind == "pod" else None)
    with pytest.raises(error, match=words) as raised:
        ask(ward)
    assert type(raised.value) is error
    assert raised.value.message.startswith("The token endpoint of ward")
    assert "swordfish" not in everything_said(raised.value)
    assert endpoint.used == []
    assert len(endpoint.asked) == 1  # nothing but the job tries again


def test_an_endpoint_that_is_down_is_a_server_that_does_not_answer(machine: Endpoint) -> None:
    ward = ward_of(machine)
    machine.shutdown()
    machine.server_close()
    begun = time.monotonic()
    with pytest.raises(PacsUnavailable, match="did not answer"):
        ask(ward)
    assert time.monotonic() - begun < 5


def test_a_hanging_endpoint_costs_all_threads_one_time_out(machine: Endpoint) -> None:
    gate = threading.Event()
    machine.before = lambda: gate.wait(20)
    credentials = AzureIdentity(settings(machine), timeout_s=1)
    begun = time.monotonic()

    def attempt(_: int) -> type[BaseException]:
        with pytest.raises(CourierError) as error:
            credentials.authorization()
        return error.type

    try:
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(attempt, range(8))) == {PacsUnavailable}
    finally:
        gate.set()
    assert time.monotonic() - begun < 3


def test_a_good_token_outlives_a_short_trouble_of_its_endpoint(machine: Endpoint) -> None:
    now = [1000.0]
    credentials = AzureIdentity(settings(machine), clock=lambda: now[0])
    given = [credentials.authorization()]
    machine.answer = (503, b"")
    now[0] = 4560.0
    given.append(credentials.authorization())
    now[0] = 4700.0
    with pytest.raises(PacsUnavailable):
        credentials.authorization()
    assert given == ["Bearer swordfish-t1"] * 2


def test_an_authority_that_is_not_trusted_is_named_and_gets_no_pods_token(pod: Endpoint) -> None:
    with pytest.raises(PacsUnavailable, match=r"certificate is not trusted.*ca_file"):
        ask(ward_of(pod))
    assert pod.asked == []


def test_a_pods_token_that_cannot_be_read_needs_a_person(pod: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "token").unlink()
    with pytest.raises(PacsUnauthorized, match="AZURE_FEDERATED_TOKEN_FILE"):
        ask(ward_of(pod, ca_file=tmp_path / "ca.pem"))


@pytest.mark.parametrize("spoil", [("AZURE_CLIENT_ID", ""), ("AZURE_AUTHORITY_HOST", "http://127.0.0.1:1")])
def test_variables_that_make_no_workload_identity_need_a_person(
    pod: Endpoint, monkeypatch: pytest.MonkeyPatch, spoil: tuple[str, str]
) -> None:
    monkeypatch.setenv(*spoil)
    with pytest.raises(PacsUnauthorized, match="AZURE_ variables"):
        ask(ward_of(pod))
    assert pod.asked == []


def test_the_environments_proxy_never_sees_a_token(machine: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    ask(ward_of(machine))


@pytest.mark.parametrize("kind", ["machine", "pod"])
def test_neither_token_nor_answer_is_logged_at_any_level(
    request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    endpoint: Endpoint = request.getfixturevalue(kind)
    ward = ward_of(endpoint, ca_file=tmp_path / "ca.pem" if kind == "pod" else None)
    with caplog.at_level(logging.DEBUG):
        ask(ward)
        endpoint.answer = (400, b'{"error": "invalid_client", "error_description": "swordfish"}')
        endpoint.refused.add("swordfish-t1")
        with pytest.raises(PacsUnauthorized):
            ask(ward)
    assert "swordfish" not in caplog.text


@pytest.mark.parametrize("scope", [None, "", "dicom", "https://a/.default https://b/.default", "/.default"])
def test_a_scope_that_is_none_stops_the_start(scope: str | None) -> None:
    with pytest.raises(ValueError, match="scope"):
        AuthSettings(type="azure_identity", scope=scope)


def test_no_other_server_pays_for_loading_the_sdk() -> None:
    """As far as it is not loaded by these tests themselves: a process of its own looks."""
    import subprocess  # noqa: PLC0415

    show = (
        "import sys; from worker.pacs.registry import connect; from courier.settings import ServerSettings;"
        "connect(ServerSettings(name='w', type='msdicom', url='http://127.0.0.1:1'));"
        "print('azure.identity' in sys.modules, 'msal' in sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", show], check=True, capture_output=True, text=True).stdout
    assert loaded.split() == ["False", "False"]


def test_settings_errors_are_of_the_start(machine: Endpoint) -> None:
    with pytest.raises(SettingsError):
        connect(settings(machine, ca_file=Path("/nowhere/ca.pem")))
    assert machine.asked == []
