"""URLs of a Redis, in the one form that redis-py, kombu and Celery all read.

Each of the three reads forms that the others refuse with a traceback: redis-py ``unix:///run/redis.sock?db=2`` and
``redis://host?db=2``, kombu and Celery ``redis+socket:///run/redis.sock?virtual_host=2``.
"""

from __future__ import annotations

from typing import Final, Literal
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

_SOCKETS: Final = ("unix", "socket", "redis+socket", "redis+unix")
_HOSTS: Final = ("redis", "rediss")
SCHEMES: Final = (*_HOSTS, *_SOCKETS)
_TLS: Final = ("ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")


def scheme_of(url: str) -> str:
    return url.partition("://")[0].lower() if "://" in url else ""


def is_socket(url: str) -> bool:
    return scheme_of(url) in _SOCKETS


def canonical(url: str, reader: Literal["redis-py", "celery"]) -> str:
    """``url`` as ``reader`` reads it; any other scheme than those of a Redis is returned as it is.

    Raises
    ------
    ValueError
        It names no database by a number, two different ones, or an option that is not one of a URL. The sentence
        quotes nothing of it but the option's name.
    """
    scheme = scheme_of(url)
    if scheme not in SCHEMES:
        return url
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    databases = {query.pop(name) for name in ("db", "virtual_host") if name in query}
    if scheme in _HOSTS:
        databases |= {unquote(parts.path).strip("/")} - {""}
    login = _login(parts.netloc, query)
    _check_options(query, tls=scheme == "rediss")
    number = _number(databases)
    if scheme in _SOCKETS:
        name, key = ("unix", "db") if reader == "redis-py" else ("redis+socket", "virtual_host")
        if len(parts.path) < 2 or parts.netloc.rpartition("@")[2]:
            raise ValueError("the path of the socket follows three slashes: unix:///run/redis/redis.sock?db=0")
        return f"{name}://{login}{parts.path}?{key}={number or 0}"
    host = parts.netloc.rpartition("@")[2]
    path = parts.path if number is None else f"/{number}"
    return f"{scheme}://{login}{host}{path}" + (f"?{urlencode(query, safe='/@')}" if query else "")


def _login(netloc: str, query: dict[str, str]) -> str:
    """User and password, which redis-py also reads as options."""
    given = netloc.rpartition("@")[0]
    named = [query.pop(name, "") for name in ("username", "password")]
    if any(named):
        given = f"{quote(named[0], safe='')}:{quote(named[1], safe='')}"
    return f"{given}@" if given else ""


def _number(databases: set[str]) -> int | None:
    if not databases:
        return None
    if any(not (one.isascii() and one.isdigit() and len(one) < 6) for one in databases):
        raise ValueError("a database of Redis is a number of 0 or more: redis://host:6379/2")
    numbers = {int(one) for one in databases}
    if len(numbers) > 1:
        raise ValueError("it names two databases; name one: redis://host:6379/2")
    return numbers.pop()


def _check_options(query: dict[str, str], *, tls: bool) -> None:
    for name in query:
        if name not in _TLS:
            raise ValueError(f"no URL of a Redis has the option {name[:40]!r} here; leave it out (docs/settings.md)")
        if not tls:
            raise ValueError(f"the option {name!r} needs rediss://")
