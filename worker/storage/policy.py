"""Which URL a worker may fetch, and which address it may connect to. Pure: nothing is resolved or opened here.

Two fences stand one behind the other. `Policy.read` holds the host's name against the allow-list;
`Policy.check_address` judges the very address that a connection is about to be made to, so that no spelling of a URL
and no answer of a name server gets past it. Through a proxy the worker connects to no host itself: the second fence is
the proxy's, and a URL that names an address is refused.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import idna

from courier.errors import SourceNotAllowed
from courier.settings import SettingsError, SourceSettings

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_MAX_URL = 8192  # as in a job; a redirect's has no other bound than that of a header
_DEFAULT_PORTS = {"http": 80, "https": 443}
_IS_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?").fullmatch
_IS_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*").fullmatch
#: What may stand in a path or a query (RFC 3986, 3.3 and 3.4), percent-encodings as their writer wrote them.
_AS_GIVEN = "%/?:@!$&'()*+,;=-._~"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NOT_IN_AUTHORITY = re.compile(r"[\s\\%@]")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_V4_COMPATIBLE = ipaddress.IPv6Network("::/96")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")
_UNIQUE_LOCAL = ipaddress.IPv6Network("fc00::/7")
#: For documentation, tests and protocols (IANA's registries of special-purpose addresses); Python 3.11 knows some.
_SPECIAL_V4 = tuple(
    map(
        ipaddress.IPv4Network,
        ("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
    )
)
_SPECIAL_V6 = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "3fff::/20")))
_THIS_NETWORK = ipaddress.IPv4Network("0.0.0.0/8")
#: Where clouds keep credentials and configuration; some of these look like public or like ordinary private addresses.
_METADATA = frozenset(
    ipaddress.ip_address(address)
    for address in (
        "169.254.169.254",  # AWS, Azure, Google and most others
        "169.254.170.2",  # AWS, credentials of a container
        "169.254.170.23",  # AWS, credentials of a pod
        "fd00:ec2::254",  # AWS over IPv6
        "fd00:ec2::23",  # AWS, credentials of a pod over IPv6
        "fd20:ce::254",  # Google over IPv6
        "100.100.100.200",  # Alibaba
        "168.63.129.16",  # Azure, the host's own services
        "192.0.0.192",  # Oracle
    )
)


@dataclass(frozen=True)
class Target:
    """An allowed URL taken apart once, so that the host that was checked is the host that is asked."""

    scheme: str
    host: str
    port: int
    request: str
    """Path and query as they go onto the wire."""

    @property
    def url(self) -> str:
        """The whole URL, query included: never to be shown."""
        return f"{self.scheme}://{self._written_host}:{self.port}{self.request}"

    @property
    def absolute(self) -> str:
        """The same as it goes to a proxy, without the scheme's own port."""
        return f"{self.scheme}://{self.entry}{self.request}"

    @property
    def entry(self) -> str:
        """The narrowest entry of ``sources.allow_hosts`` that allows it."""
        own = self.port == _DEFAULT_PORTS[self.scheme]
        return self._written_host if own else f"{self._written_host}:{self.port}"

    @property
    def _written_host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


@dataclass(frozen=True)
class _Entry:
    """One entry of the allow-list; ``port`` "" stands for the scheme's own port, ``*`` for every port."""

    host: str
    below: bool
    port: str

    @classmethod
    def read(cls, text: str) -> _Entry:
        host, colon, port = text.rpartition(":")
        if not colon or not (port == "*" or port.isdecimal()):
            host, port = text, ""
        if host == "*":
            return cls("", below=True, port=port)
        below = host.startswith("*.")
        name = normal_host(host.removeprefix("*."))
        return cls(f".{name}" if below else name, below=below, port=port)

    def covers(self, target: Target) -> bool:
        own = target.port == _DEFAULT_PORTS[target.scheme]
        if not (own if self.port == "" else self.port == "*" or int(self.port) == target.port):
            return False
        return target.host.endswith(self.host) if self.below else target.host == self.host


