"""docs/pacs-oddities.md: a heading per habit, each with product and version, and no citation that leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTIONS = (ROOT / "docs" / "pacs-oddities.md").read_text(encoding="utf-8").split("\n### ")[1:]
HEADINGS = [section.partition("\n")[0] for section in SECTIONS]
CODE = sorted((ROOT / "worker").rglob("*.py"))
CITED = [
    (path.name, " ".join(heading.split()))
    for path in CODE
    for heading in re.findall(r'Oddity:\s+"([^"]+)"', path.read_text(encoding="utf-8"))
]


def test_no_habit_is_told_twice() -> None:
    assert len(HEADINGS) == len(set(HEADINGS)) > 0


@pytest.mark.parametrize("section", SECTIONS, ids=HEADINGS)
def test_each_habit_names_its_product_with_a_version_and_how_it_is_known(section: str) -> None:
    line = section.split("\n")[1]
    assert re.match(r"[A-Z][\w' ]+.*\d.*, (read|seen)\b", line), line


@pytest.mark.parametrize(("module", "heading"), CITED)
def test_what_the_code_cites_is_a_heading(module: str, heading: str) -> None:
    assert heading in HEADINGS


@pytest.mark.parametrize("module", ["msdicom.py", "dcm4chee.py", "orthanc.py"])
def test_each_dialect_cites_the_habits_that_shape_it(module: str) -> None:
    assert [heading for cited_in, heading in CITED if cited_in == module]
