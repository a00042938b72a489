"""Large orders and protected servers from the command line, over a real worker that holds them to its settings."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner

from producer import Courier
from producer.cli import main
from producer.errors import ConfirmationRequired, InvalidRequest
from sandbox.synthetic import image, new_uid
from tests.journey.test_delete import QUICK, images_on
from tests.stow import stow

WAIT_S = 60


@pytest.fixture
def held(worker, sandbox, monkeypatch):
    """A worker that lets one study go unconfirmed, and nothing at all on dcm4chee."""
    servers = [{**one, "deletions": "never" if one["name"] == "dcm4chee" else "allow"} for one in sandbox.servers()]
    running = worker(servers=servers, jobs=QUICK, deletions={"max_studies_per_order": 1})
    monkeypatch.setenv("PACS_CONFIG", str(running.config))
    return running


def pacs(*words: str, status: int = 0) -> Any:
    ended = CliRunner().invoke(main, [*words, "--json"])
    assert ended.exit_code == status, ended.output
    return json.loads(ended.stdout) if ended.stdout else ended.stderr


def typed(text: str, *words: str) -> tuple[int, str]:
    """A command on a terminal on which that was typed, line by line."""
    master, terminal = pty.openpty()
    code = "from producer.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as command:
        os.write(master, text.encode())
        out, _ = command.communicate(timeout=WAIT_S)
    os.close(master)
    os.close(terminal)
    return command.returncode, out


def test_a_large_order_needs_its_number_however_it_is_given(held, sandbox):
    studies = [new_uid() for _ in range(3)]

    def fill():
        for study in studies:
            stow(sandbox.msdicom, image(study, side=8))

    def there():
        return sum(images_on(sandbox.msdicom, study) for study in studies)

    fill()
    refused = pacs("batch", "delete", *studies, "--yes", status=1)
    assert refused["error"]["code"] == "confirmation_required"
    batch_id = refused["error"]["details"]["batch_id"]
    assert f"pacs batch apply {batch_id} --confirm-studies 3" in refused["error"]["message"]
    assert pacs("batch", "apply", batch_id, "--yes", "--confirm-studies", "2", status=1)["error"]["code"] == (
        "confirmation_required"
    )
    assert there() == 3
    assert pacs("batch", "apply", batch_id, "--yes", "--confirm-studies", "3")["totals"] == {"deleted": 3}
    fill()
    assert pacs("batch", "delete", *studies, "--yes", "--confirm-studies", "3")["totals"] == {"deleted": 3}
    fill()
    everything = ("delete-all", "--server", "msdicom", "--confirm", "delete all studies")
    assert pacs(*everything, status=1)["error"]["details"]["studies"] == 3
    assert pacs(*everything, "--confirm-studies", "3")["status"] == "done"
    fill()
    with Courier() as courier:
        with pytest.raises(ConfirmationRequired, match="--confirm-studies 3"):
            courier.batch.delete(studies).result(timeout_s=WAIT_S)
        courier.batch.delete(studies, confirm_studies=3).result(timeout_s=WAIT_S)
    assert there() == 0


def test_on_a_terminal_the_number_is_typed(held, sandbox):
    studies = [new_uid() for _ in range(2)]
    for study in studies:
        stow(sandbox.msdicom, image(study, side=8))
    status, out = typed("y\n3\n", "batch", "delete", *studies)
    assert (status, "Nothing was deleted." in out) == (1, True), out
    assert "This deletes images of 2 studies; deletions.max_studies_per_order is 1." in out
    assert all(images_on(sandbox.msdicom, study) for study in studies)
    status, out = typed("y\n2\n", "batch", "delete", *studies)
    assert status == 0, out
    assert not any(images_on(sandbox.msdicom, study) for study in studies)


def test_a_protected_server_is_named_by_what_it_refuses(held, sandbox):
    study = new_uid()
    stow(sandbox.dcm4chee, image(study, side=8))
    told = pacs("delete", "study", study, "--yes", status=2)
    assert (told["error"]["code"], told["error"]["server_name"]) == ("invalid_request", "dcm4chee")
    told = pacs("batch", "delete", study, "--yes", "--server", "dcm4chee", status=2)
    assert 'deletions = "never"' in told["error"]["message"]
    stow(sandbox.msdicom, image(study, side=8))
    shown = CliRunner().invoke(main, ["delete", "study", study, "--yes"])
    assert (shown.exit_code, "refused" in shown.output, "deleted" in shown.output) == (1, True, True)
    assert (images_on(sandbox.msdicom, study), images_on(sandbox.dcm4chee, study)) == (0, 1)
    with Courier() as courier, pytest.raises(InvalidRequest, match="dcm4chee is protected"):
        courier.batch.migrate([study], from_server="dcm4chee", to_server="msdicom", delete_source=True).result(WAIT_S)
