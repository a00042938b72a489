"""An upgrade: what a worker of the last version had begun, and what its programs send, ends once with this version.

``last_version.txt`` names the commit of the last version; ``make test`` builds it, with its own dependencies, in
``.venv-last``. Set a new release's commit there when it is tagged.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from producer import Courier, doctor
from producer.errors import NotDicom
from sandbox import processes as parts
from sandbox.processes import Child, poll
from tests.chaos.crew import Crew
from tests.chaos.judge import Picture, check_invariant, kept
from tests.missing import left_out

ROOT = Path(__file__).parents[2]
LAST = ROOT / ".venv-last"
COMMIT = (Path(__file__).parent / "last_version.txt").read_text(encoding="ascii").strip()
WAIT_S = 60
#: A program of the last version: it reads URLs, enqueues, and prints the ids.
PROGRAM = """
import json, sys
from producer import Courier
with Courier() as courier:
    urls = json.load(sys.stdin)
    jobs = [courier.upload(url).id for url in urls["single"]]
    batch = courier.batch.upload(urls["batch"]).id if urls["batch"] else None
json.dump({"jobs": jobs, "batch": batch}, sys.stdout)
"""
#: Another, which enqueues one URL and prints the error.
FAILING = """
import sys
from producer import Courier
from producer.errors import CourierError
with Courier() as courier:
    job = courier.upload(sys.stdin.read())
    try:
        job.result(timeout_s=60)
    except CourierError as error:
        print(job.id, type(error).__name__, error.code)
