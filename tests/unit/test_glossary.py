"""The glossary and the code have the same words, and a class name means one thing."""

from __future__ import annotations

import ast
import re
from collections import Counter
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
def sources(*folders: str) -> dict[str, str]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in paths
        if "node_modules" not in path.parts
    }


@cache
def definitions() -> tuple[set[str], dict[str, list[str]]]:
    """All names that our packages define; and where those of their classes, functions and methods stand."""
    names: set[str] = set()
    places: dict[str, list[str]] = {}
    for path, source in sources(*PACKAGES).items():
        for node in ast.walk(ast.parse(source)):
            names.update(names_defined(node))
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                places.setdefault(node.name, []).append(f"{path}:{node.lineno}")
    return names, places


def classes_of(source: str) -> list[str]:
    return [node.name.lstrip("_") for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]


def names_defined(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.attr]
    return [node.arg] if isinstance(node, ast.arg) else []


def test_a_class_name_occurs_once_in_the_code_base() -> None:
    everything = sources(*PACKAGES, "tests", "benchmarks", "docs/examples")
    read = re.compile(r"^[ \t]*class[ \t]+_*(\w+)", re.MULTILINE).findall
    maybe = {
        name
        for name, count in Counter(name for text in everything.values() for name in read(text)).items()
        if count > 1
    }
    # The words "class" and a name stand in texts too: what looks like a double is parsed.
    found = Counter(
        name for text in everything.values() if not maybe.isdisjoint(read(text)) for name in classes_of(text)
    )
    assert [name for name, count in found.items() if count > 1] == []


def test_each_name_of_the_glossary_is_one_of_the_code() -> None:
    rows = re.findall(r"^\| (`[^|]*) \|", GLOSSARY, re.MULTILINE)
    words = {word for row in rows for word in re.findall(r"`(\w+)`", row)}
    assert len(words) > 50
    assert sorted(words - {name.lstrip("_") for name in definitions()[0]}) == []


@pytest.mark.parametrize("old", sorted(set(OLD) - OTHER_SENSE))
def test_a_word_that_the_glossary_replaced_names_nothing_any_more(old: str) -> None:
    assert definitions()[1].get(old, []) == []
