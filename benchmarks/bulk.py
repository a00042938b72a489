"""`make bench`: how much of a real Orthanc's own limit a batch of uploads reaches, and what people would do without it.

Everything runs on this machine and takes turns within one run, so that what else the machine does hits all of it: only
ratios are worth comparing. Each pass compares a batch with the raw STOW just before and just after it. Processor time
is told beside the rates: it depends far less on who else is on the machine, and says how far the ratio could go at best
if nothing ever waited. Linux only.

raw      the best of 1, 4 and 8 connections with 1, 10 and 50 images in each STOW, by a client that does nothing else
batch    ordered, planned, carried by one worker, done: images from an HTTP server, and from a folder
single   one job per image, as `benchmarks.uploads` has them, against raw STOW of one image per request
script   fetch, read, ask two servers, store, read the metadata: one after the other, with dicomweb-client and pydicom
"""

from __future__ import annotations

import http.client
import itertools
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import requests
from dicomweb_client.api import DICOMwebClient
from rich.console import Console
from rich.table import Table

from benchmarks.images import image
from benchmarks.naive import store_image
from benchmarks.uploads import UploadBench, bench, chain_pass, cpu_s, fresh_images
from producer import Courier
from sandbox import processes as parts

GRID = tuple(itertools.product((1, 4, 8), (1, 10, 50)))
#: Whose processor time is the client's work; the rest is what any client asks of the machine.
OURS = ("worker", "redis", "bench")
Pair = tuple[int, int]


@dataclass(frozen=True)
class Turn:
    """One measurement: images per second, and milliseconds of processor time per image by part."""

    per_s: float
    cpu_ms: dict[str, float]

    @property
    def all_ms(self) -> float:
        return sum(self.cpu_ms.values())


def turn(stage: UploadBench, count: int, work: Callable[[], object]) -> Turn:
    before_s, begun = cpu_s(stage), time.perf_counter()
    work()
    took_s, after_s = time.perf_counter() - begun, cpu_s(stage)
    return Turn(count / took_s, {part: (after_s[part] - before_s[part]) * 1000 / count for part in after_s})


# --- raw ----------------------------------------------------------------------------------------------------------


def raw(stage: UploadBench, count: int, *, connections: int, per_request: int) -> Turn:
    """Bodies are made beforehand; connections stay open and take the next body each time."""
    pairs = fresh_images(count)
    bodies = [_body(pairs[first : first + per_request]) for first in range(0, count, per_request)]
    left, lock = iter(bodies), threading.Lock()

    def following() -> bytes | None:
        with lock:
            return next(left, None)

    def work() -> None:
        with ThreadPoolExecutor(connections) as pool:
            stored = sum(pool.map(lambda _: _stow_all(stage.server, following), range(connections)))
        if stored != count:
            raise click.ClickException(f"Orthanc stored {stored} of {count} images")

    return turn(stage, count, work)


def _body(pairs: Sequence[Pair]) -> bytes:
    head = b"--BB\r\nContent-Type: application/dicom\r\n\r\n"
    return b"".join(head + image(study, number) + b"\r\n" for study, number in pairs) + b"--BB--\r\n"


def _stow_all(url: str, following: Callable[[], bytes | None]) -> int:
    target = urlsplit(url)
    connection = http.client.HTTPConnection(str(target.hostname), target.port)
    headers = {
        "Content-Type": 'multipart/related; type="application/dicom"; boundary=BB',
        "Accept": "application/dicom+json",
    }
    stored = 0
    while (body := following()) is not None:
        connection.request("POST", f"{target.path}/studies", body, headers)
        stored += len(json.loads(connection.getresponse().read())["00081199"].get("Value", ()))
    connection.close()
    return stored


# --- a batch ------------------------------------------------------------------------------------------------------


def batch(
    stage: UploadBench, courier: Courier, urls: Sequence[str], *, concurrency: int, verify: bool = False
) -> tuple[Turn, str]:
    """From the order to the result that says that it is done."""
    ended: list[dict[str, Any]] = []

    def work() -> None:
        handle = courier.batch.upload(urls, width=concurrency, verify=verify)
        ended.append(handle.result(timeout_s=900))

    measured = turn(stage, len(urls), work)
    totals = ended[0]["totals"]
    if totals != {"stored": len(urls)}:
        raise click.ClickException(f"the batch came to {totals}; see {stage.processes.folder}")
    return measured, ended[0]["batch_id"]


