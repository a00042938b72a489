"""How sources and stores are reached: which authorities TLS trusts, through which proxy, and the SDKs' clients.

The environment (``HTTP_PROXY``, ``NO_PROXY``, ``AWS_ENDPOINT_URL`` …) decides none of it: the settings do, or the rules
about sources could be got around. What an answer means is for the modules that ask.
"""

from __future__ import annotations

import functools
import re
import ssl
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import urllib3
from urllib3.exceptions import ProxyError

from courier.errors import CourierError, SourceNotAllowed, SourceUnauthorized, SourceUnreachable
from courier.settings import S3Settings, SettingsError, SourceSettings
from worker.runtime import botocore_internals

if TYPE_CHECKING:
    from azure.core.pipeline.transport import RequestsTransport

#: What http.client says where a proxy does not connect.
_NO_TUNNEL = re.compile(r"Tunnel connection failed: ([0-9]{3})").search
#: Where an exception keeps the one that it was made of, beside ``__cause__`` and ``args``.
_INNER = ("reason", "original_error", "inner_exception", "kwargs")


@dataclass(frozen=True)
class Network:
    """``proxy`` is its URL with the user name and password, so never to be shown."""

    ca_file: Path | None = None
    proxy: str | None = None

    @classmethod
    def of(cls, settings: SourceSettings) -> Network:
        return cls(settings.ca_file, settings.proxy)

    @property
    def proxies(self) -> dict[str, str]:
        """As boto and requests take them; an empty one keeps them from reading the environment."""
        return {} if self.proxy is None else {"http": self.proxy, "https": self.proxy}

    @property
    def proxy_headers(self) -> dict[str, str]:
        parts = urlsplit(self.proxy or "")
        if parts.username is None:
            return {}
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        return dict(urllib3.make_headers(proxy_basic_auth=pair))

    def pools(self, **options: Any) -> urllib3.PoolManager:
        """Connections for plain requests."""
        context = tls(self.ca_file)
        if self.proxy is None:
            return urllib3.PoolManager(ssl_context=context, **options)
        return urllib3.ProxyManager(self.proxy, proxy_headers=self.proxy_headers, ssl_context=context, **options)


#: No proxy, and the system's authorities.
NO_PROXY = Network()


@functools.cache
def tls(ca_file: Path | None) -> ssl.SSLContext:
    """The system's authorities, and the operator's own where one is named; read once, which takes a while."""
    return _context(ca_file)


@functools.cache
def _tls_of_sdks(ca_file: Path | None) -> ssl.SSLContext:
    """The same, to which boto and requests add authorities of their own."""
    return _context(ca_file)


def _context(ca_file: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    try:
        if ca_file is not None:
            context.load_verify_locations(cafile=ca_file)
    except OSError as error:  # ssl's errors are OSErrors too
        raise SettingsError(f"setting sources.ca_file: {ca_file} cannot be read as PEM: {error.strerror}") from None
    return context


# --- the SDKs' clients ----------------------------------------------------------------------------------------------


def s3_client(
    settings: S3Settings, network: Network, *, connect_timeout_s: float, read_timeout_s: float
) -> Any:  # boto has no types
    """One client of S3 for all threads. One attempt per request, because the job retries."""
    from botocore.config import Config  # noqa: PLC0415 (a worker that never sees S3 does not pay for it)

    config = Config(
        signature_version="s3v4",
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=connect_timeout_s,
        read_timeout=read_timeout_s,
        max_pool_connections=32,
        ignore_configured_endpoint_urls=True,
        proxies=network.proxies,
        s3={"addressing_style": settings.addressing_style},
        # Other stores than Amazon's may know none of the checksums that boto adds of itself.
        request_checksum_calculation="when_required" if settings.endpoint_url else "when_supported",
    )
    with reading_credentials():
        client = botocore_internals.new_session().create_client(
            "s3", endpoint_url=settings.endpoint_url, region_name=settings.region, config=config
        )
    botocore_internals.read_credentials_within(client, reading_credentials)
    if settings.endpoint_url:
        botocore_internals.keep_to_one_store(client)
    if network.ca_file:
        botocore_internals.trust(client, _tls_of_sdks(network.ca_file))
    return client


@contextmanager
def reading_credentials() -> Iterator[None]:
    """A file or a program that is to give credentials and does not, told as boto tells its own failures to have some:
    boto lets the system's errors through, and the worker would take them for the answer of a store.
    """
    from botocore import exceptions as boto  # noqa: PLC0415 (as above)

    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, boto.BotoCoreError):
            raise
        why = type(error).__name__
        raise boto.CredentialRetrievalError(provider="the worker's configuration", error_msg=why) from error


