"""Numbers as people write them on a command line: how often, how much a second, at what time of the day."""

from __future__ import annotations

import re
from typing import Any

import click

from courier.windows import check_window
from producer.errors import InvalidRequest

_RATE = re.compile(r"(\d+(?:\.\d+)?)(?:/(s|m|min|h))?")
_PER_S = {None: 1, "s": 1, "m": 60, "min": 60, "h": 3600}
_BANDWIDTH = re.compile(r"(\d+(?:\.\d+)?)\s*([kMG]?i?)B(?:/s)?")
_BYTES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "ki": 2**10, "Mi": 2**20, "Gi": 2**30}


class RateParam(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """``50/s``, ``600/min`` or ``50``: requests a second."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = _RATE.fullmatch(str(value))
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is no rate, as 50/s or 600/min.", param, ctx)
        return float(match[1]) / _PER_S[match[2]]


class Bandwidth(click.ParamType):  # type: ignore[type-arg]
    """``20MB/s``, ``512kB/s``, ``1GiB/s``: bytes a second."""

    name = "bandwidth"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = _BANDWIDTH.fullmatch(str(value))
        if match is None or match[2] not in _BYTES or float(match[1]) * _BYTES[match[2]] < 1:
            self.fail(f"{value!r} is no bandwidth, as 20MB/s or 512kB/s.", param, ctx)
        return float(match[1]) * _BYTES[match[2]]


class WindowParam(click.ParamType):  # type: ignore[type-arg]
    """``20:00-06:00``, with the name of a time zone if it is not UTC: ``20:00-06:00 Europe/Berlin``."""

    name = "window"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return check_window(str(value))
        except InvalidRequest as error:
            self.fail(f"{value!r}: {error.message}", param, ctx)
