"""Workers that may be killed, and jobs that stop where a test wants them to.

Which signal goes to whom and when is the tests' business; what has to be true afterwards is in ``judge.py``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis import Redis

from courier.settings import Settings
from sandbox import processes as parts
from sandbox.processes import Child, Processes, RedisPart

#: Times that make recovery quick to see. What they are by default is in docs/settings.md.
QUICK: dict[str, Any] = {"lease_s": 2, "grace_s": 3, "sweep_s": 0.2, "backoff_base_s": 0.2, "backoff_cap_s": 1}
#: A new line of a worker's log; what follows until the next one belongs to it.
_RECORD = re.compile(r"^(?=\d{4}-\d\d-\d\d \d\d:|\[\d{4}-)", re.MULTILINE)
#: Celery's own words on a child that was killed; every other traceback is a fault of ours.
_OF_THE_KILLED = "WorkerLostError"
_FAULTS = ("Traceback (most recent call last)", "A fault of the worker itself", "Fatal Python error")


class Crew:
    """Worker processes of one test, on one set of settings."""

    def __init__(self, folder: Path, *, queue: Mapping[str, str], servers: list[dict[str, Any]], control: str) -> None:
        self.processes = Processes(folder)
        self.queue = queue
        self.servers = servers
        self._control = control
        self._started = 0
        #: Signs in a log that are announced: what a cut connection makes Celery say.
        self.forgiven: list[str] = []

    def settings(self, **sections: Mapping[str, Any]) -> Path:
        tree = {
            "servers": self.servers,
            "queue": dict(self.queue),
            "sources": {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True},
            "jobs": QUICK,
            **{section: dict(values) for section, values in sections.items()},
        }
        return parts.write_settings(self.processes.folder / f"pacs{self._started}.toml", tree)

    def start(
        self,
        *,
        pool: str = "threads",
        concurrency: int = 8,
        stops: bool = False,
        options: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        wait: bool = True,
        **sections: Mapping[str, Any],
    ) -> Child:
        """Start a worker; with ``stops`` it is the one whose jobs stop (``stops.py``)."""
        config = self.settings(**sections)
        name = f"worker{self._started}"
        self._started += 1
        app = "tests.chaos.stops" if stops else "worker.app"
        command = [sys.executable, "-m", "celery", "-A", app, "worker", "--pool", pool, "-E"]
        command += ["--concurrency", concurrency, "--loglevel", "INFO", "--hostname", f"{name}@courier"]
        child = self.processes.start(
            name,
            [*command, "--without-mingle", "--without-gossip", *options],
            ready=lambda child: f"{name}@courier ready." in child.log,
            environ={"PACS_CONFIG": str(config), "CHAOS_URL": self._control, **(environ or {})},
        )
        if wait:
            child.wait_ready(timeout_s=60)
        return child

    def loaded(self, **sections: Mapping[str, Any]) -> Settings:
        """The settings as a program reads them."""
        return Settings.load({"PACS_CONFIG": str(self.settings(**sections))})

    def faults(self) -> list[str]:
        """What the workers wrote that is a fault of their own code."""
        found = []
        for path in sorted(self.processes.folder.glob("worker*.log")):
            records = _RECORD.split(path.read_text(encoding="utf-8", errors="replace"))
            bad = [record for record in records if any(sign in record for sign in _FAULTS)]
            bad = [one for one in bad if not any(word in one for word in (_OF_THE_KILLED, *self.forgiven))]
            found += [f"{path.name}:\n{record}" for record in bad]
        return found


def children_of(pid: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(word) for word in listed.split()]


def send(pid: int, number: int) -> None:
    """To this process alone; one that is gone already is no error."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


@dataclass(frozen=True)
class Reached:
    job_id: str
    point: str
    pid: int


class Stops:
    """Who shall stop where, who has, and who may go on."""

    def __init__(self, url: str) -> None:
        self._redis = Redis.from_url(url, decode_responses=True)

    def at(self, job_id: str, point: str) -> None:
        self._redis.hset("stops", job_id, point)

    def kill_at(self, job_id: str, point: str) -> None:
        """Let the worker die there, each time the job comes so far."""
        self._redis.hset("stops", job_id, f"kill: {point}")

    def reached(self, *, count: int, timeout_s: float) -> list[Reached]:
        """Wait until ``count`` jobs have stopped."""
        found: list[Reached] = []
        deadline = time.monotonic() + timeout_s
        while len(found) < count:
            left_s = deadline - time.monotonic()
            row = self._redis.blpop(["reached"], timeout=1) if left_s > 0 else None
            if row is not None:
                found.append(Reached(**json.loads(row[1])))
            assert left_s > 0, f"only {sorted(one.point for one in found)} were reached"
        return found

    def go(self, job_ids: Iterable[str]) -> None:
        for job_id in job_ids:
            self._redis.rpush(f"go:{job_id}", 1)

    def close(self) -> None:
        self._redis.close()


def control_url(redis: RedisPart) -> str:
    """The database in which tests and stopped jobs talk to each other."""
    return redis.url(5)
