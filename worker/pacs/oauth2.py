"""OAuth2 client credentials, asked for through requests-oauth2client. Loaded only for a server that uses them.

How long a token is kept is said in ``tokens.py``. What the endpoint answers stands in no message, because it may echo
the client's secret.
"""

from __future__ import annotations

import time

import requests
from requests_oauth2client import OAuth2Client
from requests_oauth2client.exceptions import EndpointError, InvalidTokenResponse, OAuth2Error, ServerError

from courier.errors import CourierError, PacsMisanswered, PacsUnauthorized, PacsUnavailable
from courier.settings import ServerSettings
from worker.pacs.connections import tls_error_reason
from worker.pacs.tokens import REASONS, TOKEN_TIMEOUT_S, CachedToken, Clock, NoToken, Token, bounded_session


class ClientCredentials(CachedToken):
    """The bearer token of a client that has a secret."""

    def __init__(
        self,
        server: ServerSettings,
        secret: str,
        *,
        clock: Clock = time.monotonic,
        timeout_s: float = TOKEN_TIMEOUT_S,
    ) -> None:
        super().__init__(server, self._token, clock=clock)
        token_url = str(server.auth.token_url)
        self._scope = server.auth.scope
        self._timeouts_s = (min(server.connect_timeout_s, timeout_s), timeout_s)
        self._client = OAuth2Client(
            token_url,
            client_id=server.auth.client_id,
            client_secret=secret,
            session=bounded_session(server, timeout_s),
            # Whether plain http is good enough is the operator's choice, made in token_url.
            testing=token_url.startswith("http://"),
        )

    def _token(self) -> Token:
        try:
            token = self._client.client_credentials(
                self._scope, requests_kwargs={"timeout": self._timeouts_s, "allow_redirects": False}
            )
        except (OAuth2Error, requests.RequestException) as error:
            raise NoToken(*_meaning(error), answer=getattr(error, "response", None)) from error
        return Token(token.authorization_header(), float("inf") if token.expires_in is None else token.expires_in)


def _meaning(error: Exception) -> tuple[type[CourierError], str]:
    """Which of our errors a failed token request is, and what the endpoint did, in words."""
    if isinstance(error, requests.exceptions.SSLError):
        return PacsUnavailable, f"did not answer: {tls_error_reason(error)}"
    if isinstance(error, requests.RequestException):
        return PacsUnavailable, "did not answer"
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, ServerError) or status >= 500 or status == 429:
        return PacsUnavailable, f"is in trouble (status {status})"
    standard = isinstance(error, EndpointError) and not isinstance(error, InvalidTokenResponse)
    if standard or status in (401, 403):
        reason = getattr(error, "error", None)
        said = f", {reason}" if reason in REASONS else ""
        return PacsUnauthorized, f"gives no token (status {status}{said}): check client_id, client_secret and scope"
    return PacsMisanswered, f"gave an answer that holds no token (status {status}): check token_url"
