"""The end of workers whose test is over."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Sequence

from redis import Redis
from redis.exceptions import RedisError

from sandbox import processes as parts
from sandbox.processes import Child, RedisPart


def stop_together(children: Sequence[Child], broker: RedisPart) -> None:
    """SIGTERM to all of them. Each may wait for a message for a second more; ``broker`` tells it that none comes."""
    for child in children:
        child.signal(signal.SIGTERM)

    def ended() -> bool:
        if not any(child.alive for child in children):
            return True
        with contextlib.suppress(RedisError):  # a test has ended it, too
            for connection in client.client_list():
                if "b" in connection["flags"]:
                    client.client_unblock(int(connection["id"]))
        return False

    with Redis(host=parts.HOST, port=broker.port, socket_timeout=1) as client:
        parts.poll(ended, timeout_s=15, every_s=0.05)
