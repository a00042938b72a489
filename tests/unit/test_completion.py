"""Shell completion: all commands and options, quickly, and what is looked up without a word where it cannot be."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import tomli_w
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from producer.cli import completion, demo, main
from sandbox.processes import free_port

PACS = str(Path(sys.executable).with_name("pacs"))


def completed(*words: str) -> list[str]:
    """What the shell is offered for the last of ``words``."""
    light = completion.stand_in("pacs", json.loads(completion.WORDS.read_text(encoding="utf-8")))
    *before, last = words
    return [one.value for one in ShellComplete(light, {}, "pacs", "_PACS_COMPLETE").get_completions(before, last)]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings with two servers and a Redis that does not answer."""
    tree = {
        "servers": [{"name": name, "type": "dicomweb", "url": "http://h"} for name in ("msdicom", "dcm4chee")],
        "queue": {"ledger_url": f"redis://127.0.0.1:{free_port()}/0"},
    }
    path = tmp_path / "pacs.toml"
    path.write_text(tomli_w.dumps(tree))
    monkeypatch.setenv("PACS_CONFIG", str(path))
    return path


def test_the_words_are_those_of_the_commands() -> None:
    written = json.loads(completion.WORDS.read_text(encoding="utf-8"))
    assert completion.described(main) == written, "run: python -m producer.cli.completion"


@pytest.mark.parametrize(
    ("words", "some"),
    [
        (("jo",), ["jobs"]),
        (("batch", "re"), ["report", "resume", "retry"]),
        (("exists", ""), ["image", "series", "study"]),
        (("jobs", "--state", "w"), ["waiting"]),
        (("jobs", "--kind", "batch.m"), ["batch.migrate"]),
        (("jobs", "--li"), ["--limit"]),
        (("batch", "migrate", "--from"), ["--from", "--from-server"]),
        (("download", "1.2", "/tmp", "--format", "f"), ["files"]),
    ],
)
def test_commands_options_and_choices_are_completed(words: tuple[str, ...], some: list[str]) -> None:
    assert sorted(completed(*words)) == some


@pytest.mark.parametrize(
    "words",
    [
        ("jobs", "--server", ""),
        ("delete", "study", "1.2", "--server", ""),
        ("batch", "migrate", "--to-server", ""),
        ("server", "pause", ""),
    ],
)
def test_servers_are_those_of_the_settings(settings: Path, words: tuple[str, ...]) -> None:
    assert completed(*words) == ["msdicom", "dcm4chee"]
    assert completed(*words[:-1], "dc") == ["dcm4chee"]


def test_a_mode_may_be_a_server(settings: Path) -> None:
    assert completed("exists", "study", "1.2", "--mode", "") == ["either", "both", "msdicom", "dcm4chee"]


@pytest.mark.parametrize("words", [("cancel", ""), ("result", ""), ("batch", "show", ""), ("dead", "replay", "")])
def test_where_redis_does_not_answer_nothing_is_offered_and_nothing_is_said(
    settings: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert completed(*words) == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["not toml [", 'servers = "x"', "[queue]\nledger_url = 7\n", "servers = [1]"])
def test_settings_that_are_wrong_offer_nothing(settings: Path, text: str) -> None:
    settings.write_text(text)
    assert completed("jobs", "--server", "") == []
    assert completed("cancel", "") == []


