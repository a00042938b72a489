"""`make bench`: how fast studies go from one real Orthanc to another, beside what copying costs at the very least.

Three ways take turns over the same studies, the target emptied between them, so that what else the machine does hits
all; ratios are the figures to compare. *Raw*: the body of a WADO-RS answer sent as it is as a STOW-RS request, study by
study. *Cloner*: python-orthanc-tools' OrthancCloner, which compares nothing. *Ours*: a batch from the order to its end,
surveyed, copied, and verified with the digests of all images. Linux only, as ``benchmarks.uploads``.
"""

from __future__ import annotations

import http.client
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
from rich.console import Console
from rich.table import Table

from benchmarks.images import huge_image, image
from benchmarks.uploads import _cpu_s, _spread, _status_kib
from courier.settings import Settings
from producer import Courier
from sandbox import processes as parts
from sandbox.processes import Child, OrthancPart, Processes

CLONER = "orthanc-tools==0.23.0"
CLONER_FOLDER = Path(__file__).parents[1] / ".run" / "orthanc-tools"
#: Runs in an environment of its own: what it brings along is none of ours.
CLONE = """
import sys, time
from orthanc_api_client import OrthancApiClient
from orthanc_tools import OrthancCloner
source, target = (OrthancApiClient(url, pool_maxsize=10, pool_block=True) for url in sys.argv[1:3])
cloner = OrthancCloner(source, target, worker_threads_count=int(sys.argv[3]), polling_interval=0.05)
begun = time.perf_counter()
cloner.execute(existing_changes_only=True)
print(time.perf_counter() - begun)
"""
STOW = {"Accept": "application/dicom+json"}
AS_STORED = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}


@dataclass(frozen=True)
class Way:
    """Images per second, and processor time per image by part."""

    images_per_s: float
    cpu_ms: dict[str, float]


@dataclass(frozen=True)
class MigrationBench:
    """``studies`` are on the source; the target is emptied before each way."""

    processes: Processes
    source: OrthancPart
    target: OrthancPart
    config: Path
    per_study: int
    studies: list[str] = field(default_factory=list)

    @property
    def images(self) -> int:
        return len(self.studies) * self.per_study

    def fill(self, count: int) -> None:
        for study in range(1, count + 1):
            stow(self.source, [image(study, number) for number in range(self.per_study)])
        self.studies.extend(_studies_on(self.source))

    def empty(self) -> None:
        keys = _ask(self.target, "GET", "/studies")
        for key in keys:
            _ask(self.target, "DELETE", f"/studies/{key}")

    def check(self) -> None:
        """All images have to be there, whoever brought them."""
        found = _ask(self.target, "GET", "/statistics")["CountInstances"]
        if found != self.images:
            raise click.ClickException(f"the target has {found} of {self.images} images")

    def cpu_s(self) -> dict[str, float]:
        """User and system time so far: of each part, and of this process and all that it has run as ``client``."""
        gone = resource.getrusage(resource.RUSAGE_CHILDREN)
        client = time.process_time() + gone.ru_utime + gone.ru_stime
        return {"client": client, **{child.name: _cpu_s(child) for child in self.processes.children}}

    def way(self, go: Callable[[], float]) -> Way:
        """Empty the target, go, and see that all is there."""
        self.empty()
        before = self.cpu_s()
        took_s = go()
        after = self.cpu_s()
        self.check()
        return Way(self.images / took_s, {name: (after[name] - before[name]) * 1000 / self.images for name in after})


@contextmanager
def bench(folder: Path, *, studies: int, per_study: int) -> Iterator[MigrationBench]:
    with Processes(folder) as processes:
        redis = parts.redis(processes)
        source, target = (parts.orthanc(processes, name=name) for name in ("source", "target"))
        tree = {
            "servers": [source.server("source"), target.server("target")],
            "queue": parts.queue_settings(redis),
        }
        config = parts.write_settings(folder / "pacs.toml", tree)
        stage = MigrationBench(processes, source, target, config, per_study)
        stage.fill(studies)
        yield stage


def _ask(orthanc: OrthancPart, method: str, path: str, body: bytes | None = None) -> Any:
    place = urlsplit(orthanc.rest)
    connection = http.client.HTTPConnection(str(place.hostname), place.port)
    connection.request(method, path, body)
    answer = connection.getresponse().read()
    connection.close()
    return json.loads(answer) if answer else None


def _studies_on(orthanc: OrthancPart) -> list[str]:
    studies = _ask(orthanc, "GET", "/studies?expand")
    return [study["MainDicomTags"]["StudyInstanceUID"] for study in studies]


