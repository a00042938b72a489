"""How long one upload takes from `upload` to its result: ``python -m benchmarks.latency``.

One image after another to the sandbox's MSDICOM, by a client that is notified of its results and by one that polls for
them, as it does for other result back-ends than Redis. The two take turns, so that both are hit by what else the
machine does.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import click

from benchmarks.images import image
from benchmarks.uploads import fresh_images
from courier.settings import Settings
from producer import Courier
from sandbox import processes as parts
from sandbox.processes import Processes


def settings(processes: Processes) -> tuple[Settings, Path]:
    """Of a worker on a sandbox of its own, and the folder that its images come from."""
    folder = processes.folder / "images"
    folder.mkdir()
    tree = {
        "servers": parts.sandbox(processes).servers(),
        "queue": parts.queue_settings(parts.redis(processes)),
        "sources": {"folders": [str(folder)]},
    }
    config = parts.write_settings(processes.folder / "pacs.toml", tree)
    parts.worker(processes, config).wait_ready()
    return Settings.load({"PACS_CONFIG": str(config)}), folder


def call_to_result_ms(courier: Courier, path: Path) -> float:
    begun = time.perf_counter()
    courier.upload(path.as_uri()).result(timeout_s=60)
    return (time.perf_counter() - begun) * 1000


def percentiles(times_ms: list[float]) -> tuple[float, float]:
    """The median, and what 95 % do not exceed."""
    return statistics.median(times_ms), statistics.quantiles(times_ms, n=20)[-1]


@click.command(help=__doc__)
@click.option("--count", default=200, show_default=True, help="Images for each of the two clients.")
def main(count: int) -> None:
    with tempfile.TemporaryDirectory(prefix="pacs-latency-") as folder, Processes(Path(folder)) as processes:
        told, images = settings(processes)
        with Courier(told) as notified, Courier(told) as polling:
            polling._notifications.close()
            clients: dict[str, Courier] = {"notified": notified, "polling": polling}
            times_ms: dict[str, list[float]] = {name: [] for name in clients}
            for number, pair in enumerate(fresh_images(2 * count + 20)):
                name = list(clients)[number % 2]
                path = images / f"{number}.dcm"
                path.write_bytes(image(*pair))
                took_ms = call_to_result_ms(clients[name], path)
                if number >= 20:  # connections, imports, caches
                    times_ms[name].append(took_ms)
    for name, taken in times_ms.items():
        print("{:9} p50 {:6.1f} ms   p95 {:6.1f} ms".format(name, *percentiles(taken)))
    ratios = [a / b for a, b in zip(*(percentiles(taken) for taken in times_ms.values()), strict=True)]
    print("{:9} p50 {:6.2f}      p95 {:6.2f}".format("ratio", *ratios))
    print(f"{count} uploads each, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
