"""The part of redis-py that we use although its manual does not name it; its version has a ceiling.

``tests/unit/test_redis_internals.py`` fails when it changes.
"""

from __future__ import annotations

from typing import Any

from redis.client import NEVER_DECODE


def ask_raw(client: Any, *command: Any) -> Any:
    """A command whose answer is bytes and not text, sent by a client or put into a pipeline."""
    return client.execute_command(*command, **{NEVER_DECODE: True})