def azure_transport(network: Network, *, connect_timeout_s: float, read_timeout_s: float) -> RequestsTransport:
    """What the SDK of Azure sends its requests with; ``proxies`` go to its client."""
    import requests  # noqa: PLC0415 (a worker that never sees Azure pays nothing)
    from azure.core.pipeline.transport import RequestsTransport  # noqa: PLC0415
    from requests.adapters import HTTPAdapter  # noqa: PLC0415

    context = _tls_of_sdks(network.ca_file)

    class Trusting(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, ssl_context=context, **kwargs)

        def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
            return super().proxy_manager_for(proxy, ssl_context=context, **kwargs)

    session = requests.Session()
    session.trust_env = False
    for scheme in ("http://", "https://"):
        session.mount(scheme, Trusting(max_retries=0, pool_maxsize=32))
    return RequestsTransport(session=session, connection_timeout=connect_timeout_s, read_timeout=read_timeout_s)


# --- what went wrong on the way -------------------------------------------------------------------------------------


def unreachable(error: BaseException, shown: str, *, verb: str = "reached") -> CourierError:
    """What a connection that failed means, of whichever library ``error`` is; the library's text is left out, because
    it may quote URLs and the proxy's password.
    """
    chain = _chain(error)
    if refused := next((found[1] for one in chain if (found := _NO_TUNNEL(_text(one)))), None):
        return of_proxy(int(refused), shown)
    if any(isinstance(one, ProxyError) or type(one).__name__ == "ProxyError" for one in chain):
        return proxy_is_away(shown)
    if any(isinstance(one, ssl.SSLError) or type(one).__name__ == "SSLError" for one in chain):
        return _untrusted(shown, chain)
    return SourceUnreachable(f"{shown} cannot be {verb}; it is tried again.")


def proxy_is_away(shown: str) -> SourceUnreachable:
    return SourceUnreachable(f"{shown} cannot be had: the proxy (sources.proxy) does not answer; it is tried again.")


def _untrusted(shown: str, chain: Sequence[BaseException]) -> SourceUnreachable:
    words = next((one.verify_message for one in chain if isinstance(one, ssl.SSLCertVerificationError)), "")
    if words:
        what = f"the host has no TLS certificate that can be trusted ({words}); name a private authority"
        return SourceUnreachable(f"{shown}: {what} in sources.ca_file.")
    return SourceUnreachable(f"{shown}: TLS with the host failed; check that the host speaks TLS at this port.")


def of_proxy(status: int, shown: str) -> CourierError:
    """What a status means that is the proxy's own."""
    if status == 407:
        sentence = f"{shown}: the proxy refuses the worker's credential (status 407); correct it in sources.proxy."
        return SourceUnauthorized(sentence, details={"reason": "407"}, scope="credential")
    if 400 <= status < 500 and status not in (408, 425, 429):
        return SourceNotAllowed(f"{shown}: the proxy does not connect to the host (status {status}); allow it there.")
    return SourceUnreachable(f"{shown} cannot be had: the proxy answered {status}; it is tried again.")


def close_what_failed(error: BaseException) -> None:
    """Let go of the answers that the frames of ``error`` hold: boto closes none that it cannot read, and its connection
    would stay open until Python collects its garbage.
    """
    for one in _chain(error):
        traceback.clear_frames(one.__traceback__)


def _chain(error: BaseException) -> list[BaseException]:
    """``error`` and those that it was made of."""
    found: list[BaseException] = []
    waiting: list[Any] = [error]
    while waiting:
        one = waiting.pop()
        one = one.get("error") if isinstance(one, dict) else one
        if isinstance(one, BaseException) and not any(one is other for other in found):
            found.append(one)
            waiting += [one.__cause__, one.__context__, *one.args, *(getattr(one, name, None) for name in _INNER)]
    return found


def _text(error: BaseException) -> str:
    return str(error.args[0]) if isinstance(error, OSError) and error.args else ""
