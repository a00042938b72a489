"""Workers die while a server is paused or in maintenance: the order outlives them, nothing is lost or done twice."""

from __future__ import annotations

import json
import signal
import sqlite3
import time

import pytest

from producer import Courier
from sandbox.processes import poll
from sandbox.synthetic import image, new_uid
from tests.chaos.crew import send
from tests.chaos.judge import Picture, check_invariant, kept
from tests.stow import stow

WAIT_S = 120
AREA = "servers out of service"


def obeyed(courier, code):
    """Return when the workers obey: a look-up for what is nowhere ends, or waits, with ``code``."""

    def one():
        handle = courier.exists("study", new_uid())
        poll(lambda: handle.report().over or handle.waiting() is not None, timeout_s=WAIT_S)
        report = handle.report()
        return (report.error.code if report.error else (handle.waiting() or {}).get("code")) == code

    assert poll(one, timeout_s=WAIT_S)


def upload(courier, image_server, pictures):
    return {courier.upload(image_server.put(f"{one.sop}.dcm", one.body)): one for one in pictures}


def all_wait(handles, code):
    assert poll(lambda: all((one.waiting() or {}).get("code") == code for one in handles), timeout_s=WAIT_S)


def deletions_of(sandbox, study):
    """How often MSDICOM has deleted an image of the study, by its change feed."""
    folder = sandbox.child.log_path.parent / f"{sandbox.child.name}-data" / "msdicom"
    with sqlite3.connect(f"file:{folder / 'index.sqlite'}?mode=ro", uri=True) as index:
        entries = [json.loads(entry) for (entry,) in index.execute("SELECT entry FROM journal")]
    index.close()
    return sum(entry["action"] == "Delete" and entry["studyInstanceUid"] == study for entry in entries)


def row(guarantee, point, outcome, took_s):
    print(f"{point}: {took_s:.1f} s")
    fault = "SIGKILL of the only worker, twice"
    guarantee.row(area=AREA, fault=fault, point=point, outcome=outcome, recovery_s=took_s)


@pytest.mark.slow
def test_a_pause_outlives_the_workers_and_so_do_the_jobs_that_wait_for_it(crew, sandbox, image_server, guarantee):
    worker = crew.start()
    with Courier(crew.loaded()) as courier:
        courier.servers.pause("dcm4chee", requested_by="ana")
        obeyed(courier, "server_paused")
        studies = [new_uid() for _ in range(4)]
        orders = upload(courier, image_server, [Picture.new(study, side=16) for study in studies for _ in range(3)])
        all_wait(orders, "server_paused")
        send(worker.pid, signal.SIGKILL)
        late = upload(courier, image_server, [Picture.new(study, side=16) for study in studies])
        again = crew.start()
        all_wait([*orders, *late], "server_paused")
        assert kept(sandbox) == []
        send(again.pid, signal.SIGKILL)
        courier.servers.resume("dcm4chee")
        begun_s = time.monotonic()
        crew.start()
        check_invariant({**orders, **late}, courier, sandbox, timeout_s=WAIT_S)
        took_s = time.monotonic() - begun_s
        assert [letter.job_id for letter in courier.dead.list()] == []
    row(guarantee, "a server is paused", "16 uploads wait through both, and are stored when it is resumed", took_s)


@pytest.mark.slow
def test_a_follow_up_deletion_outlives_the_workers_and_deletes_once(crew, sandbox, image_server, guarantee):
    gone = new_uid()
    for url in (sandbox.msdicom, sandbox.dcm4chee):
        stow(url, image(gone), image(gone))
    worker = crew.start()
    with Courier(crew.loaded()) as courier:
        courier.servers.maintenance("msdicom", requested_by="ana")
        obeyed(courier, "pacs_unavailable")
        orders = upload(courier, image_server, [Picture.new(side=16) for _ in range(6)])
        answer = courier.delete("study", gone, requested_by="bo").result(timeout_s=WAIT_S)
        (entry,) = [entry for entry in answer["servers"] if entry["status"] == "not_asked"]
        later = courier.handle(entry["follow_up_job_id"])
        all_wait([later], "server_maintenance")
        send(worker.pid, signal.SIGKILL)

        sandbox.set_fault("msdicom", "delete", latency_ms=3000)
        due = crew.start()
        all_wait([later], "server_maintenance")
        audit = courier.servers.end_maintenance("msdicom").audit
        assert poll(lambda: "memo" in courier.ledger.read_record(later.id), timeout_s=WAIT_S)
        send(due.pid, signal.SIGKILL)
        begun_s = time.monotonic()
        sandbox.reset_faults()
        crew.start()
        (ended,) = later.result(timeout_s=WAIT_S)["servers"]
        took_s = time.monotonic() - begun_s
        assert (ended["server_name"], ended["status"]) == ("msdicom", "deleted")
        check_invariant(orders, courier, sandbox, timeout_s=WAIT_S)
        assert (audit.studies, courier.handle(audit.job_id).result(timeout_s=WAIT_S)["split"]) == (6, 0)
        assert courier.ledger.read_record(later.id)["requested_by"] == "bo"
    assert deletions_of(sandbox, gone) == 2  # images, each once
    assert len(kept(sandbox)) == 6
    outcome = "the study is deleted there once, when the maintenance has ended; 6 uploads went to the other server"
    row(guarantee, "a deletion is kept for the end of a maintenance, then is under way", outcome, took_s)
