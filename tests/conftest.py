"""What tests run against: real servers as child processes, started once, on free loopback ports.

A server that is not installed fails the test in CI (``CI=true``) and skips it, with its reason, elsewhere.

``redis``         emptied for each test, a real one: ``.broker_url``, ``.result_backend``, ``.ledger_url``
``redis_url``     the ledger's database on it
``cluster_url``   the one database of a Redis in cluster mode, emptied for each test
``plain``         a Celery client on it that knows nothing of us
``sandbox``       emptied and calm for each test: ``.msdicom``, ``.dcm4chee``, ``.control``, ``.set_fault(…)``
``orthanc``       base URL of a real Orthanc's DICOMweb; never emptied, so bring UIDs of your own
``azurite``       Azure's emulator of its blob storage, never emptied: ``.url``, ``.connection_string``
``moto``          URL of an S3 that takes any credentials, never emptied: bring buckets of your own
``distributions`` the sdist and the wheel of this working tree
``installed``     the Python of an environment that has the wheel, and our dependencies
``image_server``  for one test; ``.put(path, body, …)`` gives the URL where it is served
``worker``        starts real worker processes for one test: ``worker(servers=…, jobs={"lease_s": 2})``
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from courier.settings import Settings
from sandbox import processes as parts
from sandbox.images import ImageServer
from sandbox.processes import AzuritePart, Child, OrthancPart, Processes, RedisPart, SandboxPart
from tests import forks
from tests.missing import missing, summary
from tests.packages import Distributions, build_distributions, install
from tests.stopping import stop_together

# Tables are as wide as a test says: readline tells child processes, such as xdist's, of a terminal of its own.
for _name in ("COLUMNS", "LINES"):
    os.environ.pop(_name, None)

# What is not kept compiled is compiled by each worker anew, which takes a third of its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

parts.spawn = forks.spawn

# In the background of a shell an interrupt is ignored, by children too; some tests interrupt theirs.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: What a worker's log holds when its code, and not its input, is wrong (the second as worker/jobs/runner.py logs it).
SIGNS_OF_A_FAULT = ("Traceback (most recent call last)", "A fault of the worker itself")


def _or_missing(start: Callable[[], Any]) -> Any:
    try:
        return start()
    except parts.PartMissing as error:
        missing(str(error))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked ``full`` is left to `make chaos`."""
    if os.environ.get("CHAOS_FULL") == "1":
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Ten thousand tests are a large heap: what stays until the end is looked through once, not again and again."""
    gc.collect()
    session.config.stash[REUSED] = _exceptions()
    gc.freeze()


#: The exceptions that were made when the tests were collected, as their parameters.
REUSED = pytest.StashKey[list[BaseException]]()


def _exceptions() -> list[BaseException]:
    return [thing for thing in gc.get_objects() if issubclass(type(thing), BaseException)]


@pytest.fixture(scope="module", autouse=True)
def _threads_of_what_is_gone_end() -> Iterator[None]:
    """Guards and pulses end their threads when they are collected; hundreds of them would take the processor."""
    yield
    gc.collect()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """An exception that stays keeps the frames of each test that raised it, and with them all that was there."""
    told = yield
    if nextitem is None or nextitem.path != item.path:
        for error in item.config.stash[REUSED] + _exceptions():
            error.__traceback__ = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # a failed command's connection is among what was kept
            gc.collect()
    return told


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None, object, object]:
    """The last lines of a run: what it could not test here, and how to repeat what was random."""
    told = yield
    for line in summary(terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(line)
    return told


def pytest_unconfigure() -> None:
    forks.close()


@pytest.fixture
def is_running() -> Callable[[int], bool]:
    """Whether a process still runs; a zombie has ended, only its parent has not looked yet."""

    def running(pid: int) -> bool:
        command = ["ps", "-o", "stat=", "-p", str(pid)]
        state = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return bool(state) and not state.startswith("Z")

    return running


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """The children that all tests share."""
    with Processes(tmp_path_factory.mktemp("parts")) as running:
        yield running


@pytest.fixture(scope="session")
def redis_server(processes: Processes) -> RedisPart:
    return parts.redis(processes)


@pytest.fixture
def redis(redis_server: RedisPart) -> RedisPart:
    redis_server.flush()
    return redis_server


@pytest.fixture
def redis_url(redis: RedisPart) -> str:
    return redis.ledger_url


@pytest.fixture(scope="session")
def cluster_server(processes: Processes) -> RedisPart:
    server = parts.redis(
        processes, name="cluster", options=["--cluster-enabled", "yes", "--cluster-port", str(parts.free_port())]
    )
    with Redis(host=parts.HOST, port=server.port, decode_responses=True) as client:
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        until = time.monotonic() + 10
        while "cluster_state:ok" not in str(client.execute_command("CLUSTER", "INFO")):
            assert time.monotonic() < until
            time.sleep(0.05)
    return server


@pytest.fixture
def cluster_url(cluster_server: RedisPart) -> str:
    cluster_server.flush()
    return cluster_server.url()


@pytest.fixture
def plain(redis: RedisPart) -> Iterator[Celery]:
    app = Celery(broker=redis.broker_url, backend=redis.result_backend, set_as_current=False)
    app.conf.task_default_queue = "pacs"
    yield app
    app.backend.result_consumer.subscribed_to.clear()  # or a result that is collected later connects to unsubscribe
    app.backend.result_consumer.stop()
    app.backend.client.connection_pool.disconnect()
    app.close()


@pytest.fixture(scope="session")
def sandbox_server(processes: Processes) -> SandboxPart:
    return parts.sandbox(processes)


@pytest.fixture
def sandbox(sandbox_server: SandboxPart) -> SandboxPart:
    sandbox_server.reset_faults()
    sandbox_server.empty()
    return sandbox_server


@pytest.fixture(scope="session")
def orthanc_server(processes: Processes) -> OrthancPart:
    server: OrthancPart = _or_missing(lambda: parts.orthanc(processes))
    return server


@pytest.fixture(scope="session")
def orthanc(orthanc_server: OrthancPart) -> str:
    return orthanc_server.url


@pytest.fixture(scope="session")
def azurite(processes: Processes) -> AzuritePart:
    server: AzuritePart = _or_missing(lambda: parts.azurite(processes))
    return server


@pytest.fixture(scope="session")
def moto(processes: Processes) -> str:
    return parts.moto(processes)


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """The sdist and the wheel of this working tree."""
    return build_distributions(tmp_path_factory.mktemp("distributions"))


@pytest.fixture(scope="session")
def installed(distributions: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel."""
    return install(distributions.wheel, tmp_path_factory.mktemp("installed"))


