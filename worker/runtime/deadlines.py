"""An HTTP answer whose bytes have to be there by a moment, however they come.

A time-out of the socket alone never ends a sender that drips one byte at a time. What an answer is about, and how long
it may take, is its asker's business.
"""

from __future__ import annotations

import http.client
import io
import math
import socket
import time
from typing import Any

from worker.runtime.http_client_internals import attach_stream, detach_stream

_BUFFER_BYTES = 65_536


class TimedReader(io.RawIOBase):
    """A socket's bytes, each read bounded by the longest silence and by what is left until ``deadline_s``.

    ``deadline_s`` is a moment of `time.monotonic`; it may be moved between two reads.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, *, deadline_s: float, idle_timeout_s: float) -> None:
        self._raw = raw
        self._sock = sock
        self.deadline_s = deadline_s
        self._idle_timeout_s = idle_timeout_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        remaining_s = self.deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("the time for the whole answer is over")
        self._sock.settimeout(min(remaining_s, self._idle_timeout_s))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def timed(
    answer: http.client.HTTPResponse, sock: socket.socket, *, deadline_s: float, idle_timeout_s: float = math.inf
) -> TimedReader:
    """Let ``answer``, none of which has been read, be read from ``sock`` in time only, its head too."""
    raw = detach_stream(answer)
    reader = TimedReader(raw, sock, deadline_s=deadline_s, idle_timeout_s=idle_timeout_s)
    attach_stream(answer, io.BufferedReader(reader, _BUFFER_BYTES))
    return reader
