"""The identity that Azure gives a machine or a pod (managed or workload identity), asked for through azure-identity.

Loaded only for a server that uses it. Which of the two it is, and where it is asked for, the SDK reads from the
variables that Azure sets (docs/settings.md). How long a token is kept is said in ``tokens.py``; so each fetch is made
by a credential of its own, which has cached nothing and reads the pod's token file as it is now.
"""

from __future__ import annotations

import logging
import ssl
import time
from typing import Any

import requests
from azure.core.exceptions import AzureError
from azure.core.pipeline.transport import RequestsTransport
from azure.identity import ManagedIdentityCredential

from courier.errors import CourierError, PacsMisanswered, PacsUnauthorized, PacsUnavailable
from courier.settings import ServerSettings
from worker.pacs.connections import causes, tls_error_reason
from worker.pacs.tokens import REASONS, TOKEN_TIMEOUT_S, CachedToken, Clock, NoToken, Token, bounded_session

#: As Azure documents them for its metadata service: time cures these, 404 and 410 while it is being updated.
_TROUBLE = frozenset((404, 408, 410, 429))
#: What the SDK raises, its reading of an answer that is no token included; it calls nothing that is ours.
_SDK_ERRORS = (AzureError, OSError, ValueError, KeyError, TypeError, AttributeError)
_NO_RETRIES: dict[str, Any] = {"retry_total": 0, "retry_connect": 0, "retry_read": 0, "retry_status": 0}
_ADVICE = "check scope and client_id, and that the identity is assigned to this machine or pod"

# They write what the endpoint answered, and at lower levels headers and URLs.
for _name in ("azure.identity", "msal"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


class AzureIdentity(CachedToken):
    """The bearer token of the identity that this process runs under."""

    def __init__(
        self, server: ServerSettings, *, clock: Clock = time.monotonic, timeout_s: float = TOKEN_TIMEOUT_S
    ) -> None:
        super().__init__(server, self._token, clock=clock)
        self._auth = server.auth
        self._timeouts_s = {"connection_timeout": min(server.connect_timeout_s, timeout_s), "read_timeout": timeout_s}
        self._session = bounded_session(server, timeout_s)
        self._session.hooks["response"].append(self._note)
        self._answer: requests.Response | None = None

    def _token(self) -> Token:
        """Called by one thread at a time."""
        self._answer = None
        transport = RequestsTransport(session=self._session, session_owner=False, **self._timeouts_s)
        try:
            with ManagedIdentityCredential(
                client_id=self._auth.client_id or None, transport=transport, **_NO_RETRIES
            ) as credential:
                token = credential.get_token(str(self._auth.scope))
        except _SDK_ERRORS as error:
            raise NoToken(*_meaning(error, self._answer), answer=self._answer) from error
        return Token(f"Bearer {token.token}", token.expires_on - time.time())

    def _note(self, answer: requests.Response, *_: Any, **__: Any) -> None:
        self._answer = answer


def _meaning(error: Exception, answer: requests.Response | None) -> tuple[type[CourierError], str]:
    """Which of our errors a failed fetch is, and what the endpoint did, in words."""
    if answer is None:
        return _unasked(error)
    status = answer.status_code
    if status in _TROUBLE or status >= 500:
        return PacsUnavailable, f"is in trouble (status {status})"
    if 400 <= status < 500:
        return PacsUnauthorized, f"gives no token (status {status}{_reason(answer)}): {_ADVICE}"
    return PacsMisanswered, f"gave an answer that holds no token (status {status}): {_ADVICE}"


def _unasked(error: Exception) -> tuple[type[CourierError], str]:
    """Nothing was answered: the endpoint is silent, or something on this machine is missing."""
    if isinstance(error, OSError):
        return PacsUnauthorized, "was not asked: the file that AZURE_FEDERATED_TOKEN_FILE names cannot be read"
    if not isinstance(error, AzureError):
        return PacsUnauthorized, "was not asked: the environment's AZURE_ variables are incomplete or malformed"
    if any(isinstance(one, ssl.SSLError) for one in causes(error)):
        return PacsUnavailable, f"did not answer: {tls_error_reason(error)}"
    return PacsUnavailable, "did not answer"


def _reason(answer: requests.Response) -> str:
    try:
        reason = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return ""
    return f", {reason}" if reason in REASONS else ""
