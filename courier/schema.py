"""A JSON Schema for every message and result, the error, and why a job waits.

Made from the classes in ``messages.py`` and ``results.py``.

``python -m courier.schema`` writes them to ``docs/schema``, and the types in ``producer/results.py``; a test compares.
Nothing else belongs here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from courier import result_types
from courier.errors import CourierError
from courier.messages import Job
from courier.results import Payload, Waiting

DIALECT = "https://json-schema.org/draft/2020-12/schema"
FOLDER = Path(__file__).parents[1] / "docs" / "schema"


def schemas() -> dict[str, dict[str, Any]]:
    """The documents by file name."""
    messages = {f"{kind.__name__}.json": _schema(kind, result=False) for kind in _below(Job)}
    results = {f"{kind.__name__}.json": _schema(kind, result=True) for kind in _below(Payload)}
    return {**messages, **results, "Error.json": _error(), "Waiting.json": _schema(Waiting, result=True)}


def _below(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)


def _schema(kind: type[BaseModel], *, result: bool) -> dict[str, Any]:
    return {"$schema": DIALECT, **kind.model_json_schema(mode="serialization" if result else "validation")}


def _error() -> dict[str, Any]:
    """What the exception of a failed job carries as its one argument."""
    text = {"type": ["string", "null"]}
    return {
        "$schema": DIALECT,
        "title": "Error",
        "description": "Why a job failed: the code is for machines, the message is one sentence for people.",
        "type": "object",
        "properties": {
            "code": {"enum": sorted(kind.code for kind in CourierError.subclasses())},
            "message": {"type": "string"},
            "server_name": text,
            "server_type": text,
            "details": {"type": "object"},
        },
        "required": ["code", "message", "server_name", "server_type", "details"],
    }


def written(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def write(folder: Path = FOLDER) -> None:
    """Put every document into ``folder``, and take away those whose class is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = schemas()
    for name, schema in documents.items():
        (folder / name).write_text(written(schema), encoding="utf-8")
    for path in folder.glob("*.json"):
        if path.name not in documents:
            path.unlink()


if __name__ == "__main__":
    write()
    result_types.write()
