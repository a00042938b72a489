"""What is loaded when, counted in modules; `benchmarks/startup.py` has the seconds, which depend on the machine."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import producer
from courier import __version__
from producer.cli import COMMANDS, ListedCommand, main

HEAVY = {"celery", "kombu", "pydantic", "redis", "rich"}
PACS = "from producer.cli import main; main(prog_name='pacs')"


def run(program: str, *words: str, **environ: str) -> tuple[str, str, list[str]]:
    """What a program of its own printed, what it complained of, and which heavy packages it had loaded at its end."""
    report = f"atexit.register(lambda: print('loaded', *(sys.modules.keys() & {HEAVY}), file=sys.stderr))"
    code = [sys.executable, "-c", f"import atexit, sys\n{report}\n{program}"]
    ended = subprocess.run([*code, *words], check=False, capture_output=True, text=True, env=environ)
    *complaint, last = ended.stderr.splitlines()
    assert "Traceback" not in ended.stderr
    assert last.startswith("loaded")
    return ended.stdout, "\n".join(complaint), sorted(last.split()[1:])


@pytest.mark.parametrize(
    "program",
    [
        "import producer",
        "import producer; dir(producer); hasattr(producer, 'couriers')",
        "from producer import BatchResult, UploadResult",
        "from producer.errors import CourierError",
        "import producer; producer.errors.CourierError, producer.results.UploadResult",
    ],
)
def test_a_program_that_names_types_and_errors_loads_no_library(program: str) -> None:
    assert run(program) == ("", "", [])


def test_a_courier_loads_celery_and_no_table() -> None:
    assert run("from producer import Courier") == ("", "", ["celery", "kombu", "pydantic", "redis"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--version"], f"pacs, version {__version__}\n"),
        (["--help"], "Usage: pacs"),
        (["-h"], "Usage: pacs"),
        ([], "Usage: pacs"),
        (["uplod"], "No such command 'uplod'"),
        (["--verison"], "No such option"),
        (["up\x1b[31mload"], r"No such command 'up\x1b[31mload'"),
    ],
)
def test_what_needs_no_command_loads_none(words: list[str], said: str) -> None:
    printed, complaint, loaded = run(PACS, *words)
    assert said in printed + complaint
    assert loaded == []


def test_a_command_loads_what_it_needs() -> None:
    printed, complaint, loaded = run(PACS, "upload", "--help")
    assert (printed.split("\n")[0], complaint) == ("Usage: pacs upload [OPTIONS] URL [URL…|-]", "")
    assert loaded == sorted(HEAVY)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("pacs d", ["database", "dead", "delete", "delete-all", "doctor", "download"]),
        ("pacs --v", ["--version"]),
        ("pacs upload --q", []),
        ("pacs upload --ser", ["--server"]),
        ("pacs batch und", ["undo"]),
        ("pacs uplod --s", []),
    ],
)
def test_a_shell_completes_commands_and_options_without_loading_a_command(words: str, found: list[str]) -> None:
    place = str(words.count(" "))
    how = {"_PACS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": place}
    printed, complaint, loaded = run(PACS, **how)
    assert ([line.partition(",")[2] for line in printed.split("\n") if line], complaint) == (found, "")
    assert loaded == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_listed_with_its_own_words(name: str) -> None:
    listed, command = ListedCommand(name, *COMMANDS[name]), main.load(name)
    assert not isinstance(command, ListedCommand)
    assert (command.name, command.hidden, command.deprecated) == (name, listed.hidden, listed.deprecated)
    limits = range(10, 200)
    assert [listed.get_short_help_str(limit) for limit in limits] == [
        command.get_short_help_str(limit) for limit in limits
    ]


def test_a_command_interrupted_while_it_is_loaded_ends_as_any_interrupted_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(command: ListedCommand) -> click.Command:
        raise KeyboardInterrupt

    monkeypatch.setattr(ListedCommand, "load", interrupted)
    monkeypatch.setitem(main.commands, "upload", ListedCommand("upload", *COMMANDS["upload"]))
    ended = CliRunner().invoke(main, ["upload", "--help"])
    assert (ended.exit_code, ended.stdout, ended.stderr) == (130, "", "pacs: Interrupted.\n")


def test_the_group_batch_is_loaded_with_all_its_commands() -> None:
    batch = main.load("batch")
    assert isinstance(batch, click.Group)
    assert {"upload", "migrate", "delete", "undo", "watch"} <= batch.commands.keys()


def typed() -> dict[str, str]:
    """The names that a type checker sees, and the modules that they are of."""
    tree = ast.parse(Path(str(producer.__file__)).read_text(encoding="utf-8"))
    (branch,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in branch.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_each_public_name_is_what_a_type_checker_takes_it_for() -> None:
    homes = typed()
    assert sorted(homes) == sorted(producer.__all__)
    for name, home in homes.items():
        assert getattr(producer, name) is getattr(import_module(home), name)


def test_each_public_name_can_be_imported_first_and_is_listed() -> None:
    assert set(producer.__all__) <= set(dir(producer))
    printed, _, _ = run("import producer; print(*dir(producer)); from producer import *; print(*sorted(globals()))")
    listed, imported = printed.splitlines()
    assert set(producer.__all__) <= set(listed.split()) & set(imported.split())


@pytest.mark.parametrize("name", ["batches", "client", "dead_letters", "errors", "handle", "inputs", "orders", "plans"])
def test_modules_that_a_program_did_not_import_by_name_are_found_as_before(name: str) -> None:
    printed, complaint, _ = run(f"import producer; print(producer.{name}.__name__, {name!r} in dir(producer))")
    assert (printed, complaint) == (f"producer.{name} True\n", "")


@pytest.mark.parametrize("name", ["Couriers", "cli", "doctor", "__wrapped__", "upload_result"])
def test_any_other_name_is_an_attribute_error_and_loads_nothing(name: str) -> None:
    program = f"import producer\ntry: producer.{name}\nexcept AttributeError as error: print(error)"
    assert run(program) == (f"module 'producer' has no attribute '{name}'\n", "", [])
