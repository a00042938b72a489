"""OAuth2 client credentials: one cached token per server, fetched again before it expires and after a 401.

Loaded only for a server that uses it. The token endpoint is asked through requests-oauth2client; what it
answers stands in no message, because it may echo the client's secret.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from threading import Lock
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from requests_oauth2client import OAuth2Client
from requests_oauth2client.exceptions import EndpointError, InvalidTokenResponse, OAuth2Error, ServerError

from worker.errors import CourierError, PacsMisanswered, PacsUnauthorized, PacsUnavailable
from worker.pacs.connections import authorities
from worker.settings import ServerSettings

#: A token is fetched again this long before it expires, or after two thirds of a shorter life.
AHEAD_S = 60.0
TOKEN_READ_TIMEOUT_S = 30.0


class _Trusting(HTTPAdapter):
    """Trusts whom the server's own connections trust."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)


class ClientCredentials:
    """The bearer token of one server's account."""

    def __init__(self, server: ServerSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        auth = server.auth
        session = requests.Session()
        session.trust_env = False
        session.mount("https://", _Trusting(authorities(server)))
        self._server = server
        self._clock = clock
        self._lock = Lock()
        self._value: str | None = None
        self._fresh_until = 0.0
        self._client = OAuth2Client(
            str(auth.token_url),
            client_id=auth.client_id,
            client_secret=auth.secret("client_secret"),
            session=session,
            # Whether plain http is good enough is the operator's choice, made in token_url.
            testing=str(auth.token_url).startswith("http://"),
        )

    def authorization(self) -> str:
        if self._value is None or self._clock() >= self._fresh_until:
            with self._lock:
                if self._value is None or self._clock() >= self._fresh_until:
                    return self._fetch()
        return self._value

    def renew(self, refused: str | None) -> bool:
        with self._lock:
            if self._value == refused:
                self._fetch()
            return self._value != refused

    def _fetch(self) -> str:
        asked_at = self._clock()
        timeout_s = (self._server.connect_timeout_s, TOKEN_READ_TIMEOUT_S)
        try:
            token = self._client.client_credentials(
                self._server.auth.scope, requests_kwargs={"timeout": timeout_s, "allow_redirects": False}
            )
        except (OAuth2Error, requests.RequestException) as error:
            kind, words = _meaning(error)
            # Not "from error": its text may hold the answer of the token endpoint.
            raise self._error(kind, words) from None
        self._value = token.authorization_header()
        life_s = token.expires_in
        ahead_s = 0.0 if life_s is None else min(AHEAD_S, life_s / 3)
        self._fresh_until = float("inf") if life_s is None else asked_at + life_s - ahead_s
        return self._value

    def _error(self, kind: type[CourierError], words: str) -> CourierError:
        name, dialect = self._server.name, self._server.type
        return kind(f"The token endpoint of {name} {words}.", server_name=name, server_type=dialect)


def _meaning(error: Exception) -> tuple[type[CourierError], str]:
    """Which of our errors a failed token request is, and what the endpoint did, in words."""
    if isinstance(error, requests.RequestException):
        return PacsUnavailable, "did not answer"
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, ServerError) or status >= 500 or status == 429:
        return PacsUnavailable, f"is in trouble (status {status})"
    if isinstance(error, EndpointError) and not isinstance(error, InvalidTokenResponse):
        return PacsUnauthorized, f"gives no token (status {status}): check client_id, client_secret and scope"
    if status in (401, 403):
        return PacsUnauthorized, f"gives no token (status {status}): check client_id, client_secret and scope"
    return PacsMisanswered, f"gave an answer that holds no token (status {status}): check token_url"
