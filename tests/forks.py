"""Starts Celery, the sandbox and ``pacs`` in a tenth of the time: forked from a process that has loaded their modules.

Nothing of ours runs at that load but imports: settings, application and command line are read by the child, which then
ends as any Python does. What cannot be had by a fork (another Python, its variables, another program) is executed.

``spawn``      in the place of `subprocess.Popen`, for `sandbox.processes.Processes` and ``terminals.py``
``python -m tests.forks FD``  the process to fork from; it ends when the other end of the socket FD is closed
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import io
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

MESSAGE_BYTES = 1 << 18
#: The command, as it is installed.
PACS = str(Path(sys.executable).with_name("pacs"))
#: What is run by a fork, and how it is started otherwise.
_STARTS = {
    "celery": [sys.executable, "-m", "celery"],
    "sandbox": [sys.executable, "-m", "sandbox"],
    PACS: [PACS],
}
_FORKS = sys.platform == "linux"
#: Variables that are read at the start of Python, or when a library is imported.
_AT_START = ("PYTHON", "LD_", "LANG", "LC_", "PROMETHEUS_")


def spawn(command: Sequence[str], *, env: Mapping[str, str], cwd: Path | None = None, **options: Any) -> Any:
    """A process in a session of its own, of which `pid`, `poll` and `wait` can be asked as of a `subprocess.Popen`.

    ``stdin``, ``stdout`` and ``stderr`` are files, numbers of files or `subprocess.DEVNULL`.
    """
    for name, words in _STARTS.items():
        if list(command[: len(words)]) == words and cwd is None and _chosen(env) == _chosen(os.environ) and _FORKS:
            streams = [options[stream] for stream in ("stdin", "stdout", "stderr")]
            return _origin().fork([name, *command[len(words) :]], env, streams)
    return subprocess.Popen(command, env=env, cwd=cwd, **options)


def _chosen(env: Mapping[str, str]) -> dict[str, str]:
    """What only a new Python can be given."""
    return {name: text for name, text in env.items() if name.startswith(_AT_START) and name != "PYTHONUNBUFFERED"}


@functools.cache
def _origin() -> Origin:
    return Origin()


def close() -> None:
    """End the process that others are forked from, if there is one; they go on."""
    if _origin.cache_info().currsize:
        _origin().close()
        _origin.cache_clear()


class Fork:
    """A child of the origin."""

    def __init__(self, pid: int, origin: Origin) -> None:
        self.pid = pid
        self._origin = origin

    def poll(self) -> int | None:
        """Its exit status, or None as long as it runs."""
        return self._origin.status(self.pid)

    def wait(self) -> int:
        """Wait for its end; its exit status."""
        while (status := self.poll()) is None:
            time.sleep(0.005)
        return status


class Origin:
    """The process that others are forked from."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._statuses: dict[int, int] = {}
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forks", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def fork(self, words: Sequence[str], env: Mapping[str, str], streams: Sequence[BinaryIO | int]) -> Fork:
        with self._lock, open(os.devnull, "rb") as nothing:
            files = [nothing if stream == subprocess.DEVNULL else stream for stream in streams]
            message = json.dumps({"words": list(words), "env": dict(env)}).encode()
            socket.send_fds(self._socket, [message], [one if isinstance(one, int) else one.fileno() for one in files])
            while "forked" not in (told := self._told()):
                pass
            self._statuses.pop(told["forked"], None)  # of an earlier process with this number
        return Fork(told["forked"], self)

    def status(self, pid: int) -> int | None:
        with self._lock:
            while pid not in self._statuses and select.select([self._socket], [], [], 0)[0]:
                self._told()
            return self._statuses.get(pid)

    def close(self) -> None:
        """It ends when it hears no more of us."""
        self._socket.close()
        self._process.wait()

    def _told(self) -> dict[str, int]:
        message = self._socket.recv(MESSAGE_BYTES)
        if not message:
            raise RuntimeError("the process that tests fork from has ended")
        told: dict[str, int] = json.loads(message)
        if "ended" in told:
            self._statuses[told["ended"]] = told["status"]
        return told


# --- the process to fork from -----------------------------------------------------------------------------------------


#: What reads settings, variables or the kind of its output when it is imported.
_NOT_LOADED = (
    "producer.cli",
    "producer.terminal",
    "worker.app",
    "worker.flower",
    "worker.pool",
    "worker.tasks",
    "sandbox.__main__",
    "sandbox.demo",
    "sandbox.summary",
)


def _load() -> None:
    """What a worker and the sandbox import."""
    for name in ("courier", "producer", "worker", "sandbox"):
        _load_package(name)
    for name in ("celery.bin.celery", "celery.apps.worker", "celery.worker.consumer", "celery.backends.redis"):
        importlib.import_module(name)
    for name in ("kombu.transport.redis", "click", "rich.console", "rich.live", "rich.progress", "rich.table"):
        importlib.import_module(name)
    assert not sys.modules.keys() & set(_NOT_LOADED)


def _load_package(package: str) -> None:
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        if module.name in _NOT_LOADED:
            continue
        if module.ispkg:
            _load_package(module.name)
        else:
            with contextlib.suppress(ImportError):  # an SDK of a store that is not installed
                importlib.import_module(module.name)


def _serve(requests: socket.socket) -> list[str]:
    """Fork for each request, tell of each child that ends; returns in a child alone: what it is to run."""
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready = select.select([requests, woken], [], [])[0]
        if woken in ready:
            os.read(woken, 4096)
            _tell_of_the_ended(requests)
        if requests in ready:
            message, files, _, _ = socket.recv_fds(requests, MESSAGE_BYTES, 3)
            if not message:
                sys.exit()
            begun, begins = os.pipe()
            if (pid := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                asked = json.loads(message)
                _become(asked["env"], files)
                for used in (begun, begins, woken, wakes, requests.detach()):
                    os.close(used)
                return list(asked["words"])
            os.close(begins)
            os.read(begun, 1)  # returns when the child has closed its end: it leads a session by then
            os.close(begun)
            for file in files:
                os.close(file)
            requests.send(json.dumps({"forked": pid}).encode())


def _tell_of_the_ended(requests: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            requests.send(json.dumps({"ended": ended[0], "status": os.waitstatus_to_exitcode(ended[1])}).encode())


def _become(env: Mapping[str, str], files: Sequence[int]) -> None:
    """A process of its own, with its own variables and files."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    raw = io.BufferedReader(io.FileIO(0, closefd=False))
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(raw, sys.stdin.encoding, sys.stdin.errors)
    sys.stdout, sys.stderr = _output(sys.stdout, 1), _output(sys.stderr, 2)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr


def _output(stream: TextIO, number: int) -> TextIO:
    """As Python opens it at its start: it depends on the variables, and on whether it is a terminal."""
    at_once = bool(os.environ.get("PYTHONUNBUFFERED"))
    raw = io.FileIO(number, "w", closefd=False)
    by_line = number == 2 or os.isatty(number)
    return io.TextIOWrapper(
        cast("BinaryIO", raw if at_once else io.BufferedWriter(raw)),
        stream.encoding,
        stream.errors,
        newline="\n",
        line_buffering=by_line,
        write_through=at_once,
    )


if __name__ == "__main__":
    _load()
    gc.collect()
    gc.freeze()
    name, *sys.argv[1:] = _serve(socket.socket(fileno=int(sys.argv[1])))
    if name == PACS:
        sys.argv[0] = name
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
