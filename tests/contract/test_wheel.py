"""The wheel, installed as its users have it: their type checker knows what each operation returns."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("courier", "producer", "worker", "sandbox", "celeryconfig.py", "pyproject.toml", "README.md", "LICENSE")

PROGRAM = '''\
"""Upload an image, look at its study, and say where it is."""

from typing import Any, assert_type

from producer import BatchResult, Courier, FoundResult, Handle, StatusResult, UploadResult
from producer.errors import CourierError, ImageAlreadyExists, StillRunning


def upload(courier: Courier, url: str) -> str:
    job = courier.upload(url, requested_by="night shift")
    assert_type(job, Handle[UploadResult])
    try:
        stored = job.result(timeout_s=60)
    except ImageAlreadyExists as error:
        return error.server_name or "no server"
    except (CourierError, StillRunning) as error:
        raise SystemExit(str(error)) from error
    return f"{stored['server_name']} because {stored['route']['reason']}: {stored['viewer_url']}"


def main() -> None:
    with Courier() as courier:
        print(upload(courier, "https://images.example.org/1.dcm"))
        assert_type(courier.exists("study", "1.2.3").result(), FoundResult)
        batch: Handle[BatchResult] = courier.batch.upload(["https://images.example.org/1.dcm"])
        failures: list[str] = [one["message"] for one in batch.result()["failures"]]
        for handle, report in courier.as_completed([courier.status(), courier.status()]):
            assert_type(handle, Handle[StatusResult])
            print(handle.id, failures, report.result and report.result["servers"][0]["latency_ms"])
        other: Handle = courier.handle("of another program")
        assert_type(other.result(), Any)
'''


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel; the other packages are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # building leaves files in the source
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir")
    built = run(*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    done = run(*pip, "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    where = run(python, "-c", "import producer; print(producer.__file__)", cwd=folder)
    assert where.stdout.startswith(str(site)), where.stderr
    return python


def checked(installed: Path, program: str, folder: Path) -> str:
    """What mypy says of a user's program, which sees nothing but what is installed."""
    (folder / "program.py").write_text(program, encoding="utf-8")
    (folder / "mypy.ini").write_text("[mypy]\n", encoding="utf-8")
    options = ("--strict", "--python-executable", installed, "--cache-dir", folder / "cache")
    return run(sys.executable, "-m", "mypy", *options, "program.py", cwd=folder).stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_users_program_is_checked_strictly_against_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    assert checked(installed, PROGRAM, tmp_path) == "Success: no issues found in 1 source file\n"
    wrong = PROGRAM.replace("stored['viewer_url']", "stored['viewer_link']").replace('"servers"', '"server"')
    wrong = wrong.replace("error.server_name or", "error.server or").replace('exists("study"', 'exists("studies"')
    answer = checked(installed, wrong, tmp_path)
    for words in ('"viewer_link"', '"server"', '"ImageAlreadyExists" has no attribute "server"', "'studies'"):
        assert words in answer
    assert "Found 4 errors" in answer
