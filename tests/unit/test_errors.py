"""The tree of errors and its drawing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import courier.errors
import producer.errors
from courier.errors import CourierError, NeedsPerson, PacsUnavailable, Refused, TryAgain, from_payload

KINDS = sorted(CourierError.subclasses(), key=lambda kind: kind.code)
CONTRACT_CODES = [
    "image_already_exists",
    "not_found",
    "invalid_request",
    "confirmation_required",
    "source_not_allowed",
    "source_not_found",
    "source_denied",
    "source_unauthorized",
    "source_too_large",
    "source_unreachable",
    "source_truncated",
    "not_dicom",
    "missing_uid",
    "invalid_uid",
    "study_conflict",
    "pacs_rejected",
    "pacs_unavailable",
    "pacs_unauthorized",
    "pacs_misanswered",
    "poisoned",
    "cancelled",
]


def test_there_is_one_class_for_each_code_of_the_contract() -> None:
    assert [kind.code for kind in KINDS] == sorted(CONTRACT_CODES)


def test_the_drawing_shows_every_class_with_its_code() -> None:
    drawn = set(re.findall(r"[├└]── (\w+) +(\w+)\n", courier.errors.__doc__ or ""))
    assert drawn == {(kind.__name__, kind.code) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.code)
def test_every_error_is_on_one_branch_and_offered_to_producers(kind: type[CourierError]) -> None:
    assert sum(issubclass(kind, branch) for branch in (TryAgain, Refused, NeedsPerson)) == 1
    assert getattr(producer.errors, kind.__name__) is kind


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.code)
def test_an_error_survives_json_as_celery_stores_it(kind: type[CourierError]) -> None:
    error = kind("Do this.", server_name="msdicom", server_type="msdicom", details={"a": 1})
    rebuilt = kind(*json.loads(json.dumps(error.args)))
    assert rebuilt.payload == error.payload == from_payload(error.payload).payload
    assert type(from_payload(error.payload)) is kind
    assert str(rebuilt) == f"{kind.code}: Do this."


def test_what_a_server_asks_for_is_kept() -> None:
    assert PacsUnavailable("Later.", retry_after_s=7).retry_after_s == 7


def test_no_error_carries_a_code_that_the_contract_does_not_know() -> None:
    source = (Path(courier.errors.__file__)).read_text(encoding="utf-8")
    assert set(re.findall(r'code = "(\w+)"', source)) == set(CONTRACT_CODES)