def served(stage: UploadBench, count: int) -> list[str]:
    return [f"{stage.images}/{study}/{number}.dcm" for study, number in fresh_images(count)]


def in_folder(folder: Path, count: int) -> Iterator[str]:
    for study, number in fresh_images(count):
        path = folder / f"{study}-{number}.dcm"
        path.write_bytes(image(study, number))
        yield f"file://{path}"


# --- a script -----------------------------------------------------------------------------------------------------


def script(stage: UploadBench, count: int, servers: Sequence[str]) -> Turn:
    """What is written where nobody has a PACS Courier: one image after the other, every call waited for."""
    clients = [DICOMwebClient(url) for url in servers]
    session = requests.Session()

    def work() -> None:
        for url in served(stage, count):
            if store_image(url, session, clients)["status"] != "stored":
                raise click.ClickException("an image that was never sent is there")

    return turn(stage, count, work)


# --- the run ------------------------------------------------------------------------------------------------------


def measure(
    stage: UploadBench, folder: Path, *, passes: int, count: int, concurrency: int, warm_up: int = 200
) -> dict[str, Any]:
    """Everything, as plain numbers."""
    few = max(warm_up // 4, count // 8)
    grid = {cell: raw(stage, count // 2, connections=cell[0], per_request=cell[1]).per_s for cell in GRID}
    best = max(grid, key=lambda cell: grid[cell])
    alone = max((cell for cell in GRID if cell[1] == 1), key=lambda cell: grid[cell])
    turns: dict[str, list[Turn]] = {name: [] for name in ("raw", "http", "folder", "raw alone", "single", "script")}
    ratios: dict[str, list[float]] = {name: [] for name in ("http", "folder", "single", "script")}

    def note(name: str, measured: Turn) -> Turn:
        turns[name].append(measured)
        return measured

    def limit(cell: Pair = best, name: str = "raw", size: int = count) -> float:
        return note(name, raw(stage, size, connections=cell[0], per_request=cell[1])).per_s

    worker = parts.worker(stage.processes, stage.config)
    worker.wait_ready()
    servers = [server.url for server in stage.settings.servers]
    with Courier(stage.settings) as courier:
        batch(stage, courier, served(stage, warm_up), concurrency=concurrency)  # connections, imports, caches
        chain_pass(stage, courier, count=max(1, warm_up // 10))
        for _ in range(passes):
            limits = [limit()]
            by_http = note("http", batch(stage, courier, served(stage, count), concurrency=concurrency)[0]).per_s
            limits.append(limit())
            by_folder = note(
                "folder", batch(stage, courier, list(in_folder(folder, count)), concurrency=concurrency)[0]
            ).per_s
            limits.append(limit())
            ratios["http"].append(by_http / statistics.mean(limits[:2]))
            ratios["folder"].append(by_folder / statistics.mean(limits[1:]))
            one = limit(alone, "raw alone", few)
            jobs = chain_pass(stage, courier, count=few)
            note("single", Turn(jobs.jobs_per_s, jobs.cpu_ms))
            ratios["single"].append(jobs.jobs_per_s / statistics.mean((one, limit(alone, "raw alone", few))))
            ratios["script"].append(by_http / note("script", script(stage, few, servers)).per_s)
            shutil.rmtree(folder)
            folder.mkdir()
        verified = _verified(
            courier, batch(stage, courier, served(stage, count), concurrency=concurrency, verify=True)[1], count
        )
    stage.processes.stop_one(worker)
    return {
        "grid_per_s": {f"{connections}x{size}": rate for (connections, size), rate in grid.items()},
        "best": f"{best[0]}x{best[1]}",
        "alone": f"{alone[0]}x{alone[1]}",
        "per_s": {name: [one.per_s for one in found] for name, found in turns.items()},
        "ratios": ratios,
        "cpu_ms": {name: _median_cpu(found) for name, found in turns.items()},
        "verified_per_s": verified,
    }


def _verified(courier: Courier, batch_id: str, count: int) -> float:
    """How many images a second the pass looked at again, bytes and all."""
    seen = courier.batch.get(batch_id).of("verify")
    if seen.totals != {"verified": count} or seen.begun_ms is None or seen.ended_ms is None:
        raise click.ClickException(f"verified were {seen.totals} of {count}")
    return count * 1000 / max(1, seen.ended_ms - seen.begun_ms)


def _median_cpu(turns: Sequence[Turn]) -> dict[str, float]:
    return {part: statistics.median(one.cpu_ms.get(part, 0.0) for one in turns) for part in turns[0].cpu_ms}


def show(figures: dict[str, Any], console: Console) -> None:
    grid = Table(title="Raw STOW, images per second", title_justify="left", box=None)
    for heading in ("connections", "1 in each", "10 in each", "50 in each"):
        grid.add_column(heading, justify="right")
    for connections in (1, 4, 8):
        grid.add_row(
            str(connections), *(f"{figures['grid_per_s'][f'{connections}x{size}']:.0f}" for size in (1, 10, 50))
        )
    console.print(grid, "")

    names = {
        "raw": f"raw, {figures['best']}",
        "http": "batch, from an HTTP server",
        "folder": "batch, from a folder",
        "raw alone": f"raw, {figures['alone']}",
        "single": "single jobs",
        "script": "script",
    }
    rates = Table(title="Images per second into the same Orthanc", title_justify="left", box=None)
    for heading in ("", "median", "passes", "CPU ms an image", "of these, ours"):
        rates.add_column(heading, justify="left" if not heading else "right")
    for name, title in names.items():
        found, cpu = figures["per_s"][name], figures["cpu_ms"][name]
        ours = sum(cpu.get(part, 0.0) for part in OURS)
        passes = " ".join(f"{rate:.0f}" for rate in found)
        rates.add_row(title, f"{statistics.median(found):.0f}", passes, f"{sum(cpu.values()):.2f}", f"{ours:.2f}")
    console.print(rates, "")

    ratios = Table(title="Ratios within each pass", title_justify="left", box=None)
    for heading in ("", "median", "passes", "aim", "if nothing waited"):
        ratios.add_column(heading, justify="left" if not heading else "right")
    raw_ms, alone_ms = (sum(figures["cpu_ms"][name].values()) for name in ("raw", "raw alone"))
    for name, title, aim, limit_ms in (
        ("http", "batch from HTTP / raw", "0.85", raw_ms),
        ("folder", "batch from a folder / raw", "0.85", raw_ms),
        ("single", "single jobs / raw, one in each", "0.5", alone_ms),
        ("script", "batch from HTTP / script", "4", None),
    ):
        found = figures["ratios"][name]
        own_ms = sum(figures["cpu_ms"][name].values())
        bound = f"{limit_ms / own_ms:.2f}" if limit_ms is not None else ""
        passes = " ".join(f"{ratio:.2f}" for ratio in found)
        ratios.add_row(title, f"{statistics.median(found):.2f}", passes, aim, bound)
    console.print(ratios, "")
    console.print(f"Verified, bytes and all: {figures['verified_per_s']:.0f} images per second.")


@click.command(help=__doc__)
@click.option("--passes", default=3, show_default=True, help="How often everything takes its turn.")
@click.option("--count", default=1200, show_default=True, help="Images per turn.")
@click.option("--width", default=6, show_default=True, help="Chunks of the batch at a time.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def main(passes: int, count: int, width: int, as_json: bool) -> None:
    console = Console(stderr=as_json)
    with tempfile.TemporaryDirectory(prefix="pacs-bench-") as folder:
        try:
            with bench(Path(folder)) as stage, console.status("Measuring …"):
                figures = measure(stage, Path(folder) / "images", passes=passes, count=count, concurrency=width)
        except (parts.PartMissing, parts.PartFailed) as error:
            raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(figures, indent=1))
    else:
        show(figures, console)


if __name__ == "__main__":
    main()