@pytest.fixture
def image_server() -> Iterator[ImageServer]:
    with ImageServer() as server:
        yield server


@dataclass(frozen=True)
class Worker:
    """A running worker process and the settings it runs on."""

    child: Child
    config: Path
    settings: Settings

    @property
    def log(self) -> str:
        return self.child.log

    @property
    def log_path(self) -> Path:
        return self.child.log_path

    def stop(self) -> int:
        """SIGTERM and wait; returns the exit status."""
        return self.child.stop(grace_s=15)

    def kill(self) -> int:
        """SIGKILL to its whole process group."""
        return self.child.kill()


class Workers:
    """Starts workers and, at the end of the test, ends them and reads their logs."""

    def __init__(self, folder: Path, request: pytest.FixtureRequest) -> None:
        self._running = Processes(folder)
        self._request = request
        self._may_show_tracebacks: set[Child] = set()

    def __call__(
        self,
        *,
        servers: list[dict[str, Any]] | None = None,
        concurrency: int = 8,
        environ: Mapping[str, str] | None = None,
        options: Iterable[str] = (),
        may_show_tracebacks: bool = False,
        **sections: Mapping[str, Any],
    ) -> Worker:
        """Start one and wait until it takes jobs.

        ``servers`` are the sandbox's two unless given; every further keyword is a section of ``pacs.toml``.
        Sources may be on loopback. ``options`` are of Celery's command line.
        """
        if servers is None:
            servers = self._request.getfixturevalue("sandbox").servers()
        name = f"worker{len(list(self._running.folder.glob('*.toml')))}"
        tree = {
            "servers": servers,
            "queue": parts.queue_settings(self._request.getfixturevalue("redis")),
            "sources": {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True},
            **{section: dict(values) for section, values in sections.items()},
        }
        config = parts.write_settings(self._running.folder / f"{name}.toml", tree)
        child = parts.worker(
            self._running, config, name=name, concurrency=concurrency, options=options, environ=environ
        )
        if may_show_tracebacks:
            self._may_show_tracebacks.add(child)
        child.wait_ready()
        return Worker(child, config, Settings.load({"PACS_CONFIG": str(config)}))

    def close(self) -> None:
        """End them all, then fail the test if one wrote a traceback, or owned to a fault, that was not announced."""
        watched = [child for child in self._running.children if child not in self._may_show_tracebacks]
        stop_together(self._running.children, self._request.getfixturevalue("redis"))
        self._running.stop()
        for child in watched:
            if any(sign in child.log for sign in SIGNS_OF_A_FAULT):
                pytest.fail(f"{child.name} has a fault:\n{child.log_tail(60)}")


@pytest.fixture
def worker(tmp_path: Path, request: pytest.FixtureRequest, redis: RedisPart) -> Iterator[Workers]:
    workers = Workers(tmp_path / "workers", request)
    try:
        yield workers
    finally:
        workers.close()
