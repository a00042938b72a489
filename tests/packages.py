"""The sdist and the wheel, built from this working tree as for a release, and an environment that has the wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir")
_SDIST = "from setuptools import build_meta; build_meta.build_sdist('dist')"
#: What a developer's working tree may hold beside the sources, and no distribution may.
LITTER = (
    ".run/ohif/index.html",
    ".venv/lib/seen.py",
    "build/lib/worker/old.py",
    "courier/__pycache__/errors.cpython-311.pyc",
    "docs/examples/node_modules/amqp/README.md",
    "tests/servers/node_modules/azurite/docs/a.md",
    "tests/unit/__pycache__/test_urls.cpython-311.pyc",
    "worker/storage/notes.txt",
)


def run(*command: object, cwd: Path, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=environ, capture_output=True, text=True, check=False)


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    """The standard output of a program that ended well."""
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_sources(target: Path) -> None:
    """What Git would export of this working tree, whether or not this is a clone."""
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    patterns = [".git", ".*_cache", *(pattern.rstrip("/") for pattern in ignored)]
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*patterns))


@dataclass(frozen=True)
class Distributions:
    """``sources``: the files of the tree that they were built from, by their paths in it, without the litter."""

    sources: frozenset[str]
    sdist: Path
    #: Built from the sdist, as an installer does where there is no wheel.
    wheel: Path

    @property
    def sdist_files(self) -> set[str]:
        with tarfile.open(self.sdist) as archive:
            return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def build_distributions(folder: Path) -> Distributions:
    source = folder / "source"
    copy_sources(source)
    files = frozenset(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    for name in LITTER:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("litter\n", encoding="utf-8")
    succeeded(run(sys.executable, "-c", _SDIST, cwd=source))
    (sdist,) = (source / "dist").glob("*.tar.gz")
    options = ("--no-index", "--no-deps", "--no-build-isolation")
    succeeded(run(*_PIP, "wheel", *options, "-w", folder, sdist, cwd=folder))
    (wheel,) = folder.glob("*.whl")
    return Distributions(files, sdist, wheel)


def install(wheel: Path, folder: Path) -> Path:
    """The Python of an environment that has the wheel; the other packages are those of this environment."""
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    succeeded(run(*_PIP, "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=folder))
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    where = succeeded(run(python, "-c", "import producer; print(producer.__file__)", cwd=folder))
    assert where.startswith(str(site))
    return python
