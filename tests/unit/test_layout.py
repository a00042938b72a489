"""The lay-out holds: rooms have cards and nouns, Celery stays at its doors, packaging names every package."""

from __future__ import annotations

import ast
import importlib
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from courier import celery_settings
from courier.settings import Settings

ROOT = Path(__file__).parents[2]
PACKAGES = ("courier", "producer", "worker", "sandbox")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
CELERY_LIVES_IN = (
    "courier/celery_internals.py",
    "courier/celery_settings.py",
    "courier/signing.py",
    "producer/client.py",
    "worker/app.py",
    "worker/pool.py",
    "worker/runtime/",
    "worker/tasks/",
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_begins_with_its_room_card(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert path.name == "__init__.py" or ast.get_docstring(ast.parse(source)), "what lives here, what must not?"


def test_rooms_are_named_by_their_noun() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "core", "misc"}
    assert [name_of(path) for path in MODULES if vague & {path.stem, *path.relative_to(ROOT).parts}] == []


def imported_by(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_celery_is_named_only_at_the_doors() -> None:
    inside = [
        name_of(path)
        for path in MODULES
        if {"celery", "kombu", "billiard"} & imported_by(path) and not name_of(path).startswith(CELERY_LIVES_IN)
    ]
    assert inside == []


def test_every_deletion_on_a_server_voids_receipts_first() -> None:
    """`Pacs.delete` is known by its keyword; above the dialects only `Receipts` calls it."""
    past_them = [
        f"{name_of(path)}:{node.lineno}"
        for path in MODULES
        if name_of(path).startswith(("worker/jobs/", "worker/batches/")) and path.name != "receipts.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "delete"
        if "permanent" in {keyword.arg for keyword in node.keywords}
        if "receipts" not in ast.unparse(node.func.value).lower()
    ]
    assert past_them == []


def test_a_program_that_enqueues_loads_no_worker_no_dicom_and_no_http_client() -> None:
    show = (
        "import importlib, pkgutil, sys, producer;"
        "[importlib.import_module(one.name) for one in pkgutil.walk_packages(producer.__path__, 'producer.')];"
        "found = {'worker', 'pydicom', 'requests', 'boto3', 'azure', 'msal', 'numpy', 'sandbox'} & set(sys.modules);"
        "print(*sorted(found))"
    )
    loaded = subprocess.run([sys.executable, "-c", show], check=True, capture_output=True, text=True).stdout
    assert loaded.strip() == ""


def test_celeryconfig_at_the_top_only_re_exports_and_is_loaded_by_no_package() -> None:
    source = (ROOT / "celeryconfig.py").read_text(encoding="utf-8")
    assert [ast.unparse(node) for node in ast.parse(source).body[1:]] == ["from courier.celery_settings import *"]
    exported = {
        name: value for name, value in runpy.run_path(str(ROOT / "celeryconfig.py")).items() if not name.startswith("_")
    }
    ours = {name: value for name, value in vars(celery_settings).items() if not name.startswith("_")}
    assert exported == ours
    assert [name_of(path) for path in MODULES if "celeryconfig" in path.read_text(encoding="utf-8")] == []


def test_the_settings_are_found_under_their_name_of_version_0_1() -> None:
    assert importlib.import_module("worker.settings").Settings is Settings


def test_packaging_names_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    present = {name_of(path.parent).replace("/", ".") for path in MODULES if path.name == "__init__.py"}
    assert set(listed) == {name for name in present if name.split(".")[0] != "sandbox"}


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(wish for extra in extras for wish in extra)]
    names = {wish.split(">=")[0].split("[")[0].lower().replace("_", "-") for wish in wanted}
    assert names - pinned == set()


def test_the_settings_of_docker_compose_are_valid() -> None:
    settings = Settings.load({"PACS_CONFIG": str(ROOT / "docker" / "pacs.toml")})
    assert [server.name for server in settings.servers] == ["msdicom", "dcm4chee"]
