"""How long a look-up takes while waiting jobs are released: ``python -m benchmarks.drain``.

Uploads wait for a server whose circuit is open, as after an outage; then it answers again. Look-ups, one after another,
ask for a study before that, and while the worker does the uploads. Sandbox, Redis and worker of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.images import image
from benchmarks.latency import percentiles
from benchmarks.uploads import fresh_images
from courier.ledger.breakers import BREAKER
from courier.ledger.jobs import Ledger
from courier.queues import DUE
from courier.settings import Settings
from producer import Courier
from sandbox import processes as parts
from sandbox.processes import Processes

SERVER = "msdicom"
_UNTIL_FAR_MS = "99999999999999"


@dataclass
class DrainFigures:
    """How long each look-up took before and in the drains, how many uploads those released in how long, and how many
    of their messages were in their queue at most.
    """

    usual_ms: list[float] = field(default_factory=list)
    drain_ms: list[float] = field(default_factory=list)
    released: int = 0
    took_s: float = 0
    most_in_queue: int = 0

    @property
    def ratio(self) -> float:
        """Of what 95 % do not exceed."""
        return percentiles(self.drain_ms)[1] / percentiles(self.usual_ms)[1]


def park(ledger: Ledger, jobs: Mapping[str, str]) -> None:
    """Uploads (URLs by the ids of their jobs) that were tried, and wait for the circuit of `SERVER` to close."""
    ledger.client.hset(ledger.key(BREAKER + SERVER), "until_ms", _UNTIL_FAR_MS)
    for job_id, url in jobs.items():
        fence = ledger.take(job_id, task="pacs.upload", job={"version": 1, "image_url": url}).fence
        why = {"code": "pacs_unavailable", "message": "It does not answer", "server_name": SERVER}
        ledger.park_for(SERVER, job_id, fence, max_wait_s=86_400, **why)


def close_circuit(ledger: Ledger) -> None:
    ledger.client.delete(ledger.key(BREAKER + SERVER))


@dataclass(frozen=True)
class DrainBench:
    """A worker that runs, a program, and a study that is there to be looked up."""

    courier: Courier
    ledger: Ledger
    images: Path
    study_uid: str

    def lookups_ms(self, until: Callable[[int], bool]) -> list[float]:
        """How long each look-up took, one after another, ``until`` there were enough."""
        times_ms: list[float] = []
        while not until(len(times_ms)):
            begun = time.perf_counter()
            self.courier.exists("study", self.study_uid, mode=SERVER).result(timeout_s=120)
            times_ms.append((time.perf_counter() - begun) * 1000)
        return times_ms

    def drain(self, figures: DrainFigures, *, waiting: int) -> None:
        """Release ``waiting`` uploads, and look a study up until the last of them is done."""
        jobs = {}
        for pair in fresh_images(waiting):
            path = self.images / "{}-{}.dcm".format(*pair)
            path.write_bytes(image(*pair))
            jobs[f"waiting-{path.stem}"] = path.as_uri()
        park(self.ledger, jobs)
        left, begun = set(jobs), time.perf_counter()

        def is_over(count: int) -> bool:
            figures.most_in_queue = max(figures.most_in_queue, self.courier.queue_depths()[DUE])
            if count % 10 == 0:
                standing = self.ledger.standing(left)
                left.difference_update(job_id for job_id, one in standing.items() if one.state == "done")
            return not left

        close_circuit(self.ledger)
        figures.drain_ms += self.lookups_ms(is_over)
        figures.took_s += time.perf_counter() - begun
        figures.released += waiting


def measure(folder: Path, *, passes: int, waiting: int, lookups: int) -> DrainFigures:
    images = folder / "images"
    images.mkdir()
    with Processes(folder) as processes:
        tree = {
            "servers": parts.sandbox(processes).servers(),
            "queue": parts.queue_settings(parts.redis(processes)),
            "sources": {"folders": [str(images)]},
        }
        config = parts.write_settings(folder / "pacs.toml", tree)
        parts.worker(processes, config).wait_ready(timeout_s=120)
        with Courier(Settings.load({"PACS_CONFIG": str(config)})) as courier:
            path = images / "first.dcm"
            path.write_bytes(image(*fresh_images(1)[0]))
            study_uid = str(courier.upload(path.as_uri()).result(timeout_s=120)["study_uid"])
            assert courier.ledger is not None
            bench = DrainBench(courier, courier.ledger, images, study_uid)
            figures = DrainFigures()
            bench.lookups_ms(lambda count: count >= 10)  # connections, imports, caches
            for _ in range(passes):
                figures.usual_ms += bench.lookups_ms(lambda count: count >= lookups)
                bench.drain(figures, waiting=waiting)
    return figures


@click.command(help=__doc__)
@click.option("--passes", default=3, show_default=True, help="Turns of look-ups alone and in a drain.")
@click.option("--waiting", default=300, show_default=True, help="Uploads that wait for the server, in each turn.")
@click.option("--lookups", default=100, show_default=True, help="Look-ups alone, in each turn.")
def main(passes: int, waiting: int, lookups: int) -> None:
    with tempfile.TemporaryDirectory(prefix="pacs-drain-") as folder:
        figures = measure(Path(folder), passes=passes, waiting=waiting, lookups=lookups)
    table = Table(title="Milliseconds of a look-up", title_justify="left", box=None)
    for heading in ("", "p50", "p95", "most", "look-ups"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, taken in (("alone", figures.usual_ms), ("while uploads are released", figures.drain_ms)):
        table.add_row(name, *(f"{one:.0f}" for one in (*percentiles(taken), max(taken))), str(len(taken)))
    table.add_row("[bold]ratio of p95", "", f"[bold]{figures.ratio:.2f}", "", "")
    console = Console()
    console.print(table)
    console.print(
        f"{figures.released} uploads released, {figures.released / figures.took_s:.0f} a second; at most"
        f" {figures.most_in_queue} of their messages in their queue at once."
    )


if __name__ == "__main__":
    main()