class Policy:
    """The settings' allow-list and their stance on private networks."""

    def __init__(self, settings: SourceSettings) -> None:
        try:
            self._entries = tuple(_Entry.read(entry) for entry in settings.allow_hosts)
        except SourceNotAllowed:
            raise SettingsError("setting sources.allow_hosts: an entry is no host, no *.host and no address") from None
        self._private_too = settings.allow_private_networks
        self._proxied = settings.proxy is not None

    def read(self, url: str) -> Target:
        """``url`` taken apart.

        Raises
        ------
        SourceNotAllowed
            It is malformed, bears a password, or its host is not on the list; the sentence quotes the host at most.
        """
        target = _take_apart(url)
        if not any(entry.covers(target) for entry in self._entries):
            raise SourceNotAllowed(
                f"The host {target.host} (port {target.port}) is not on the list of allowed sources; "
                f"add {target.entry} to sources.allow_hosts if images may be fetched from it."
            )
        literal = _literal(target.host)
        if literal is not None and self._proxied:
            raise SourceNotAllowed(
                f"The host {target.host} is an address, and through a proxy (sources.proxy) a worker fetches from names"
                " alone; use the host's name."
            )
        if literal is not None:
            self.check_address(literal, host=target.host)
        return target

    def check_address(self, address: str | Address, *, host: str) -> None:
        """Refuse to connect to an address that only an insider can reach.

        ``sources.allow_private_networks`` opens private and loopback addresses; link-local ones, the metadata services
        of clouds, multicast and reserved ranges stay shut.
        """
        kind, private = _kind(ipaddress.ip_address(address))
        if kind is None or (private and self._private_too):
            return
        hint = "set sources.allow_private_networks if it may" if private else "no setting opens it"
        raise SourceNotAllowed(f"The host {host} leads to {kind}, which a worker does not fetch from; {hint}.")


@functools.lru_cache(maxsize=1024)
def normal_host(text: str) -> str:
    """A host in the one spelling that is compared: lower case, punycode, no trailing dot, addresses canonical.

    Raises
    ------
    SourceNotAllowed
        Not a host, or an address in a spelling (decimal, octal, hexadecimal, shortened) that hides it.
    """
    if text.startswith("[") and text.endswith("]"):
        return _ipv6(text[1:-1])
    if ":" in text:
        return _ipv6(text)
    try:
        host = text.lower() if text.isascii() else idna.encode(text, uts46=True).decode("ascii")
    except idna.IDNAError:
        raise SourceNotAllowed(
            "The host of the URL is not a valid international domain name; correct the URL."
        ) from None
    labels = host.removesuffix(".").split(".")
    if len(host) > 253 or not all(_IS_LABEL(label) for label in labels):
        raise SourceNotAllowed("The URL has no valid host; correct the URL.")
    host = ".".join(labels)
    if _IS_NUMBER(labels[-1]) and _literal(host) is None:
        raise SourceNotAllowed("The host of the URL is an address in disguise; write it as four decimal numbers.")
    return host


def _take_apart(url: str) -> Target:
    if len(url) > _MAX_URL:
        raise SourceNotAllowed(f"The URL has more than {_MAX_URL} characters; use a shorter one.")
    if _CONTROL.search(url):
        raise SourceNotAllowed("The URL has control characters in it; correct the URL.")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise SourceNotAllowed("The URL is malformed; correct its host or port.") from None
    scheme = parts.scheme.lower()
    if scheme not in _DEFAULT_PORTS:
        raise SourceNotAllowed("The URL does not start with http:// or https://; correct the URL.")
    if "@" in parts.netloc:
        raise SourceNotAllowed(
            "The URL has a user name or password in it, which would be stored with the job; "
            "use a signed URL or a source that the worker itself may read."
        )
    if _NOT_IN_AUTHORITY.search(parts.netloc) or not parts.hostname:
        raise SourceNotAllowed("The URL has no valid host; correct the URL.")
    bracketed = parts.netloc.startswith("[")
    host = normal_host(f"[{parts.hostname}]" if bracketed else parts.hostname)
    port = _DEFAULT_PORTS[scheme] if port is None else port
    if port == 0:
        raise SourceNotAllowed("The URL names port 0; correct the URL.")
    query = f"?{parts.query}" if parts.query else ""
    path = parts.path if parts.path.startswith("/") else f"/{parts.path}"
    return Target(scheme, host, port, quote(path + query, safe=_AS_GIVEN, errors="surrogatepass"))


