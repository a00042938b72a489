"""The glossary and the code have the same words, and a class name means one thing."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("courier", "producer", "worker", "sandbox")
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")

#: Words that the glossary has replaced. They name no class, function or method any more.
OLD = [
    "carry",
    "Verdict",
    "Parked",
    "_Rest",
    "Run",
    "Pulse",
    "beating",
    "NotYet",
    "remember",
    "intend",
    "Tools",
    "Turns",
    "Parcel",
    "Kept",
    "settle",
    "Settled",
    "say_how",
    "shown_url",
    "shown_job",
    "shown_text",
    "bury",
    "hasten",
    "rouse",
    "Watcher",
    "watching",
    "JobSeen",
    "Seen",
    "something_else",
    "Conductor",
    "conducted",
    "survey",
    "Desk",
    "BatchDesk",
    "DeadDesk",
    "Work",
    "Spent",
    "Notes",
    "Pace",
    "_owed",
    "pay_up",
    "Passing",
    "store_passing",
    "takes_passing",
    "Sightings",
    "shut",
    "let_go",
    "hold_image",
    "hold_images",
    "trail",
    "Known",
    "_Patience",
    "allow",
    "mistrust",
    "PlainDicomWeb",
    "why_not",
    "Listed",
    "Given",
    "Unfit",
    "Moods",
    "calm",
    "Wish",
]
#: Where an old word is the right one for something else.
OTHER_SENSE = {
    "Turns",  # worker/runtime/consumer.py: turns of Celery's event loop
    "Work",  # worker/jobs/runner.py: what a job does
    "allow",  # worker/dicom/structure.py
    "settle",  # worker/jobs/placement.py, worker/jobs/lookup.py: to choose a place, to choose an answer
}


@cache
def modules(*folders: str) -> list[tuple[str, list[ast.AST]]]:
    """The files of some folders with all nodes of each."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [
        (path.relative_to(ROOT).as_posix(), list(ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
        for path in paths
        if "node_modules" not in path.parts
    ]


def names_defined(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg


def test_a_class_name_occurs_once_in_the_code_base() -> None:
    found = Counter(
        node.name.lstrip("_")
        for _, nodes in modules(*PACKAGES, "tests", "benchmarks", "docs/examples")
        for node in nodes
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in found.items() if count > 1] == []


def test_each_name_of_the_glossary_is_one_of_the_code() -> None:
    rows = re.findall(r"^\| (`[^|]*) \|", GLOSSARY, re.MULTILINE)
    words = {word for row in rows for word in re.findall(r"`(\w+)`", row)}
    assert len(words) > 50
    defined = {name.lstrip("_") for _, nodes in modules(*PACKAGES) for name in names_defined(nodes)}
    assert sorted(words - defined) == []


@pytest.mark.parametrize("old", sorted(set(OLD) - OTHER_SENSE))
def test_a_word_that_the_glossary_replaced_names_nothing_any_more(old: str) -> None:
    found = [
        f"{path}:{node.lineno}"
        for path, nodes in modules(*PACKAGES)
        for node in nodes
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == old
    ]
    assert found == []