def stow(orthanc: OrthancPart, images: Sequence[bytes]) -> None:
    body = b"".join(b"--BB\r\nContent-Type: application/dicom\r\n\r\n" + one + b"\r\n" for one in images)
    place = urlsplit(orthanc.url)
    connection = http.client.HTTPConnection(str(place.hostname), place.port)
    headers = {**STOW, "Content-Type": 'multipart/related; type="application/dicom"; boundary=BB'}
    connection.request("POST", f"{place.path}/studies", body + b"--BB--\r\n", headers)
    answer = json.loads(connection.getresponse().read())
    connection.close()
    if len(answer["00081199"].get("Value", ())) != len(images):
        raise click.ClickException("Orthanc did not store all images")


# --- the three ways ---------------------------------------------------------------------------------------------


def raw_s(stage: MigrationBench, *, connections: int) -> float:
    """The least that copying takes: nothing is read, compared or written down, a study is held in memory."""
    shares = [stage.studies[first::connections] for first in range(connections)]
    begun = time.perf_counter()
    with ThreadPoolExecutor(connections) as pool:
        list(pool.map(lambda share: _copy_all(stage, share), shares))
    return time.perf_counter() - begun


def _copy_all(stage: MigrationBench, studies: Sequence[str]) -> None:
    ends = [urlsplit(part.url) for part in (stage.source, stage.target)]
    source, target = (http.client.HTTPConnection(str(end.hostname), end.port) for end in ends)
    for study in studies:
        source.request("GET", f"{ends[0].path}/studies/{study}", headers=AS_STORED)
        answer = source.getresponse()
        headers = {**STOW, "Content-Type": str(answer.getheader("Content-Type"))}
        target.request("POST", f"{ends[1].path}/studies", answer.read(), headers)
        stored = json.loads(target.getresponse().read())
        if len(stored["00081199"].get("Value", ())) != stage.per_study:
            raise click.ClickException("Orthanc did not store a whole study")
    source.close()
    target.close()


def ours_s(stage: MigrationBench, courier: Courier, pass_s: dict[str, list[float]]) -> float:
    """From the order to the result; every study has to be verified, every image compared."""
    begun = time.perf_counter()
    handle = courier.batch.migrate(stage.studies, source="source", target="target")
    done = handle.result(timeout_s=600)
    took_s = time.perf_counter() - begun
    compared = sum(row["verify"]["result"]["compared"] for row in courier.batch.report(handle.id))
    if compared != stage.images:
        raise click.ClickException(f"{compared} of {stage.images} images were compared: {done}")
    for name, one in done["passes"].items():
        if one["ended_ms"]:
            pass_s.setdefault(name, []).append((one["ended_ms"] - one["begun_ms"]) / 1000)
    return took_s


def cloner() -> Path | None:
    """The Python that has OrthancCloner, in an environment of its own; None if it cannot be had."""
    python = CLONER_FOLDER / "bin" / "python"
    if not python.exists():
        venv.create(CLONER_FOLDER, with_pip=True)
    wanted = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", CLONER]
    installed = subprocess.run(wanted, check=False, capture_output=True)
    return python if installed.returncode == 0 else None


