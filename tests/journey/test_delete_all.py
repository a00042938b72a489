"""All studies deleted as a batch, over a real broker and real workers that get killed; and the commands of batches."""

from __future__ import annotations

import json
import time

import pytest
import requests
from click.testing import CliRunner

from producer import Courier
from producer.cli import main
from producer.errors import Cancelled, ConfirmationRequired, NotFound
from sandbox.synthetic import image, new_uid
from tests.stow import stow

WAIT_S = 60
QUICK = {"max_attempts": 4, "backoff_base_s": 0.1, "sweep_s": 0.1, "lease_s": 1.5, "grace_s": 2, "max_deaths": 5}
SENTENCE = "delete all studies"


def put(url, studies):
    """One image of each study, all in one request."""
    stow(url, *(image(study, side=8) for study in studies))


def studies_on(url):
    answer = requests.get(f"{url}/studies?limit=200", headers={"Accept": "application/dicom+json"}, timeout=10)
    return len(answer.json()) if answer.status_code == 200 else 0


def until(condition):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def counts(answer):
    return {
        entry["server_name"]: {name: n for name, n in entry.items() if n and name not in ("server_name", "server_type")}
        for entry in answer["servers"]
    }


def test_all_studies_are_deleted_although_workers_are_killed(worker, sandbox):
    shared = [new_uid() for _ in range(10)]
    put(sandbox.msdicom, [new_uid() for _ in range(50)] + shared)
    put(sandbox.dcm4chee, [new_uid() for _ in range(50)] + shared)
    doomed = worker(jobs=QUICK)
    with Courier(doomed.settings) as courier:
        with pytest.raises(ConfirmationRequired, match=SENTENCE):
            courier.delete_all("yes").result(timeout_s=WAIT_S)
        foretold = courier.delete_all(dry_run=True).result(timeout_s=WAIT_S)
        assert (foretold["status"], counts(foretold)) == (
            "planned",
            {"msdicom": {"planned": 60}, "dcm4chee": {"planned": 60}},
        )
        assert (studies_on(sandbox.msdicom), studies_on(sandbox.dcm4chee)) == (60, 60)

        sandbox.set_fault("msdicom", "delete", latency_ms=150)
        sandbox.set_fault("dcm4chee", "delete", latency_ms=150)
        handle = courier.delete_all(SENTENCE)
        until(lambda: handle.id in {batch.id for batch in courier.batch.list()})
        until(lambda: courier.batch.get(handle.id).settled >= 16)
        doomed.kill()
        half = courier.batch.get(handle.id)
        assert (half.state, half.items) == ("running", 120)
        assert 16 <= half.settled < 120
        sandbox.reset_faults()
        worker(jobs=QUICK)
        done = handle.result(timeout_s=WAIT_S)
        assert (done["operation"], done["batch_id"], done["status"]) == ("delete_all", handle.id, "done")
        assert counts(done) == {
            "msdicom": {"planned": 60, "deleted": 60},
            "dcm4chee": {"planned": 60, "deleted": 60},
        }
        assert [entry["remaining"] for entry in done["servers"]] == [0, 0]
        assert (done["failures"], done["failures_total"]) == ([], 0)
        assert (studies_on(sandbox.msdicom), studies_on(sandbox.dcm4chee)) == (0, 0)
        report = list(courier.batch.report(handle.id))
        assert len({(row["server_name"], row["study_uid"]) for row in report}) == 120
        assert {row["status"] for row in report} == {"deleted"}


@pytest.fixture
def pacs(worker, monkeypatch):
    """The command, with a worker that answers."""
    # A batch would sit out what is done to a server here.
    monkeypatch.setenv("PACS_CONFIG", str(worker(jobs=QUICK, breaker={"failures": 1000}).config))

    def command(*words, status=0):
        answer = CliRunner().invoke(main, words)
        assert answer.exit_code == status, answer.output
        return answer.stdout

    return command


def test_what_could_not_be_deleted_is_counted_and_told(pacs, sandbox):
    put(sandbox.msdicom, [new_uid() for _ in range(30)])
    put(sandbox.dcm4chee, [new_uid() for _ in range(3)])
    pacs("delete-all", status=1)
    pacs("delete-all", "--confirm", "yes", status=1)
    assert "30" in pacs("delete-all", "--dry-run")
    assert studies_on(sandbox.msdicom) == 30

    sandbox.set_fault("dcm4chee", "reject", status=503)
    answer = json.loads(pacs("delete-all", "--server", "dcm4chee", "--confirm", SENTENCE, "--json", status=1))
    assert counts(answer) == {"dcm4chee": {"planned": 3, "failed": 3, "remaining": 3}}
    assert [(one["code"], one["server_name"]) for one in answer["failures"]] == [("pacs_unavailable", "dcm4chee")] * 3
    assert studies_on(sandbox.msdicom) == 30


def test_a_batch_is_shown_paused_resumed_and_cancelled(pacs, sandbox):
    put(sandbox.msdicom, [new_uid() for _ in range(30)])
    sandbox.set_fault("msdicom", "delete", latency_ms=600)
    batch = pacs("delete-all", "--server", "msdicom", "--confirm", SENTENCE, "--no-wait").strip()
    with Courier() as courier:
        until(lambda: batch in {one.id for one in courier.batch.list()} and courier.batch.get(batch).settled)
        assert json.loads(pacs("batch", "pause", batch, "--json"))["state"] == "paused"
        assert batch in pacs("batch", "list")
        assert json.loads(pacs("batch", "resume", batch, "--json"))["state"] == "running"
        assert json.loads(pacs("batch", "cancel", batch, "--json"))["state"] == "cancelled"
        pacs("batch", "watch", batch, status=1)
        with pytest.raises(Cancelled) as caught:
            courier.handle(batch).result(timeout_s=WAIT_S)
        settled = caught.value.details["settled"]
        assert 0 < settled < 30
        assert studies_on(sandbox.msdicom) == 30 - settled
        with pytest.raises(NotFound):
            courier.batch.get("elsewhere")
    shown = json.loads(pacs("batch", "show", batch, "--json"))
    assert (shown["state"], shown["items"], shown["settled"]) == ("cancelled", 30, settled)
    assert pacs("batch", "report", batch, "--csv").count("\n") == 31
    rows = json.loads(pacs("batch", "report", batch, "--json"))
    assert [row["status"] for row in rows].count("open") == 30 - settled
    pacs("batch", "show", "elsewhere", status=1)