def _ipv6(text: str) -> str:
    try:
        return str(ipaddress.IPv6Address(text if "%" not in text else ""))
    except ValueError:
        raise SourceNotAllowed("The URL has no valid IPv6 address for a host; correct the URL.") from None


@functools.lru_cache(maxsize=1024)
def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


@functools.lru_cache(maxsize=1024)
def _kind(address: Address) -> tuple[str | None, bool]:
    """What is wrong with an address (None: it is public), and whether being private is all that is wrong."""
    if address in _METADATA:
        return "the metadata service of a cloud", False
    if isinstance(address, ipaddress.IPv4Address):
        return _kind_v4(address)
    if address in _LOCAL_NAT64 and any(one in _METADATA or one.is_link_local for one in _translated(address)):
        return "the metadata service of a cloud, or a link-local address, behind a translation", False
    inner = next(_embedded(address), None)
    return _kind_v6(address) if inner is None else _kind(inner)


def _kind_v4(address: ipaddress.IPv4Address) -> tuple[str | None, bool]:
    if address.is_loopback:
        return "a loopback address", True
    if address.is_link_local:
        return "a link-local address", False
    if address.is_multicast:
        return "a multicast address", False
    if address.is_reserved or address in _THIS_NETWORK:
        return "a reserved address", False
    is_public = address.is_global and not any(address in network for network in _SPECIAL_V4)
    return (None, False) if is_public else ("a private address", True)


def _kind_v6(address: ipaddress.IPv6Address) -> tuple[str | None, bool]:
    if address.is_loopback:
        return "a loopback address", True
    if address.is_link_local:
        return "a link-local address", False
    if address.is_multicast:
        return "a multicast address", False
    if address.is_site_local or address in _LOCAL_NAT64 or address in _UNIQUE_LOCAL:
        return "a private address", True
    if address not in _GLOBAL_UNICAST:
        return "a reserved address", False
    is_public = address.is_global and not any(address in network for network in _SPECIAL_V6)
    return (None, False) if is_public else ("a private address", True)


def _embedded(address: ipaddress.IPv6Address) -> Iterator[ipaddress.IPv4Address]:
    """The IPv4 address that an IPv6 address is another spelling of, or that its packets are carried on to."""
    low_bits = int(address) & 0xFFFFFFFF
    if address.ipv4_mapped:
        yield address.ipv4_mapped
    if address.sixtofour:
        yield address.sixtofour
    if address.teredo:
        yield address.teredo[1]
    if address in _NAT64 or (address in _V4_COMPATIBLE and low_bits > 0xFFFF):
        yield ipaddress.IPv4Address(low_bits)


def _translated(address: ipaddress.IPv6Address) -> Iterator[ipaddress.IPv4Address]:
    """What an address below a network's own NAT64 prefix may stand for: one for each length of it (RFC 6052)."""
    bits = int(address)
    yield ipaddress.IPv4Address(bits & 0xFFFFFFFF)  # 96
    yield ipaddress.IPv4Address(bits >> 24 & 0xFFFFFFFF)  # 64
    yield ipaddress.IPv4Address((bits >> 64 & 0xFF) << 24 | bits >> 32 & 0xFFFFFF)  # 56
    yield ipaddress.IPv4Address((bits >> 64 & 0xFFFF) << 16 | bits >> 40 & 0xFFFF)  # 48
