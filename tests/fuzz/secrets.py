"""Where a planted secret may be seen: an oracle for texts that show a URL, by RFC 3986 appendix B alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

SECRET = "s3cr3t"
_URL = re.compile(r"^(([^:/?#]+):)?(//([^/?#]*))?([^?#]*)(\?([^#]*))?(#(.*))?", re.DOTALL)


def hides_it(url: str) -> bool:
    """Whether the secret stands in the userinfo, the query or the fragment of ``url`` and nowhere else.

    In URLs of objects ``?`` and ``#`` belong to the name: there only the userinfo is none of it.
    """
    found = _URL.match(url)
    assert found is not None
    host = (found[4] or "").rpartition("@")[2]
    name = found[5]
    if (found[2] or "").lower() in ("s3", "az", "file"):
        name += f"{found[6] or ''}{found[8] or ''}"
    return SECRET in url and SECRET not in f"{found[2]}{host}{name}"


def strings(value: Any) -> Iterator[str]:
    """Every key and every value of a JSON document that is text; not by recursion."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            waiting += one


def must_not_show(document: Any) -> bool:
    """Whether the secret is in ``document`` but hidden wherever it is."""
    bearing = [text for text in strings(document) if SECRET in text]
    return bool(bearing) and all("://" in text and hides_it(text) for text in bearing)
