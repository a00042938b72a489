"""What a program that enqueues leaves behind."""

from __future__ import annotations

import json
import traceback
import uuid

import pytest
from redis import Redis

from courier.ledger.jobs import Ledger
from courier.settings import Settings, SettingsError
from producer import Courier
from producer.errors import ImageAlreadyExists, NotFound, Poisoned, SourceDenied, StillRunning
from sandbox import processes as parts
from sandbox.processes import Processes

SECRET = "PLANTED"


def databases_in_use(port):
    with Redis(host=parts.HOST, port=port, decode_responses=True) as client:
        return {int(entry["db"]) for entry in client.client_list() if entry["cmd"] != "client|list"}


def test_a_courier_that_is_closed_leaves_no_connection_to_results_and_ledger(tmp_path):
    with Processes(tmp_path) as running:
        redis = parts.redis(running)
        with Courier(Settings.model_validate({"queue": parts.queue_settings(redis)})) as courier:
            assert not courier.known(str(uuid.uuid4()))
            assert databases_in_use(redis.port) >= {1, 2}
        assert not databases_in_use(redis.port) & {1, 2}


@pytest.mark.parametrize("name", ["broker_url", "result_backend", "ledger_url"])
def test_urls_given_in_code_are_read_as_those_of_the_settings(name):
    with pytest.raises(SettingsError, match=f"setting {name}: it is no URL") as caught:
        Courier(Settings(), **{name: f"redis://:{SECRET}@host:port/0"})
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_variables_of_another_celery_in_the_same_program_are_left_to_it(redis, monkeypatch):
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "redis://127.0.0.1:1/1")
    with Courier(Settings.model_validate({"queue": parts.queue_settings(redis)})) as courier:
        courier.upload("https://images.example/a.dcm")
        assert courier.queue_depths()["pacs"] == 1
        courier.check_backend()


# --- a job of which the result back-end has no entry (any more) ---------------------------------------------------

TASK = "pacs.trace"
JOB = {"version": 1, "uid": "1.2.3"}


@pytest.fixture
def courier(redis):
    settings = Settings.model_validate({"queue": parts.queue_settings(redis), "jobs": {"grace_s": 0.5}})
    with Courier(settings) as courier:
        yield courier


@pytest.fixture
def ledger(redis):
    ledger = Ledger.connect(redis.ledger_url, worker="w")
    yield ledger
    ledger.close()


def begun(ledger, job_id="j1"):
    ledger.submit(job_id, task=TASK, job=JOB)
    return ledger.take(job_id, task=TASK, job=JOB)


def test_a_job_whose_result_is_lost_is_done_with_the_payload_of_the_ledger(courier, ledger):
    payload = {"operation": "trace", "job_id": "j1", "uid": "1.2.3"}
    ledger.finish("j1", begun(ledger).fence, outcome={"payload": payload}, code="done", task=TASK, job=JOB)
    handle = courier.handle("j1")
    assert (handle.status(), handle.stage()) == ("done", "done")
    assert handle.result(timeout_s=5) == payload
    assert courier.known("j1")


@pytest.mark.parametrize("end", ["finish", "end_as_dead_letter"])
def test_a_job_whose_failure_is_lost_fails_with_the_error_of_the_ledger(courier, ledger, end):
    code, kind = ("image_already_exists", ImageAlreadyExists) if end == "finish" else ("poisoned", Poisoned)
    error = {"code": code, "message": "So it is.", "server_name": "msdicom", "server_type": "msdicom", "details": {}}
    getattr(ledger, end)("j1", begun(ledger).fence, outcome={"error": error}, code=code, task=TASK, job=JOB)
    with pytest.raises(kind, match="So it is") as caught:
        courier.handle("j1").result(timeout_s=5)
    assert caught.value.payload == error
    assert courier.handle("j1").status() == "failed"


def test_a_purged_dead_letter_still_says_how_it_failed(courier, ledger):
    error = {"code": "poisoned", "message": "It crashed.", "server_name": None, "server_type": None, "details": {}}
    ledger.end_as_dead_letter("j1", begun(ledger).fence, outcome={"error": error}, code="poisoned", task=TASK, job=JOB)
    assert ledger.purge("j1")
    assert courier.handle("j1").report().error.payload["message"] == "It crashed."


def test_the_ledger_tells_which_jobs_are_queued_run_or_wait_and_why(courier, ledger):
    ledger.submit("queued", task=TASK, job=JOB)
    begun(ledger, "running")
    ledger.park("waits", begun(ledger, "waits").fence, delay_s=60, code="pacs_unavailable", message="It is down.")
    reports = courier.reports(["queued", "running", "waits"])
    assert {job_id: report.status for job_id, report in reports.items()} == {
        "queued": "queued",
        "running": "running",
        "waits": "waiting",
    }
    meta = reports["waits"].meta
    assert (meta["stage"], meta["attempt"]) == ("waiting", 1)
    assert (meta["code"], meta["message"], meta["server_name"]) == ("pacs_unavailable", "It is down.", None)


def test_a_job_that_is_known_nowhere_is_unknown_and_its_result_is_not_found(courier):
    handle = courier.handle(str(uuid.uuid4()))
    assert (handle.status(), handle.stage()) == ("unknown", "unknown")
    assert not courier.known(handle.id)
    for timeout_s in (0, 0.2, None):
        with pytest.raises(NotFound, match=handle.id):
            handle.result(timeout_s=timeout_s)
    assert [one.id for one, _ in courier.as_completed([handle])] == [handle.id]


