"""`make bench`: what single uploads cost workers and Redis where the PACS costs nothing.

One and several worker processes, by turns, against a server that keeps nothing (``stub_pacs.py``, a process of its
own), with images from another process. Everything shares this machine's processors, so the jobs a second say little of
several workers; what a job costs a worker and Redis says how many of them a rate needs. Linux only.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from redis import Redis
from rich.console import Console
from rich.table import Table

from benchmarks.uploads import UploadBench, chain_pass, serve_images
from producer import Courier
from sandbox import processes as parts
from sandbox.processes import HOST, Child, Processes, RedisPart

WORKERS = (1, 2)


@dataclass(frozen=True)
class RedisLoad:
    """Of one job: commands, those in scripts included; requests of clients; microseconds of Redis' processor time."""

    commands: float
    requests: float
    cpu_us: float


@dataclass(frozen=True)
class ScalingPass:
    """``worker_ms`` is the processor time that a job costs all workers together."""

    jobs_per_s: float
    worker_ms: float
    cpu_ms: dict[str, float]
    redis: RedisLoad


@contextmanager
def bench(folder: Path) -> Iterator[tuple[UploadBench, RedisPart]]:
    """Redis, the server that keeps nothing, and the image server; workers are started where they are measured."""
    folder.mkdir(exist_ok=True)
    with Processes(folder) as processes:
        redis = parts.redis(processes)
        command = [sys.executable, "-m", "benchmarks.stub_pacs"]
        stub = processes.start("pacs", command, ready=lambda child: child.out_path.read_bytes().endswith(b"\n"))
        stub.wait_ready()
        url = stub.out_path.read_text().strip()
        tree = {
            "servers": [{"name": "pacs", "type": "dicomweb", "url": url}],
            "sources": {"allow_hosts": [f"{HOST}:*"], "allow_private_networks": True},
            "queue": parts.queue_settings(redis),
        }
        config = parts.write_settings(folder / "pacs.toml", tree)
        yield UploadBench(processes, url, serve_images(processes), config), redis


def redis_totals(redis: RedisPart) -> RedisLoad:
    """Since it was started, all jobs together."""
    with Redis.from_url(redis.url()) as client:
        stats: dict[str, Any] = client.info("stats")
        cpu: dict[str, Any] = client.info("cpu")
    cpu_us = (cpu["used_cpu_user"] + cpu["used_cpu_sys"]) * 1e6
    return RedisLoad(stats["total_commands_processed"], stats["total_reads_processed"], cpu_us)


def scaling_pass(stage: UploadBench, redis: RedisPart, courier: Courier, *, count: int) -> ScalingPass:
    before = redis_totals(redis)
    done = chain_pass(stage, courier, count=count)
    after = redis_totals(redis)
    load = RedisLoad(
        (after.commands - before.commands) / count,
        (after.requests - before.requests) / count,
        (after.cpu_us - before.cpu_us) / count,
    )
    worker_ms = sum(spent for part, spent in done.cpu_ms.items() if part.startswith("worker"))
    return ScalingPass(done.jobs_per_s, worker_ms, done.cpu_ms, load)


def start_workers(stage: UploadBench, number: int) -> list[Child]:
    workers = [parts.worker(stage.processes, stage.config, name=f"worker{one}") for one in range(number)]
    for worker in workers:
        worker.wait_ready(timeout_s=120)
    return workers


def measure(
    stage: UploadBench, redis: RedisPart, *, passes: int, count: int, warm_up: int = 100
) -> dict[int, list[ScalingPass]]:
    """The passes by how many workers there were; the numbers of workers take turns."""
    found: dict[int, list[ScalingPass]] = {number: [] for number in WORKERS}
    with Courier(stage.settings) as courier:
        for _ in range(passes):
            for number, passed in found.items():
                workers = start_workers(stage, number)
                chain_pass(stage, courier, count=warm_up)  # connections, imports, caches
                passed.append(scaling_pass(stage, redis, courier, count=count))
                for worker in workers:
                    stage.processes.stop_one(worker)
    return found


def show(found: dict[int, list[ScalingPass]], console: Console) -> None:
    table = Table(title="Single uploads to a PACS that costs nothing", title_justify="left", box=None)
    headings = ("workers", "jobs/s", "passes", "worker ms/job", "Redis: commands", "requests", "µs")
    for heading in headings:
        table.add_column(heading, justify="right")
    for number, passes in found.items():
        rates = [one.jobs_per_s for one in passes]
        table.add_row(
            str(number),
            f"{statistics.median(rates):.0f}",
            " ".join(f"{rate:.0f}" for rate in rates),
            f"{_median([one.worker_ms for one in passes]):.1f}",
            f"{_median([one.redis.commands for one in passes]):.0f}",
            f"{_median([one.redis.requests for one in passes]):.0f}",
            f"{_median([one.redis.cpu_us for one in passes]):.0f}",
        )
    console.print(table)
    one_worker = found[min(found)]
    worker_ms = _median([one.worker_ms for one in one_worker])
    redis_us = max(_median([one.redis.cpu_us for one in passes]) for passes in found.values())
    others = {
        part: _median([one.cpu_ms[part] for one in one_worker])
        for part in one_worker[0].cpu_ms
        if not part.startswith(("worker", "redis"))
    }
    told = ", ".join(f"{part} {spent:.1f}" for part, spent in others.items())
    console.print(f"Other parts, ms a job with one worker: {told}. {os.cpu_count()} cores for all of them.")
    console.print(
        f"Extrapolated, not measured: a worker process with a core of its own does at most {1000 / worker_ms:.0f} jobs"
        f" a second, and one Redis with a core of its own serves at most {1e6 / redis_us:.0f}, so"
        f" {1e6 / redis_us / (1000 / worker_ms):.0f} such workers.",
        "",
    )


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


@click.command(help=__doc__)
@click.option("--passes", default=3, show_default=True, help="Turns of each number of workers.")
@click.option("--count", default=400, show_default=True, help="Images per turn.")
def main(passes: int, count: int) -> None:
    with tempfile.TemporaryDirectory(prefix="pacs-bench-") as folder, bench(Path(folder)) as (stage, redis):
        found = measure(stage, redis, passes=passes, count=count)
    show(found, Console())


if __name__ == "__main__":
    main()
