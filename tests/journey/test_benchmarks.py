"""Each benchmark runs to its end and prints its table: with a handful of images, so that the figures say nothing."""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from benchmarks import (
    archive,
    bulk,
    drain,
    equality,
    latency,
    machine,
    migration,
    planning,
    sandbox,
    scale,
    scaling,
    startup,
    stub_pacs,
    uploads,
)
from benchmarks.images import image
from benchmarks.uploads import UploadBench
from sandbox.processes import SandboxPart

MAKEFILE = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
RUN = re.findall(r"-m benchmarks\.(\w+)", MAKEFILE)


@pytest.fixture(scope="module")
def stage(orthanc: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[UploadBench]:
    with uploads.bench(tmp_path_factory.mktemp("bench")) as stage:
        yield stage


def printed(show: Callable[[Console], None]) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_make_bench_says_first_what_its_figures_are_of_and_then_runs_what_exists() -> None:
    assert RUN[0] == "machine"
    assert {"startup", "latency", "uploads", "scaling", "drain", "bulk", "migration"} == set(RUN[1:])
    assert all(callable(importlib.import_module(f"benchmarks.{name}").main) for name in RUN[1:])


def test_the_line_names_the_commit_and_the_versions_and_no_date() -> None:
    said = machine.described()
    assert re.fullmatch(
        r"commit ([0-9a-f]{7,40}|unknown)\+?, \d+ cores, Orthanc (\d[\d.]*|not installed),"
        r" Redis \(Valkey\) \d[\d.]*, Python 3[\d.]*",
        said,
    )
    assert machine.version_of("no-such-program", "--version") == "not installed"


def test_startup(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: startup.PROGRAMS[name] for name in ("python -c pass", "import producer")}
    monkeypatch.setattr(startup, "PROGRAMS", few)
    assert all(one.processor_s > 0 for one in startup.measured(1).values())


@pytest.mark.slow
def test_latency(stage: UploadBench) -> None:
    times_ms = latency.measure(stage, count=2, warm_up=1)
    assert {name: len(taken) for name, taken in times_ms.items()} == dict.fromkeys(times_ms, 2)
    assert "notified / script" in printed(lambda console: latency.show(times_ms, console))


@pytest.mark.slow
def test_uploads_and_their_naive_rivals(stage: UploadBench) -> None:
    figures = uploads.measure(stage, passes=1, count=4, huge_bytes=0, warm_up=2)
    assert set(figures["naive_jobs_per_s"]) == {"naive-threads", "naive-prefork"}
    assert all(spent > 0 for spent in figures["naive_cpu_ms_per_job"].values())
    assert "chain / the better naive one" in printed(lambda console: uploads.show(figures, console))


@pytest.mark.slow
def test_bulk(stage: UploadBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "GRID", ((1, 1), (1, 10)))
    folder = stage.config.parent / "images"
    figures = bulk.measure(stage, folder, passes=1, count=20, concurrency=2, warm_up=8)
    assert {name for name, ratios in figures["ratios"].items() if ratios} == {"http", "folder", "single", "script"}


@pytest.mark.slow
def test_migration(orthanc: str, tmp_path: Path) -> None:
    with migration.bench(tmp_path, studies=2, per_study=2) as stage:
        figures = migration.measure(stage, passes=1, python=None, huge_bytes=0)
    assert "ours / raw" in printed(lambda console: migration.show(figures, console))


@pytest.mark.slow
def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "WORKERS", (1,))
    with scaling.bench(tmp_path) as (stage, redis):
        found = scaling.measure(stage, redis, passes=1, count=4, warm_up=2)
    assert found[1][0].redis.commands > found[1][0].redis.requests > 1
    assert "Extrapolated, not measured" in printed(lambda console: scaling.show(found, console))


@pytest.mark.slow
def test_drain(tmp_path: Path) -> None:
    figures = drain.measure(tmp_path, passes=1, waiting=12, lookups=3)
    assert (figures.released, len(figures.usual_ms)) == (12, 3)
    assert figures.most_in_queue <= 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        (planning.main, ["--rows", "100"], "a plan file to a plan"),
        (equality.main, ["--images", "2", "--passes", "1"], "dcm4chee to msdicom"),
        (scale.main, ["100"], "load average"),
    ],
    ids=["planning", "equality", "scale"],
)
def test_those_that_make_bench_leaves_out(command: click.Command, words: list[str], said: str, orthanc: str) -> None:
    ended = CliRunner().invoke(command, words, catch_exceptions=False)
    assert (ended.exit_code, said in ended.output) == (0, True)


@pytest.mark.slow
def test_archive(sandbox_server: SandboxPart, tmp_path: Path) -> None:
    figures = archive.measure(sandbox_server.dcm4chee, tmp_path, passes=1, count=2, warm_up=2)
    assert set(figures["rates"]) == {"raw", "uploads", "shuffled", "alone"}


def test_sandbox(sandbox_server: SandboxPart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.05)
    assert "STOW/s" in sandbox.measure(sandbox_server.msdicom, sandbox.short_header())


def test_the_server_that_costs_nothing_answers_what_an_upload_asks() -> None:
    assert stub_pacs.answer_to(b"GET /dicom-web/instances?SOPInstanceUID=1.2 HTTP/1.1", b"") == b"[]"
    stored = stub_pacs.answer_to(b"POST /dicom-web/studies HTTP/1.1", b"--BB\r\n\r\n" + image(7, 3) + b"\r\n--BB--")
    (uid,) = re.findall(rb'00081155": \{"vr": "UI", "Value": \["([\d.]+)"', stored)
    asked = b"GET /dicom-web/studies/1.2/series/3.4/instances/%s/metadata HTTP/1.1" % uid
    assert uid in stub_pacs.answer_to(asked, b"")
