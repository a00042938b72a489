"""Images behind http and https: one GET, its redirects checked one by one, its answer judged.

Which URL and which address is allowed is `policy`'s to say; the bytes are `spool`'s. Nothing is tried twice here, no
cookie, ``.netrc`` or proxy of the environment is used, and urllib3's errors end here.
"""

from __future__ import annotations

import http.client
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from http import HTTPStatus
from typing import Any
from urllib.parse import urljoin

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    InvalidHeader,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
    SSLError,
)
from urllib3.util import Retry, Timeout

from courier.errors import (
    CourierError,
    SourceDenied,
    SourceNotAllowed,
    SourceNotFound,
    SourceTruncated,
    SourceUnreachable,
    TryAgain,
)
from courier.ledger.breakers import Breakers
from courier.redaction import redact_url
from courier.settings import SourceSettings
from worker.runtime.deadlines import timed
from worker.runtime.http_client_internals import FinalResponse
from worker.runtime.urllib3_internals import dialled_pools, use_pools
from worker.storage.credentials import StoreCredential
from worker.storage.encoding import decoded, is_plain
from worker.storage.network import Network, of_proxy, proxy_is_away, unreachable
from worker.storage.policy import Policy, Target
from worker.storage.spool import CHUNK_BYTES, Fetched, Limits, spool

Resolve = Callable[[str, int], list[tuple[Any, ...]]]
#: What an answer that is no redirect means, by its status and headers; None where the body is the image.
ErrorOfAnswer = Callable[[int, Mapping[str, str], str], CourierError | None]

_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "pacs-courier"}
#: From a proxy that hands on the request itself. Behind a CONNECT, where its refusal ends the connection, it would be
#: the host's own word, which no sender may turn against the worker's credential.
_PROXY_REFUSES = HTTPStatus.PROXY_AUTHENTICATION_REQUIRED
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_IS_LENGTH = re.compile(r"[0-9]{1,18}").fullmatch
#: Of a range that begins with the first byte, its last one and how many there are.
_IS_RANGE = re.compile(r"bytes 0-([0-9]{1,18})/([0-9]{1,18})").fullmatch
_NO = (SourceDenied, "refused the request; correct the URL or ask for a new one")
_LATER = (SourceUnreachable, "cannot be had at present; it is tried again")
_MEANINGS: dict[int, tuple[type[CourierError], str]] = {
    **dict.fromkeys((204, 205), (SourceNotFound, "has no content; check the URL")),
    206: (SourceTruncated, "sent a part where the whole was asked for; it is fetched again"),
    **dict.fromkeys((401, 403), (SourceDenied, "may not be read; ask for a new URL, a signature may have expired")),
    **dict.fromkeys((404, 410), (SourceNotFound, "is not there; check the URL")),
    **dict.fromkeys((408, 421, 423, 425, 429), _LATER),
}

# At these levels they write whole request lines, the signature of a signed URL included.
logging.getLogger("urllib3.connectionpool").setLevel(logging.INFO)
logging.getLogger("urllib3.connection").setLevel(logging.ERROR)

#: Until when the calling thread's fetch may take, what answers it, and its path and query as they were given: urllib3
#: would write percent-encodings anew, which a signature may cover. http.client offers no other way in.
_fetch = threading.local()


def resolve(host: str, port: int) -> list[tuple[Any, ...]]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