_SHOW_LOADED = """
import sys
from producer.cli import main
try:
    main(prog_name="pacs")
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""


def asked_of_the_command(words: str, environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    count = len(words.split()) - (not words.endswith(" "))
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(count), "_PACS_COMPLETE": "bash_complete", **environ}
    return subprocess.run([PACS], env={**os.environ, **asked}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("words", "offered"), [("pacs jobs --server m", "msdicom"), ("pacs batch sh", "show")])
def test_the_command_itself_completes(settings: Path, words: str, offered: str) -> None:
    ended = asked_of_the_command(words, {"PACS_CONFIG": str(settings)})
    assert (ended.stdout.splitlines(), ended.stderr) == ([f"plain,{offered}"], "")


@pytest.mark.parametrize(
    ("words", "not_loaded"),
    [
        ("pacs cancel ", {"celery", "kombu", "rich", "pydantic", "producer.client", "courier.ledger"}),
        ("pacs jobs --server ", {"celery", "redis", "pydantic", "courier.settings"}),
        ("pacs upload --", {"celery", "redis", "pydantic", "courier", "producer.cli.uploads"}),
    ],
)
def test_completion_loads_no_command_and_none_of_the_large_libraries(
    settings: Path, words: str, not_loaded: set[str]
) -> None:
    count = len(words.split()) - (not words.endswith(" "))
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(count), "_PACS_COMPLETE": "bash_complete"}
    command = [sys.executable, "-c", _SHOW_LOADED]
    ended = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, check=False)
    loaded = set(ended.stderr.split())
    assert loaded & (not_loaded - {"courier"}) == set()
    if "courier" in not_loaded:
        assert {name for name in loaded if name.startswith("courier.")} == set()


# --- the demo ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, without a word in the environment of where Redis is."""
    for name in list(os.environ):
        if name in ("PACS_CONFIG", "BROKER_URL", "RESULT_BACKEND", "LEDGER_URL") or name.startswith("PACS__"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def listening() -> Iterator[int]:
    """The port of a Redis that answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def left_by_demo(place: Path, pid: int, port: int) -> Path:
    """The settings that a demo leaves."""
    folder = place / ".run" / f"demo-{pid}"
    folder.mkdir(parents=True)
    path = folder / "pacs.toml"
    queue = {"broker_url": f"redis://127.0.0.1:{port}/0", "ledger_url": f"redis://127.0.0.1:{port}/2"}
    path.write_text(tomli_w.dumps({"queue": queue, "servers": [{"name": "of-the-demo"}]}))
    return path


def dead_pid() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_the_one_demo_that_runs_is_found_from_its_folder_and_below(place: Path, listening: int) -> None:
    path = left_by_demo(place, os.getpid(), listening)
    (place / "below" / "deeper").mkdir(parents=True)
    assert demo.running_demos(place) == demo.running_demos(place / "below" / "deeper") == [path]
    assert completed("jobs", "--server", "") == ["of-the-demo"]


def test_a_demo_that_died_is_not_found(place: Path, listening: int) -> None:
    left_by_demo(place, dead_pid(), listening)
    assert demo.running_demos(place) == []


def test_a_process_that_has_the_number_of_a_demo_that_died_is_none(place: Path) -> None:
    left_by_demo(place, os.getpid(), free_port())
    assert demo.running_demos(place) == []


@pytest.mark.parametrize("text", ["", "queue = 1", "[queue]\nbroker_url = 1", '[queue]\nbroker_url = "redis://["', "["])
def test_settings_of_a_demo_that_cannot_be_read_are_none(place: Path, listening: int, text: str) -> None:
    left_by_demo(place, os.getpid(), listening).write_text(text)
    assert demo.running_demos(place) == []


def test_settings_of_another_user_are_not_trusted(place: Path, listening: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left_by_demo(place, os.getpid(), listening)
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    assert demo.running_demos(place) == []


def test_a_command_says_which_demo_it_asks_and_forgets_it_after(
    place: Path, listening: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = left_by_demo(place, os.getpid(), listening)
    with demo.used_if_alone():
        assert os.environ["PACS_CONFIG"] == str(path)
    assert "PACS_CONFIG" not in os.environ
    said = capsys.readouterr()
    assert said.out == ""
    assert f".run/demo-{os.getpid()}/pacs.toml" in said.err


@pytest.mark.parametrize("name", ["PACS_CONFIG", "BROKER_URL", "LEDGER_URL", "PACS__QUEUE__LEDGER_URL"])
def test_a_setting_comes_before_any_demo(
    place: Path, listening: int, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left_by_demo(place, os.getpid(), listening)
    monkeypatch.setenv(name, "set")
    before = dict(os.environ)
    with demo.used_if_alone():
        assert dict(os.environ) == before
    assert capsys.readouterr() == ("", "")


def test_of_two_demos_a_command_asks_for_one_and_begins_nothing(
    place: Path, listening: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by_demo(place, os.getpid(), listening)
    left_by_demo(place, os.getppid(), listening)
    ended = CliRunner().invoke(main, ["jobs"])
    assert ended.exit_code == 2
    assert "2 demos run here" in ended.stderr
    assert f"PACS_CONFIG=.run/demo-{os.getpid()}/pacs.toml" in ended.stderr
    assert completed("jobs", "--server", "") == []
