"""What the `pacs batch` commands cost with long lists: ``python -m benchmarks.planning [--rows 1000000]``.

A real Redis, no worker: a file of URLs becomes a plan (`upload --no-wait`), the plan a file, the report CSV, and the
plan file a plan again. Each command is a process of its own; measured are its wall-clock seconds, its processor
time, rows per second, and the most memory that it ever held.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click
from redis import Redis
from rich.console import Console
from rich.table import Table

from sandbox import processes as parts
from sandbox.processes import Processes

PACS = [sys.executable, "-c", "from producer.cli import main; main()", "batch"]


@dataclass(frozen=True)
class PlanningFigures:
    what: str
    elapsed_s: float
    processor_s: float
    peak_mib: float


def run(what: str, words: list[str], environ: Mapping[str, str], out: Path) -> PlanningFigures:
    began_s = time.perf_counter()
    with out.open("wb") as file:
        child = subprocess.Popen([*PACS, *words], env=dict(environ), stdout=file)
        _, status, usage = os.wait4(child.pid, 0)  # the peak of this child alone
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{what}: exit status {child.returncode}")
    return PlanningFigures(what, time.perf_counter() - began_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def measured(rows: int, folder: Path, environ: Mapping[str, str]) -> list[PlanningFigures]:
    urls, plan, out = folder / "urls.txt", folder / "plan.jsonl", folder / "out"
    with urls.open("w") as file:
        file.writelines(
            f"https://images.example.org/archive/{number // 100:06}/{number:09}.dcm?sv=1\n" for number in range(rows)
        )
    figures = [run("a file of URLs to a plan", ["upload", str(urls), "--no-wait"], environ, out)]
    batch_id = out.read_text().strip()
    figures.append(run("the plan to a file", ["plan", batch_id, "--plan", str(plan)], environ, out))
    figures.append(run("the report as CSV", ["report", batch_id, "--csv"], environ, out))
    figures.append(run("a plan file to a plan", ["apply", str(plan), "--no-wait"], environ, out))
    return figures


@click.command()
@click.option("--rows", type=click.IntRange(min=100), default=1_000_000, show_default=True)
def main(rows: int) -> None:
    """Measure and show a table."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("command", "s", "processor s", "rows/s", "peak MiB"):
        table.add_column(heading, justify="left" if heading == "command" else "right")
    with tempfile.TemporaryDirectory() as name, Processes(Path(name) / "parts") as running:
        redis = parts.redis(running)
        config = parts.write_settings(Path(name) / "pacs.toml", {"queue": parts.queue_settings(redis)})
        before = Redis.from_url(redis.ledger_url).info("memory")["used_memory"]
        for one in measured(rows, Path(name), {**os.environ, "PACS_CONFIG": str(config)}):
            times = f"{one.elapsed_s:.1f}", f"{one.processor_s:.1f}", f"{rows / one.elapsed_s:,.0f}"
            table.add_row(one.what, *times, f"{one.peak_mib:.0f}")
        grown = Redis.from_url(redis.ledger_url).info("memory")["used_memory"] - before
    Console().print(table)
    Console().print(
        f"{rows:,} rows; two plans took {grown / rows / 2:.1f} bytes an item each in Redis.", highlight=False
    )


if __name__ == "__main__":
    main()
