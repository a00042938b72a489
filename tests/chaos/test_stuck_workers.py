"""A worker that has stopped working without dying ends itself and the next does its jobs; no healthy one ever does."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from courier.settings import Settings
from producer import Courier
from producer.doctor import examine
from sandbox import processes as parts
from sandbox.processes import Processes
from sandbox.synthetic import image, new_uid
from tests.chaos.wires import Wires
from worker.runtime.watchdog import EXIT_STATUS

WAIT_S = 60
PHASE_S = 6
STUCK = {
    "loop": "its loop has not turned",
    "deaf": "it has taken no message",
    "slots": "none of its slots has done anything",
}


@pytest.fixture
def nursery(tmp_path, sandbox):
    """A Redis of its own, settings with an impatient watchdog, and processes that nobody starts again but the test."""
    with Processes(tmp_path / "children") as children:
        redis = parts.redis(children)
        tree = settings_tree(tmp_path, redis, sandbox)
        config = parts.write_settings(tmp_path / "pacs.toml", tree)
        yield children, config, Settings.load({"PACS_CONFIG": str(config)}), redis


def settings_tree(tmp_path, redis, sandbox):
    return {
        "servers": sandbox.servers(),
        "queue": parts.queue_settings(redis),
        "sources": {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True},
        "jobs": {"lease_s": 3, "grace_s": 3, "sweep_s": 0.5},
        "worker": {"watchdog_s": 4, "hung_s": 4, "health_file": str(tmp_path / "health")},
    }


def health(config: Path) -> int:
    command = [sys.executable, "-m", "worker.health"]
    ended = subprocess.run(command, env={"PACS_CONFIG": str(config), "PATH": ""}, capture_output=True, check=False)
    assert b"Traceback" not in ended.stderr
    return ended.returncode


@pytest.mark.parametrize("fault", STUCK)
def test_a_worker_that_lives_and_does_nothing_ends_itself_and_its_jobs_are_done(
    nursery, image_server, guarantee, tmp_path, fault
):
    children, config, settings, _ = nursery
    stall = tmp_path / "stall"
    stuck = parts.worker(
        children,
        config,
        name="stuck",
        concurrency=2,
        options=["-I", "tests.chaos.stalling"],
        environ={"STALL_FILE": str(stall)},
    )
    stuck.wait_ready()
    with Courier(settings) as courier:
        assert courier.upload(image_server.put("before.dcm", image(new_uid()))).result(timeout_s=WAIT_S)
        assert parts.poll(lambda: health(config) == 0, timeout_s=WAIT_S, every_s=0.5)
        stall.write_text(fault)
        time.sleep(1.5)  # a message that is already asked for is still taken
        urls = [image_server.put(f"{number}.dcm", image(new_uid())) for number in range(4)]
        handles, begun_s = [courier.upload(url) for url in urls], time.monotonic()
        assert parts.poll(lambda: not stuck.alive, timeout_s=WAIT_S), stuck.log_tail()
        ended_s = time.monotonic() - begun_s
        assert stuck.kill() == EXIT_STATUS
        (line,) = [line for line in stuck.log.splitlines() if "This worker is stuck" in line]
        assert STUCK[fault] in line
        assert health(config) == 1
        parts.worker(children, config, name="next").wait_ready()
        assert [handle.result(timeout_s=WAIT_S)["status"] for handle in handles] == ["stored"] * 4
        took_s = time.monotonic() - begun_s
        assert parts.poll(lambda: health(config) == 0, timeout_s=WAIT_S, every_s=0.5)
        found = {finding.check: finding for finding in examine(lambda: settings)}
        assert (found["worker next@courier"].state, found["progress"].state) == ("ok", "ok")
    assert ended_s < WAIT_S
    guarantee.row(
        area="worker",
        fault=f"a worker lives, but {STUCK[fault]}",
        point="4 jobs wait (watchdog_s = 4)",
        outcome="it ends itself, the next worker does them",
        recovery_s=took_s,
    )


@pytest.mark.full  # half a minute of watching nothing happen
def test_a_healthy_worker_is_never_ended_idle_or_busy_or_told_to_pause_or_while_redis_is_away(
    nursery, image_server, sandbox
):
    children, config, settings, redis = nursery
    worker = parts.worker(children, config, name="healthy", concurrency=2)
    worker.wait_ready()
    with Courier(settings) as courier:
        time.sleep(PHASE_S)  # idle
        sandbox.set_fault("msdicom", "store", latency_ms=2500)
        slow = [courier.upload(image_server.put(f"{number}.dcm", image(new_uid()))) for number in range(4)]
        assert [handle.result(timeout_s=WAIT_S)["status"] for handle in slow] == ["stored"] * 4
        sandbox.reset_faults()
        courier._app.control.cancel_consumer("pacs", reply=True)
        waiting = courier.upload(image_server.put("paused.dcm", image(new_uid())))
        time.sleep(PHASE_S)  # it was told not to take what waits
        assert worker.alive
        courier._app.control.add_consumer("pacs", reply=True)
        assert waiting.result(timeout_s=WAIT_S)["status"] == "stored"
        children.stop_one(redis.child)
        time.sleep(2 * PHASE_S)  # each look takes its time now
    assert worker.alive, worker.log_tail()
    assert health(config) == 0
    assert "stuck" not in worker.log


@pytest.mark.full
def test_a_worker_whose_connections_died_unheard_takes_messages_again_or_is_replaced(
    nursery, image_server, guarantee, tmp_path
):
    children, _, settings, redis = nursery
    wires = Wires(redis.port)
    tree = settings.model_dump(mode="json", exclude_unset=True)
    tree["queue"]["broker_url"] = f"redis://{parts.HOST}:{wires.port}/0"
    tree["worker"] |= {"watchdog_s": 20, "health_file": str(tmp_path / "health")}
    config = parts.write_settings(tmp_path / "wired.toml", tree)

    def start(name):
        child = parts.worker(children, config, name=name)
        child.wait_ready()
        return child

    worker, replaced = start("first"), 0
    with Courier(settings) as courier:
        assert courier.upload(image_server.put("before.dcm", image(new_uid()))).result(timeout_s=WAIT_S)
        wires.forget()
        begun_s = time.monotonic()
        handle = courier.upload(image_server.put("after.dcm", image(new_uid())))
        while not handle.report().over and time.monotonic() - begun_s < 2 * WAIT_S:
            if not worker.alive:
                assert worker.kill() == EXIT_STATUS
                replaced += 1
                worker = start(f"next{replaced}")
            time.sleep(0.2)
        took_s = time.monotonic() - begun_s
        assert handle.result(timeout_s=1)["status"] == "stored"
    assert wires.forgotten, "there were connections to forget"
    wires.close()
    guarantee.row(
        area="worker",
        fault="all connections to the broker die without a word",
        point="idle, then a job is enqueued (watchdog_s = 20)",
        outcome=f"the job is done; {'the worker was replaced' if replaced else 'the worker connected again'}",
        recovery_s=took_s,
    )
