"""What Celery is kept from telling of a job: a failure to tell is no failure of the job."""

from __future__ import annotations

from typing import Any

import pytest
from celery.exceptions import BackendStoreError

from worker.app import app
from worker.errors import NotDicom


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    told: list[tuple[str, str]] = []

    def store(job_id: str, result: Any, state: str, **_: Any) -> None:
        told.append((job_id, state))

    monkeypatch.setattr(app.backend, "store_result", store)
    return told


def test_a_result_that_cannot_be_stored_does_not_make_its_job_a_failed_one(stored: list[tuple[str, str]]) -> None:
    app.backend.mark_as_failure("j1", BackendStoreError("the result back-end is away"))
    assert stored == []


def test_a_failure_of_the_job_is_told(stored: list[tuple[str, str]]) -> None:
    app.backend.mark_as_failure("j1", NotDicom("This is no image."))
    assert stored == [("j1", "FAILURE")]
