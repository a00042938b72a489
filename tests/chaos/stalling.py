"""Makes a worker stop working without dying, as Celery's own faults would: loaded into it by ``celery worker -I``.

Each fault begins when the file ``STALL_FILE`` names is there and holds its name: ``loop`` (the consumer's loop turns no
more), ``deaf`` (it turns, answers pings and takes no message: celery #8030), ``slots`` (every job hangs for good).
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from celery import bootsteps

from worker.app import app
from worker.jobs.attempt import Attempt

STALL_FILE = Path(os.environ["STALL_FILE"])
step = Attempt.step


def asked_for(fault: str) -> bool:
    return STALL_FILE.exists() and STALL_FILE.read_text() == fault


class Stalling(bootsteps.StartStopStep):
    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        parent.timer.call_repeatedly(0.2, self._loop)
        qos = parent.task_consumer.channel.qos
        can_consume = qos.can_consume
        qos.can_consume = lambda: not asked_for("deaf") and can_consume()

    @staticmethod
    def _loop() -> None:
        while asked_for("loop"):
            time.sleep(0.1)


def hanging(self: Attempt, name: str) -> Any:
    if asked_for("slots"):
        threading.Event().wait()
    return step(self, name)


Attempt.step = hanging  # type: ignore[method-assign]
app.steps["consumer"].add(Stalling)
