"""A job that waits says why: through the library, on the command line, to a plain Celery client, and in Flower."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import pytest
from celery.events.state import State
from click.testing import CliRunner

from courier.results import Waiting
from producer import Courier
from producer.cli import main
from sandbox.processes import poll
from sandbox.synthetic import image, new_uid

WAIT_S = 60
NAMES = set(Waiting.model_fields)


class Watcher:
    """Sees the events of workers as Flower does."""

    def __init__(self, app) -> None:
        self.state = State()
        self._app = app
        self._over = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watcher:
        self._thread.start()
        assert self._ready.wait(WAIT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        with self._app.connection_for_read() as connection:
            receiver = self._app.events.Receiver(connection, handlers={"*": self.state.event})
            self._ready.set()
            while not self._over.is_set():
                try:
                    receiver.capture(limit=None, timeout=0.3, wakeup=False)
                except TimeoutError:
                    continue

    def task(self, job_id):
        return self.state.tasks.get(job_id)


@pytest.fixture
def flower(plain) -> Iterator[Watcher]:
    with Watcher(plain) as watcher:
        yield watcher


@pytest.fixture
def site(worker, monkeypatch):
    jobs = {"sweep_s": 0.2, "backoff_base_s": 0.2, "backoff_cap_s": 0.5}
    started = worker(jobs=jobs, breaker={"failures": 1, "pause_s": 20, "pause_cap_s": 20})
    monkeypatch.setenv("PACS_CONFIG", str(started.config))
    with Courier(started.settings) as courier:
        yield courier


def pacs(*arguments):
    return CliRunner().invoke(main, list(arguments))


def test_a_job_that_waits_for_a_server_says_so_everywhere(site, sandbox, image_server, plain, flower):
    sandbox.set_fault("msdicom", "*", status=503)
    handle = site.upload(image_server.put("a.dcm", image(new_uid())))
    assert poll(lambda: handle.status() == "waiting", timeout_s=WAIT_S)
    waiting = handle.waiting()
    assert set(waiting) == NAMES
    assert (waiting["code"], waiting["server_name"]) == ("pacs_unavailable", "msdicom")
    assert waiting["since"] < waiting["next_try"]
    assert "circuit breaker" in waiting["message"]

    told = plain.AsyncResult(handle.id)
    assert (told.state, told.info["stage"]) == ("PROGRESS", "waiting")
    assert {name: told.info[name] for name in ("code", "message", "server_name", "since")} == {
        name: waiting[name] for name in ("code", "message", "server_name", "since")
    }
    document = json.loads(pacs("result", handle.id, "--json").stdout)
    assert document["waiting"] == waiting
    words = " ".join(pacs("result", handle.id).stdout.split())
    assert "waiting for msdicom since" in words
    assert "next try in" in words

    assert poll(lambda: flower.task(handle.id) and flower.task(handle.id).state == "WAITING", timeout_s=WAIT_S)
    shown = flower.task(handle.id)
    assert "waiting for msdicom since" in shown.result
    assert shown.result.endswith(" (pacs_unavailable)")
    assert (shown.exchange, shown.routing_key) == ("pacs_unavailable", "msdicom")
    sandbox.reset_faults()
    handle.cancel()
    assert poll(lambda: flower.task(handle.id).state == "FAILURE", timeout_s=WAIT_S)
    assert flower.task(handle.id).result.startswith("cancelled: "), "what it waited for is over"
    assert handle.waiting() is None


def test_a_job_that_waits_for_another_one_says_which(site, sandbox, image_server):
    sandbox.set_fault("msdicom", "store", latency_ms=4000)
    url = image_server.put("a.dcm", image(new_uid()))
    first = site.upload(url)
    assert poll(lambda: first.stage() == "push", timeout_s=WAIT_S, every_s=0.02)
    second = site.upload(url)
    assert poll(lambda: (second.waiting() or {}).get("code") == "other_job", timeout_s=WAIT_S, every_s=0.02)
    assert f"job {first.id} is storing the same image" in second.waiting()["message"]
    assert first.waiting() is None
    assert f"job {first.id}" in " ".join(pacs("result", second.id).stdout.split())
    ended = first.result(timeout_s=WAIT_S)
    assert ended["status"] == "stored"


def test_a_job_without_a_worker_waits_for_one(redis, monkeypatch, tmp_path):
    with Courier(broker_url=redis.broker_url, result_backend=redis.result_backend, ledger_url=redis.ledger_url) as site:
        handle = site.upload("https://images.example.org/a.dcm")
        waiting = handle.waiting()
        assert (handle.status(), waiting["code"], waiting["next_try"]) == ("queued", "queued", None)
        assert time.time() - 60 < site.ledger.clock_s()
        rows = list(site.watch([handle], timeout_s=0.5))
        assert rows[-1][1].waiting["code"] == "queued"
