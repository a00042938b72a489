"""From where settings come, as a tree: the file that ``PACS_CONFIG`` names, and variables of the environment over it.

What is wrong in it is told in one sentence that names the variable or the key, and each server by its name.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

if TYPE_CHECKING:  # shell completion reads settings without checking them, and shall not load pydantic
    from pydantic import BaseModel, ValidationError

#: Variables of the environment that stand for a key; a later one lies over an earlier one.
SHORT_NAMES: Final = {
    "BROKER_URL": ("queue", "broker_url"),
    "RESULT_BACKEND": ("queue", "result_backend"),
    "LEDGER_URL": ("queue", "ledger_url"),
    "OTEL_SERVICE_NAME": ("telemetry", "service_name"),
    "OTEL_EXPORTER_OTLP_ENDPOINT": ("telemetry", "otlp_endpoint"),
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": ("telemetry", "otlp_endpoint"),
}
_PREFIX: Final = "PACS__"


class SettingsError(Exception):
    """A setting is wrong; the one sentence names the key."""


def read(environ: Mapping[str, str]) -> dict[str, Any]:
    """What is set, not validated yet; `SettingsError` where it cannot be read at all."""
    tree = _read_file(environ.get("PACS_CONFIG"))
    for variable, value in sorted(environ.items()):
        if variable.startswith(_PREFIX):
            _lay_over(tree, variable, variable.removeprefix(_PREFIX).lower().split("__"), _literal(value))
    for variable, keys in SHORT_NAMES.items():
        if environ.get(variable):
            _lay_over(tree, variable, keys, environ[variable])
    return tree


def sentence(error: ValidationError, model: type[BaseModel], tree: Any, environ: Mapping[str, str]) -> str:
    """The first of the errors, with its key; of the value nothing is quoted."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    at = first["loc"]
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        said = _no_such_key(str(at[-1]), _names_at(model, at[:-1]))
    elif first["type"] in ("tuple_type", "model_type") and (variable := _variable_of(at, environ)):
        said = f'the variable {variable} is not JSON; lists are written as ["a", "b"], tables as {{"a": 1}}'
    elif at == ("servers",) and first["type"] == "tuple_type":
        said = f"it is a list: write [[servers]] tables in the file, or all of them as JSON in {_PREFIX}SERVERS"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"setting {_key(at, tree)}: {said}{more}"


def _read_file(path: str | None) -> dict[str, Any]:
    if not path:
        return {}
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"PACS_CONFIG names {path}, which cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line = before.count(b"\n") + 1
        raise SettingsError(f"{path} is not UTF-8 (line {line}); save it in that encoding") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from None


def _lay_over(tree: dict[str, Any], variable: str, keys: Sequence[str], value: Any) -> None:
    at: Any = tree
    for key in keys[:-1]:
        at = at[_place(at, variable, key)] if isinstance(at, list) else at.setdefault(key, {})
        if not isinstance(at, dict | list):
            raise SettingsError(f"the variable {variable} stands for no key: {key} is a value, and no table")
    at[_place(at, variable, keys[-1]) if isinstance(at, list) else keys[-1]] = value


def _place(rows: list[Any], variable: str, key: str) -> int:
    """Where in a list the row is that is called, or numbered, ``key``."""
    names = [str(row["name"]) if isinstance(row, dict) and "name" in row else "" for row in rows]
    for place, name in enumerate(names):
        if name and name.lower() == key:
            return place
    if key.isascii() and key.isdigit() and int(key) < len(rows):
        return int(key)
    known = ", ".join(f"{place} ({name})" if name else f"{place}" for place, name in enumerate(names))
    raise SettingsError(f"the variable {variable} names {key!r} of a list that has {known or 'no entry'}")


def _literal(text: str) -> Any:
    """Lists and tables arrive as JSON; everything else stays text, which pydantic converts."""
    if text[:1] not in ("[", "{"):
        return text
    try:
        return json.loads(text)
    except ValueError:  # such as a prefix of keys with a hash tag
        return text


def _variable_of(at: Sequence[str | int], environ: Mapping[str, str]) -> str:
    """The variable that should have held a list or a table for this key, and holds no JSON; "" if there is none."""
    variable = _PREFIX + "__".join(str(one) for one in at).upper()
    text = environ.get(variable, "")
    return variable if text[:1] in ("[", "{") and isinstance(_literal(text), str) else ""


def _key(at: Sequence[str | int], tree: Any) -> str:
    """The path to a key, in which the entries of lists bear their names."""
    path = []
    for key in at:
        try:
            tree = tree[key]
        except (LookupError, TypeError):
            tree = None
        named = isinstance(key, int) and isinstance(tree, dict) and isinstance(tree.get("name"), str)
        path.append(tree["name"][:64] if named else str(key))
    return ".".join(path)


def _no_such_key(key: str, names: Iterable[str]) -> str:
    known = sorted(names)
    near = difflib.get_close_matches(key.lower(), known, 1)
    return f"there is no such key; {f'did you mean {near[0]}?' if near else 'known are ' + ', '.join(known)}"


def _names_at(model: Any, at: Sequence[str | int]) -> set[str]:
    """The keys of the table at ``at``."""
    for key in at:
        if isinstance(key, str):
            model = _table_in(model.model_fields[key].annotation)
    return set(model.model_fields)


def _table_in(annotation: Any) -> type[BaseModel] | None:
    """The model in ``annotation``, perhaps in a list, or optional."""
    from pydantic import BaseModel  # noqa: PLC0415 (only a wrong setting needs it)

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_table_in, get_args(annotation))), None)
