"""What it costs to start: ``python -m benchmarks.startup [--passes 7]``.

Each program is a process of its own. The programs take turns, so that a busy machine slows all of them; of each the
best turn counts, and its ratio to a Python that does nothing says more than its milliseconds. Compiled modules are kept
in a temporary folder and are there before the first turn that counts, as pip compiles those of a wheel.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass

import click
from rich.console import Console
from rich.table import Table

_PACS = "from producer.cli import main; main(prog_name='pacs')"
_NOTHING = "python -c pass"
#: What is started, and how: the program and its words.
PROGRAMS: dict[str, tuple[str, ...]] = {
    _NOTHING: ("pass",),
    "import producer": ("import producer",),
    "from producer import UploadResult": ("from producer import UploadResult",),
    "from producer import Courier": ("from producer import Courier",),
    "the libraries that Courier needs": ("import celery.backends.redis, kombu.pools, pydantic.main; celery.Celery",),
    "import click": ("import click",),
    "pacs --version": (_PACS, "--version"),
    "pacs --help": (_PACS, "--help"),
    "pacs upload --help": (_PACS, "upload", "--help"),
}


@dataclass(frozen=True)
class StartFigures:
    elapsed_s: float
    processor_s: float


def started(words: tuple[str, ...], environ: Mapping[str, str]) -> StartFigures:
    began_s = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", *words], env=dict(environ), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    elapsed_s = time.perf_counter() - began_s
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{words}: exit status {child.returncode}")
    return StartFigures(elapsed_s, usage.ru_utime + usage.ru_stime)


def measured(passes: int) -> dict[str, StartFigures]:
    """The least of each program's times."""
    turns: dict[str, list[StartFigures]] = {what: [] for what in PROGRAMS}
    with tempfile.TemporaryDirectory() as compiled:
        environ = {**os.environ, "PYTHONPYCACHEPREFIX": compiled}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        for number in range(passes + 1):
            for what, words in PROGRAMS.items():
                figures = started(words, environ)
                if number:
                    turns[what].append(figures)
    return {
        what: StartFigures(min(one.elapsed_s for one in some), min(one.processor_s for one in some))
        for what, some in turns.items()
    }


@click.command()
@click.option("--passes", type=click.IntRange(min=1), default=7, show_default=True)
def main(passes: int) -> None:
    """Measure and show a table."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("program", "ms", "processor ms", f"over {_NOTHING}"):
        table.add_column(heading, justify="left" if heading == "program" else "right")
    figures = measured(passes)
    for what, one in figures.items():
        ratio = one.processor_s / figures[_NOTHING].processor_s
        table.add_row(what, f"{one.elapsed_s * 1000:.0f}", f"{one.processor_s * 1000:.0f}", f"{ratio:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
