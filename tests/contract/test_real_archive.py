"""The contract tests against an MSDICOM that is not the sandbox of the tests: what they may do there and leave there.

A second sandbox, started apart, that demands tokens stands for the real server. A small server that knows partitions
stands for one that has them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from sandbox import processes as parts
from sandbox.processes import Processes, SandboxPart
from sandbox.synthetic import image, new_uid
from tests import real_archive
from tests.real_archive import MsdicomArchive, msdicom_of, scratch
from tests.stow import stow
from worker.pacs.credentials import Fixed

ROOT = Path(__file__).parents[2]
ROWS = "tests/contract/test_sandbox_msdicom.py"
DIALECTS = "tests/contract/test_dialects.py"
SECRET = "COURIER_TEST_SECRET"


@pytest.fixture(scope="module")
def elsewhere_server(processes: Processes) -> SandboxPart:
    return parts.sandbox(processes, name="elsewhere")


@pytest.fixture
def elsewhere(elsewhere_server: SandboxPart) -> SandboxPart:
    """A server that demands tokens, empty."""
    elsewhere_server.reset_faults()
    elsewhere_server.empty()
    return elsewhere_server


def environment(server: SandboxPart, **more: str) -> dict[str, str]:
    auth = {
        "type": "oauth2",
        "token_url": f"{server.control}/entra/tenant/oauth2/v2.0/token",
        "client_id": "courier",
        "client_secret_env": SECRET,
        "scope": "https://dicom.healthcareapis.azure.com/.default",
    }
    names = {"PACS_TEST_MSDICOM": server.msdicom, "PACS_TEST_MSDICOM_AUTH": json.dumps(auth), SECRET: "courier-secret"}
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PACS_TEST_", "PYTEST_"))}
    return {**ours, **names, **more}


def run(environ: dict[str, str], *selected: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *selected]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=150, check=False)


def rows(*numbers: str, but: str = "") -> list[str]:
    return [ROWS, "-k", f"({' or '.join(numbers)}){but}"]


def studies_at(server: SandboxPart) -> list[str]:
    server.reset_faults()
    found = requests.get(f"{server.msdicom}/studies", headers={"Accept": "application/dicom+json"}, timeout=10)
    return [one["0020000D"]["Value"][0] for one in found.json()] if found.status_code == 200 else []


def test_the_rows_run_against_the_server_that_the_variable_names_and_leave_nothing_there(
    elsewhere: SandboxPart,
) -> None:
    elsewhere.set_fault("msdicom", "*", bearer=True)
    elsewhere.load(anew=True)
    found = "test_what_was_stored_is_found_by_its_uid_alone_with_its_parents"
    chosen = rows("S04", "D01", "Q01", "R01", "M01", "C01", found, but=" and not dcm4chee and not orthanc")
    ended = run(environment(elsewhere), f"{DIALECTS}::{found}", *chosen)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "passed" in ended.stdout
    assert elsewhere.load()["msdicom"]["total"] > 50
    assert studies_at(elsewhere) == []


def test_a_test_that_only_the_sandbox_can_serve_is_skipped_and_says_why(elsewhere: SandboxPart) -> None:
    elsewhere.set_fault("msdicom", "*", bearer=True)
    ended = run(environment(elsewhere), *rows("A01", "N15", "N09"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    reasons = re.findall(r"needs the sandbox: (.*)", ended.stdout)
    assert len(reasons) >= 2
    assert any("orders database_down" in reason for reason in reasons)


def test_a_wrong_secret_ends_the_run_without_a_trace_of_the_secret(elsewhere: SandboxPart) -> None:
    elsewhere.set_fault("msdicom", "*", bearer=True)
    ended = run(environment(elsewhere, **{SECRET: "swordfish-1"}), *rows("S04"))
    assert ended.returncode != 0
    assert "gives no token" in ended.stdout
    assert "swordfish" not in ended.stdout + ended.stderr


def test_a_server_that_holds_studies_is_not_touched(elsewhere: SandboxPart) -> None:
    theirs = new_uid()
    stow(elsewhere.msdicom, image(theirs))
    elsewhere.load(anew=True)
    ended = run(environment(elsewhere), *rows("S04", "C01"))
    assert ended.returncode != 0
    assert "holds studies already" in ended.stdout
    assert elsewhere.load()["msdicom"]["total"] <= 4
    assert studies_at(elsewhere) == [theirs]


def test_only_studies_that_were_not_there_before_are_removed(elsewhere: SandboxPart) -> None:
    theirs, ours = new_uid(), new_uid()
    stow(elsewhere.msdicom, image(theirs))
    with real_archive.recorded(MsdicomArchive(elsewhere.msdicom)) as recorder:
        stow(elsewhere.msdicom, image(theirs), image(ours))
        assert recorder.clean() == []
    assert studies_at(elsewhere) == [theirs]


class Partitions(ThreadingHTTPServer):
    """As an MSDICOM whose partitions are on: a partition comes into being with its first image."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _PartitionHandler)
        self.known = {"Microsoft.Default"}
        self.studies: dict[str, int] = {"Microsoft.Default": 7}
        self.asked: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v2"


