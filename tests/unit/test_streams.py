"""The real command with standard streams that are closed or full, and with readers that leave: a sentence at most."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from producer.cli.studies import write_csv
from producer.plans import PlanHeader, PlanLine, write
from producer.terminal import flush_output, prepare_output
from tests.terminals import Ended, in_shell, in_terminal

NO_BROKER = {"BROKER_URL": "redis://127.0.0.1:1/0", "LEDGER_URL": "", "PACS_CONFIG": ""}


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.jsonl"
    with path.open("w", encoding="utf-8") as out:
        write(
            PlanHeader(kind="upload"), [PlanLine(item=f"https://host/{n}.dcm", why=f"why {n}") for n in range(99)], out
        )
    return path


def run(line: str) -> Ended:
    ended = in_shell(line, env=NO_BROKER)
    assert "Traceback" not in ended.errors
    assert "Exception ignored" not in ended.errors
    return ended


@pytest.mark.parametrize(
    "words", ["--help", "--version", "batch --help", "doctor", "doctor --json", "batch apply PLAN --dry-run"]
)
def test_a_full_disk_is_one_sentence(plan: Path, words: str) -> None:
    ended = run(f"pacs {words.replace('PLAN', str(plan))} > /dev/full")
    assert ended.status == 1
    (sentence,) = ended.errors.strip().splitlines()
    assert sentence == "pacs: Standard output cannot be written: No space left on device."


@pytest.mark.parametrize(
    "words", ["upload -", "batch upload -", "batch delete - --yes", "batch download - --to-folder /x"]
)
def test_a_closed_standard_input_is_one_sentence_where_it_is_to_be_read(words: str) -> None:
    ended = run(f"pacs {words} <&-")
    assert ended.status == 2
    (sentence,) = ended.errors.strip().splitlines()
    assert sentence == "pacs: Standard input is closed, so there is nothing to read from it."


@pytest.mark.parametrize("words", ["delete study 1.2.3", "batch delete 1.2.3", "delete study 1.2.3 --json"])
def test_with_a_closed_standard_input_there_is_nothing_to_ask_on(words: str) -> None:
    ended = run(f"pacs {words} <&-")
    assert ended.status == 1
    assert "there is no terminal to ask for confirmation" in ended.errors


def test_what_reads_nothing_goes_on_without_standard_input(plan: Path) -> None:
    ended = run(f"pacs batch apply {plan} --dry-run <&-")
    assert (ended.status, "99 of 99 items to do" in ended.raw, ended.errors) == (0, True, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_outputs_end_in_no_traceback(plan: Path, closed: str) -> None:
    assert run(f"pacs batch apply {plan} --dry-run {closed}").status == 0
    assert run(f"pacs batch apply {plan} --dry-run --json {closed}").status == 0


def test_csv_for_a_closed_output_goes_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    prepare_output()
    with sys.stdout as nowhere:
        write_csv([], nowhere)
        flush_output()


def test_an_empty_url_is_not_told_as_one_of_standard_input() -> None:
    ended = run("pacs upload ''")
    assert (ended.status, "standard input" in ended.errors, "No URL was given" in ended.errors) == (2, False, True)
    assert "No URL was given on standard input" in run("pacs upload - < /dev/null").errors


@pytest.mark.parametrize("words", ["--help", "doctor --json", "batch apply PLAN --dry-run"])
def test_a_reader_that_leaves_is_no_news(plan: Path, words: str) -> None:
    ended = run(f"pacs {words.replace('PLAN', str(plan))} | true; exit ${{PIPESTATUS[0]}}")
    assert (ended.status in (0, 1, 3), ended.errors) == (True, "")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "latin-1"])
def test_urls_on_standard_input_are_read_as_a_list_is(tmp_path: Path, encoding: str) -> None:
    listed = tmp_path / "list.txt"
    listed.write_bytes("https://host/\u00e4.dcm\r\n".encode(encoding))
    ended = run(f"pacs upload - < {listed}")
    assert ended.status == (2 if encoding == "latin-1" else 3)
    assert ("line 1: not UTF-8" in ended.errors) == (encoding == "latin-1")


@pytest.mark.parametrize(
    "words",
    [
        ["studies", "\x1b[31mx"],
        ["\x9b31mx"],
        ["studies", "--\x1b[31mx"],
        ["exists", "\x1b[31mx", "1"],
        ["dead", "\x1b[31mx"],
    ],
    ids=repr,
)
def test_what_is_quoted_of_a_command_line_does_not_reach_the_terminal_raw(words: list[str]) -> None:
    ended = in_terminal(words, columns=80, env=NO_BROKER)
    assert ended.status == 2
    assert "\x1b[31m" not in ended.raw
    assert "\x9b" not in ended.raw
    assert "\\x1b[31mx" in ended.shown or "\\x9b31mx" in ended.shown
