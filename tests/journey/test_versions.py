"""Workers and programs of several releases on one ledger."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

import worker as package
from courier.ledger import peers
from courier.ledger.jobs import PREFIX, SCHEMA
from producer import Courier
from producer.errors import BrokerUnavailable
from sandbox import processes as parts
from sandbox.processes import Processes, RedisPart, SandboxPart


def begun(
    tmp_path: Path, redis: RedisPart, *, queue: dict[str, str] | None = None, wait_s: float = 40
) -> tuple[int, str]:
    """The exit status and the log of a worker that is expected to end itself."""
    server = {"name": "a", "type": "msdicom", "url": "http://127.0.0.1:9/v2"}
    tree = {"servers": [server], "queue": queue or parts.queue_settings(redis)}
    with Processes(tmp_path / "refused") as running:
        child = parts.worker(running, parts.write_settings(running.folder / "pacs.toml", tree), name="refused")
        parts.poll(lambda: not child.alive, timeout_s=wait_s)
        return child.stop(grace_s=5), child.log


@pytest.fixture
def ledger(redis: RedisPart) -> Any:
    with Redis.from_url(redis.ledger_url, decode_responses=True) as client:
        yield client


def speak_as_0_1(client: Redis, until: threading.Event) -> None:
    while not until.wait(0.5):
        said = {"ok": True, "complaint": "", "every_s": 1.5, "at": time.time()}
        client.hset(f"{PREFIX}workers", "old@host", json.dumps(said))


def test_a_worker_refuses_to_begin_beside_a_worker_of_0_1(tmp_path: Path, redis: RedisPart, ledger: Any) -> None:
    ended = threading.Event()
    said = {"ok": True, "complaint": "", "every_s": 1.5, "at": time.time()}
    ledger.hset(f"{PREFIX}workers", "old@host", json.dumps(said))
    thread = threading.Thread(target=speak_as_0_1, args=(ledger, ended))
    thread.start()
    try:
        status, log = begun(tmp_path, redis)
    finally:
        ended.set()
        thread.join()
    assert status == 1
    assert [line for line in log.splitlines() if line.startswith("pacs-courier: Worker old@host of version 0.1 still")]
    assert "Traceback" not in log
    assert ledger.get(f"{PREFIX}schema") is None


def test_a_worker_begins_after_one_of_0_1_has_ended(
    worker: Callable[..., Any], sandbox: SandboxPart, ledger: Any
) -> None:
    said = {"ok": True, "complaint": "", "every_s": 0.1, "at": time.time()}
    ledger.hset(f"{PREFIX}workers", "old@host", json.dumps(said))
    running = worker()
    assert ledger.get(f"{PREFIX}schema") == str(SCHEMA)
    with Courier(running.settings) as courier:
        assert courier.status().result(timeout_s=30)["servers"]
    (name,) = ledger.hkeys(f"{PREFIX}workers")
    assert json.loads(ledger.hget(f"{PREFIX}workers", name))["version"] == package.__version__


def test_a_worker_refuses_a_newer_ledger(tmp_path: Path, redis: RedisPart, ledger: Any) -> None:
    ledger.set(f"{PREFIX}schema", SCHEMA + 1)
    status, log = begun(tmp_path, redis)
    assert status == 1
    assert f"pacs-courier: The ledger has schema {SCHEMA + 1}, and version {package.__version__}" in log
    assert "Traceback" not in log
    assert ledger.keys("*") == [f"{PREFIX}schema"]


def test_a_worker_that_runs_ends_once_the_ledger_is_newer(worker: Callable[..., Any], ledger: Any) -> None:
    running = worker(worker={"watchdog_s": 15})
    ledger.set(f"{PREFIX}schema", SCHEMA + 1)
    assert parts.poll(lambda: not running.child.alive, timeout_s=30)
    assert running.stop() == peers.EXIT_STATUS
    assert f"The ledger has schema {SCHEMA + 1}" in running.log
    assert "takes no more jobs and ends itself with exit status 78" in running.log
    with Courier(running.settings) as courier, pytest.raises(BrokerUnavailable, match="The ledger has schema"):
        courier.exists("study", "1.2")


def test_a_worker_refuses_a_redis_in_cluster_mode_without_a_hash_tag(
    tmp_path: Path, redis: RedisPart, cluster_url: str
) -> None:
    status, log = begun(tmp_path, redis, queue={**parts.queue_settings(redis), "ledger_url": cluster_url})
    assert status == 1
    assert "pacs-courier: The ledger's Redis is in cluster mode; give queue.key_prefix a hash tag" in log
    assert "Traceback" not in log
