"""The sandbox's token endpoints and what a request without a good token is answered, on the wire."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from requests_oauth2client import OAuth2Client, OAuth2ClientCredentialsAuth

from sandbox.processes import SandboxPart

SCOPE = "https://dicom.healthcareapis.azure.com/.default"
DIALECTS = ["msdicom", "dcm4chee"]


@pytest.fixture
def server(sandbox: SandboxPart) -> Iterator[SandboxPart]:
    yield sandbox
    requests.put(f"{sandbox.control}/clock", json={"ahead_s": 0}, timeout=10)


def endpoint(server: SandboxPart, dialect: str) -> str:
    """Entra-shaped for MSDICOM, Keycloak-shaped for DCM4CHEE."""
    if dialect == "msdicom":
        return f"{server.control}/entra/5f3c0a52-0000-4000-8000-000000000000/oauth2/v2.0/token"
    return f"{server.control}/keycloak/realms/dcm4che/protocol/openid-connect/token"


def ask(server: SandboxPart, dialect: str, client: str = "courier", **form: str) -> requests.Response:
    order = {"grant_type": "client_credentials", "client_id": client, "client_secret": f"{client}-secret"}
    if dialect == "msdicom":
        order["scope"] = SCOPE
    sent = {name: value for name, value in {**order, **form}.items() if value}
    return requests.post(endpoint(server, dialect), data=sent, timeout=10)


def token(server: SandboxPart, dialect: str, client: str = "courier") -> str:
    answer = ask(server, dialect, client)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["access_token"])


def search(server: SandboxPart, dialect: str, bearer: str | None = None) -> requests.Response:
    headers = {"Accept": "application/dicom+json"} | ({"Authorization": f"Bearer {bearer}"} if bearer else {})
    return requests.get(f"{getattr(server, dialect)}/studies", headers=headers, timeout=10)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_nothing_is_asked_of_a_client_unless_the_fault_is_bearer(server: SandboxPart, dialect: str) -> None:
    assert search(server, dialect).status_code in (200, 204)
    server.set_fault(dialect, "*", bearer=True)
    answer = search(server, dialect)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_token_of_the_endpoint_opens_the_server(server: SandboxPart, dialect: str) -> None:
    server.set_fault(dialect, "*", bearer=True)
    assert search(server, dialect, token(server, dialect)).status_code in (200, 204)
    assert search(server, dialect, "made-up").status_code == 401


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_token_says_how_long_it_lives_and_dies_then(server: SandboxPart, dialect: str) -> None:
    server.set_fault(dialect, "token", token_lifetime_s=20)
    server.set_fault(dialect, "query", bearer=True)
    answer = ask(server, dialect).json()
    assert (answer["token_type"], answer["expires_in"]) == ("Bearer", 20)
    requests.put(f"{server.control}/clock", json={"advance_s": 19}, timeout=10)
    assert search(server, dialect, answer["access_token"]).status_code in (200, 204)
    requests.put(f"{server.control}/clock", json={"advance_s": 1}, timeout=10)
    refused = search(server, dialect, answer["access_token"])
    assert refused.status_code == 401
    assert "expired" in refused.headers["WWW-Authenticate"]
    assert search(server, dialect, token(server, dialect)).status_code in (200, 204)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("form", "status", "error"),
    [
        ({"client_id": "nobody"}, 401, "invalid_client"),
        ({"client_secret": "wrong"}, 401, "invalid_client"),
        ({"client_secret": ""}, 401, "invalid_client"),
        ({"grant_type": "password"}, 400, "unsupported_grant_type"),
        ({"grant_type": ""}, 400, "invalid_request"),
    ],
    ids=["unknown client", "wrong secret", "no secret", "other grant", "no grant"],
)
def test_whoever_asks_wrongly_gets_no_token(
    server: SandboxPart, dialect: str, form: dict[str, str], status: int, error: str
) -> None:
    answer = ask(server, dialect, **form)
    assert (answer.status_code, answer.json()["error"]) == (status, error)
    assert "access_token" not in answer.json()


def test_entra_wants_a_default_scope(server: SandboxPart) -> None:
    answer = ask(server, "msdicom", scope="https://dicom.healthcareapis.azure.com/Dicom.Read")
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_scope")
    assert answer.json()["error_description"].startswith("AADSTS")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_client_may_name_itself_by_http_basic(server: SandboxPart, dialect: str) -> None:
    form = {"grant_type": "client_credentials", "scope": SCOPE}
    url = endpoint(server, dialect)
    assert requests.post(url, data=form, auth=("courier", "courier-secret"), timeout=10).status_code == 200
    assert requests.post(url, data=form, auth=("courier", "nonsense"), timeout=10).status_code == 401


def test_a_body_that_is_no_form_is_refused(server: SandboxPart) -> None:
    answer = requests.post(endpoint(server, "dcm4chee"), json={"grant_type": "client_credentials"}, timeout=10)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_401_until_a_new_token(server: SandboxPart, dialect: str) -> None:
    old = token(server, dialect)
    server.set_fault(dialect, "query", unauthorized=True)
    assert search(server, dialect, old).status_code == 401
    assert search(server, dialect, old).status_code == 401
    assert search(server, dialect, token(server, dialect)).status_code in (200, 204)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_token_endpoint_has_faults_of_its_own(server: SandboxPart, dialect: str) -> None:
    server.set_fault(dialect, "token", status=503, retry_after_s=7, times=1)
    answer = ask(server, dialect)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "7")
    assert ask(server, dialect).status_code == 200
    server.set_fault(dialect, "token", latency_ms=150, times=1)
    start = time.monotonic()
    assert ask(server, dialect).status_code == 200
    assert time.monotonic() - start >= 0.15


def test_an_independent_client_library_gets_and_uses_a_token(server: SandboxPart) -> None:
    server.set_fault("dcm4chee", "*", bearer=True)
    provider: Any = OAuth2Client(
        endpoint(server, "dcm4chee"),
        client_id="courier",
        client_secret="courier-secret",
        testing=True,
    )
    answer = requests.get(f"{server.dcm4chee}/studies", auth=OAuth2ClientCredentialsAuth(provider), timeout=10)
    assert answer.status_code == 204