class HttpSource:
    """Fetches from every allowed host over kept connections; shared by all threads."""

    def __init__(
        self,
        settings: SourceSettings,
        *,
        resolve: Resolve = resolve,
        policy: Policy | None = None,
        breakers: Breakers | None = None,
    ) -> None:
        self._settings = settings
        self._policy = policy or Policy(settings)
        self._resolve = resolve
        self._network = Network.of(settings)
        self._pools = self._network.pools(num_pools=64, maxsize=32, block=False)
        use_pools(self._pools, dialled_pools(self._dial, request_target=lambda: str(_fetch.request), answer=_answer))
        self._proxy = None if settings.proxy is None else StoreCredential("sources.proxy", breakers)

    def fetch(self, url: str, limits: Limits, error_of: ErrorOfAnswer | None = None) -> Fetched:
        target = self._policy.read(url)
        source = redact_url(url)
        for _ in range(self._settings.max_redirects + 1):
            response = self._get(target, limits, source)
            try:
                if response.status not in _REDIRECTS:
                    return _receive(response, limits, source, error_of or error_of_answer)
                target = self._next_target(target, response, source)
            finally:
                response.close()
        raise SourceUnreachable(f"{source} redirects more than {self._settings.max_redirects} times; correct the URL.")

    def close(self) -> None:
        self._pools.clear()

    def _get(self, target: Target, limits: Limits, source: str) -> urllib3.BaseHTTPResponse:
        """The answer's head; its body is still on the wire."""
        limits.check_time(source)
        with self._of_the_proxy(source):
            response = self._send_request(target, limits, source)
            if self._proxy is not None and target.scheme == "http" and response.status == _PROXY_REFUSES:
                response.close()
                raise of_proxy(response.status, source)
        return response

    def _of_the_proxy(self, source: str) -> AbstractContextManager[object]:
        """Around a request: the proxy may refuse the worker's credential."""
        return nullcontext() if self._proxy is None else self._proxy.asking(source)

    def _send_request(self, target: Target, limits: Limits, source: str) -> urllib3.BaseHTTPResponse:
        plain = self._proxy is not None and target.scheme == "http"
        request = target.absolute if plain else target.request
        _fetch.deadline_s, _fetch.idle_timeout_s = limits.deadline_s, self._settings.idle_timeout_s
        _fetch.answer, _fetch.request = None, request
        pool = self._pools.connection_from_host(target.host, target.port, target.scheme)
        try:
            return pool.urlopen(
                "GET",
                request,
                headers=_HEADERS,
                retries=False,
                redirect=False,
                assert_same_host=False,
                timeout=Timeout(connect=self._settings.connect_timeout_s, read=self._settings.idle_timeout_s),
                preload_content=False,
                decode_content=False,
            )
        except (HTTPError, OSError) as error:
            if _fetch.answer is not None:  # urllib3 lets go of an answer whose headers it does not like, still open
                _fetch.answer.close()
            if self._proxy is not None and isinstance(error, NewConnectionError | ConnectTimeoutError):
                raise proxy_is_away(source) from error
            raise _unreachable(error, limits, source) from error

    def _next_target(self, target: Target, response: urllib3.BaseHTTPResponse, source: str) -> Target:
        location = response.headers.get("Location")
        if not location:
            raise SourceUnreachable(f"{source} redirects to nowhere; correct the URL.")
        try:
            following = self._policy.read(urljoin(target.url, _text(location)))
        except ValueError:
            raise SourceNotAllowed(f"{source} redirects to a malformed URL; fetch from where the image is.") from None
        except SourceNotAllowed as refusal:
            raise SourceNotAllowed(f"{source} redirects to where no image is fetched from. {refusal.message}") from None
        if (target.scheme, following.scheme) == ("https", "http"):
            raise SourceNotAllowed(f"{source} redirects from https to http, where anybody can read along.")
        return following

    def _dial(self, host: str, port: int, timeout_s: float | None) -> socket.socket:
        """Connect to the first of the host's addresses that answers, once all of them have been judged; where there is
        a proxy it is the host, and the operator's choice.
        """
        try:
            found = self._resolve(host, port)
        except (socket.gaierror, UnicodeError) as error:
            raise SourceUnreachable(f"The name {host} cannot be resolved at present; it is tried again.") from error
        for *_, address in found if self._proxy is None else ():
            self._policy.check_address(address[0], host=host)
        failure: OSError = OSError("the name has no address")
        for family, kind, protocol, _, address in found:
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(min(timeout_s or self._settings.connect_timeout_s, max(_remaining_s(), 0.001)))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.connect(address)
            except OSError as error:
                sock.close()
                failure = error
            else:
                return sock
        raise failure


