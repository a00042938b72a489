"""`make bench`: how much of a real Orthanc's own limit the whole chain reaches, and what a job costs the worker.

Raw limit, chain and a naive Celery task (``naive.py``, with threads and with processes) take turns within one run, so
that what else the machine does hits all; ratios are the figures to compare, absolute numbers are not. Linux only:
processor time and memory are read from /proc.

The chain: image server → worker → check on two Orthancs → push to the first → metadata → result in Redis.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
from celery import Celery
from rich.console import Console
from rich.table import Table

from benchmarks.images import image
from courier.ledger.jobs import Ledger
from courier.settings import Settings
from producer import Courier
from sandbox import processes as parts
from sandbox.processes import Child, Processes
from worker.jobs.attempt import Heartbeat
from worker.jobs.runner import Done, execute
from worker.jobs.services import Services
from worker.jobs.upload import upload
from worker.pacs.fleet import Fleet
from worker.pacs.registry import connect
from worker.storage.sources import Sources

PER_STUDY = 20
#: The pools of the naive task's workers, and how many jobs each does at a time.
NAIVE = {"threads": 8, "prefork": 2}
NAIVE_NAMES = tuple(f"naive-{pool}" for pool in NAIVE)
STEPS = ("fetch", "identify", "check", "route", "push", "describe")
_studies = itertools.count(1)
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class UploadBench:
    processes: Processes
    #: DICOMweb root of the server that is measured.
    server: str
    images: str
    config: Path

    @property
    def settings(self) -> Settings:
        return Settings.load({"PACS_CONFIG": str(self.config)})


@contextmanager
def bench(folder: Path) -> Iterator[UploadBench]:
    """Redis, two Orthancs and the image server; workers are started where they are measured."""
    (folder / "images").mkdir()
    with Processes(folder) as processes:
        redis = parts.redis(processes)
        orthanc, other = (parts.orthanc(processes, name=name) for name in ("orthanc", "archive"))
        images = serve_images(processes)
        tree = {
            "servers": [orthanc.server("orthanc"), other.server("archive")],
            "sources": {
                "allow_hosts": [f"{parts.HOST}:*"],
                "allow_private_networks": True,
                "folders": [str(folder / "images")],
            },
            "queue": parts.queue_settings(redis),
        }
        config = parts.write_settings(folder / "pacs.toml", tree)
        yield UploadBench(processes, orthanc.url, images, config)


def serve_images(processes: Processes) -> str:
    """Start the server of images; returns its base URL."""
    command = [sys.executable, "-m", "benchmarks.images"]
    images = processes.start("images", command, ready=lambda child: child.out_path.read_bytes().endswith(b"\n"))
    images.wait_ready()
    return images.out_path.read_text().strip()


def fresh_images(count: int, studies: Iterator[int] = _studies) -> list[tuple[int, int]]:
    """``count`` pairs (study, number) that were never used before, as studies come: twenty images each."""
    pairs: list[tuple[int, int]] = []
    while len(pairs) < count:
        study = next(studies)
        pairs += [(study, number) for number in range(PER_STUDY)]
    return pairs[:count]


# --- raw limit -------------------------------------------------------------------------------------------


def raw_stows_per_s(url: str, pairs: Sequence[tuple[int, int]], *, connections: int) -> float:
    """STOW-RS one image per request, in the order of ``pairs``; bodies are made beforehand.

    The ``connections`` stay open, and each takes the next image of one line, as the threads of a worker do.
    """
    line = iter([_multipart(image(study, number)) for study, number in pairs])
    begun = time.perf_counter()
    with ThreadPoolExecutor(connections) as pool:
        stored = sum(pool.map(lambda _: _stow_all(url, line), range(connections)))
    took_s = time.perf_counter() - begun
    if stored != len(pairs):
        raise click.ClickException(f"The server stored {stored} of {len(pairs)} images")
    return len(pairs) / took_s


def _multipart(dicom: bytes) -> bytes:
    return b"--BB\r\nContent-Type: application/dicom\r\n\r\n" + dicom + b"\r\n--BB--\r\n"


def _stow_all(url: str, bodies: Iterable[bytes]) -> int:
    target = urlsplit(url)
    connection = http.client.HTTPConnection(str(target.hostname), target.port)
    headers = {
        "Content-Type": 'multipart/related; type="application/dicom"; boundary=BB',
        "Accept": "application/dicom+json",
    }
    stored = 0
    for body in bodies:
        connection.request("POST", f"{target.path}/studies", body, headers)
        answer = json.loads(connection.getresponse().read())
        stored += len(answer.get("00081199", {}).get("Value", ()))
    connection.close()
    return stored


# --- the whole chain -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChainPass:
    """``cpu_ms`` is processor time per job by part; ``bench`` is this process, which enqueues and polls."""

    jobs_per_s: float
    cpu_ms: dict[str, float]
    payloads: list[dict[str, Any]]


def chain_pass(stage: UploadBench, courier: Courier, *, count: int, studies: Iterator[int] = _studies) -> ChainPass:
    """Enqueue ``count`` jobs and wait for all of them; enqueueing is part of the time."""
    pairs = fresh_images(count, studies)
    before_s, begun = cpu_s(stage), time.perf_counter()
    handles = [courier.upload(f"{stage.images}/{study}/{number}.dcm") for study, number in pairs]
    reports = [report for _, report in courier.as_completed(handles, timeout_s=300)]
    took_s, after_s = time.perf_counter() - begun, cpu_s(stage)
    payloads = [report.result for report in reports if report.result is not None]
    if len(payloads) != count:
        errors = {str(report.error) for report in reports if report.error}
        raise click.ClickException(f"{len(payloads)} of {count} jobs were stored: {errors or stage.processes.folder}")
    return ChainPass(
        count / took_s, {part: (after_s[part] - before_s[part]) * 1000 / count for part in after_s}, payloads
    )


def cpu_s(stage: UploadBench) -> dict[str, float]:
    """User and system time of every part so far, all its threads, and of this process as ``bench``."""
    return {"bench": time.process_time(), **{child.name: _cpu_s(child) for child in stage.processes.children}}


def _cpu_s(child: Child) -> float:
    """Of the part's first process and of those that it has started (a pool's), unless they have ended."""
    pids = [int(pid) for path in Path(f"/proc/{child.pid}/task").glob("*/children") for pid in path.read_text().split()]
    return sum(_ticks(pid) for pid in (child.pid, *pids)) / _TICKS_PER_S


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# --- the naive task --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NaiveRival:
    """A worker of the naive task, and the client that sends to it."""

    name: str
    app: Celery
    worker: Child


def start_naive(stage: UploadBench, pool: str, concurrency: int) -> NaiveRival:
    """Start a worker of the naive task, on two databases of the same Redis that ours does not use."""
    redis, _, _ = stage.settings.queue.broker_url.rpartition("/")
    name = f"naive-{pool}"
    app = Celery(name, broker=f"{redis}/10", backend=f"{redis}/11", set_as_current=False)
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.naive", "worker", "--pool", pool, "-Q", name]
    command += [
        "--concurrency",
        str(concurrency),
        "--hostname",
        f"{name}@bench",
        "--without-mingle",
        "--without-gossip",
    ]
    worker = stage.processes.start(
        name,
        command,
        ready=lambda _: bool(app.control.ping(destination=[f"{name}@bench"], timeout=0.5)),
        environ={
            "NAIVE_BROKER": f"{redis}/10",
            "NAIVE_RESULTS": f"{redis}/11",
            "NAIVE_SERVERS": " ".join(server.url for server in stage.settings.servers),
        },
        grace_s=0,
    )
    return NaiveRival(name, app, worker)


def naive_pass(stage: UploadBench, rival: NaiveRival, *, count: int) -> ChainPass:
    """The same of the naive task: send ``count`` messages, and wait for all results."""
    pairs = fresh_images(count)
    before_s, begun = cpu_s(stage), time.perf_counter()
    sent = [
        rival.app.send_task("naive.upload", (f"{stage.images}/{study}/{number}.dcm",), queue=rival.name)
        for study, number in pairs
    ]
    payloads = [one.get(timeout=300) for one in sent]
    took_s, after_s = time.perf_counter() - begun, cpu_s(stage)
    stored = sum(payload["status"] == "stored" for payload in payloads)
    if stored != count:
        raise click.ClickException(f"{stored} of {count} images were stored by the naive task")
    return ChainPass(
        count / took_s, {part: (after_s[part] - before_s[part]) * 1000 / count for part in after_s}, payloads
    )


def wall_ms_by_step(payloads: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {step: statistics.median(payload["timings_ms"].get(step, 0.0) for payload in payloads) for step in STEPS}


def cpu_ms_by_step(stage: UploadBench, *, count: int) -> dict[str, float]:
    """The same jobs, one at a time in this process, with processor time (of all its threads) as their clock."""
    settings = stage.settings
    services = Services(
        settings=settings,
        ledger=Ledger.connect(settings.queue.ledger_url),
        sources=Sources(settings.sources),
        fleet=Fleet([connect(server) for server in settings.servers]),
        clock=time.process_time,
    )
    heartbeat = Heartbeat(services.ledger, lambda *_: None)
    spent: defaultdict[str, float] = defaultdict(float)
    for study, number in fresh_images(count):
        message = {"image_url": f"{stage.images}/{study}/{number}.dcm"}
        begun = time.process_time()
        result = execute(
            upload,
            task="pacs.upload",
            job_id=str(uuid.uuid4()),
            message=message,
            services=services,
            heartbeat=heartbeat,
        )
        spent["all"] += (time.process_time() - begun) * 1000
        if not isinstance(result, Done):
            raise click.ClickException(f"a job ended as {result}")
        for step, took_ms in result.payload["timings_ms"].items():
            spent[step] += took_ms
    services.fleet.close()
    spent["ledger and payload"] = spent["all"] - sum(spent[step] for step in STEPS)
    return {step: total / count for step, total in spent.items()}


# --- memory ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HugeImage:
    growth_mib: float
    took_s: float
    size_bytes: int


def huge_upload(stage: UploadBench, *, size_bytes: int) -> HugeImage:
    """How far a warm worker's resident memory grows above its level while it carries one huge image."""
    worker = parts.worker(stage.processes, stage.config, name="huge-worker")
    worker.wait_ready()
    with Courier(stage.settings) as courier:
        chain_pass(stage, courier, count=100)
        Path(f"/proc/{worker.pid}/clear_refs").write_text("5")  # forget the peak so far (proc(5))
        level_kib, begun = _status_kib(worker, "VmRSS"), time.perf_counter()
        courier.upload(f"{stage.images}/huge/{size_bytes}.dcm").result(timeout_s=600)
        took_s = time.perf_counter() - begun
        peak_kib = _status_kib(worker, "VmHWM")
    stage.processes.stop_one(worker)
    return HugeImage((peak_kib - level_kib) / 1024, took_s, size_bytes)


