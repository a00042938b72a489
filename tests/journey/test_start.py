"""A worker that is set up wrongly does not start, and says in one sentence what to change."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SERVER = '[[servers]]\nname = "msdicom"\ntype = "msdicom"\nurl = "http://127.0.0.1:9/v2"\n'


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no [[servers]] are set"),
        (SERVER + '[routing]\npolicy = "random"\n', "setting routing.policy"),
        (SERVER + 'auth = { type = "bearer", token_env = "NOT_SET" }\n', "NOT_SET"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_one_sentence(tmp_path, text, sentence):
    config = tmp_path / "pacs.toml"
    config.write_text(text, encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "worker.app", "worker"],
        env={**os.environ, "PACS_CONFIG": str(config), "BROKER_URL": "redis://127.0.0.1:1/0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode != 0
    assert [line for line in ended.stderr.splitlines() if "pacs-courier:" in line and sentence in line]
    assert "Traceback" not in ended.stderr
