"""The parts of Python's http.client that we use although its manual does not name them; urllib3 and boto3 build on it.

The bound of their version is that of Python. ``tests/unit/test_urllib3_internals.py`` fails when one of them changes.
"""

from __future__ import annotations

import http.client
import io
from http import HTTPStatus

#: A 101 would change the protocol and is none of them.
_INTERIM = frozenset((HTTPStatus.PROCESSING, HTTPStatus.EARLY_HINTS))


class FinalResponse(http.client.HTTPResponse):
    """Skips all interim answers (RFC 9110, 15.2); http.client skips a 100, and takes any other for the final one."""

    def _read_status(self) -> tuple[str, int, str]:
        version, status, reason = super()._read_status()  # type: ignore[misc]
        while status in _INTERIM:
            http.client.parse_headers(self.fp)
            version, status, reason = super()._read_status()  # type: ignore[misc]
        return version, status, reason


def detach_stream(answer: http.client.HTTPResponse) -> io.RawIOBase:
    """The stream of ``answer``, none of which has been read; it reads its head from there, too."""
    raw: io.RawIOBase = answer.fp.detach()
    return raw


def attach_stream(answer: http.client.HTTPResponse, stream: io.BufferedReader) -> None:
    """Have ``answer`` read from ``stream`` in place of the one that `detach_stream` took away."""
    answer.fp = stream
