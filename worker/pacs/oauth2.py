"""OAuth2 client credentials: one cached token per server, fetched again before it expires and after a 401.

Loaded only for a server that uses it. The token endpoint is asked through requests-oauth2client; what it
answers stands in no message, because it may echo the client's secret.
"""

from __future__ import annotations

import io
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from requests_oauth2client import OAuth2Client
from requests_oauth2client.exceptions import EndpointError, InvalidTokenResponse, OAuth2Error, ServerError
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError

from worker.errors import CourierError, PacsMisanswered, PacsUnauthorized, PacsUnavailable
from worker.pacs.connections import authorities, mistrust
from worker.settings import ServerSettings

#: A token is fetched again this long before it expires, or after two thirds of a shorter life.
AHEAD_S = 60.0
#: The longest that fetching one may take, whatever the endpoint does meanwhile.
TOKEN_TIMEOUT_S = 30.0
#: While the old token is still good and the endpoint is in trouble, it is asked so often.
_AGAIN_S = 5.0
_MAX_ANSWER_BYTES = 1024**2
#: What an endpoint may call its reason (RFC 6749 5.2). Other words of it are not quoted.
_REASONS = frozenset(("invalid_request", "invalid_client", "invalid_grant", "unauthorized_client", "invalid_scope"))


class ClientCredentials:
    """The bearer token of one server's account.

    Whoever needs a token while another thread is fetching one waits for that one, and shares its failure: a hanging
    endpoint costs all of them one time-out and not one after the other.
    """

    def __init__(
        self,
        server: ServerSettings,
        secret: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        timeout_s: float = TOKEN_TIMEOUT_S,
    ) -> None:
        auth = server.auth
        session = requests.Session()
        session.trust_env = False
        bounded = _Bounded(authorities(server), timeout_s)
        session.mount("https://", bounded)
        session.mount("http://", bounded)
        self._server = server
        self._timeout_s = timeout_s
        self._clock = clock
        self._lock = threading.Lock()
        self._value: str | None = None
        self._fresh_until = self._good_until = 0.0
        self._failed_at = float("-inf")
        self._failure: tuple[type[CourierError], str] = (PacsUnavailable, "")
        self._client = OAuth2Client(
            str(auth.token_url),
            client_id=auth.client_id,
            client_secret=secret,
            session=session,
            # Whether plain http is good enough is the operator's choice, made in token_url.
            testing=str(auth.token_url).startswith("http://"),
        )

    def authorization(self) -> str:
        value = self._value
        if value is not None and self._clock() < self._fresh_until:
            return value
        asked_at = self._clock()
        with self._lock:
            if self._value is not None and self._clock() < self._fresh_until:
                return self._value
            try:
                return self._fetch(asked_at)
            except PacsUnavailable:
                if self._value is None or self._clock() >= self._good_until:
                    raise
                self._fresh_until = min(self._clock() + _AGAIN_S, self._good_until)
                return self._value

    def renew(self, refused: str | None) -> bool:
        asked_at = self._clock()
        with self._lock:
            if self._value == refused:
                self._good_until = 0.0  # whatever its life was said to be
                self._fetch(asked_at)
            return self._value != refused

    def _fetch(self, asked_at: float) -> str:
        if self._failed_at > asked_at:  # while this thread waited for its turn
            raise self._error(*self._failure)
        begun_at = self._clock()
        timeout_s = (min(self._server.connect_timeout_s, self._timeout_s), self._timeout_s)
        try:
            token = self._client.client_credentials(
                self._server.auth.scope, requests_kwargs={"timeout": timeout_s, "allow_redirects": False}
            )
        except (OAuth2Error, requests.RequestException) as error:
            self._failed_at, self._failure = self._clock(), _meaning(error)
            # Not "from error": its text may hold the answer of the token endpoint.
            raise self._error(*self._failure) from None
        self._value = token.authorization_header()
        life_s = float("inf") if token.expires_in is None else token.expires_in
        self._good_until = begun_at + life_s
        self._fresh_until = self._good_until - min(AHEAD_S, life_s / 3)
        return self._value

    def _error(self, kind: type[CourierError], words: str) -> CourierError:
        name, dialect = self._server.name, self._server.type
        return kind(f"The token endpoint of {name} {words}.", server_name=name, server_type=dialect)


def _meaning(error: Exception) -> tuple[type[CourierError], str]:
    """Which of our errors a failed token request is, and what the endpoint did, in words."""
    if isinstance(error, requests.exceptions.SSLError):
        return PacsUnavailable, f"did not answer: {mistrust(error)}"
    if isinstance(error, requests.RequestException):
        return PacsUnavailable, "did not answer"
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, ServerError) or status >= 500 or status == 429:
        return PacsUnavailable, f"is in trouble (status {status})"
    standard = isinstance(error, EndpointError) and not isinstance(error, InvalidTokenResponse)
    if standard or status in (401, 403):
        reason = getattr(error, "error", None)
        said = f", {reason}" if reason in _REASONS else ""
        return PacsUnauthorized, f"gives no token (status {status}{said}): check client_id, client_secret and scope"
    return PacsMisanswered, f"gave an answer that holds no token (status {status}): check token_url"


#: The sockets of the request that the calling thread has under way.
_asking = threading.local()


class _PlainConnection(HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _asking.sockets.append(self.sock)


class _TlsConnection(HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        _asking.sockets.append(self.sock)


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _PlainConnection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class _Bounded(HTTPAdapter):
    """Trusts whom the server's own connections trust, and is back in time with an answer of bounded size.

    A read's time-out never ends an endpoint that drips, so the connection is shut under it. None is kept: the next
    token is minutes away.
    """

    def __init__(self, context: ssl.SSLContext, timeout_s: float) -> None:
        self._context, self._timeout_s = context, timeout_s
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        request.headers["Connection"] = "close"
        sockets: list[socket.socket] = []
        _asking.sockets = sockets
        timer = threading.Timer(self._timeout_s, _shut, [sockets])
        timer.daemon = True
        timer.start()
        try:
            response = super().send(request, *args, **{**kwargs, "stream": True})
            body = response.raw.read(_MAX_ANSWER_BYTES, decode_content=True)
            response.close()
        except (HTTPError, OSError) as error:  # requests' own are OSErrors too
            if isinstance(error, requests.RequestException):
                raise
            raise requests.ConnectionError("the answer did not come whole") from None
        finally:
            timer.cancel()
        response.raw = io.BytesIO(body)
        return response


def _shut(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