def _status_kib(child: Child, key: str) -> int:
    status = Path(f"/proc/{child.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{key}:"))


# --- the run ---------------------------------------------------------------------------------------------


def measure(stage: UploadBench, *, passes: int, count: int, huge_bytes: int, warm_up: int = 50) -> dict[str, Any]:
    """Everything, as plain numbers."""
    raw: dict[int, list[float]] = {4: [], 8: []}
    chain: list[ChainPass] = []
    naive: dict[str, list[ChainPass]] = {}
    worker = parts.worker(stage.processes, stage.config)
    rivals = [start_naive(stage, pool, concurrency) for pool, concurrency in NAIVE.items()]
    for child in (worker, *(rival.worker for rival in rivals)):
        child.wait_ready(timeout_s=120)
    with Courier(stage.settings) as courier:
        chain_pass(stage, courier, count=warm_up)  # connections, imports, caches
        for rival in rivals:
            naive_pass(stage, rival, count=warm_up)
        for _ in range(passes):
            for connections, rates in raw.items():
                rates.append(raw_stows_per_s(stage.server, fresh_images(count), connections=connections))
            chain.append(chain_pass(stage, courier, count=count))
            for rival in rivals:
                naive.setdefault(rival.name, []).append(naive_pass(stage, rival, count=count))
    for child in (worker, *(rival.worker for rival in rivals)):
        stage.processes.stop_one(child)
    limit = max(statistics.median(rates) for rates in raw.values())
    jobs_per_s = statistics.median(one.jobs_per_s for one in chain)
    naive_per_s = {name: [one.jobs_per_s for one in all_of] for name, all_of in naive.items()}
    figures: dict[str, Any] = {
        "raw_stow_per_s": {str(connections): statistics.median(rates) for connections, rates in raw.items()},
        "raw_stow_per_s_all": {str(connections): rates for connections, rates in raw.items()},
        "chain_jobs_per_s": jobs_per_s,
        "chain_jobs_per_s_all": [one.jobs_per_s for one in chain],
        "ratio": jobs_per_s / limit,
        "naive_jobs_per_s": {name: statistics.median(rates) for name, rates in naive_per_s.items()},
        "naive_jobs_per_s_all": naive_per_s,
        "naive_cpu_ms_per_job": {
            name: statistics.median(one.cpu_ms[name] for one in all_of) for name, all_of in naive.items()
        },
        "ratios_to_naive": [
            one.jobs_per_s / max(rates) for one, *rates in zip(chain, *naive_per_s.values(), strict=True)
        ],
        "cpu_ms_per_job_by_part": {
            part: statistics.median(one.cpu_ms[part] for one in chain) for part in chain[0].cpu_ms
        },
        "wall_ms_by_step": wall_ms_by_step([payload for one in chain for payload in one.payloads]),
        "cpu_ms_by_step": cpu_ms_by_step(stage, count=2 * warm_up),
    }
    if huge_bytes:
        huge = huge_upload(stage, size_bytes=huge_bytes)
        figures["huge"] = {"size_bytes": huge.size_bytes, "growth_mib": huge.growth_mib, "took_s": huge.took_s}
    return figures


