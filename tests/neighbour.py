"""Another Celery application on the same Redis, with Celery's default queue: ``celery -A tests.neighbour``."""

from __future__ import annotations

import os

from celery import Celery

app = Celery("reports", broker=os.environ.get("BROKER_URL"), backend=os.environ.get("RESULT_BACKEND"))


@app.task(name="reports.build")  # type: ignore[untyped-decorator]  # celery is untyped
def build(number: int) -> int:
    return number + 1


@app.task(name="reports.note")  # type: ignore[untyped-decorator]  # celery is untyped
def note(result: dict[str, str]) -> str:
    return result["status"]
