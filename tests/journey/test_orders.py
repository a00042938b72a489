"""What an order that deletes says is done or refused: by plain messages, by the library, and by commands that ask."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from celery import Celery
from click.testing import CliRunner

from courier.batches.store import Batches
from courier.messages import BatchDeleteJob
from producer import Courier
from producer.cli import main
from sandbox.synthetic import image, new_uid

WAIT_S = 60
WHO, WHY = "Dr. Who", "PLANTED-PATIENT was stored twice"


def images_on(url: str, study: str) -> int:
    answer = requests.get(f"{url}/studies/{study}/instances", headers={"Accept": "application/dicom+json"}, timeout=10)
    return len(answer.json()) if answer.status_code == 200 else 0


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def ward(worker: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A worker that may write backups, and the library and the command on its settings."""
    jobs = {"max_attempts": 1, "backoff_base_s": 0.1, "sweep_s": 0.1, "grace_s": 2}
    running = worker(jobs=jobs, downloads={"folders": [str(out)]})
    monkeypatch.setenv("PACS_CONFIG", str(running.config))
    with Courier(running.settings) as courier:
        courier.log_path = running.log_path  # type: ignore[attr-defined]  # for the tests that read it
        yield courier


def pacs(*words: str, status: int = 0) -> Any:
    ended = CliRunner().invoke(main, words)
    assert ended.exit_code == status, ended.output
    return ended


def error(answer: Any) -> dict[str, Any]:
    """What a plain client reads of a failed job."""
    failure = answer.get(timeout=WAIT_S, propagate=False)
    return dict(failure.args[0])


def test_a_plain_message_with_a_field_that_is_not_known_deletes_nothing(
    ward: Courier, plain: Celery, sandbox: Any, put: Any
) -> None:
    study = new_uid()
    for url in (sandbox.msdicom, sandbox.dcm4chee):
        put(url, image(study))
    one = {"level": "study", "uid": study}
    everything = {"confirm": "delete all studies"}
    planned = ward.batch.delete([study], dry_run=True)
    assert planned.result(timeout_s=WAIT_S)["state"] == "planned"
    wrong = [
        ("pacs.delete", {"job": {**one, "dryRun": True}}, "dryRun"),
        ("pacs.delete", {"job": {**one, "server": ["msdicom"]}}, "server"),
        ("pacs.delete", {"job": one, "dry_run": True}, None),
        ("pacs.delete", {"job": {**one, "callback_url": "https://host/"}}, "callback_url"),
        ("pacs.delete_all", {"job": {**everything, "dryRun": True}}, "dryRun"),
        ("pacs.delete_all", {"job": everything, "servers": ["msdicom"]}, None),
        ("pacs.batch.delete", {"job": {"items": [study], "permanant": False}}, "permanant"),
        ("pacs.batch.delete", {"job": {"items": [{"item": study, "servers": ["msdicom"]}]}}, "items.0.servers"),
        ("pacs.batch.apply", {"job": {"batch_id": planned.batch_id, "dryRun": True}}, "dryRun"),
    ]
    answers = [(plain.send_task(task, kwargs=kwargs), field) for task, kwargs, field in wrong]
    for answer, field in answers:
        told = error(answer)
        assert (told["code"], told["details"].get("field")) == ("invalid_request", field), told
    assert [images_on(url, study) for url in (sandbox.msdicom, sandbox.dcm4chee)] == [1, 1]
    assert [batch.id for batch in ward.batch.list()] == [planned.batch_id]
    done = plain.send_task("pacs.delete", kwargs={"job": {**one, "dry_run": True}}).get(timeout=WAIT_S)
    assert [entry["status"] for entry in done["servers"]] == ["would_delete", "would_delete"]