def show(figures: dict[str, Any], console: Console) -> None:
    rates = Table(title="Images per second into the same Orthanc", title_justify="left", box=None)
    rates.add_column("")
    rates.add_column("median", justify="right")
    rates.add_column("passes", justify="right")
    for connections, rate in figures["raw_stow_per_s"].items():
        passes = figures["raw_stow_per_s_all"][connections]
        rates.add_row(f"raw STOW, {connections} connections", f"{rate:.0f}", _spread(passes))
    rates.add_row(
        "whole chain, 1 worker", f"{figures['chain_jobs_per_s']:.0f}", _spread(figures["chain_jobs_per_s_all"])
    )
    for name, rate in figures["naive_jobs_per_s"].items():
        pool = name.removeprefix("naive-")
        rates.add_row(
            f"naive Celery task, {pool} {NAIVE[pool]}", f"{rate:.0f}", _spread(figures["naive_jobs_per_s_all"][name])
        )
    to_naive = figures["ratios_to_naive"]
    rates.add_row("[bold]chain / raw", f"[bold]{figures['ratio']:.2f}", "")
    rates.add_row(
        "[bold]chain / the better naive one",
        f"[bold]{statistics.median(to_naive):.2f}",
        " ".join(f"{one:.2f}" for one in to_naive),
    )
    console.print(rates, "")

    cpu, wall = figures["cpu_ms_by_step"], figures["wall_ms_by_step"]
    steps = Table(title="A job's milliseconds by step", title_justify="left", box=None)
    for heading in ("", "CPU, alone", "wall, 8 at once"):
        steps.add_column(heading, justify="left" if not heading else "right")
    for step in STEPS:
        steps.add_row(step, f"{cpu.get(step, 0):.1f}", f"{wall[step]:.1f}")
    steps.add_row("ledger and payload", f"{cpu['ledger and payload']:.1f}", "")
    parts_cpu = figures["cpu_ms_per_job_by_part"]
    total = parts_cpu["worker"]
    steps.add_row("Celery, threads", f"{total - cpu['all']:.1f}", "")
    steps.add_row("[bold]worker process, per job", f"[bold]{total:.1f}", "")
    console.print(steps, "")
    others = ", ".join(
        f"{part} {spent:.1f}" for part, spent in parts_cpu.items() if part != "worker" and part not in NAIVE_NAMES
    )
    console.print(f"CPU milliseconds per job of the other parts: {others}.")
    naive = ", ".join(f"{name} {spent:.1f}" for name, spent in figures["naive_cpu_ms_per_job"].items())
    console.print(f"Those of the naive task's workers, per job of theirs: {naive}.", "")
    if "huge" in figures:
        huge = figures["huge"]
        console.print(
            f"One image of {huge['size_bytes'] / 2**30:.2f} GiB: the worker grew by {huge['growth_mib']:.0f} MiB "
            f"(aim: 64) and took {huge['took_s']:.1f} s."
        )


def _spread(rates: Sequence[float]) -> str:
    return " ".join(f"{rate:.0f}" for rate in rates)


@click.command(help=__doc__)
@click.option("--passes", default=3, show_default=True, help="Turns of raw limit and chain.")
@click.option("--count", default=400, show_default=True, help="Images per turn.")
@click.option("--huge-gib", default=1.0, show_default=True, help="Size of the huge image; 0 leaves it out.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def main(passes: int, count: int, huge_gib: float, as_json: bool) -> None:
    console = Console(stderr=as_json)
    with tempfile.TemporaryDirectory(prefix="pacs-bench-") as folder:
        try:
            with bench(Path(folder)) as stage, console.status("Measuring …"):
                figures = measure(stage, passes=passes, count=count, huge_bytes=int(huge_gib * 2**30))
        except (parts.PartMissing, parts.PartFailed) as error:
            raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(figures, indent=1))
    else:
        show(figures, console)


if __name__ == "__main__":
    main()
