"""A worker that is set up wrongly does not start, and says in one sentence what to change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SERVER = '[[servers]]\nname = "msdicom"\ntype = "msdicom"\nurl = "http://127.0.0.1:9/v2"\n'
AZURE = '[{}.azure]\ncontainers = ["images"]\naccount_url = "https://account.blob.core.windows.net"\n'
ODD_AZURE = '[sources.azure]\ncontainers = ["images"]\nconnection_string_env = "ODD"\n'
SIGNING = '[queue.signing]\nkey_file = "no/file"\ncertificate_file = "no/file"\ntrusted_folder = "no"\n'
#: A machine without any credentials for AWS, the role of a cloud's included.
NO_AWS = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": "/no/file", "AWS_CONFIG_FILE": "/no/file"}
ALONE = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PACS_"))}


STATUS, DOCTOR, WORKER = "pacs status", "pacs doctor --json", "celery -A worker.app worker"


@pytest.mark.parametrize(
    ("command", "text", "environ", "sentence"),
    [
        (STATUS, SERVER, {"PACS__SERVERS__9__URL": "http://x"}, "PACS__SERVERS__9__URL names '9' of a list that has 0"),
        (DOCTOR, SERVER, {"PACS__SOURCES__ALLOW_HOSTS": "[a]"}, "setting sources.allow_hosts: the variable PACS__SOU"),
        (WORKER, SERVER + "# f\xfcr uns\n", {}, "pacs.toml is not UTF-8 (line 5)"),
        (STATUS, SERVER + "[jobs]\nlease = 3\n", {}, "setting jobs.lease: there is no such key; did you mean lease_s?"),
        (WORKER, SERVER + 'viewer = "http://v/"\n', {}, "setting servers.msdicom.viewer: a link has {study} in it"),
    ],
)
def test_a_setting_that_cannot_be_read_is_one_sentence_of_each_command(tmp_path, command, text, environ, sentence):
    config = tmp_path / "pacs.toml"
    config.write_bytes(text.encode("latin-1"))
    program, *words = command.split()
    ended = subprocess.run(
        [Path(sys.executable).parent / program, *words],
        env={**ALONE, "PACS_CONFIG": str(config), **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode > 0
    assert sentence in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no [[servers]] are set"),
        (SERVER + '[routing]\npolicy = "random"\n', "setting routing.policy"),
        (SERVER + 'auth = { type = "bearer", token_env = "NOT_SET" }\n', "NOT_SET"),
        (SERVER + 'auth = { type = "basic", username = "u", password_file = "no/file" }\n', "password_file of server"),
        (SERVER + AZURE.format("sources") + 'account_key_env = "NOT_SET"\n', "NOT_SET (azure.account_key_env)"),
        (SERVER + AZURE.format("downloads") + 'sas_token_file = "no/file"\n', "no/file (azure.sas_token_file)"),
        (
            SERVER + '[sources.azure]\ncontainers = ["a"]\nconnection_string_env = "ODD"\n',
            "(connection_string) is malformed",
        ),
        (SERVER + '[sources.s3]\nbuckets = ["images"]\n', "AWS credentials, but there are none"),
        (SERVER + '[downloads.s3]\nbuckets = ["images"]\n', "AWS credentials, but there are none"),
        (SERVER + '[sources]\nca_file = "no/file"\n', "sources.ca_file"),
        (SERVER + '[sources]\nallow_hosts = ["0x7f.1"]\n', "sources.allow_hosts"),
        (SERVER + SIGNING, "setting queue.signing.key_file: no/file cannot be read"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_one_sentence(tmp_path, text, sentence):
    config = tmp_path / "pacs.toml"
    config.write_text(text, encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "worker.app", "worker"],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
            **NO_AWS,
            "PACS_CONFIG": str(config),
            "BROKER_URL": "redis://127.0.0.1:1/0",
            "ODD": "no string",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode != 0
    assert [line for line in ended.stderr.splitlines() if "pacs-courier:" in line and sentence in line]
    assert "Traceback" not in ended.stderr
    assert "no string" not in ended.stderr
