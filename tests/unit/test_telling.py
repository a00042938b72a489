"""What Celery is kept from telling of a job: a failure to tell is no failure of the job."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery.exceptions import BackendStoreError, TimeLimitExceeded

import producer.errors
from courier.errors import NotDicom
from worker import app as product
from worker.app import app


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


def test_a_plain_celery_program_catches_the_class_of_an_error_that_it_imports_from_producer() -> None:
    stored = app.backend.prepare_exception(NotDicom("This is no image."))
    assert (stored["exc_module"], stored["exc_type"]) == ("producer.errors", "NotDicom")  # 0.1 has it there, too
    with pytest.raises(producer.errors.NotDicom, match="This is no image"):
        raise app.backend.exception_to_python(stored)


@pytest.mark.parametrize(
    ("known", "told"), [({"state": "running"}, []), ({"state": "done"}, []), ({}, [("j1", "FAILURE")])]
)
def test_a_process_that_was_ended_by_a_time_limit_is_no_end_of_a_job_that_the_ledger_knows(
    stored: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, known: dict[str, str], told: list[tuple[str, str]]
) -> None:
    monkeypatch.setattr(product, "_is_written_down", lambda _: bool(known))
    app.backend.mark_as_failure("j1", TimeLimitExceeded(1))
    assert stored == told


def test_a_ledger_that_is_away_is_no_end_of_a_job_whose_process_was_ended(
    stored: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: str) -> bool:
        raise redis.ConnectionError

    monkeypatch.setattr(product, "_is_written_down", away)
    app.backend.mark_as_failure("j1", TimeLimitExceeded(1))
    assert stored == []


@pytest.mark.parametrize(("result", "is_told"), [(TimeLimitExceeded(1), False), (NotDicom("No image."), True)])
def test_a_process_that_was_ended_has_told_no_outcome(
    monkeypatch: pytest.MonkeyPatch, result: Exception, is_told: bool
) -> None:
    told: list[str] = []
    monkeypatch.setattr(product, "heartbeat", lambda: SimpleNamespace(published=told.append))
    product.PacsTask().after_return("FAILURE", result, "j1", (), {}, None)
    assert told == (["j1"] if is_told else [])
