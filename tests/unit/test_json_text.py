"""A result is encoded once, as JSON that any language reads."""

from __future__ import annotations

import json
import math
from typing import Any

import kombu.utils.json
import pytest

from courier.json_text import ASCII_GROWTH, EncodedResult, decode, encode
from courier.results import Route, UploadPayload
from courier.settings import ResultSettings
from worker.app import ShownResult, app
from worker.jobs.result_fields import allowed, uids_only

META = {"status": "SUCCESS", "traceback": None, "children": [], "date_done": "2026-01-01", "task_id": "j1"}

PLAIN: list[Any] = [
    {"a": [1, 2.5, None, True, {"b": {}}], "": ""},
    {"name": "Müller^Jürgen", "kanji": "山田^太郎", "sign": "🩻", "control": "\x00\x1f\x7f\u2028"},
    {"signed": -(2**63), "unsigned": 2**64 - 1, "beyond": 2**64, "far": 10**40, "below": -(2**63) - 1},
    {"half": "\ud83d"},
    {"small": 1e-7, "large": 1.7976931348623157e308, "zero": -0.0, "third": 1 / 3, "whole": 1e22},
    {"both": [2**70, "\ud800", 1e-9]},
]


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize("value", [*PLAIN, {"\udc00": 1}])
def test_what_is_encoded_reads_back_as_it_was_exact_integers_and_half_pairs_included(value):
    assert json.loads(encode(value), parse_constant=no_constant) == value


@pytest.mark.parametrize("beside", [1, 2**70, "\ud83d"])
def test_what_is_no_number_is_null_as_it_always_was(beside):
    text = encode({"a": math.nan, "b": [math.inf, -math.inf], "c": beside})
    assert json.loads(text, parse_constant=no_constant) == {"a": None, "b": [None, None], "c": beside}


@pytest.mark.parametrize("value", [{"a": {1, 2}}, {"a": object()}])
def test_what_is_no_json_at_all_is_refused(value):
    with pytest.raises(TypeError):
        encode(value)


@pytest.mark.parametrize("value", PLAIN)
def test_pythons_own_encoder_writes_no_more_than_a_known_multiple(value):
    assert len(json.dumps(value)) <= ASCII_GROWTH * len(encode(value))


@pytest.mark.parametrize("text", ["x" * 40, "ü" * 40, "山" * 40, "🩻" * 40, '"' * 40, "\x01" * 40])
def test_metadata_fit_into_a_result_by_the_same_measure_as_before(text):
    dataset = {"00100010": {"vr": "PN", "Value": [text]}, "00080018": {"vr": "UI", "Value": ["1.2"]}}
    size = len(json.dumps([dataset]))
    results = ResultSettings(metadata="full")
    assert allowed([dataset], results, max_bytes=size) == ([dataset], [])
    assert allowed([dataset], results, max_bytes=size - 1) == ([uids_only(dataset)], ["metadata_reduced_to_uids"])


READ = [
    *(json.dumps(value).encode() for value in PLAIN),
    *(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") for value in PLAIN),
    *(b"-0", b"1e999", b"[-1E400]", b"0.1e-400", b"18446744073709551615", b"[18446744073709551616]", b"1.0", b"1E2"),
    *(
        b"[-9223372036854775808]",
        b"[-9223372036854775809]",
        b'{"a":\n99999999999999999999}',
        b"[1, 99999999999999999999]",
    ),
    *(b'{"a":1,"a":2}', b'{"00080018":{"Value":["2.25.123456789012345678901234567890"]}}', b'"\\u0000"'),
    *(b"\xef\xbb\xbf[1]", '{"ä": [1]}'.encode("utf-16"), b"[Infinity, -Infinity]", b"[1234567890123456789012.5]"),
    *(b"", b"[1,]", b"[NaN", b'"\xff"', b'"\t"', b"0123", b"<html>"),
]


@pytest.mark.parametrize("text", READ)
def test_what_a_server_sends_is_read_as_python_itself_reads_it(text):
    def said(read: Any) -> Any:
        try:
            value = read(text)
        except ValueError as error:
            return type(error)
        return repr(value)

    assert said(decode) == said(json.loads)


def payload(metadata: dict[str, Any]) -> UploadPayload:
    fields = {"server_name": "a", "server_type": "orthanc", "study_uid": "1.2", "series_uid": "1.3", "image_uid": "1.4"}
    return UploadPayload(
        job_id="j1",
        study_action="created",
        route=Route(reason="new_study", study_on=[], candidates=["a"]),
        sop_class_uid="1",
        transfer_syntax_uid="1",
        size_bytes=1,
        sha256="0",
        warnings=[],
        metadata=metadata,
        viewer_url="",
        source="",
        timings_ms={"fetch": 0.1},
        attempts=1,
        **fields,
    )


@pytest.mark.parametrize("metadata", [{}, {"a": math.nan}, *PLAIN])
def test_an_uploads_result_is_stored_as_pydantic_would_dump_it_in_the_same_order(metadata):
    result = payload(metadata)
    stored = json.loads(EncodedResult(result.as_json()).text)
    dumped = json.loads(json.dumps(result.model_dump(mode="json", by_alias=True)))
    assert stored == dumped
    assert list(stored) == list(dumped)


@pytest.mark.parametrize("value", PLAIN)
def test_the_result_back_end_stores_the_text_that_the_ledger_has(value):
    result = EncodedResult(value)
    stored = app.backend.encode({**META, "result": ShownResult(result)})
    assert result.text in stored
    assert kombu.utils.json.loads(stored) == {**META, "result": value}


def test_the_result_back_end_stores_as_before_what_is_not_encoded_yet():
    for result in (None, 1, {"a": 1}, ShownResult({"a": 1}), [1]):
        plain = {"a": 1} if isinstance(result, ShownResult) else result
        assert json.loads(app.backend.encode({**META, "result": result})) == {**META, "result": plain}
    assert json.loads(app.backend.encode([1, "j1", "SUCCESS", ShownResult(EncodedResult({"a": math.nan}))])) == [
        *(1, "j1", "SUCCESS"),
        {"a": None},
    ]


def test_a_result_is_encoded_once_however_often_it_is_asked_for():
    result = EncodedResult({"a": 1})
    assert EncodedResult.of(result) is result
    assert result.read_back() == {"a": 1}
