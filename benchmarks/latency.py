"""`make bench`: how long one upload takes from `upload` to its result, and how long a script takes for the same steps.

One image after another to a real Orthanc, with a second one to be asked: by a client that is notified of its results,
by one that polls for them, as it does for other result back-ends than Redis, and by a script with dicomweb-client
(``naive.py``), which has no queue, no worker and no guarantees. They take turns, image by image, so that all are hit by
what else the machine does.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import requests
from dicomweb_client.api import DICOMwebClient
from rich.console import Console
from rich.table import Table

from benchmarks.naive import store_image
from benchmarks.uploads import UploadBench, bench, fresh_images
from producer import Courier
from sandbox import processes as parts

NOTIFIED, POLLING, SCRIPT = "upload(), notified", "upload(), polling", "script"


def percentiles(times_ms: list[float]) -> tuple[float, float]:
    """The median, and what 95 % do not exceed."""
    return statistics.median(times_ms), statistics.quantiles(times_ms, n=20)[-1]


def measure(stage: UploadBench, *, count: int, warm_up: int = 10) -> dict[str, list[float]]:
    """By each way, how long each of ``count`` images took."""
    worker = parts.worker(stage.processes, stage.config)
    worker.wait_ready(timeout_s=120)
    session = requests.Session()
    clients = [DICOMwebClient(server.url) for server in stage.settings.servers]
    with Courier(stage.settings) as notified, Courier(stage.settings) as polling:
        polling._notifications.close()
        ways: dict[str, Callable[[str], object]] = {
            NOTIFIED: lambda url: notified.upload(url).result(timeout_s=60),
            POLLING: lambda url: polling.upload(url).result(timeout_s=60),
            SCRIPT: lambda url: store_image(url, session, clients),
        }
        times_ms: dict[str, list[float]] = {name: [] for name in ways}
        for number, (study, image) in enumerate(fresh_images(len(ways) * (count + warm_up))):
            name = list(ways)[number % len(ways)]
            begun = time.perf_counter()
            ways[name](f"{stage.images}/{study}/{image}.dcm")
            times_ms[name].append((time.perf_counter() - begun) * 1000)
    stage.processes.stop_one(worker)
    return {name: taken[warm_up:] for name, taken in times_ms.items()}


def show(times_ms: dict[str, list[float]], console: Console) -> None:
    table = Table(title="Milliseconds from call to result, one at a time", title_justify="left", box=None)
    for heading in ("", "p50", "p95"):
        table.add_column(heading, justify="right" if heading else "left")
    found = {name: percentiles(taken) for name, taken in times_ms.items()}
    for name, pair in found.items():
        table.add_row(name, *(f"{one:.1f}" for one in pair))
    for other in (SCRIPT, POLLING):
        ratios = [ours / theirs for ours, theirs in zip(found[NOTIFIED], found[other], strict=True)]
        table.add_row(f"[bold]notified / {other}", *(f"[bold]{ratio:.2f}" for ratio in ratios))
    console.print(table)
    console.print(f"{len(times_ms[SCRIPT])} images each, load average {os.getloadavg()[0]:.1f}", "")


@click.command(help=__doc__)
@click.option("--count", default=200, show_default=True, help="Images for each way.")
def main(count: int) -> None:
    with tempfile.TemporaryDirectory(prefix="pacs-bench-") as folder:
        try:
            with bench(Path(folder)) as stage:
                times_ms = measure(stage, count=count)
        except (parts.PartMissing, parts.PartFailed) as error:
            raise click.ClickException(str(error)) from error
    show(times_ms, Console())


if __name__ == "__main__":
    main()
