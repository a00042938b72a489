"""What batches cost as they grow: ``python -m benchmarks.scale`` (10,000, 100,000 and 1,000,000 items).

A real Redis with its append-only file, a real worker, and a kind that does nothing (``noop.py``). For each size a plan
is made by a process of its own, as a program that reads a list makes one, and applied by a worker started for it.
Measured: items planned per second; the most memory that planner and worker have ever held; the most that Redis has held
above what it held before, everything included (plan, outcomes, results, records, messages), by item; seconds to apply.
Processor time, by item, is what a busy machine changes least.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
from redis import Redis
from rich.console import Console
from rich.table import Table

from benchmarks.listing import listed
from courier.batches.planner import Planned, Planner
from courier.batches.store import Batches
from courier.messages import BatchOrderJob
from courier.settings import Settings
from producer import Courier
from sandbox import processes as parts
from sandbox.processes import Processes, RedisPart

SIZES = (10_000, 100_000, 1_000_000)
WAIT_S = 3600
#: A worker needs a server to start; nobody asks it anything.
NOBODY = {"name": "here", "type": "dicomweb", "url": "http://127.0.0.1:9/dicom-web"}


@dataclass(frozen=True)
class ScaleFigures:
    items: int
    plan_s: float
    plan_cpu_s: float
    planner_mib: float
    apply_s: float
    worker_cpu_s: float
    worker_mib: float
    redis_bytes: int

    def row(self) -> tuple[str, ...]:
        return (
            f"{self.items:,}",
            f"{self.items / self.plan_s:,.0f}",
            f"{self.plan_cpu_s / self.items * 1e6:.1f}",
            f"{self.planner_mib:.0f}",
            f"{self.worker_mib:.0f}",
            f"{self.redis_bytes / self.items:.0f}",
            f"{self.apply_s:.1f}",
            f"{self.apply_s / self.items * 1e6:.0f}",
            f"{self.worker_cpu_s / self.items * 1e6:.0f}",
        )


class Peak(threading.Thread):
    """The most memory that Redis's data have taken, seen ten times a second."""

    def __init__(self, redis: RedisPart) -> None:
        super().__init__(daemon=True)
        self._client = Redis.from_url(redis.url())
        self.before = self.most = self._used()
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.1):
            self.most = max(self.most, self._used())

    def _used(self) -> int:
        memory = self._client.info("memory")
        return int(memory["used_memory"]) - int(memory["mem_clients_normal"]) - int(memory["mem_aof_buffer"])

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.most - self.before


def plan(config: str, batch_id: str, items: int) -> None:
    """Plan a batch in this process; one line of JSON says how long that took and how large the process became."""
    with Courier(Settings.load({"PACS_CONFIG": config})) as courier:
        assert courier.ledger is not None
        batches = Batches(courier.ledger)
        begun, begun_cpu = time.perf_counter(), time.process_time()
        batches.open(batch_id, kind="noop", order={"verify": False}, concurrency=4, name=f"{items} times nothing")
        with Planner(batches, batch_id) as planner:
            planner.add_all(Planned(listed(number)) for number in range(items))
            planner.freeze()
        plan_s, cpu_s = time.perf_counter() - begun, time.process_time() - begun_cpu
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"plan_s": plan_s, "cpu_s": cpu_s, "mib": peak_mib}))


@contextmanager
def running(folder: Path) -> Iterator[tuple[Processes, RedisPart, Path]]:
    with Processes(folder) as processes:
        redis = parts.redis(processes)
        tree = {"servers": [NOBODY], "queue": parts.queue_settings(redis)}
        yield processes, redis, parts.write_settings(folder / "pacs.toml", tree)


def measure(items: int, *, receipts: bool, listed_by_worker: bool) -> ScaleFigures:
    environ = {"NOOP_RECEIPTS": "1"} if receipts else {}
    if listed_by_worker:
        environ["NOOP_LISTS"] = str(items)
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as (processes, redis, config):
        worker = parts.worker(processes, config, options=["-I", "benchmarks.noop"], environ=environ)
        worker.wait_ready(timeout_s=120)
        peak = Peak(redis)
        peak.start()
        batch_id, cpu_s = str(uuid.uuid4()), _cpu_s(worker.pid)
        told = (
            dict.fromkeys(("plan_s", "cpu_s", "mib"), 0.0)
            if listed_by_worker
            else _planned_elsewhere(config, batch_id, items)
        )
        with Courier(Settings.load({"PACS_CONFIG": str(config)})) as courier:
            order = {"planned": not listed_by_worker, "verify": False}
            courier.enqueue("pacs.batch.noop", BatchOrderJob, order, job_id=batch_id)
            end = courier.handle(batch_id).result(timeout_s=WAIT_S)
        assert end["totals"] == {"stored": items}, end
        applied = end["passes"]["apply"]
        apply_s = (applied["ended_ms"] - applied["begun_ms"]) / 1000
        plan_s = told["plan_s"] or (applied["begun_ms"] - end["created_ms"]) / 1000
        return ScaleFigures(
            items=items,
            plan_s=plan_s,
            plan_cpu_s=told["cpu_s"],
            planner_mib=told["mib"],
            apply_s=apply_s,
            worker_cpu_s=_cpu_s(worker.pid) - cpu_s,
            worker_mib=_peak_mib(worker.pid),
            redis_bytes=peak.stop(),
        )


def _planned_elsewhere(config: Path, batch_id: str, items: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scale", "--plan", batch_id, "--config", str(config), str(items)]
    told: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return told


def _peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@click.command()
@click.option("--plan", "batch_id", hidden=True)
@click.option("--config", hidden=True)
@click.option("--receipts", is_flag=True, help="Each item leaves a result as large as an upload's.")
@click.option("--listed-by-worker", is_flag=True, help="The worker finds the items and plans them.")
@click.argument("sizes", type=int, nargs=-1)
def main(
    sizes: tuple[int, ...], batch_id: str | None, config: str | None, receipts: bool, listed_by_worker: bool
) -> None:
    if batch_id and config:
        plan(config, batch_id, sizes[0])
        return
    table = Table(box=None)
    planned, applied = ("planned/s", "CPU µs", "planner MiB"), ("apply s", "µs/item", "CPU µs")
    headings = ("items", *planned, "worker MiB", "Redis B/item", *applied)
    for heading in headings:
        table.add_column(heading, justify="right")
    for items in sizes or SIZES:
        figures = measure(items, receipts=receipts, listed_by_worker=listed_by_worker)
        print(" ".join(figures.row()), flush=True)
        table.add_row(*figures.row())
    Console().print(table)
    Console().print(f"load average {Path('/proc/loadavg').read_text().split()[0]}")


if __name__ == "__main__":
    main()