def on_a_terminal(typed: str, *words: str) -> tuple[int, str]:
    """The exit status of a command whose input is a terminal, and what it printed."""
    ours, its = pty.openpty()
    try:
        os.write(ours, typed.encode())
        command = [str(Path(sys.executable).with_name("pacs")), *words]
        ended = subprocess.run(command, stdin=its, capture_output=True, text=True, timeout=WAIT_S, check=False)
    finally:
        os.close(ours)
        os.close(its)
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.parametrize(
    "words", [["delete", "study"], ["delete", "image"], ["delete", "series"], ["batch", "delete"]], ids=" ".join
)
def test_what_deletes_asks_on_a_terminal_and_needs_yes_where_nothing_can_be_asked(
    ward: Courier, sandbox: Any, put: Any, words: list[str]
) -> None:
    study, series, sop = new_uid(), new_uid(), new_uid()
    put(sandbox.msdicom, image(study, series=series, sop=sop))
    uid = {"image": sop, "series": series}.get(words[1], study)
    for more in ([], ["--json"]):
        refused = pacs(*words, uid, *more, status=1)
        assert "there is no terminal to ask for confirmation. Pass --yes." in " ".join(refused.stderr.split())
        assert refused.stdout == ""
    status, said = on_a_terminal("n\n", *words, uid)
    assert (status, "[y/N]" in said) == (1, True), said
    status, said = on_a_terminal("", *words, uid, "--json")
    assert (status, "--json asks nothing. Pass --yes." in said) == (1, True), said
    assert images_on(sandbox.msdicom, study) == 1
    status, said = on_a_terminal("y\n", *words, uid)
    assert (status, images_on(sandbox.msdicom, study)) == (0, 0), said


def assert_audited_alone(ward: Courier) -> None:
    """Who asked and why stands in the audit lines of the worker's log, and in no other line."""
    lines = ward.log_path.read_text(encoding="utf-8").splitlines()  # type: ignore[attr-defined]
    audit = [line for line in lines if " courier.audit: " in line]
    assert any(WHO in line for line in audit)
    assert not [line for line in lines if line not in audit and (WHO in line or WHY in line)]


def test_a_study_is_deleted_with_a_backup_by_every_command_that_deletes_studies_and_comes_back(
    ward: Courier, sandbox: Any, put: Any, out: Path
) -> None:
    study = new_uid()
    put(sandbox.msdicom, image(study))
    place = str(out / "kept")
    history = ("--requested-by", WHO, "--reason", WHY)
    for words in (
        ("delete", "study", study, "--backup", place, "--yes"),
        ("delete-all", "--backup", place, "--confirm", "delete all studies"),
        ("batch", "delete", study, "--backup", place, "--yes"),
    ):
        answer = json.loads(pacs(*words, *history, "--json").stdout)
        batch = answer["batch_id"]
        assert images_on(sandbox.msdicom, study) == 0, words
        shown = json.loads(pacs("batch", "show", batch, "--json").stdout)
        assert (shown["requested_by"], shown["reason"]) == (WHO, WHY)
        undone = json.loads(pacs("batch", "undo", batch, "--yes", "--reason", "on second thoughts", "--json").stdout)
        assert undone["passes"]["undo"]["totals"]["undone"] == 1, words
        assert (undone["reason"], undone["passes"]["undo"]["reason"]) == (WHY, "on second thoughts")
        assert images_on(sandbox.msdicom, study) == 1, words
    seen = pacs("batch", "show", batch).stdout
    assert f"order: requested by {WHO}, reason {WHY}" in " ".join(seen.split())
    assert "undo: reason on second thoughts" in " ".join(seen.split())
    assert "whole studies" in pacs("delete", "image", "1.2.3", "--backup", place, "--yes", status=2).stderr
    assert_audited_alone(ward)


def test_old_spellings_work_with_a_warning_and_beside_the_new_ones_they_are_refused(
    ward: Courier, plain: Celery, sandbox: Any, put: Any, out: Path
) -> None:
    study = new_uid()
    put(sandbox.dcm4chee, image(study))
    kept, place = str(out / "kept"), (out / "kept").as_uri()
    for words in (("delete", "study", study), ("delete-all",)):
        hidden = pacs(*words, "--keep", "--dry-run")
        assert "--keep is called --hide now" in " ".join(hidden.stderr.split())
        refused = pacs(*words, "--keep", "--hide", "--dry-run", status=2)
        assert "give --hide alone" in " ".join(refused.stderr.split())
    assert "would_hide" in pacs("delete", "study", study, "--keep", "--dry-run").stdout

    ended = pacs("batch", "delete", study, "--keep", kept, "--dry-run", "--json")
    assert "--keep is called --backup now" in " ".join(ended.stderr.split())
    assert ward.batch.get(json.loads(ended.stdout)["batch_id"]).order["backup"] == place
    both = ("batch", "delete", study, "--keep", kept, "--backup", kept, "--dry-run")
    assert "give --backup alone" in " ".join(pacs(*both, status=2).stderr.split())

    sent = plain.send_task("pacs.batch.delete", kwargs={"job": {"items": [study], "keep": place}})
    done = sent.get(timeout=WAIT_S)
    assert done["totals"] == {"deleted": 1}
    assert [sentence for sentence in done["warnings"] if "keep is called backup" in sentence] == done["warnings"]
    assert len(done["warnings"]) == 1
    assert len(list(out.rglob("*.zip"))) == 1
    two = {"items": [study], "keep": place, "backup": place}
    assert error(plain.send_task("pacs.batch.delete", kwargs={"job": two}))["details"] == {"field": "keep"}
    assert ward.batch.undo(done["batch_id"]).result(timeout_s=WAIT_S)["passes"]["undo"]["totals"]["undone"] == 1
    assert images_on(sandbox.dcm4chee, study) == 1


