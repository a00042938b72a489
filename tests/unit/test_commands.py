"""What commands refuse before they ask anybody, so that no part of a wish is dropped without a word."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from producer.cli import confirm, main
from producer.plans import PlanHeader, PlanLine, write

OLD, NEW = "StudyDate=20250101-", "StudyDate=-20251231"


def refused(*words: str, status: int = 2) -> str:
    """The one sentence that a command ends with, whose broker nobody can reach."""
    ended = CliRunner().invoke(main, words, env={"BROKER_URL": "redis://127.0.0.1:1/0", "LEDGER_URL": ""})
    assert ended.exit_code == status, ended.output
    return " ".join(ended.stderr.split())


@pytest.mark.parametrize(
    "words",
    [
        ("studies", "--filter", OLD, "--filter", NEW),
        ("audit", "--filter", OLD, "--filter", NEW),
        ("batch", "delete", "--yes", "--query", OLD, "--query", NEW),
        ("batch", "download", "--to-folder", "/out", "--query", OLD, "--query", NEW),
        ("batch", "migrate", "--from", "a", "--to", "b", "--query", OLD, "--query", "PatientID=7", "--query", NEW),
    ],
)
def test_two_conditions_on_one_keyword_are_refused_and_none_is_dropped(words: tuple[str, ...]) -> None:
    assert "StudyDate is given twice" in refused(*words)


@pytest.mark.parametrize("digests", ["sample", "none"])
def test_a_move_compares_all_images_and_takes_no_order_for_less(digests: str) -> None:
    move = ("batch", "migrate", "1.2.3", "--from", "a", "--to", "b", "--delete-source", "--yes")
    assert "compares all images" in refused(*move, "--digests", digests)


@pytest.mark.parametrize(
    ("pair", "advice"),
    [
        ("StudyDate=2004", "YYYY0101-YYYY1231"),
        ("StudyDate=20260230", "calendar"),
        ("StudyDate=20261231-20260101", "ends before it begins"),
        ("StudyTime=7:27", "HHMMSS"),
        ("StudyInstanceUID=1.2.*", "no wildcards"),
        ("studydate=20260101", "StudyDate is"),
    ],
)
@pytest.mark.parametrize(
    "words",
    [
        ("studies", "--filter"),
        ("audit", "--filter"),
        ("batch", "delete", "--yes", "--query"),
        ("batch", "download", "--to-folder", "/out", "--query"),
        ("batch", "migrate", "--from", "a", "--to", "b", "--delete-source", "--yes", "--query"),
    ],
)
def test_a_wrong_filter_is_refused_with_what_to_write(words: tuple[str, ...], pair: str, advice: str) -> None:
    assert advice in refused(*words, pair)


@pytest.mark.parametrize("pair", ["PatientName=*", "PatientName=?*", "StudyDate=-", "PatientID=", "PatientID=A,*"])
@pytest.mark.parametrize(
    "words",
    [
        ("batch", "delete", "--yes", "--query"),
        ("batch", "migrate", "--from", "a", "--to", "b", "--delete-source", "--yes", "--query"),
    ],
)
def test_a_query_that_chooses_every_study_is_refused_and_points_to_all(words: tuple[str, ...], pair: str) -> None:
    assert "--all" in refused(*words, pair)


def test_a_plan_that_would_not_be_written_is_not_made(tmp_path: Path) -> None:
    written = tmp_path / "plan.jsonl"
    written.write_text("of yesterday", encoding="utf-8")
    order = ("batch", "upload", "https://images.example.org/a.dcm")
    assert "exists already" in refused(*order, "--plan", str(written))
    assert "no such folder" in refused(*order, "--plan", str(tmp_path / "none" / "plan.jsonl"))
    assert "--no-wait" in refused(*order, "--plan", str(tmp_path / "new.jsonl"), "--no-wait")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.jsonl"]


@pytest.mark.parametrize("json", [(), ("--json",)])
@pytest.mark.parametrize(
    "words",
    [
        ("delete", "study", "1.2.3"),
        ("delete", "image", "1.2.3", "--hide", "--server", "a"),
        ("batch", "delete", "1.2.3"),
        ("batch", "migrate", "1.2.3", "--from-server", "a", "--to", "b", "--delete-source"),
    ],
    ids=" ".join,
)
def test_what_deletes_is_not_started_without_a_terminal_or_yes_and_asks_no_broker(
    words: tuple[str, ...], json: tuple[str, ...]
) -> None:
    sentence = "Not started: there is no terminal to ask for confirmation. Pass --yes."
    assert sentence in refused(*words, *json, status=1)


@pytest.mark.parametrize("words", [("delete", "study", "1.2.*", "--yes"), ("delete", "study", "1.2.*")])
def test_wrong_usage_comes_before_the_question(words: tuple[str, ...]) -> None:
    assert "UID" in refused(*words)


@pytest.mark.parametrize("ask", [confirm.ask, confirm.ask_to_type])
@pytest.mark.parametrize(
    ("terminals", "asked_on"),
    [({"stdout", "stderr"}, "stdout"), ({"stdout"}, "stdout"), ({"stderr"}, "stderr"), (set(), "stdout")],
)
def test_a_question_is_asked_on_standard_error_where_standard_output_is_redirected(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[str], object], terminals: set[str], asked_on: str
) -> None:
    with CliRunner().isolation(input="n\n") as (out, err, _):
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(getattr(sys, name), "isatty", lambda name=name: name in terminals)
        ask("Delete them?")
        said = {"stdout": out.getvalue().decode(), "stderr": err.getvalue().decode()}
    assert {name for name, text in said.items() if "Delete them?" in text} == {asked_on}


def test_yes_is_not_the_sentence_that_deletes_everything() -> None:
    for words in (("delete-all", "--yes"), ("batch", "delete", "--all", "--yes"), ("delete-all", "--yes", "--json")):
        assert 'add --confirm "delete all studies"' in refused(*words, status=1)


@pytest.mark.parametrize(
    ("words", "new"),
    [
        (("delete", "study", "1.2.3", "--keep", "--hide", "--yes"), "--hide"),
        (("delete-all", "--keep", "--hide", "--dry-run"), "--hide"),
        (("batch", "delete", "1.2.3", "--keep", "/kept", "--backup", "/kept", "--yes"), "--backup"),
        (("batch", "delete", "1.2.3", "--keep", "/kept", "--backup", "/other", "--dry-run"), "--backup"),
    ],
)
def test_an_old_spelling_beside_the_new_one_is_refused(words: tuple[str, ...], new: str) -> None:
    assert f"--keep is the old name of {new}, and both are given; give {new} alone." in refused(*words)


def test_a_plan_file_of_version_0_1_is_read_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "plan.jsonl"
    with path.open("w", encoding="utf-8") as out:
        header = PlanHeader(kind="delete", order={"permanent": True, "keep": "s3://kept/x"})
        write(header, [PlanLine(item="1.2.3")], out)
    ended = CliRunner().invoke(main, ["batch", "apply", str(path), "--dry-run"])
    assert (ended.exit_code, "1 of 1 items to do" in ended.stdout) == (0, True)
    assert "keep is called backup now" in " ".join(ended.stderr.split())
    assert "--yes" in refused("batch", "apply", str(path), status=1)


@pytest.mark.parametrize("option", ["--reason", "--requested-by"])
def test_a_text_that_would_forge_a_line_is_refused(option: str) -> None:
    told = refused("delete", "study", "1.2.3", "--yes", option, "a\n\x1b[31mpacs: done")
    assert f"Field {option[2:].replace('-', '_')} of the job" in told
    assert "done" not in told
