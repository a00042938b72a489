"""Makes a worker lack threads or memory for some of its jobs: loaded into it by ``celery worker -I``.

``STARVE`` says where (``decode``, ``hand over``, ``begin``, ``attempt``); those jobs starve whose image's name begins
with ``starve``, or all of them if ``STARVE_ALL`` is set.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from celery.concurrency.base import BasePool
from kombu.exceptions import DecodeError

from worker import app
from worker.runtime import consumer
from worker.storage.sources import Sources
from worker.tasks import door

WHERE, ALL = os.environ["STARVE"], "STARVE_ALL" in os.environ


def _starving(function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if ALL or "/starve" in " ".join(_texts(args)) + " ".join(_texts(list(kwargs.values()))):
            raise error
        return function(*args, **kwargs)

    return wrapped


def _texts(values: Any) -> list[str]:
    return [str(getattr(value, "payload", value)) for value in values]


if WHERE == "decode":
    consumer.unfit = _starving(consumer.unfit, DecodeError(MemoryError()))
elif WHERE == "hand over":
    BasePool.apply_async = _starving(BasePool.apply_async, RuntimeError("can't start new thread"))
elif WHERE == "begin":
    door.ready = _starving(app.ready, RuntimeError("can't start new thread"))
else:
    Sources.fetch = _starving(Sources.fetch, MemoryError())
