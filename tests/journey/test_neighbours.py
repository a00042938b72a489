"""Beside another Celery application on the same Redis database neither takes or loses what is the other's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from celery import Celery
from redis import Redis

from producer import Courier, doctor
from sandbox import processes as parts
from sandbox.processes import Child, Processes, poll
from sandbox.synthetic import image, new_uid

WAIT_S = 60


@pytest.fixture
def theirs(redis: Any) -> Iterator[Celery]:
    """A client of the other application, which names no queue."""
    app = Celery(broker=redis.broker_url, backend=redis.result_backend, set_as_current=False)
    yield app
    app.backend.result_consumer.subscribed_to.clear()
    app.backend.result_consumer.stop()
    app.backend.client.connection_pool.disconnect()
    app.close()


@pytest.fixture
def broker(redis: Any) -> Iterator[Redis]:
    with Redis.from_url(redis.broker_url) as client:
        yield client


@pytest.fixture
def neighbour(tmp_path: Path, redis: Any) -> Iterator[Callable[..., Child]]:
    """Starts a worker of the other application."""
    with Processes(tmp_path / "neighbour") as running:

        def start(hostname: str = "reports@courier") -> Child:
            command = [sys.executable, "-m", "celery", "-A", "tests.neighbour", "worker", "--pool", "threads"]
            command += ["--concurrency", "4", "--loglevel", "INFO", "--hostname", hostname]
            child = running.start(
                "neighbour",
                [*command, "--without-mingle", "--without-gossip"],
                ready=lambda child: f"{hostname} ready." in child.log,
                environ={"BROKER_URL": redis.broker_url, "RESULT_BACKEND": redis.result_backend},
            )
            child.wait_ready()
            return child

        yield start


def upload(image_server: Any) -> dict[str, str]:
    return {"image_url": image_server.put(f"{new_uid()}.dcm", image(new_uid()))}


def findings(running: Any) -> dict[str, doctor.Finding]:
    return {finding.check: finding for finding in doctor.examine(lambda: running.settings)}


def test_with_default_settings_all_jobs_of_both_are_done(
    worker: Any, neighbour: Any, plain: Any, theirs: Any, broker: Any, image_server: Any
) -> None:
    their_worker, running = neighbour(), worker(jobs={"sweep_s": 0.2})
    with Courier(running.settings) as courier:
        reports, uploads, followed = [], [], []
        for number in range(100):
            reports.append(theirs.send_task("reports.build", args=(number,)))
            if number % 4 == 0:
                uploads.append(courier.upload(**upload(image_server)))
            if number % 4 == 2:
                follow_up = theirs.signature("reports.note").set(task_id=f"note-{number}")
                sent = plain.send_task("pacs.upload", kwargs={"job": upload(image_server)}, link=follow_up)
                uploads.append(courier.handle(sent.id))
                followed.append(theirs.AsyncResult(f"note-{number}"))
        assert [handle.result(timeout_s=WAIT_S)["status"] for handle in uploads] == ["stored"] * 50
        assert [report.get(timeout=WAIT_S) for report in reports] == list(range(1, 101))
        assert [note.get(timeout=WAIT_S) for note in followed] == ["stored"] * 25
    assert "Threw a message away" not in running.log
    assert "unregistered" not in their_worker.log
    assert poll(lambda: broker.hlen("unacked") + broker.hlen("pacs.unacked") == 0, timeout_s=WAIT_S)


@pytest.mark.parametrize("hostname", ["reports@courier", "worker0@courier"])
def test_the_doctor_leaves_a_worker_of_another_application_alone(
    worker: Any, neighbour: Any, theirs: Any, hostname: str
) -> None:
    running, _ = worker(), neighbour(hostname)
    for number in range(3):
        theirs.send_task("reports.build", args=(number,), countdown=60)
    found = findings(running)
    assert {check: one for check, one in found.items() if one.state != "ok"} == {}
    assert found["workers"].found == "1 answer: worker0@courier"
    assert [check for check in found if check.startswith(("worker ", "old queue"))] == ["worker worker0@courier"]
    running.stop()
    assert findings(running)["workers"].found == "no worker answers"


def test_a_job_that_was_sent_to_celerys_default_queue_stays_there_and_the_doctor_says_so(
    worker: Any, theirs: Any, broker: Any, image_server: Any
) -> None:
    theirs.send_task("pacs.upload", kwargs={"job": upload(image_server)})
    running = worker(jobs={"sweep_s": 0.2})
    (message,) = broker.lrange("celery", 0, -1)
    assert poll(lambda: "1 messages for tasks of PACS Courier wait in celery" in running.log, timeout_s=WAIT_S)
    finding = findings(running)["old queue celery"]
    assert (finding.state, finding.found in running.log, finding.advice in running.log) == ("warning", True, True)
    assert "queue pacs;" in finding.advice
    assert "read_old_queues" in finding.advice
    assert broker.lrange("celery", 0, -1) == [message]
    assert image_server.requests == []
    moving = worker(jobs={"sweep_s": 0.2}, queue={**running_queue(running), "read_old_queues": True})
    job_id = json.loads(message)["headers"]["id"]
    with Courier(running.settings) as courier:
        assert courier.handle(job_id).result(timeout_s=WAIT_S)["status"] == "stored"
    assert "Moved 1 messages from the old queue celery to pacs" in moving.log
    assert "old queue celery" not in findings(running)


def test_a_job_of_a_program_of_0_1_is_done_though_no_worker_reads_its_message(
    worker: Any, theirs: Any, redis: Any, broker: Any, sandbox: Any, image_server: Any
) -> None:
    running = worker(jobs={"sweep_s": 0.2, "grace_s": 1})
    with Courier(running.settings) as courier:
        job = upload(image_server)
        courier.ledger.submit("order-7", task="pacs.upload", job=job)
        theirs.send_task("pacs.upload", kwargs={"job": job}, task_id="order-7")
        stored = courier.handle("order-7").result(timeout_s=WAIT_S)
        assert (stored["status"], broker.llen("celery"), len(image_server.requests)) == ("stored", 1, 1)
        worker(jobs={"sweep_s": 0.2}, queue={**running_queue(running), "read_old_queues": True})
        assert poll(lambda: broker.llen("celery") + broker.hlen("pacs.unacked") == 0, timeout_s=WAIT_S)
        assert courier.handle("order-7").result(timeout_s=WAIT_S) == stored
    assert len(image_server.requests) == 1


def running_queue(running: Any) -> dict[str, Any]:
    return dict(running.settings.model_dump(mode="json", exclude_unset=True)["queue"])


def test_old_queues_are_read_until_a_message_is_not_ours_and_nothing_of_anybody_is_lost(
    worker: Any, neighbour: Any, theirs: Any, redis: Any, broker: Any, image_server: Any
) -> None:
    ahead = theirs.send_task("pacs.upload", kwargs={"job": upload(image_server)})
    reports = [theirs.send_task("reports.build", args=(number,)) for number in range(3)]
    behind = theirs.send_task("pacs.upload", kwargs={"job": upload(image_server)})
    batch = theirs.send_task(
        "pacs.batch.upload", kwargs={"job": {"items": [image_server.url("gone")]}}, queue="batches"
    )
    left = broker.lrange("celery", 0, 3)
    port = parts.free_port()
    settings = {"jobs": {"sweep_s": 0.2}, "queue": {**parts.queue_settings(redis), "read_old_queues": True}}
    running = worker(**settings, telemetry={"metrics_port": port}, worker={"watchdog_s": 15})
    with Courier(running.settings) as courier:
        for sent in (ahead, batch):
            assert courier.handle(sent.id).result(timeout_s=WAIT_S)
        sentence = "The first message in the old queue celery is of another application (task reports.build)"
        assert poll(lambda: sentence in running.log, timeout_s=WAIT_S)
        assert poll(lambda: "reads celery no more" in findings(running)["worker worker0@courier"].found, timeout_s=20)
        assert broker.lrange("celery", 0, -1) == left, "they stay as they are"
        assert running.log.count(sentence) == 1, "never a loop"
        assert "pacs_old_queues_stopped_total 1.0" in requests.get(f"http://{parts.HOST}:{port}", timeout=20).text
        found = findings(running)["old queue celery"]
        assert (found.state, found.found.split()[0]) == ("warning", "1")
        assert "task reports.build" in found.advice
        rest = broker.lpop("celery")  # a worker of the other application would throw it away
        neighbour()
        assert [report.get(timeout=WAIT_S) for report in reports] == [1, 2, 3]
        broker.lpush("admin", rest)
        assert courier.handle(behind.id).result(timeout_s=WAIT_S)["status"] == "stored"


def test_a_worker_is_not_started_on_a_queue_of_others_and_is_not_told_to_read_one(
    worker: Any, theirs: Any, redis: Any, broker: Any
) -> None:
    running = worker(options=("-Q", "pacs,urgent"))
    ended = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "-Q", "pacs,celery"],
        env={**os.environ, "PACS_CONFIG": str(running.config)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode != 0
    (line,) = [line for line in ended.stderr.splitlines() if "pacs-courier:" in line]
    assert "-Q celery: the queues are called pacs, pacs.batches, pacs.admin since version 0.2" in line
    assert "Traceback" not in ended.stderr
    for queue in ("reports", "celery", "pacs.batches"):
        theirs.control.add_consumer(queue, reply=True, limit=1, timeout=WAIT_S)
    sent = theirs.send_task("reports.build", args=(1,), queue="reports")
    assert poll(lambda: running.log.count("Did not begin to read the queue") == 2, timeout_s=WAIT_S)
    with Courier(running.settings) as courier:
        assert courier.workers() == {"worker0@courier": ["pacs", "urgent", "pacs.due", "pacs.batches"]}
    assert broker.llen("reports") == 1
    assert sent.state == "PENDING"


def test_a_worker_that_reads_a_queue_of_the_operators_alone_is_one_of_ours(worker: Any) -> None:
    running = worker(options=("-Q", "urgent"))
    with Courier(running.settings) as courier:
        assert poll(lambda: courier.workers() == {"worker0@courier": ["urgent"]}, timeout_s=WAIT_S)
