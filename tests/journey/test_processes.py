"""Whatever happens to the process that starts them, children end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from redis import Redis

from sandbox import processes as parts
from sandbox.processes import PartFailed, Processes, RedisPart

IsRunning = Callable[[int], bool]
ENDLESS = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
WITH_GRANDCHILD = [
    sys.executable,
    "-c",
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print(child.pid, flush=True); time.sleep(600)",
]


def says_something(child: parts.Child) -> bool:
    return child.out_path.read_bytes().endswith(b"\n")


def test_leaving_the_block_ends_children_and_grandchildren(tmp_path: Path, is_running: IsRunning) -> None:
    with Processes(tmp_path) as running:
        child = running.start("family", WITH_GRANDCHILD, ready=says_something)
        child.wait_ready()
        grandchild = int(child.out_path.read_text())
        assert is_running(grandchild)
    assert not child.alive
    assert parts.poll(lambda: not is_running(grandchild), timeout_s=30)


def test_a_child_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    with Processes(tmp_path) as running:
        child = running.start("stubborn", [sys.executable, "-c", stubborn], ready=says_something, grace_s=0.2)
        child.wait_ready()
        assert running.stop_one(child) == -signal.SIGKILL


def test_children_end_when_their_parent_is_killed(tmp_path: Path, is_running: IsRunning) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from sandbox.processes import Processes\n"
        "running = Processes(Path(sys.argv[1]))\n"
        f"child = running.start('endless', {ENDLESS!r}, ready=lambda c: c.out_path.read_bytes() != b'')\n"
        "child.wait_ready(); print(child.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert parts.poll(lambda: not is_running(int(done.stdout)), timeout_s=30)


def test_a_part_that_dies_at_the_start_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    broken = [sys.executable, "-c", "import sys; print('the disk is full', file=sys.stderr); sys.exit(7)"]
    with Processes(tmp_path) as running:
        child = running.start("broken", broken, ready=says_something)
        with pytest.raises(PartFailed, match="broken ended by itself with exit status 7\nthe disk is full"):
            child.wait_ready()


def test_a_part_that_crashes_later_is_noticed(tmp_path: Path) -> None:
    with Processes(tmp_path) as running:
        child = running.start("endless", ENDLESS, ready=says_something)
        child.wait_ready()
        assert running.crashed() is None
        os.kill(child.pid, signal.SIGKILL)
        assert parts.poll(lambda: running.crashed() is child, timeout_s=30)
        assert "killed by signal 9" in str(child.failure())


def test_the_settings_of_the_caller_do_not_reach_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PACS_CONFIG", "PACS__ROUTING__POLICY", "BROKER_URL"):
        monkeypatch.setenv(variable, "of the caller")
    with Processes(tmp_path) as running:
        show = [
            sys.executable,
            "-c",
            "import os; print(sorted(k for k in os.environ if 'PACS' in k or 'BROKER' in k))",
        ]
        child = running.start("show", show, ready=says_something, environ={"PACS_CONFIG": "its own"})
        assert parts.poll(lambda: says_something(child), timeout_s=30)
        assert child.out_path.read_text() == "['PACS_CONFIG']\n"


def test_redis_keeps_its_data_over_a_kill(tmp_path: Path) -> None:
    with Processes(tmp_path) as running:
        first = parts.redis(running)
        with Redis.from_url(first.ledger_url) as client:
            client.set("receipt", "stored")
            client.execute_command("WAITAOF", 1, 0, 5000)
        first.child.kill()
        second = parts.redis(running, port=first.port)
        with Redis.from_url(second.ledger_url) as client:
            assert client.get("receipt") == b"stored"


def test_flushing_redis_empties_every_database(redis: RedisPart) -> None:
    with Redis.from_url(redis.ledger_url) as client:
        client.set("receipt", "of another test")
        redis.flush()
        assert client.dbsize() == 0


def test_orthanc_speaks_dicomweb(orthanc: str) -> None:
    with urllib.request.urlopen(f"{orthanc}/studies?StudyInstanceUID=1.2.3", timeout=10) as response:
        assert response.read() == b"[]"
