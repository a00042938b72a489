"""A command that waits says on standard error when no worker answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from producer.client import Courier
from producer.errors import BrokerUnavailable
from producer.terminal import errors_console

#: How long a command waits before it asks whether there is a worker, and how often it asks later, at the most seldom.
PATIENCE_S: Final = 10.0
_SELDOM_S: Final = 300.0
_ANSWER_S: Final = 1.0
SENTENCE: Final = (
    "No worker answers. What was ordered is kept and begins when a worker starts; pacs doctor says what is wrong."
)


@contextmanager
def said_if_no_worker_answers(courier: Courier) -> Iterator[None]:
    """Inside, the command waits for a job. It is said once if no worker answers after `PATIENCE_S`, or later."""
    over = threading.Event()
    asking = threading.Thread(target=_ask, args=(courier, over), name="no worker?", daemon=True)
    asking.start()
    try:
        yield
    finally:
        over.set()
        asking.join(timeout=3 * _ANSWER_S)


def _ask(courier: Courier, over: threading.Event) -> None:
    patience_s = PATIENCE_S
    while not over.wait(patience_s):
        try:
            workers = courier.workers(timeout_s=_ANSWER_S)
        except BrokerUnavailable:  # the command itself meets it and says so
            return
        if not workers and not over.is_set():
            errors_console.print(f"pacs: {SENTENCE}", style="yellow")
            return
        patience_s = min(2 * patience_s, _SELDOM_S)
