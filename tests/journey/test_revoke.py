"""A revoke, from Flower's button or Celery's `control`, is a cancellation: the ledger ends the job, and all see it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from redis import Redis

from courier.batches.store import Batches
from courier.settings import PREFIX
from producer import Courier
from producer.errors import Cancelled
from sandbox.processes import poll
from sandbox.synthetic import image, new_uid
from tests.stow import stow

WAIT_S = 60
JOBS = {"sweep_s": 0.2, "backoff_base_s": 0.2, "backoff_cap_s": 0.5}


@pytest.fixture
def site(worker):
    started = worker(jobs=JOBS, breaker={"failures": 1000}, concurrency=2)
    with Courier(started.settings) as courier:
        yield courier, started


@pytest.fixture
def courier(site):
    return site[0]


def send(plain, task, job_id=None, **job):
    return plain.send_task(task, kwargs={"job": job}, task_id=job_id or str(uuid.uuid4()))


def ended(plain, job_id):
    result = plain.AsyncResult(job_id)
    assert poll(lambda: result.state in ("SUCCESS", "FAILURE", "REVOKED"), timeout_s=WAIT_S), result.state
    assert result.state == "FAILURE"
    return plain.backend.get_task_meta(job_id)["result"].args[0]


def left(courier):
    """What is locked or due in the ledger."""
    client = courier.ledger.client
    held = [key for kind in ("hold", "gate", "storing") for key in client.scan_iter(f"{PREFIX}{kind}:*")]
    return [*held, *client.zrange(f"{PREFIX}due", 0, -1)]


def waits(courier, job_id):
    return poll(lambda: (courier.handle(job_id).report().status) == "waiting", timeout_s=WAIT_S)


def exists(courier, study):
    return courier.exists("study", study).result(timeout_s=WAIT_S)["exists"]


HOW = {
    "control": lambda app, job_id: app.control.revoke(job_id),
    "a list": lambda app, job_id: app.control.revoke([str(uuid.uuid4()), job_id]),
    "terminate": lambda app, job_id: app.control.terminate(job_id),
    "AsyncResult": lambda app, job_id: app.AsyncResult(job_id).revoke(terminate=True),
    "heard again and again": lambda app, job_id: [app.control.revoke(job_id) for _ in range(5)],
}


@pytest.mark.parametrize("how", HOW)
def test_a_waiting_upload_that_is_revoked_ends_as_cancelled_and_frees_its_image(
    site, plain, sandbox, image_server, how
):
    courier, worker = site
    url = image_server.put("a.dcm", image(new_uid()))
    sandbox.set_fault("msdicom", "store", status=503)
    first = send(plain, "pacs.upload", image_url=url, server="msdicom")
    assert waits(courier, first.id)
    HOW[how](plain, first.id)
    assert ended(plain, first.id)["code"] == "cancelled"
    with pytest.raises(Cancelled):
        courier.handle(first.id).result(timeout_s=WAIT_S)
    sandbox.reset_faults()
    second = send(plain, "pacs.upload", image_url=url, server="msdicom")
    assert second.get(timeout=WAIT_S)["status"] == "stored"
    assert poll(lambda: not left(courier), timeout_s=WAIT_S), left(courier)
    assert ("is not killed" in worker.log) is (how in ("terminate", "AsyncResult"))
    assert "Discarding revoked task" not in worker.log


def test_a_revoked_deletion_that_a_server_refused_for_now_deletes_nothing(courier, plain, sandbox, worker):
    study = new_uid()
    stow(sandbox.msdicom, image(study))
    sandbox.set_fault("msdicom", "delete", status=503, retry_after_s=1)
    job = send(plain, "pacs.delete", level="study", uid=study)
    assert waits(courier, job.id)
    plain.control.revoke(job.id)
    error = ended(plain, job.id)
    assert error["code"] == "cancelled"
    assert error["details"]["may_be_deleted_on"] == ["msdicom"]
    sandbox.reset_faults()
    worker(jobs=JOBS)  # another one, which has heard of no revoke
    time.sleep(2)
    assert exists(courier, study)
    assert poll(lambda: not left(courier), timeout_s=WAIT_S), left(courier)


@pytest.mark.parametrize("how", HOW)
def test_a_queued_deletion_that_is_revoked_is_not_begun(courier, plain, sandbox, image_server, how):
    study = new_uid()
    stow(sandbox.msdicom, image(study))
    sandbox.set_fault("msdicom", "metadata", latency_ms=2500)
    busy = [send(plain, "pacs.metadata", level="study", uid=study, mode="msdicom") for _ in range(4)]
    assert poll(lambda: courier.handle(busy[0].id).stage() != "queued", timeout_s=WAIT_S)
    job = send(plain, "pacs.delete", level="study", uid=study)
    HOW[how](plain, job.id)
    assert ended(plain, job.id)["code"] == "cancelled"
    assert exists(courier, study)


def test_an_id_that_is_revoked_before_its_message_comes_is_never_done(courier, plain, sandbox):
    study, job_id = new_uid(), f"order/{uuid.uuid4()}"
    stow(sandbox.msdicom, image(study))
    told = plain.control.revoke(job_id, reply=True, limit=1, timeout=WAIT_S)
    assert "unknown here" in str(told)
    assert plain.AsyncResult(job_id).state == "PENDING"
    send(plain, "pacs.delete", job_id, level="study", uid=study)
    assert ended(plain, job_id)["code"] == "cancelled"
    assert exists(courier, study)


def test_the_same_id_sent_again_is_told_the_same_end(courier, plain, sandbox):
    study, job_id = new_uid(), str(uuid.uuid4())
    stow(sandbox.msdicom, image(study))
    plain.control.revoke(job_id, reply=True, limit=1, timeout=WAIT_S)
    for _ in range(2):
        send(plain, "pacs.delete", job_id, level="study", uid=study)
        assert ended(plain, job_id)["code"] == "cancelled"
        plain.AsyncResult(job_id).forget()
    assert exists(courier, study)


def test_what_has_ended_stays_as_it_ended(courier, plain, sandbox, image_server):
    url = image_server.put("a.dcm", image(new_uid()))
    done = send(plain, "pacs.upload", image_url=url)
    payload = done.get(timeout=WAIT_S)
    refused = send(plain, "pacs.upload", image_url=image_server.put("b.dcm", b"no image"))
    error = ended(plain, refused.id)
    for job in (done, refused):
        assert "ended before" in str(plain.control.revoke(job.id, reply=True, limit=1, timeout=WAIT_S))
    assert plain.AsyncResult(done.id).get(timeout=WAIT_S) == payload
    assert ended(plain, refused.id) == error


def test_a_running_upload_ends_before_its_push(courier, plain, sandbox, image_server):
    study = new_uid()
    sandbox.set_fault("msdicom", "query", latency_ms=2000)
    job = send(plain, "pacs.upload", image_url=image_server.put("a.dcm", image(study)), server="msdicom")
    assert poll(lambda: courier.handle(job.id).stage() == "check", timeout_s=WAIT_S, every_s=0.02)
    plain.control.revoke(job.id)
    assert ended(plain, job.id)["code"] == "cancelled"
    sandbox.reset_faults()
    with pytest.raises(Exception, match="not_found"):
        exists(courier, study)


def test_a_stamp_is_revoked_in_hand_and_later(courier, plain, sandbox, image_server):
    study = new_uid()
    stow(sandbox.msdicom, image(study))
    stamps = {"stamped_headers": ["order"], "stamps": {"order": ["7"]}}
    sandbox.set_fault("msdicom", "query", latency_ms=2000)
    running = plain.send_task(
        "pacs.upload",
        kwargs={"job": {"image_url": image_server.put("a.dcm", image(new_uid())), "server": "msdicom"}},
        headers=stamps,
    )
    assert poll(lambda: courier.handle(running.id).stage() == "check", timeout_s=WAIT_S, every_s=0.02)
    plain.control.revoke_by_stamped_headers({"order": "7"})
    assert ended(plain, running.id)["code"] == "cancelled"
    sandbox.reset_faults()
    delete = {"level": "study", "uid": study}
    later = plain.send_task("pacs.delete", kwargs={"job": delete}, headers=stamps)
    assert ended(plain, later.id)["code"] == "cancelled"
    other = {"stamped_headers": ["order"], "stamps": {"order": ["8"]}}
    plain.send_task("pacs.delete", kwargs={"job": delete}, headers=other).get(timeout=WAIT_S)


@pytest.mark.parametrize("which", ["the batch", "a piece of it"])
def test_a_batch_whose_job_or_piece_is_revoked_is_cancelled(courier, plain, sandbox, which):
    studies = [new_uid() for _ in range(3)]
    for study in studies:
        stow(sandbox.msdicom, image(study))
    sandbox.set_fault("msdicom", "delete", status=503)
    handle = courier.batch.delete(studies, servers=["msdicom"])
    batches = Batches(courier.ledger)
    piece = f"{handle.id}.apply.0"
    assert poll(lambda: courier.ledger.read_record(piece).get("state") == "waiting", timeout_s=WAIT_S)
    plain.control.revoke(handle.id if which == "the batch" else piece)
    assert ended(plain, handle.id)["code"] == "cancelled"
    sandbox.reset_faults()
    assert poll(lambda: not left(courier), timeout_s=WAIT_S), left(courier)
    assert batches.state(handle.id) == "cancelled"
    assert all(exists(courier, study) for study in studies)


def test_a_message_that_has_expired_ends_as_cancelled(courier, plain, sandbox):
    study = new_uid()
    stow(sandbox.msdicom, image(study))
    over = datetime.now(UTC) - timedelta(seconds=5)
    job = plain.send_task("pacs.delete", kwargs={"job": {"level": "study", "uid": study}}, expires=over)
    assert ended(plain, job.id)["code"] == "cancelled"
    assert exists(courier, study)


def test_an_id_in_a_state_db_of_celerys_ends_as_cancelled(worker, plain, sandbox, tmp_path):
    study, job_id = new_uid(), str(uuid.uuid4())
    stow(sandbox.msdicom, image(study))
    made = (
        "import sys; from celery.worker import state; from celery.utils.collections import LimitedSet;"
        "state.revoked.add(sys.argv[1]); db = state.Persistent(state, sys.argv[2]); db.save()"
    )
    database = str(tmp_path / "revoked")
    subprocess.run([sys.executable, "-c", made, job_id, database], check=True)
    started = worker(jobs=JOBS, options=[f"--statedb={database}"])
    with Courier(started.settings) as courier:
        send(plain, "pacs.delete", job_id, level="study", uid=study)
        assert ended(plain, job_id)["code"] == "cancelled"
        assert exists(courier, study)


def test_a_worker_that_cannot_reach_the_ledger_says_so_and_still_heeds_the_revoke(site, plain, sandbox, redis):
    """Of two databases one is away: here, the ledger answers to no command."""
    courier, _ = site
    study, job_id = new_uid(), str(uuid.uuid4())
    stow(sandbox.msdicom, image(study))
    with Redis.from_url(redis.ledger_url) as client:
        client.set(f"{PREFIX}job:{job_id}", "no record at all")  # a command is answered with an error
        told = plain.control.revoke(job_id, reply=True, limit=1, timeout=WAIT_S)
        assert "send it again" in str(told)
        client.delete(f"{PREFIX}job:{job_id}")
    send(plain, "pacs.delete", job_id, level="study", uid=study)
    assert ended(plain, job_id)["code"] == "cancelled"
    assert exists(courier, study)


def test_revokes_of_many_workers_are_one(worker, plain, sandbox, image_server):
    started = [worker(jobs=JOBS, concurrency=1) for _ in range(3)]
    sandbox.set_fault("msdicom", "store", status=503)
    with Courier(started[0].settings) as courier:
        urls = [image_server.put(f"{number}.dcm", image(new_uid())) for number in range(6)]
        jobs = [courier.upload(url, server="msdicom") for url in urls]
        assert all(waits(courier, job.id) for job in jobs)
        threads = [threading.Thread(target=plain.control.revoke, args=(job.id,)) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for job in jobs:
            assert ended(plain, job.id)["code"] == "cancelled"
        assert poll(lambda: not left(courier), timeout_s=WAIT_S), left(courier)