def _receive(response: urllib3.BaseHTTPResponse, limits: Limits, source: str, error_of: ErrorOfAnswer) -> Fetched:
    range_bytes = _bytes_of_whole(response)
    refusal = error_of(response.status, response.headers, source)
    if refusal and range_bytes is None:
        raise refusal
    encoding = response.headers.get("Content-Encoding", "")
    announced_bytes = _announced_bytes(response, source) or range_bytes
    if range_bytes not in (None, announced_bytes):
        raise SourceTruncated(f"{source} sent less than the whole that it announced; it is fetched again.")
    limits.check_size(announced_bytes or 0, source)
    return spool(
        decoded(_chunks(response, limits, source), encoding, source=source),
        source=source,
        limits=limits,
        announced_bytes=announced_bytes if is_plain(encoding) else None,
    )


def _bytes_of_whole(response: urllib3.BaseHTTPResponse) -> int | None:
    """How many bytes a 206 announces that holds all there are of the image (Content-Range, RFC 9110, 14.4)."""
    found = _IS_RANGE(response.headers.get("Content-Range", ""))
    if response.status != HTTPStatus.PARTIAL_CONTENT or found is None:
        return None
    last, size_bytes = int(found[1]), int(found[2])
    return size_bytes if last + 1 == size_bytes else None


def error_of_answer(status: int, headers: Mapping[str, str], source: str) -> CourierError | None:
    return error_of_status(status, headers.get("Retry-After"), source)


def error_of_status(status: int, retry_after: str | None, source: str) -> CourierError | None:
    """What an answer's status means for the job; None where the body is the image.

    Statuses that time may cure are tried again; everything else of the 400s is taken as the source's no.
    """
    if status in (200, 203):
        return None
    kind, sentence = _MEANINGS.get(status) or (_NO if 400 <= status < 500 else _LATER)
    sentence = f"{source} {sentence} (status {status})."
    if issubclass(kind, TryAgain):
        return kind(sentence, retry_after_s=_retry_after_s(retry_after))
    return kind(sentence)


def _chunks(response: urllib3.BaseHTTPResponse, limits: Limits, source: str) -> Iterator[bytes]:
    try:
        yield from response.stream(CHUNK_BYTES, decode_content=False)
    except (ProtocolError, SSLError) as error:
        raise SourceTruncated(
            f"{source} broke off before its end was there; it is fetched again from the start."
        ) from error
    except (HTTPError, OSError) as error:
        raise _unreachable(error, limits, source) from error


def _announced_bytes(response: urllib3.BaseHTTPResponse, source: str) -> int | None:
    """The Content-Length, refused where it is none: below, such a length would count as not given."""
    length = response.headers.get("Content-Length")
    if length is None or "Transfer-Encoding" in response.headers:
        return None
    lengths = {part.strip() for part in length.split(",")}
    if len(lengths) != 1 or not _IS_LENGTH(length := lengths.pop()):
        raise SourceUnreachable(f"{source} announces a length that is no number; it is tried again.")
    return int(length)


def _text(header: str) -> str:
    """A header as its sender meant it: http.client reads Latin-1, servers write UTF-8."""
    try:
        return header.encode("latin-1").decode()
    except UnicodeError:
        return header


def _retry_after_s(text: str | None) -> float | None:
    try:
        return Retry(0).parse_retry_after(text) if text else None
    except (InvalidHeader, ValueError, OverflowError):
        return None


def _unreachable(error: Exception, limits: Limits, source: str) -> CourierError:
    """The sentence for a connection that failed; the error's own text is left out because it quotes the URL."""
    if _remaining_s() <= 0:
        return limits.too_slow(source)
    if isinstance(error, ReadTimeoutError | TimeoutError):
        return SourceUnreachable(f"{source} fell silent or did not answer in time; it is tried again.")
    return unreachable(error, source)


def _remaining_s() -> float:
    return float(_fetch.deadline_s - time.monotonic())


def _answer(sock: socket.socket, *args: Any, **kwargs: Any) -> http.client.HTTPResponse:
    """An answer to the calling thread's fetch, which has to keep to its time."""
    _fetch.answer = answer = FinalResponse(sock, *args, **kwargs)
    timed(answer, sock, deadline_s=_fetch.deadline_s, idle_timeout_s=_fetch.idle_timeout_s)
    return answer
