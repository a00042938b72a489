"""How much of a real DCM4CHEE's own limit single uploads reach: ``python -m benchmarks.archive URL``.

``URL`` is the DICOMweb root of an archive for tests, ``http://…/aets/DCM4CHEE/rs``. Raw STOW and the whole chain (image
server → worker with eight threads → check → push → metadata → result) take turns within one run, and the ratio of a
turn's two rates is the figure to compare. Raw STOW in study order, as the worker gets the images: each of eight
connections takes the next one. *Shuffled*: the same images in any order, so that few images of a study are on their way
at once; *alone*: one connection. An archive that has just started is slow: let a run pass before the one that counts.
What the archive and its database take is the processor time of this machine that is not ours, so it is right only on
this machine, and where nothing else runs. What was stored is deleted after each turn, untimed.
"""

from __future__ import annotations

import itertools
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import pydicom
import requests

from benchmarks.images import image
from benchmarks.uploads import (
    ChainPass,
    UploadBench,
    chain_pass,
    cpu_s,
    fresh_images,
    raw_stows_per_s,
    serve_images,
    wall_ms_by_step,
)
from producer import Courier
from sandbox import processes as parts
from sandbox.processes import Processes

CONNECTIONS = 8
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


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


def measure(url: str, folder: Path, *, passes: int, count: int, warm_up: int = 40) -> dict[str, Any]:
    studies = Studies(url)
    rates: defaultdict[str, list[float]] = defaultdict(list)
    archive_ms: defaultdict[str, list[float]] = defaultdict(list)
    chain: list[ChainPass] = []
    with Processes(folder) as processes:
        redis = parts.redis(processes)
        images = serve_images(processes)
        server = {"name": "archive", "type": "dcm4chee", "url": url}
        sources = {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True}
        tree = {"servers": [server], "sources": sources, "queue": parts.queue_settings(redis)}
        stage = UploadBench(processes, url, images, parts.write_settings(folder / "pacs.toml", tree))
        worker = parts.worker(processes, stage.config, concurrency=CONNECTIONS)
        worker.wait_ready()

        def raw(connections: int, *, shuffled: bool = False) -> float:
            pairs = fresh_images(count, studies)
            return raw_stows_per_s(url, random.sample(pairs, count) if shuffled else pairs, connections=connections)

        def uploads() -> float:
            chain.append(chain_pass(stage, courier, count=count, studies=studies))
            return chain[-1].jobs_per_s

        ways: dict[str, Callable[[], float]] = {
            "raw": partial(raw, CONNECTIONS),
            "uploads": uploads,
            "shuffled": partial(raw, CONNECTIONS, shuffled=True),
            "alone": partial(raw, 1),
        }
        with Courier(stage.settings) as courier:
            chain_pass(stage, courier, count=warm_up, studies=studies)
            for _ in range(passes):
                for way, carry in ways.items():
                    before_s = others_s(stage)
                    rates[way].append(carry())
                    archive_ms[way].append((others_s(stage) - before_s) * 1000 / count)
                studies.remove()
        processes.stop_one(worker)
    return {
        "rates": rates,
        "archive_ms": archive_ms,
        "cpu_ms": {part: statistics.median(one.cpu_ms[part] for one in chain) for part in chain[0].cpu_ms},
        "wall_ms_by_step": wall_ms_by_step([payload for one in chain for payload in one.payloads]),
    }


def others_s(stage: UploadBench) -> float:
    """Processor time of all on this machine but us: of the archive and its database, if nothing else runs."""
    _, user, nice, system, _, _, irq, softirq, *_ = Path("/proc/stat").read_text().split()
    return sum(map(int, (user, nice, system, irq, softirq))) / TICKS_PER_S - sum(cpu_s(stage).values())


@click.command(help=__doc__)
@click.argument("url")
@click.option("--passes", default=3, show_default=True, help="Turns of raw limit and chain.")
@click.option("--count", default=400, show_default=True, help="Images per turn, twenty to a study.")
def main(url: str, passes: int, count: int) -> None:
    with tempfile.TemporaryDirectory(prefix="pacs-bench-") as folder:
        figures = measure(url.rstrip("/"), Path(folder), passes=passes, count=count)
    rates = figures["rates"]
    for way, each in rates.items():
        archive_ms = statistics.median(figures["archive_ms"][way])
        print(f"{way:8} {_all(each, '6.1f')} images/s; archive and database {archive_ms:.1f} ms an image")
    for way, words in (("raw", "in study order"), ("shuffled", "shuffled over the studies")):
        ratios = [ours / theirs for ours, theirs in zip(rates["uploads"], rates[way], strict=True)]
        print(f"uploads / raw, {CONNECTIONS} connections, {words}: {_all(ratios, '.2f')}")
    print("processor time of an upload: " + ", ".join(f"{part} {ms:.1f} ms" for part, ms in figures["cpu_ms"].items()))
    print("milliseconds by step: " + ", ".join(f"{step} {ms:.0f}" for step, ms in figures["wall_ms_by_step"].items()))


def _all(figures: Sequence[float], form: str) -> str:
    return f"{statistics.median(figures):{form}} ({' '.join(f'{one:{form}}'.strip() for one in figures)})"


if __name__ == "__main__":
    main()
