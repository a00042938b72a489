"""Another application's worker, for the tests: ``celery -A tests.foreign worker -Q mine``.

Its one task writes each of its calls into the list ``calls`` of the Redis at ``FOREIGN_CALLS``.
"""

from __future__ import annotations

import json
import os
from typing import Any

import redis
from celery import Celery, Task

app = Celery("foreign", broker=os.environ["FOREIGN_BROKER"], backend=os.environ["FOREIGN_BACKEND"])
app.conf.worker_send_task_events = False
_calls = redis.Redis.from_url(os.environ["FOREIGN_CALLS"])


@app.task(name="mine.after", bind=True)  # type: ignore[untyped-decorator]  # celery is untyped
def after(self: Task, *args: Any, tag: str) -> str:
    """Note the call, and return its tag."""
    request = self.request
    call = {"tag": tag, "id": request.id, "args": args, "parent_id": request.parent_id, "root_id": request.root_id}
    shown = {"argsrepr": request.argsrepr, "kwargsrepr": request.kwargsrepr, "stamps": request.stamps}
    _calls.rpush("calls", json.dumps({**call, **shown}))
    return tag
