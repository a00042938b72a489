"""JSON of results, encoded once, so that the ledger and the result back-end keep the same text.

Any language reads what is written: numbers are as exact as Python's, what is no number (NaN, infinity) is null. What a
result says is not this module's business.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Self

import orjson

#: The text of ``json.dumps``, in ASCII and with blanks, has at most so many times the characters of `encode`'s.
ASCII_GROWTH = 12
#: Where an integer may stand that is longer than 64 bits; orjson would read a float.
_MAY_BE_LONG = re.compile(rb"[:\[,\s-][0-9]{19}").search


def encode(value: object) -> str:
    """``value`` as JSON, in UTF-8 where orjson can write it; integers beyond 64 bits and halves of surrogate pairs,
    which it refuses, are written as Python's own encoder does.
    """
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # its JSONEncodeError is one
        return json.dumps(_without_nan(value), separators=(",", ":"), allow_nan=False)


def decode(text: bytes) -> Any:
    """What ``json.loads`` makes of ``text``, and its errors; in half the time, where orjson would read the same."""
    if _MAY_BE_LONG(text) is None:
        with contextlib.suppress(ValueError):  # it may be no JSON, or none that orjson takes: NaN, half of a pair
            return orjson.loads(text)
    return json.loads(text)


def _without_nan(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class EncodedResult(dict[str, Any]):
    """The result of a job with its JSON, ``text``."""

    def __init__(self, result: Mapping[str, Any]) -> None:
        super().__init__(result)
        self.text = encode(result)

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Self:
        return result if isinstance(result, cls) else cls(result)

    def read_back(self) -> dict[str, Any]:
        """What a reader of the text gets; the dict itself may hold a NaN."""
        found: dict[str, Any] = json.loads(self.text)
        return found
