"""What commands refuse before they ask anybody, so that no part of a wish is dropped without a word."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from producer.cli import main

OLD, NEW = "StudyDate=20250101-", "StudyDate=-20251231"


def refused(*words: str) -> str:
    """The one sentence that a command ends with, whose broker nobody can reach."""
    ended = CliRunner().invoke(main, words, env={"BROKER_URL": "redis://127.0.0.1:1/0", "LEDGER_URL": ""})
    assert ended.exit_code == 2, ended.output
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


def test_a_plan_that_would_not_be_written_is_not_made(tmp_path: Path) -> None:
    written = tmp_path / "plan.jsonl"
    written.write_text("of yesterday", encoding="utf-8")
    order = ("batch", "upload", "https://images.example.org/a.dcm")
    assert "exists already" in refused(*order, "--plan", str(written))
    assert "no such folder" in refused(*order, "--plan", str(tmp_path / "none" / "plan.jsonl"))
    assert "--no-wait" in refused(*order, "--plan", str(tmp_path / "new.jsonl"), "--no-wait")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.jsonl"]