def test_a_job_that_expires_while_it_is_waited_for_ends_the_waiting(courier, ledger, redis):
    ledger.submit("j1", task=TASK, job=JOB)
    states = courier.watch([courier.handle("j1")])
    assert next(states)[1].status == "queued"
    ledger.client.delete("courier:job:j1")
    assert next(states)[1].status == "unknown"
    assert next(states, None) is None


def test_a_job_that_ends_while_it_is_waited_for_ends_the_waiting_without_a_result_back_end(courier, ledger):
    claim = begun(ledger)
    states = courier.watch([courier.handle("j1")], timeout_s=20)
    assert next(states)[1].status == "running"
    ledger.finish("j1", claim.fence, outcome={"payload": {"uid": "1"}}, code="done", task=TASK, job=JOB)
    assert next(states)[1].result == {"uid": "1"}


def test_without_a_ledger_a_job_without_result_counts_as_queued(redis):
    with Courier(Settings(), broker_url=redis.broker_url, result_backend=redis.result_backend) as courier:
        handle = courier.handle(str(uuid.uuid4()))
        assert handle.status() == "queued"
        with pytest.raises(StillRunning):
            handle.result(timeout_s=0.2)
        with pytest.raises(NotFound):
            courier.must_know(handle.id)


def test_the_ledger_is_asked_only_for_jobs_that_the_result_back_end_does_not_know_and_in_one_round_trip(
    courier, ledger, monkeypatch
):
    backend = courier._app.backend
    meta = {"status": "SUCCESS", "result": {"uid": "1"}, "traceback": None, "children": [], "task_id": "told"}
    backend.client.set(backend.get_key_for_task("told"), json.dumps(meta))
    for job_id in ("told", "a", "b", "c"):
        ledger.submit(job_id, task=TASK, job=JOB)
    asked = []
    monkeypatch.setattr(courier.ledger, "standing", lambda ids: asked.append(list(ids)) or ledger.standing(asked[-1]))
    reports = courier.reports(["told", "a", "b", "c"])
    assert reports["told"].status == "done"
    assert asked == [["a", "b", "c"]]


def test_a_key_whose_job_failed_for_a_reason_that_can_pass_is_sent_again_and_its_failure_forgotten(
    courier, ledger, redis
):
    job = {"version": 1, "image_url": "http://host/a.dcm", "idempotency_key": "k"}
    handle = courier.upload("http://host/a.dcm?sig=old", idempotency_key="k")
    taken = ledger.take(handle.id, task="pacs.upload", job=job)
    error = SourceDenied("No.").payload
    outcome = {"error": error}
    ledger.finish(handle.id, taken.fence, outcome=outcome, code="source_denied", task="pacs.upload", job=job)
    # As a worker of version 0.1 stores it.
    told = {"exc_type": "SourceDenied", "exc_module": "worker.errors", "exc_message": [error]}
    with Redis.from_url(redis.result_backend) as results:
        key = courier._app.backend.get_key_for_task(handle.id)
        results.set(key, json.dumps({"status": "FAILURE", "result": told, "task_id": handle.id}))
    assert handle.status() == "failed"
    with Redis.from_url(redis.broker_url) as broker:
        queue = courier._app.conf.task_default_queue
        broker.delete(queue)
        again = courier.upload("http://host/a.dcm?sig=new", idempotency_key="k")
        assert (again.id, again.status(), broker.llen(queue)) == (handle.id, "queued", 1)
        assert courier.upload("http://host/a.dcm?sig=new", idempotency_key="k").id == handle.id
        assert broker.llen(queue) == 1, "one message for one job"


@pytest.mark.parametrize("module", ["worker.errors", "courier.errors", "producer.errors"])
def test_an_error_is_the_same_whatever_module_the_worker_of_another_version_has_it_in(courier, module):
    error = SourceDenied("No.", details={"a": 1}).payload
    told = {"exc_type": "SourceDenied", "exc_module": module, "exc_message": [error]}
    backend = courier._app.backend
    backend.client.set(
        backend.get_key_for_task(module), json.dumps({"status": "FAILURE", "result": told, "task_id": module})
    )
    with pytest.raises(SourceDenied) as raised:
        courier.handle(module).result()
    assert raised.value.payload == error


def test_a_result_that_another_celery_worker_revoked_is_what_the_ledger_says(courier, ledger):
    backend = courier._app.backend
    for job_id in ("waits", "gone"):
        error = {"exc_type": "TaskRevokedError", "exc_message": ["revoked"], "exc_module": "celery.exceptions"}
        row = {"status": "REVOKED", "result": error, "traceback": None, "children": [], "task_id": job_id}
        backend.client.set(backend.get_key_for_task(job_id), json.dumps(row))
    claim = begun(ledger, "waits")
    ledger.park("waits", claim.fence, delay_s=60, code="pacs_unavailable", message="It is down.")
    reports = courier.reports(["waits", "gone"])
    assert (reports["waits"].status, reports["waits"].waiting["code"]) == ("waiting", "pacs_unavailable")
    assert reports["gone"].error.code == "cancelled"
    ended = {handle.id: report for handle, report in courier.as_completed(map(courier.handle, reports), timeout_s=3)}
    assert list(ended) == ["gone"]
    assert ended["gone"].error.code == "cancelled"
