"""The TypedDicts of results are made from the classes that workers make results with, and say the same."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

import producer
from courier import result_types
from courier.results import BatchTrouble, Payload, Waiting
from producer import results


def test_the_types_are_those_of_the_code() -> None:
    assert result_types.FILE.read_text(encoding="utf-8") == result_types.module(), "run: python -m courier.schema"


def shape(schema: Any, definitions: dict[str, Any]) -> Any:
    """A JSON Schema without names, words and defaults."""
    if isinstance(schema, list):
        return [shape(one, definitions) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return shape(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    found = {name: value for name, value in schema.items() if name not in ("title", "description", "default", "$defs")}
    if "properties" in found:
        found["properties"] = {name: shape(one, definitions) for name, one in found["properties"].items()}
        found.pop("required", None)  # of a class with defaults it names those without; a worker writes them all
        return found
    return {name: shape(value, definitions) for name, value in found.items()}


@pytest.mark.parametrize("kind", [*result_types.results(), Waiting, BatchTrouble], ids=result_types.name_of)
def test_a_type_has_the_fields_that_a_worker_writes_and_all_of_them(kind: type[Payload]) -> None:
    written = kind.model_json_schema(mode="serialization")
    read = TypeAdapter(getattr(results, result_types.name_of(kind))).json_schema()
    assert shape(read, read.get("$defs", {})) == shape(written, written.get("$defs", {}))


@pytest.mark.parametrize("name", results.__all__)
def test_no_key_is_optional(name: str) -> None:
    kind = getattr(results, name)
    assert kind.__required_keys__ == set(kind.__annotations__)


def test_every_type_of_a_result_is_exported_by_the_package() -> None:
    names = {result_types.name_of(kind) for kind in result_types.results()}
    assert names <= set(producer.__all__)