class _PartitionHandler(BaseHTTPRequestHandler):
    server: Partitions

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def _answer(self, method: str) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.removeprefix("/v2").partition("?")[0]
        self.server.asked.append((method, path))
        status = 200 if path == "/partitions" else 400
        if match := re.fullmatch(r"/partitions/([^/]+)/studies(/[^/]+)?", path):
            status = self._in(match[1], method)
        self.send_response(status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"[]")

    def _in(self, partition: str, method: str) -> int:
        held = self.server.studies
        if method == "POST":
            held[partition] = held.get(partition, 0) + 1
            return 200
        if partition not in held:
            return 400
        if method == "DELETE":
            held[partition] -= 1
        return 204 if method == "DELETE" or not held[partition] else 200

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def partitions() -> Iterator[Partitions]:
    server = Partitions()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_where_partitions_are_on_the_tests_have_one_of_their_own(partitions: Partitions) -> None:
    for _ in range(2):  # it is made once
        chosen = scratch(MsdicomArchive(partitions.url))
        assert chosen.url == f"{partitions.url}/partitions/{real_archive.PARTITION}"
    assert partitions.studies == {"Microsoft.Default": 7, real_archive.PARTITION: 0}
    assert [method for method, _ in partitions.asked].count("POST") == 1


def test_a_partition_that_holds_studies_is_not_touched(partitions: Partitions) -> None:
    partitions.studies["ward"] = 1
    with pytest.raises(RuntimeError, match="holds studies already"):
        scratch(MsdicomArchive(f"{partitions.url}/partitions/ward"))
    assert {method for method, _ in partitions.asked} == {"GET"}


def test_every_request_to_the_server_and_none_to_another_bears_the_account(partitions: Partitions) -> None:
    sent: list[str | None] = []
    heard = _PartitionHandler._answer
    other = Partitions()
    threading.Thread(target=other.serve_forever, args=(0.02,), daemon=True).start()

    def answer(handler: _PartitionHandler, method: str) -> None:
        sent.append(handler.headers["Authorization"])
        heard(handler, method)

    account = MsdicomArchive(partitions.url, Fixed("Bearer t1"))
    with pytest.MonkeyPatch.context() as patch, real_archive.logged_in(account):
        patch.setattr(_PartitionHandler, "_answer", answer)
        requests.get(f"{partitions.url}/partitions", timeout=10)
        requests.get(f"{partitions.url}/partitions", headers={"Authorization": "Bearer own"}, timeout=10)
        requests.get(f"{other.url}/partitions", timeout=10)
    other.shutdown()
    other.server_close()
    assert sent == ["Bearer t1", "Bearer own", None]


def test_without_settings_for_it_no_request_logs_in() -> None:
    assert msdicom_of("http://127.0.0.1:1/v2", {}).credentials is None
