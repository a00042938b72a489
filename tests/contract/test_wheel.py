"""The sdist and the wheel: what they hold, and that a user's type checker knows what each operation returns."""

from __future__ import annotations

import re
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

from tests.packages import LITTER, Distributions, run

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


def checked(installed: Path, folder: Path, **programs: str) -> str:
    """What mypy says of programs of a user, which see nothing but what is installed."""
    for name, program in programs.items():
        (folder / f"{name}.py").write_text(program, encoding="utf-8")
    (folder / "mypy.ini").write_text("[mypy]\n", encoding="utf-8")
    options = ("--strict", "--python-executable", installed, "--cache-dir", folder / "cache")
    return run(sys.executable, "-m", "mypy", *options, *(f"{name}.py" for name in programs), cwd=folder).stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_users_program_is_checked_strictly_against_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    wrong = PROGRAM.replace("stored['viewer_url']", "stored['viewer_link']").replace('"servers"', '"server"')
    wrong = wrong.replace("error.server_name or", "error.server or").replace('exists("study"', 'exists("studies"')
    wrong += "\nfrom producer import Couriers\n"
    answer = checked(installed, tmp_path, right=PROGRAM, wrong=wrong)
    assert "right.py" not in answer
    for words in (
        '"viewer_link"',
        '"server"',
        '"ImageAlreadyExists" has no attribute "server"',
        "'studies'",
        'no attribute "Couriers"',
    ):
        assert words in answer
    assert answer.endswith("Found 5 errors in 1 file (checked 2 source files)\n")


def in_folders(files: frozenset[str], *folders: str) -> set[str]:
    return {name for name in files if name.partition("/")[0] in folders}


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_three_packages_whole_and_nothing_else(distributions: Distributions) -> None:
    with zipfile.ZipFile(distributions.wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == in_folders(distributions.sources, "courier", "producer", "worker")
    assert {"courier/py.typed", "producer/py.typed", "worker/py.typed"} <= held


def test_the_sdist_has_docs_tests_and_what_they_need_and_no_litter(distributions: Distributions) -> None:
    held = distributions.sdist_files
    folders = (".ci", "benchmarks", "courier", "deploy", "docker", "docs", "producer", "sandbox", "tests", "worker")
    files = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "celeryconfig.py", "constraints.txt"}
    files |= {"docker-compose.yml", "pyproject.toml", ".dockerignore", ".gitignore"}
    generated = {"PKG-INFO", "setup.cfg"}
    found = {name for name in held if not name.startswith("pacs_courier.egg-info/")}
    assert found == in_folders(distributions.sources, *folders) | files | generated
    assert not held & set(LITTER)


def test_the_metadata_say_who_it_is_for_and_that_s3_and_azure_are_extras(distributions: Distributions) -> None:
    described = metadata(distributions.wheel)
    assert described["License-Expression"] == "MIT"
    assert "Intended Audience :: Healthcare Industry" in described.get_all("Classifier", [])
    extras: dict[str, set[str]] = {}
    for line in described.get_all("Requires-Dist", []):
        wish, _, condition = line.partition(";")
        name = re.split(r"[^A-Za-z0-9-]", wish)[0]
        extras.setdefault(condition.strip().removeprefix("extra == ").strip('"'), set()).add(name)
    stores = {"s3": {"boto3", "botocore"}, "azure": {"azure-identity", "azure-storage-blob"}}
    assert {name: extras[name] for name in stores} == stores
    assert not set.union(*stores.values()) & (extras[""] | extras["worker"])
