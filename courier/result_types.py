"""Writes ``producer/results.py``: one TypedDict per class in ``courier/results.py``, for editors and type checkers.

`courier.schema` writes it with the JSON Schemas; a test compares. A result is made by `Payload.as_json`, which leaves
no field out, so every key is required.
"""

from __future__ import annotations

import json
import keyword
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from courier.results import BatchChunkPayload, BatchEndPayload, BatchPayload, BatchStatePayload, Payload, Waiting

FILE: Final = Path(__file__).parents[1] / "producer" / "results.py"
#: Results that users know by another name than that of their class. All others: ``UploadPayload`` is `UploadResult`.
_NAMES: Final[dict[type[BaseModel], str]] = {
    BatchPayload: "DeleteAllResult",
    BatchEndPayload: "BatchResult",
    BatchStatePayload: "BatchStateResult",
}
_WIDTH: Final = 120
_HEADER: Final = '''"""What `Handle.result` returns; ``python -m courier.schema`` makes it from courier/messages.py."""

from typing import Any, Literal

from typing_extensions import TypedDict
'''


def name_of(kind: type[BaseModel]) -> str:
    if issubclass(kind, Payload):
        return _NAMES.get(kind, f"{kind.__name__.removesuffix('Payload')}Result")
    return f"{kind.__name__}Dict"


def results() -> list[type[Payload]]:
    """The classes of all results. `pacs.batch.chunk` has none: a batch sends it to itself."""
    found = [kind for child in Payload.__subclasses__() for kind in (child, *child.__subclasses__())]
    return sorted((kind for kind in found if kind is not BatchChunkPayload), key=name_of)


def module() -> str:
    """The text of ``producer/results.py``; a class stands behind those that it is made of."""
    kinds: dict[type[BaseModel], None] = {}
    roots: list[type[BaseModel]] = [*results(), Waiting]
    for kind in roots:
        _collect(kind, kinds)
    names = "".join(f"    {json.dumps(name)},\n" for name in sorted(name_of(kind) for kind in kinds))
    parts = (_HEADER, f"__all__ = [\n{names}]\n", *(_definition(kind) for kind in kinds))
    return "\n\n".join(part.rstrip("\n") if part is _HEADER else part for part in parts)


def _collect(kind: type[BaseModel], kinds: dict[type[BaseModel], None]) -> None:
    for field in kind.model_fields.values():
        for inner in _models(field.annotation):
            _collect(inner, kinds)
    kinds.setdefault(kind)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not Literal:
        for argument in get_args(annotation):
            yield from _models(argument)


def _definition(kind: type[BaseModel]) -> str:
    fields = [(field.alias or name, _text(field.annotation)) for name, field in kind.model_fields.items()]
    written = kind.__dict__.get("__doc__")
    doc = f'"""{written.rstrip()}"""\n' if written and "\n" not in written else f'"""{written}"""\n' if written else ""
    if any(keyword.iskeyword(name) for name, _ in fields):  # `pass` cannot be written as an attribute
        items = "".join(_line(8, json.dumps(name), text, ",") for name, text in fields)
        title = name_of(kind)
        return f"{title} = TypedDict(\n    {json.dumps(title)},\n    {{\n{items}    }},\n)\n" + _flush_left(doc)
    lines = "".join(_line(4, name, text) for name, text in fields)
    return f"class {name_of(kind)}(TypedDict):\n" + (f"    {doc}\n" if doc else "") + lines


def _line(indent: int, name: str, text: str, end: str = "") -> str:
    """A line as ruff formats it: what is too long is broken in its brackets."""
    blanks, line = " " * indent, f"{name}: {text}{end}"
    if indent + len(line) > _WIDTH:
        start, _, rest = line.partition("[")
        inside, _, tail = rest.rpartition("]")
        line = f"{start}[\n{blanks}    {inside}\n{blanks}]{tail}"
    return f"{blanks}{line}\n"


def _flush_left(doc: str) -> str:
    return "\n".join(line.removeprefix("    ") for line in doc.split("\n"))


def _text(annotation: Any) -> str:
    """The annotation as it is written."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _text(arguments[0])
    if origin in (Union, types.UnionType):
        return " | ".join(_text(argument) for argument in arguments)
    if origin is Literal:
        return f"Literal[{_listed(json.dumps(one) if isinstance(one, str) else repr(one) for one in arguments)}]"
    if origin in (list, dict):
        return f"{origin.__name__}[{_listed(_text(argument) for argument in arguments)}]"
    if annotation in (None, type(None), Any):
        return "Any" if annotation is Any else "None"
    return name_of(annotation) if issubclass(annotation, BaseModel) else str(annotation.__name__)


def _listed(texts: Iterable[str]) -> str:
    return ", ".join(texts)


def write(file: Path = FILE) -> None:
    file.write_text(module(), encoding="utf-8")
