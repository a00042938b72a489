"""One cached bearer token per server: fetched again before it expires and after a 401, by one thread for all.

How a token is fetched is said in ``oauth2.py`` and ``azure_identity.py``. What an endpoint answers stands in no
message, because it may echo a secret.
"""

from __future__ import annotations

import io
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

from courier.errors import CourierError, PacsMisanswered, PacsUnauthorized, PacsUnavailable
from courier.settings import ServerSettings
from worker.pacs.connections import authorities
from worker.pacs.server_rates import asks_to_slow_down
from worker.pacs.transport import retry_after_s
from worker.runtime.urllib3_internals import noted_pools, use_pools

#: A token is fetched again this long before it expires, or after two thirds of a shorter life.
AHEAD_S = 60.0
#: The longest that fetching one may take, whatever the endpoint does meanwhile.
TOKEN_TIMEOUT_S = 30.0
#: While the old token is still good and the endpoint is in trouble, it is asked so often.
_AGAIN_S = 5.0
_MAX_ANSWER_BYTES = 1024**2
#: What an endpoint may call its reason (RFC 6749 5.2). Other words of it are not quoted.
REASONS = frozenset(("invalid_request", "invalid_client", "invalid_grant", "unauthorized_client", "invalid_scope"))

Clock = Callable[[], float]


@dataclass(frozen=True)
class Token:
    """``value`` is what goes into ``Authorization``; ``life_s`` is infinite where the endpoint does not say."""

    value: str
    life_s: float


class NoToken(Exception):
    """An endpoint gave no token: which of our errors that is, and what the endpoint did, in words.

    ``answer`` may ask for fewer requests.
    """

    def __init__(self, kind: type[CourierError], words: str, *, answer: requests.Response | None = None) -> None:
        super().__init__(words)
        status = 0 if answer is None else answer.status_code
        after_s = None if answer is None else retry_after_s(answer.headers.get("Retry-After"), now=time.time())
        self.failure = _Failure(kind, words, status, after_s)


class _Failure(NamedTuple):
    kind: type[CourierError]
    words: str
    status: int = 0
    retry_after_s: float | None = None


class CachedToken:
    """The bearer token of one server's account.

    A thread that needs a token while another is fetching one waits for that one, and shares its failure: a hanging
    endpoint costs all of them one time-out and not one after the other.
    """

    def __init__(self, server: ServerSettings, fetch: Callable[[], Token], *, clock: Clock = time.monotonic) -> None:
        """``fetch`` raises `NoToken`."""
        self._server = server
        self._request = fetch
        self._clock = clock
        self._lock = threading.Lock()
        self._value: str | None = None
        self._fresh_until = self._good_until = 0.0
        self._failed_at = float("-inf")
        self._failure = _Failure(PacsUnavailable, "")

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
            raise self._error(self._failure)
        begun_at = self._clock()
        try:
            token = _fit_for_a_header(self._request())
        except NoToken as failure:
            self._failed_at, self._failure = self._clock(), failure.failure
            # Not "from failure": what is behind it may hold the answer of the token endpoint.
            raise self._error(self._failure) from None
        self._value = token.value
        self._good_until = begun_at + token.life_s
        self._fresh_until = self._good_until - min(AHEAD_S, token.life_s / 3)
        return self._value

    def _error(self, failure: _Failure) -> CourierError:
        name, dialect = self._server.name, self._server.type
        sentence = f"The token endpoint of {name} {failure.words}."
        error = failure.kind(sentence, server_name=name, server_type=dialect)
        if isinstance(error, PacsUnavailable) and asks_to_slow_down(failure.status, failure.retry_after_s):
            error.payload["details"] = {"status": failure.status}
            error.slow_down, error.retry_after_s = True, failure.retry_after_s
        if isinstance(error, PacsUnauthorized):
            error.scope = "credential"
        return error


def _fit_for_a_header(token: Token) -> Token:
    """
    Raises
    ------
    NoToken
        No header can carry it; what sends the request would fail, and quote it.
    """
    if not (token.value.isascii() and token.value.isprintable()):
        raise NoToken(PacsMisanswered, "gave a token that no header can carry: check what answers there")
    return token


def bounded_session(server: ServerSettings, timeout_s: float) -> requests.Session:
    """HTTP to a token endpoint of ``server``: no proxy of the environment, and no answer later than ``timeout_s``."""
    session = requests.Session()
    session.trust_env = False
    bounded = _Bounded(authorities(server), timeout_s)
    session.mount("https://", bounded)
    session.mount("http://", bounded)
    return session


#: The sockets of the request that the calling thread has under way.
_asking = threading.local()


def _note(sock: socket.socket) -> None:
    _asking.sockets.append(sock)


class _Body(io.BytesIO):
    """A whole body in place of urllib3's; the Azure SDK sets a flag on it."""

    enforce_content_length = False


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
        use_pools(self.poolmanager, noted_pools(_note))

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
        response.raw = _Body(body)
        return response


def _shut(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