"""


class LastVersion:
    """Programs and workers of the last version on the settings of ``crew``."""

    def __init__(self, crew: Crew, put: Callable[[Picture], str]) -> None:
        self._crew, self._put = crew, put
        sources = {"allow_hosts": [parts.HOST], "allow_private_networks": True}  # it knows no `:*`
        own = crew.settings(worker={"watchdog_s": 15}, sources=sources)
        self._config = own.rename(own.with_name("last.toml"))
        self.pictures: dict[str, Picture] = {}
        self.in_batch: list[Picture] = []

    def worker(self, name: str) -> Child:
        # Its own code alone: this one's is not in its path, wherever the tests are run.
        command = [LAST / "bin/celery", "--workdir", LAST / "source", "-A", "worker.app", "worker", "--pool", "threads"]
        command += ["--concurrency", "4", "--loglevel", "INFO", "--hostname", f"{name}@courier"]
        child = self._crew.processes.start(
            name,
            [*command, "--without-mingle", "--without-gossip", "-E"],
            ready=lambda child: f"{name}@courier ready." in child.log,
            environ={"PACS_CONFIG": str(self._config)},
        )
        child.wait_ready(timeout_s=60)
        return child

    def enqueue(self, *, single: int, batch: int = 0) -> str | None:
        """The id of the batch."""
        alone, together = [Picture.new() for _ in range(single)], [Picture.new() for _ in range(batch)]
        urls = {"single": [self._put(one) for one in alone], "batch": [self._put(one) for one in together]}
        ids = json.loads(self._run(PROGRAM, json.dumps(urls)))
        self.pictures |= dict(zip(ids["jobs"], alone, strict=True))
        self.in_batch += together
        return ids["batch"]

    def fail(self, url: str) -> list[str]:
        """An upload of ``url``: its id, and the class and code of its error as a program of that version sees it."""
        return self._run(FAILING, url).split()

    def _run(self, program: str, text: str) -> str:
        ended = subprocess.run(
            [LAST / "bin/python", "-I", "-c", program],
            input=text,
            env={"PACS_CONFIG": str(self._config)},
            cwd=LAST / "source",  # Celery reads the `celeryconfig` that is there
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT_S,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout


def _in_clone() -> bool:
    asked = ["git", "-C", str(ROOT), "cat-file", "-e", f"{COMMIT}^{{commit}}"]
    return subprocess.run(asked, capture_output=True, check=False).returncode == 0


@pytest.fixture
def last(crew: Crew, image_server: Any) -> LastVersion:
    if not _in_clone():
        left_out(f"The last version (commit {COMMIT}) is not in this clone (git fetch --unshallow)")
    if not (LAST / COMMIT).exists():
        pytest.fail(f"The last version (commit {COMMIT}) is not built: make last-version")
    return LastVersion(crew, lambda picture: str(image_server.put(f"{picture.sop}.dcm", picture.body)))


@pytest.fixture
def sent_by_celery(redis: Any, image_server: Any) -> Callable[[int], dict[str, Picture]]:
    """Uploads of a plain Celery client that names no queue: a message is all there is of each."""

    def send(count: int) -> dict[str, Picture]:
        pictures = [Picture.new() for _ in range(count)]
        with Celery(broker=redis.broker_url, set_as_current=False) as app:
            urls = [image_server.put(f"{one.sop}.dcm", one.body) for one in pictures]
            sent = [app.send_task("pacs.upload", kwargs={"job": {"image_url": url}}).id for url in urls]
        return dict(zip(sent, pictures, strict=True))

    return send


def waiting(redis: Any) -> int:
    with Redis.from_url(redis.broker_url) as broker:
        return int(broker.llen("celery"))


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_an_upgrade_loses_nothing_and_does_nothing_twice(
    crew: Crew, last: LastVersion, sent_by_celery: Any, sandbox: Any, redis: Any, guarantee: Any, how: str
) -> None:
    sandbox.set_fault("msdicom", "store", latency_ms=300)
    old = last.worker("old")
    refused = crew.start(wait=False)
    assert poll(lambda: not refused.alive, timeout_s=WAIT_S)
    assert refused.stop() == 1
    assert "pacs-courier: Worker old@courier of version 0.1 still runs on this ledger" in refused.log
    (named,) = [one for one in doctor.examine(crew.loaded) if one.check == "worker old@courier"]
    assert (named.state, named.found.split(":")[0]) == ("failed", "is of version 0.1")
    batch_id = last.enqueue(single=10, batch=24)
    last.pictures |= sent_by_celery(20)
    with Courier(crew.loaded()) as courier:
        assert poll(lambda: len(kept(sandbox)) >= 8, timeout_s=WAIT_S)
        assert poll(lambda: courier.batch.get(batch_id).state == "running", timeout_s=WAIT_S)
        if how == "killed":
            old.kill()
        else:
            assert crew.processes.stop_one(old) == 0
        assert 0 < len(kept(sandbox)) < 40
        last.enqueue(single=6)
        assert waiting(redis) >= 6
        sandbox.reset_faults()
        begun_s = time.monotonic()
        crew.start(queue={**crew.queue, "read_old_queues": True})
        last.enqueue(single=6)  # programs are upgraded after the workers
        orders = {courier.handle(job_id): picture for job_id, picture in last.pictures.items()}
        assert poll(lambda: all(has_ended(handle) for handle in orders), timeout_s=WAIT_S, every_s=0.2)
        batch = courier.handle(batch_id).result(timeout_s=WAIT_S)
        check_invariant(orders, courier, sandbox, timeout_s=WAIT_S)
        took_s = time.monotonic() - begun_s
        assert (batch["state"], batch["totals"]["stored"]) == ("done", 24)
    there = {one.sop for one in kept(sandbox)}
    assert there == {picture.sop for picture in (*last.pictures.values(), *last.in_batch)}
    assert waiting(redis) == 0
    guarantee.row(
        area="An upgrade from the last version",
        fault=f"its worker is {how}",
        point="with uploads and a batch at work",
        outcome="all done once by a worker of this version; the batch has ended",
        recovery_s=took_s,
    )


def test_an_error_is_the_same_for_programs_and_workers_of_either_version(
    crew: Crew, last: LastVersion, image_server: Any, sandbox: Any
) -> None:
    url = str(image_server.put("none.dcm", b"no image"))
    old = last.worker("old")
    job_id, *of_the_old = last.fail(url)
    with Courier(crew.loaded()) as courier, pytest.raises(NotDicom):
        courier.handle(job_id).result(timeout_s=WAIT_S)
    assert crew.processes.stop_one(old) == 0
    crew.start(queue={**crew.queue, "read_old_queues": True})
    _, *of_the_new = last.fail(url)
    assert of_the_old == of_the_new == ["NotDicom", "not_dicom"]
    assert len(kept(sandbox)) == 0


def has_ended(handle: Any) -> bool:
    return handle.status() in ("done", "failed")
