"""The sandbox's own identity provider: access tokens for client credentials, Entra-shaped and Keycloak-shaped.

Who gets a token, how long it lives, whether a request's token is good. Whether a dialect asks for tokens at all is a
fault (``bearer``), and refusing the request is done where requests arrive. Tokens are opaque, kept in memory and gone
with the process, as they would be after a restart of a provider that changes its keys.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from dataclasses import dataclass
from enum import Enum
from urllib.parse import unquote_plus

from aiohttp import web

from sandbox.faults import Clock

LIFETIME_S = 300.0
ENTRA_SCOPE = "https://dicom.healthcareapis.azure.com/.default"


@dataclass(frozen=True)
class Client:
    """One registered client. ``roles`` are what DCM4CHEE's `realm_access` would hold."""

    client_id: str
    client_secret: str
    roles: frozenset[str]


#: Fixed and public: they open nothing but a sandbox on loopback. ``visitor`` authenticates but may do nothing.
CLIENTS = {
    client.client_id: client
    for client in (
        Client("courier", "courier-secret", frozenset({"auth", "user"})),
        Client("visitor", "visitor-secret", frozenset()),
    )
}


class Standing(Enum):
    """What a request's Authorization header is worth."""

    GOOD = "good"
    MISSING = "missing"
    INVALID = "invalid"
    EXPIRED = "expired"
    NO_ROLE = "no_role"


@dataclass(frozen=True)
class _Issued:
    client: Client
    issued_at_s: float
    expires_at_s: float


class Tokens:
    """Every token issued so far. One for the whole sandbox, so a token of either endpoint opens either dialect."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._issued: dict[str, _Issued] = {}

    def issue(self, client: Client, lifetime_s: float = LIFETIME_S) -> str:
        now_s = self._clock.now_s()
        self._issued = {token: kept for token, kept in self._issued.items() if kept.expires_at_s > now_s - 3600}
        token = secrets.token_urlsafe(32)
        self._issued[token] = _Issued(client, now_s, now_s + lifetime_s)
        return token

    def standing(self, authorization: str | None) -> Standing:
        """Judge an Authorization header."""
        if not authorization:
            return Standing.MISSING
        issued = self._find(authorization)
        if issued is None:
            return Standing.INVALID
        if issued.expires_at_s <= self._clock.now_s():
            return Standing.EXPIRED
        return Standing.GOOD if "user" in issued.client.roles else Standing.NO_ROLE

    def issued_at_s(self, authorization: str | None) -> float | None:
        """When the token of this header was issued; None for a header that is none of ours."""
        issued = self._find(authorization or "")
        return None if issued is None else issued.issued_at_s

    def _find(self, authorization: str) -> _Issued | None:
        scheme, _, token = authorization.partition(" ")
        return self._issued.get(token.strip()) if scheme.lower() == "bearer" else None


def refusal(dialect: str, standing: Standing) -> web.Response | None:
    """The answer to a request that may not pass; None when it may.

    MSDICOM knows no roles of ours: whoever has a token may pass. DCM4CHEE answers a role that is missing with 403 and
    no body.
    """
    if standing is Standing.GOOD or (standing is Standing.NO_ROLE and dialect == "msdicom"):
        return None
    if standing is Standing.NO_ROLE:
        return web.Response(status=403)
    challenge = "Bearer"
    if standing is not Standing.MISSING:
        why = "The token expired" if standing is Standing.EXPIRED else "The token is unknown"
        challenge = f'Bearer error="invalid_token", error_description="{why}"'
    return web.Response(status=401, headers={"WWW-Authenticate": challenge})


async def entra(request: web.Request, tokens: Tokens, lifetime_s: float = LIFETIME_S) -> web.Response:
    """``POST /{tenant}/oauth2/v2.0/token`` (RFC 6749 4.4; errors with Entra's AADSTS codes in their description)."""
    form = await _form(request)
    if isinstance(form, web.Response):
        return form
    if not form.get("scope", "").endswith("/.default"):
        return _error(
            400,
            "invalid_scope",
            f"AADSTS1002012: a client's scope has to end with /.default, such as {ENTRA_SCOPE}.",
        )
    client = _authenticate(request, form)
    if client is None:
        return _error(401, "invalid_client", "AADSTS7000215: Invalid client secret provided, or unknown client.")
    token = tokens.issue(client, lifetime_s)
    answer = {"token_type": "Bearer", "expires_in": _whole(lifetime_s), "ext_expires_in": _whole(lifetime_s)}
    return _granted({**answer, "access_token": token})


async def keycloak(request: web.Request, tokens: Tokens, lifetime_s: float = LIFETIME_S) -> web.Response:
    """``POST /realms/{realm}/protocol/openid-connect/token`` (RFC 6749 4.4)."""
    form = await _form(request)
    if isinstance(form, web.Response):
        return form
    client = _authenticate(request, form)
    if client is None:
        return _error(401, "invalid_client", "Invalid client or Invalid client credentials")
    token = tokens.issue(client, lifetime_s)
    answer = {"expires_in": _whole(lifetime_s), "refresh_expires_in": 0, "token_type": "Bearer"}
    return _granted({"access_token": token, **answer, "not-before-policy": 0, "scope": "profile email"})


async def _form(request: web.Request) -> dict[str, str] | web.Response:
    if request.content_type != "application/x-www-form-urlencoded":
        return _error(400, "invalid_request", "The body has to be application/x-www-form-urlencoded.")
    form = {name: value for name, value in (await request.post()).items() if isinstance(value, str)}
    if "grant_type" not in form:
        return _error(400, "invalid_request", "Missing form parameter: grant_type")
    if form["grant_type"] != "client_credentials":
        return _error(400, "unsupported_grant_type", "Unsupported grant_type; this endpoint has client_credentials.")
    return form


def _authenticate(request: web.Request, form: dict[str, str]) -> Client | None:
    """The client, by HTTP Basic or by the form's client_id and client_secret."""
    client_id, secret = form.get("client_id", ""), form.get("client_secret", "")
    scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            pair = base64.b64decode(credentials, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        client_id, secret = unquote_plus(pair[0]), unquote_plus(pair[2])
    client = CLIENTS.get(client_id)
    right = client is not None and secrets.compare_digest(client.client_secret.encode(), secret.encode())
    return client if right else None


def _whole(lifetime_s: float) -> int:
    """Seconds as a provider announces them: whole, and never longer than the token really lives."""
    return int(lifetime_s)


def _granted(answer: dict[str, object]) -> web.Response:
    return web.json_response(answer, headers={"Cache-Control": "no-store", "Pragma": "no-cache"})


def _error(status: int, code: str, description: str) -> web.Response:
    return web.json_response({"error": code, "error_description": description}, status=status)
