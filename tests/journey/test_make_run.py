"""`make run`: everything starts, every sample ends as expected, and nothing is left, however it ends."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from pydicom import dcmread

from sandbox.processes import Processes, poll
from sandbox.samples import STORED, samples
from tests.terminals import in_terminal

MARK = "COURIER_TEST_RUN"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds its processes through /proc"),
]


#: `make run` runs at the root of the source; the sandbox is not installed.
SANDBOX = {"PYTHONPATH": str(Path(__file__).parents[2])}


class Demo:
    """One run of what `make run` runs, in a folder of its own; its processes are known by their environment."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self._mark = f"{MARK}={uuid.uuid4()}"
        self._out = folder / "out.txt"
        with self._out.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sandbox.demo", *options],
                cwd=folder,
                env={**os.environ, **SANDBOX, MARK: self._mark.partition("=")[2], "COLUMNS": "110"},
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self._out.read_text(encoding="utf-8")

    def wait(self, *, timeout_s: float = 60) -> int:
        return self.process.wait(timeout=timeout_s)

    def wait_until_it_stays(self) -> None:
        assert poll(lambda: "until Ctrl-C" in self.output or self.process.poll() is not None, timeout_s=60)
        assert self.process.poll() is None, self.output

    def children(self) -> dict[int, str]:
        """Command line by pid of every process that this run started and that still runs."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                marked = entry.name.isdigit() and self._mark.encode() in (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode() if marked else ""
            except OSError:  # ended meanwhile, or somebody else's
                continue
            if command and int(entry.name) != self.process.pid:
                found[int(entry.name)] = command
        return found

    def pid_of(self, part: str) -> int:
        (pid,) = [pid for pid, command in self.children().items() if part in command]
        return pid

    def addresses(self) -> list[str]:
        return re.findall(r"http://127\.0\.0\.1:\d+\S*", self.output)

    def leaves_nothing(self) -> bool:
        """Neither process nor port, once the kernel has cleared away what was killed (memory first, then sockets)."""
        ports = {urlsplit(address).port for address in self.addresses()}
        return poll(lambda: not self.children() and not any(_listens(port) for port in ports if port), timeout_s=30)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    started: list[Demo] = []

    def begin(*options: str) -> Demo:
        started.append(Demo(tmp_path, *options))
        return started[-1]

    yield begin
    for demo in started:
        if demo.process.poll() is None:
            demo.process.kill()
            demo.process.wait()


def test_once_ends_with_zero_when_every_sample_ended_as_expected(start: Callable[..., Demo]) -> None:
    demo = start("--once")
    assert demo.wait() == 0, demo.output
    for sample in samples():
        assert re.search(rf"{re.escape(sample.file)}.*✓ {sample.ending}", demo.output), sample.file
    assert demo.leaves_nothing()
    assert list((demo.folder / ".run").iterdir()) == []


def test_it_stays_with_its_addresses_answering_until_ctrl_c(start: Callable[..., Demo]) -> None:
    demo = start()
    demo.wait_until_it_stays()
    viewers = [address for address in demo.addresses() if "/viewer/" in address]
    flower = next(line.split()[-1] for line in demo.output.splitlines() if line.startswith("Flower"))
    assert len(viewers) >= 7
    for address in (viewers[0], viewers[-1], f"{flower}/tasks"):
        with urllib.request.urlopen(address, timeout=10) as response:
            assert response.headers.get_content_type() == "text/html"
    try_what_it_offers(demo)
    demo.process.send_signal(signal.SIGINT)
    assert demo.wait() == 0, demo.output
    assert demo.leaves_nothing()


def try_what_it_offers(demo: Demo) -> None:
    """The commands that it prints, as they stand; they find the demo without a setting."""
    offered = [line.strip() for line in demo.output.partition("in this folder:")[2].splitlines() if line.strip()]
    environ = {name: value for name, value in os.environ.items() if name != "PACS_CONFIG"}
    ends = {}
    for command in offered:
        words = command.split()
        what = "FLOWER" if command.startswith("FLOWER_URL=") else words[1]
        typed = command.replace("  #", " --yes  #")  # there is no terminal to ask
        ended = subprocess.run(
            ["bash", "-c", typed], cwd=demo.folder, env=environ, capture_output=True, text=True, check=False
        )
        ends[what] = (ended.returncode, ended.stdout, ended.stderr)
    assert {what: status for what, (status, *_) in ends.items()} == {
        "upload": 1,  # the demo has stored it already
        "jobs": 0,
        "top": 0,
        "download": 0,
        "delete": 0,
        "FLOWER": 0,
    }, ends
    assert "image_already_exists" in ends["upload"][1]
    assert "stored on msdicom" in ends["FLOWER"][1] + ends["FLOWER"][2]
    assert list(demo.folder.glob(".run/demo-*/downloads/study.zip"))
    assert list(demo.folder.glob(".run/demo-*/downloads/backup/**/*.zip"))
    for what in ("upload", "jobs", "top", "download", "delete"):
        assert "asking the demo that runs here" in ends[what][2]


@pytest.mark.parametrize(("part", "command"), [("worker", "worker.app worker"), ("flower", "worker.flower")])
def test_a_crash_of_one_part_is_named_and_ends_the_rest(part: str, command: str, start: Callable[..., Demo]) -> None:
    demo = start()
    demo.wait_until_it_stays()
    os.kill(demo.pid_of(command), signal.SIGKILL)
    assert demo.wait() == 1
    assert f"{part} was killed by signal 9." in demo.output
    assert len(demo.output.partition(f"{part}.log:")[2].strip().splitlines()) >= 5, "the end of its log is shown"
    assert demo.leaves_nothing()


def test_an_interrupt_in_the_moment_when_a_part_starts_leaves_nothing(tmp_path, monkeypatch, is_running) -> None:
    really, started = subprocess.Popen, []

    def interrupted(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(really(*arguments, **options))
        signal.raise_signal(signal.SIGINT)
        return started[-1]

    with Processes(tmp_path) as running:
        monkeypatch.setattr(subprocess, "Popen", interrupted)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            running.start("sleeper", ["sleep", "60"], ready=lambda _: True)
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    assert [is_running(process.pid) for process in started] == [False]


def test_ctrl_c_at_the_start_leaves_nothing(start: Callable[..., Demo]) -> None:
    demo = start()
    assert poll(lambda: any("sandbox" in command for command in demo.children().values()), timeout_s=20)
    demo.process.send_signal(signal.SIGINT)
    assert demo.wait() == 130, demo.output
    assert "Traceback" not in demo.output
    assert demo.leaves_nothing()


def test_nothing_is_left_when_the_run_itself_is_killed(start: Callable[..., Demo]) -> None:
    demo = start()
    demo.wait_until_it_stays()
    assert len(demo.children()) >= 4
    demo.process.kill()
    assert demo.wait() == -signal.SIGKILL
    assert demo.leaves_nothing()


def test_make_run_passes_once_on() -> None:
    makefile = Path(__file__).parents[2] / "Makefile"
    dry = ["make", "--dry-run", "--file", str(makefile), "run"]
    for options, wanted in (([], False), (["ONCE=1"], True)):
        shown = subprocess.run([*dry, *options], capture_output=True, text=True, check=True, cwd=makefile.parent)
        assert ("sandbox.demo --once" in shown.stdout) is wanted


@pytest.mark.parametrize("columns", [80, 40])
def test_on_a_terminal_its_table_loses_no_digit_of_a_study(tmp_path: Path, columns: int) -> None:
    run = (sys.executable, "-m", "sandbox.demo")
    ended = in_terminal(["--once"], columns=columns, env=SANDBOX, argv=run, cwd=tmp_path)
    assert ended.status == 0, ended.shown
    contents = [sample.content for sample in samples() if sample.ending == STORED and sample.content]
    studies = {dcmread(io.BytesIO(content), stop_before_pixels=True).StudyInstanceUID for content in contents}
    table = ended.shown.rpartition("images stored")[0]
    assert [study for study in studies if f" {study}\n" not in table] == []
    assert "…" not in table.rpartition("file ")[2]
    assert [number for number in range(1, 9) if f"[{number}] http://" not in ended.shown] == []