def test_a_batch_that_version_0_1_planned_is_backed_up_and_undone(
    ward: Courier, sandbox: Any, put: Any, out: Path
) -> None:
    study, place = new_uid(), (out / "kept").as_uri()
    put(sandbox.msdicom, image(study))
    planned = ward.batch.delete([study], dry_run=True)
    planned.result(timeout_s=WAIT_S)
    ledger = ward.ledger
    assert ledger is not None
    key = f"courier:batch:{planned.batch_id}"
    ledger.client.hset(key, "order", json.dumps({"permanent": True, "verify": True, "keep": place, "dry_run": True}))
    done = ward.batch.apply(planned.batch_id).result(timeout_s=WAIT_S)
    assert (done["totals"], len(list(out.rglob("*.zip")))) == ({"deleted": 1}, 1)
    assert ward.batch.undo(planned.batch_id).result(timeout_s=WAIT_S)["passes"]["undo"]["totals"]["undone"] == 1
    assert images_on(sandbox.msdicom, study) == 1

    old = {"items": [study], "keep": place}  # its message, sent by a library of that version
    handle = ward.enqueue("pacs.batch.delete", BatchDeleteJob, old)
    assert handle.result(timeout_s=WAIT_S)["totals"] == {"deleted": 1}
    batch = Batches(ledger).get(handle.id)
    assert batch is not None
    assert batch.order["backup"] == place


def test_who_asked_and_why_are_told_by_a_trace_and_of_a_dead_letter_and_in_no_line_but_those_of_the_audit(
    ward: Courier, sandbox: Any, put: Any, image_server: Any
) -> None:
    study = new_uid()
    upload = ward.upload(image_server.put("a.dcm", image(study)), requested_by=WHO, reason=WHY)
    upload.result(timeout_s=WAIT_S)
    gone = json.loads(
        pacs("delete", "study", study, "--yes", "--requested-by", WHO, "--reason", "[red]again[/red]", "--json").stdout
    )
    told = {job["job_id"]: job for job in ward.trace(study).result(timeout_s=WAIT_S)["jobs"]}
    assert (told[upload.id]["requested_by"], told[upload.id]["reason"]) == (WHO, WHY)
    assert told[gone["job_id"]]["reason"] == "[red]again[/red]"
    shown = CliRunner().invoke(main, ["trace", study], env={"COLUMNS": "300"}).stdout
    assert f"requested by: {WHO}, reason: {WHY}" in shown
    assert "reason: [red]again[/red]" in shown

    sandbox.set_fault("msdicom", "query", status=503)
    dead = ward.delete("study", study, requested_by=WHO, reason=WHY)
    with pytest.raises(Exception, match="pacs_unavailable"):
        dead.result(timeout_s=WAIT_S)
    sandbox.reset_faults()
    letter = json.loads(pacs("dead", "show", dead.id, "--json").stdout)
    assert (letter["requested_by"], letter["reason"]) == (WHO, WHY)
    assert WHO in pacs("dead", "show", dead.id).stdout
    for more in ([], ["--json"]):  # a deletion that is replayed deletes
        assert "Pass --yes" in pacs("dead", "replay", dead.id, *more, status=1).stderr
    assert [one.job_id for one in ward.dead.list()] == [dead.id]
    pacs("dead", "replay", dead.id, "--yes")
    assert_audited_alone(ward)