def cloner_s(stage: MigrationBench, python: Path, *, connections: int) -> float:
    command = [python, "-c", CLONE, stage.source.rest, stage.target.rest, str(connections)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    return float(ran.stdout)


# --- memory -----------------------------------------------------------------------------------------------------


def huge(stage: MigrationBench, courier: Courier, worker: Child, *, size_bytes: int) -> dict[str, float]:
    """How far a warm worker's resident memory grows above its level while one huge image passes, and is compared."""
    before = set(_studies_on(stage.source))
    stow(stage.source, [b"".join(huge_image(size_bytes))])
    (study,) = set(_studies_on(stage.source)) - before
    Path(f"/proc/{worker.pid}/clear_refs").write_text("5")  # forget the peak so far (proc(5))
    level_kib, begun = _status_kib(worker, "VmRSS"), time.perf_counter()
    done = courier.batch.migrate([study], source="source", target="target").result(timeout_s=600)
    took_s, peak_kib = time.perf_counter() - begun, _status_kib(worker, "VmHWM")
    if done["passes"]["verify"]["totals"] != {"verified": 1}:
        raise click.ClickException(f"the huge image did not arrive: {done}")
    return {"size_bytes": size_bytes, "growth_mib": (peak_kib - level_kib) / 1024, "took_s": took_s}


# --- the run ----------------------------------------------------------------------------------------------------


def measure(stage: MigrationBench, *, passes: int, python: Path | None, huge_bytes: int) -> dict[str, Any]:
    ways: dict[str, list[Way]] = {}
    pass_s: dict[str, list[float]] = {}
    worker = parts.worker(stage.processes, stage.config)
    worker.wait_ready()
    with Courier(Settings.load({"PACS_CONFIG": str(stage.config)})) as courier:
        ours_s(replace(stage, studies=stage.studies[:10]), courier, {})  # connections, imports, caches
        going: dict[str, Callable[[], float]] = {
            "raw, 4 connections": lambda: raw_s(stage, connections=4),
            "raw, 8 connections": lambda: raw_s(stage, connections=8),
            "ours": lambda: ours_s(stage, courier, pass_s),
        }
        if python is not None:
            going["cloner, 8 threads"] = lambda: cloner_s(stage, python, connections=8)
        for _ in range(passes):
            for name, go in going.items():
                ways.setdefault(name, []).append(stage.way(go))
        figures = _figures(stage, ways, pass_s)
        if huge_bytes:
            figures["huge"] = huge(stage, courier, worker, size_bytes=huge_bytes)
    return figures


def _figures(stage: MigrationBench, ways: dict[str, list[Way]], pass_s: dict[str, list[float]]) -> dict[str, Any]:
    rates = {name: statistics.median(way.images_per_s for way in all_of) for name, all_of in ways.items()}
    ours = [way.images_per_s for way in ways["ours"]]
    cpu = {
        name: {part: statistics.median(way.cpu_ms[part] for way in all_of) for part in all_of[0].cpu_ms}
        for name, all_of in ways.items()
    }
    return {
        "images": stage.images,
        "per_study": stage.per_study,
        "images_per_s": rates,
        "images_per_s_all": {name: [way.images_per_s for way in all_of] for name, all_of in ways.items()},
        "ours_to_raw": _ratios(ours, ways, "raw"),
        "ours_to_cloner": _ratios(ours, ways, "cloner"),
        "cpu_ms_per_image": cpu,
        "pass_s": {name: statistics.median(all_of) for name, all_of in pass_s.items()},
    }


def _ratios(ours: Sequence[float], ways: dict[str, list[Way]], name: str) -> list[float]:
    """Turn by turn, ours to the best way of that name: neighbours in time have met the same machine."""
    others = [all_of for way, all_of in ways.items() if way.startswith(name)]
    best = [max(way.images_per_s for way in turn) for turn in zip(*others, strict=True)]
    return [one / other for one, other in zip(ours, best, strict=bool(best))]


def show(figures: dict[str, Any], console: Console) -> None:
    rates = Table(title="Images per second from one Orthanc to another", title_justify="left", box=None)
    for heading in ("", "median", "passes", "CPU ms an image", "of which"):
        rates.add_column(heading, justify="right" if heading and heading != "of which" else "left")
    for way, median in figures["images_per_s"].items():
        spent = figures["cpu_ms_per_image"][way]
        shares = ", ".join(f"{part} {ms:.1f}" for part, ms in spent.items() if ms >= 0.05)
        passes = _spread(figures["images_per_s_all"][way])
        rates.add_row(way, f"{median:.0f}", passes, f"{sum(spent.values()):.1f}", shares)
    for other in ("raw", "cloner"):
        if ratios := figures[f"ours_to_{other}"]:
            turns = " ".join(f"{ratio:.2f}" for ratio in ratios)
            rates.add_row(f"[bold]ours / {other}", f"[bold]{statistics.median(ratios):.2f}", turns)
    console.print(rates, "")
    told = ", ".join(f"{name} {took_s:.1f}" for name, took_s in figures["pass_s"].items())
    console.print(f"Seconds of ours by pass: {told}.", "")
    if "huge" in figures:
        one = figures["huge"]
        console.print(
            f"One image of {one['size_bytes'] / 2**20:.0f} MiB: the worker grew by {one['growth_mib']:.0f} MiB and "
            f"took {one['took_s']:.1f} s."
        )


@click.command(help=__doc__)
@click.option("--passes", default=3, show_default=True, help="Turns of all ways.")
@click.option("--studies", default=120, show_default=True)
@click.option("--per-study", default=20, show_default=True, help="Images of 40 KB each.")
@click.option("--huge-mib", default=256, show_default=True, help="Size of the huge image; 0 leaves it out.")
@click.option("--without-cloner", is_flag=True, help="Do not install and measure OrthancCloner.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def main(passes: int, studies: int, per_study: int, huge_mib: int, without_cloner: bool, as_json: bool) -> None:
    console = Console(stderr=as_json)
    python = None if without_cloner else cloner()
    if python is None and not without_cloner:
        console.print(f"{CLONER} cannot be installed here; it is left out.")
    with tempfile.TemporaryDirectory(prefix="pacs-bench-") as folder:
        try:
            with (
                bench(Path(folder), studies=studies, per_study=per_study) as stage,
                console.status("Measuring …"),
            ):
                figures = measure(stage, passes=passes, python=python, huge_bytes=huge_mib * 2**20)
        except (parts.PartMissing, parts.PartFailed) as error:
            raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(figures, indent=1))
    else:
        show(figures, console)


if __name__ == "__main__":
    sys.exit(main())
