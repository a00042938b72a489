"""One worker for all tests of a module that neither kill it nor empty Redis: starting one costs seconds.

``steady``   the worker's settings, as `Settings` and as the file that PACS_CONFIG names; both sandbox PACS, emptied
             and calm for each test
``courier``  a `Courier` on it
``pacs``     runs a command line: exit status, the JSON document on standard output (or None), standard error
``put``      stores a file on a server without the worker: ``put(sandbox.msdicom, body)``
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from courier.settings import Settings
from producer import Courier
from producer.cli import main
from sandbox import processes as parts
from sandbox.processes import Processes, RedisPart, SandboxPart
from tests.stopping import stop_together
from tests.stow import stow


@dataclass(frozen=True)
class Steady:
    config: Path
    settings: Settings


@pytest.fixture(scope="module")
def steady_worker(
    redis_server: RedisPart, sandbox_server: SandboxPart, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Steady]:
    redis_server.flush()
    with Processes(tmp_path_factory.mktemp("steady")) as running:
        tree = {
            "servers": sandbox_server.servers(),
            "queue": parts.queue_settings(redis_server),
            "sources": {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True},
            "jobs": {"max_attempts": 2, "backoff_base_s": 0.1, "sweep_s": 0.1},
            "breaker": {"failures": 1000},  # what one test does to a server is not to keep the next one from it
        }
        config = parts.write_settings(running.folder / "pacs.toml", tree)
        child = parts.worker(running, config, name="steady")
        child.wait_ready()
        yield Steady(config, Settings.load({"PACS_CONFIG": str(config)}))
        stop_together([child], redis_server)
        child.stop(grace_s=15)
        assert "Traceback (most recent call last)" not in child.log, child.log_tail(60)


@pytest.fixture
def steady(steady_worker: Steady, sandbox: SandboxPart) -> Steady:
    return steady_worker


@pytest.fixture
def courier(steady: Steady) -> Iterator[Courier]:
    with Courier(steady.settings) as courier:
        yield courier


@pytest.fixture
def pacs(steady: Steady, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Any, str]]:
    monkeypatch.setenv("PACS_CONFIG", str(steady.config))

    def run(*arguments: str) -> tuple[int, Any, str]:
        ended = CliRunner().invoke(main, [*arguments, "--json"])
        return ended.exit_code, json.loads(ended.stdout) if ended.stdout else None, ended.stderr

    return run


@pytest.fixture
def put() -> Callable[[str, bytes], None]:
    return stow
