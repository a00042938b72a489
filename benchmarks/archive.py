"""How much of a real DCM4CHEE's own limit single uploads reach: ``python -m benchmarks.archive URL``.

``URL`` is the DICOMweb root of an archive for tests, ``http://…/aets/DCM4CHEE/rs``. Raw STOW in study order
and the whole chain (image server → worker with eight threads → check → push → metadata → result) take turns within one
run, and the ratio of a turn's two rates is the figure to compare. What was stored is deleted after each turn, untimed.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import pydicom
import requests

from benchmarks.images import image
from benchmarks.uploads import Bench, chain_pass, fresh_images, raw_stows_per_s, serve_images, wall_ms_by_step
from producer import Courier
from sandbox import processes as parts
from sandbox.processes import Processes

CONNECTIONS = 8


class Studies:
    """Numbers of studies that no earlier run has used, and the removal of those that were given out."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._numbers = itertools.count(time.time_ns() // 10**8)  # ten a second: runs do not meet
        self._given: list[int] = []

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self._given.append(next(self._numbers))
        return self._given[-1]

    def remove(self) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(self._remove, self._given))
        self._given.clear()

    def _remove(self, number: int) -> None:
        study = f"{self.url}/studies/{study_uid(number)}"
        requests.post(f"{study}/reject/113039%5EDCM", timeout=120)
        requests.delete(study, timeout=120)


def study_uid(number: int) -> str:
    return str(
        pydicom.dcmread(pydicom.filebase.DicomBytesIO(image(number, 0)), stop_before_pixels=True).StudyInstanceUID
    )


def measure(url: str, folder: Path, *, passes: int, count: int) -> dict[str, Any]:
    studies = Studies(url)
    with Processes(folder) as processes:
        redis = parts.redis(processes)
        images = serve_images(processes)
        server = {"name": "archive", "type": "dcm4chee", "url": url}
        sources = {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True}
        tree = {"servers": [server], "sources": sources, "queue": parts.queue_settings(redis)}
        stage = Bench(processes, url, images, parts.write_settings(folder / "pacs.toml", tree))
        worker = parts.worker(processes, stage.config, concurrency=CONNECTIONS)
        worker.wait_ready()
        raw, alone, chain = [], [], []
        with Courier(stage.settings) as courier:
            chain_pass(stage, courier, count=40, studies=studies)
            for _ in range(passes):
                raw.append(raw_stows_per_s(url, fresh_images(count, studies), connections=CONNECTIONS))
                chain.append(chain_pass(stage, courier, count=count, studies=studies))
                alone.append(raw_stows_per_s(url, fresh_images(count, studies), connections=1))
                studies.remove()
        processes.stop_one(worker)
    return {
        "raw": raw,
        "alone": alone,
        "chain": [one.jobs_per_s for one in chain],
        "ratios": [one.jobs_per_s / rate for one, rate in zip(chain, raw, strict=True)],
        "wall_ms_by_step": wall_ms_by_step([payload for one in chain for payload in one.payloads]),
    }


@click.command(help=__doc__)
@click.argument("url")
@click.option("--passes", default=3, show_default=True, help="Turns of raw limit and chain.")
@click.option("--count", default=400, show_default=True, help="Images per turn, twenty to a study.")
def main(url: str, passes: int, count: int) -> None:
    with tempfile.TemporaryDirectory(prefix="pacs-bench-") as folder:
        figures = measure(url.rstrip("/"), Path(folder), passes=passes, count=count)
    for name in ("raw", "alone", "chain"):
        rates = figures[name]
        print(f"{name:6} {statistics.median(rates):6.1f} images/s   ({' '.join(f'{rate:.0f}' for rate in rates)})")
    ratios = figures["ratios"]
    print(f"chain / raw, {CONNECTIONS} connections in study order: {statistics.median(ratios):.2f}", end="")
    print(f"   ({' '.join(f'{ratio:.2f}' for ratio in ratios)})")
    print("milliseconds by step: " + ", ".join(f"{step} {ms:.0f}" for step, ms in figures["wall_ms_by_step"].items()))


if __name__ == "__main__":
    main()
