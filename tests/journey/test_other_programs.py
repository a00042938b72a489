"""The examples of docs/examples, run as other programs would: uploads that are stored, and some that are not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sandbox import processes as parts
from sandbox.processes import HOST, Processes
from sandbox.synthetic import image, new_uid
from tests.missing import missing

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
LOGIN = "ops:a-password-of-the-test"
WAIT_S = 60

#: Runs a script where importing anything of ours fails.
WITHOUT_US = """
import runpy, sys
sys.modules |= dict.fromkeys(("courier", "producer", "worker", "celeryconfig", "sandbox"))
script = sys.argv.pop(1)
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        missing(f"{name} is not installed (of the Debian packages curl and npm)")
    return str(found)


@pytest.fixture
def environ(steady: Any) -> dict[str, str]:
    """What an example is told: where Redis is, and nothing else of the product."""
    queue = steady.settings.queue
    ours = ("PACS_", "BROKER_URL", "RESULT_BACKEND", "LEDGER_URL", "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {
        **inherited,
        "BROKER_URL": queue.broker_url,
        "RESULT_BACKEND": queue.result_backend,
        "LEDGER_URL": queue.ledger_url,
    }


def works(command: list[str | Path], image_server: Any, environ: Mapping[str, str]) -> None:
    """An example stores an image, is refused it a second time, and is told of a source that is not there."""
    study = new_uid()
    url = image_server.put("an image.dcm", image(study))

    def run(image_url: str) -> tuple[int, str, str]:
        line = [*command, image_url]
        ended = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=WAIT_S, check=False)
        return ended.returncode, ended.stdout, ended.stderr

    status, stored, said = run(url)
    assert (status, said) == (0, "")
    assert stored.startswith("stored on msdicom: http")
    assert study in stored
    assert run(url) == (1, "", "image_already_exists: The image is already on msdicom. [msdicom]\n")
    status, stored, said = run(image_server.url("nothing.dcm"))
    assert (status, stored, said.count("\n")) == (1, "", 1)
    assert said.startswith("source_not_found: ")
    assert said.endswith(" [no server]\n")


def works_for_many(command: list[str | Path], image_server: Any, environ: Mapping[str, str]) -> None:
    """An example of a batch stores what is there, names what is not, and is told why a wrong list begins nothing."""
    study = new_uid()
    urls = [image_server.put(f"{new_uid()}.dcm", image(study, seed=seed)) for seed in range(3)]

    def run(*image_urls: str) -> tuple[int, str, str]:
        line = [*command, *image_urls]
        ended = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=WAIT_S, check=False)
        return ended.returncode, ended.stdout, ended.stderr

    assert run(*urls) == (0, "3 images planned\nbatch done: stored 3\n", "")
    status, told, said = run(urls[0], image_server.url("nothing.dcm"))
    assert (status, told.startswith("2 images planned\nbatch done: ")) == (1, True)
    assert {"already_there 1", "refused 1"} == set(told.splitlines()[1].removeprefix("batch done: ").split(", "))
    assert said.startswith(f"{image_server.url('nothing.dcm')}: source_not_found: ")
    status, told, said = run("no URL")
    assert (status, told, said.partition(":")[0]) == (1, "", "invalid_request")


def test_a_python_program_uses_the_library(environ: dict[str, str], image_server: Any) -> None:
    script = EXAMPLES / "upload_with_courier.py"
    works([sys.executable, script], image_server, environ)


def test_a_celery_program_needs_nothing_of_ours(environ: dict[str, str], image_server: Any) -> None:
    script = EXAMPLES / "upload_with_celery.py"
    command = [sys.executable, "-I", "-c", WITHOUT_US, script]
    works(command, image_server, environ)
    proof = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_US, EXAMPLES / "upload_with_courier.py"],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "import of producer halted" in proof.stderr, "the way this test keeps our packages away does not work"


def test_a_celery_program_orders_a_batch(environ: dict[str, str], image_server: Any) -> None:
    script = EXAMPLES / "batch_with_celery.py"
    works_for_many([sys.executable, "-I", "-c", WITHOUT_US, script], image_server, environ)


def test_curl_goes_through_flower(steady: Any, environ: dict[str, str], image_server: Any, tmp_path: Path) -> None:
    program("curl")
    port = parts.free_port()
    address = f"http://{HOST}:{port}"
    with Processes(tmp_path / "flower") as children:
        flower = children.start(
            "flower",
            [sys.executable, "-m", "worker.flower", f"--port={port}"],
            ready=lambda _: parts.answers(f"{address}/healthcheck"),
            environ={"PACS_CONFIG": str(steady.config), "FLOWER_BASIC_AUTH": LOGIN},
            grace_s=2,
        )
        flower.wait_ready()
        told = {**environ, "FLOWER_URL": address, "FLOWER_LOGIN": LOGIN, "NO_PROXY": HOST, "no_proxy": HOST}
        script = EXAMPLES / "upload_with_flower.sh"
        works([script], image_server, told)
        stranger = subprocess.run(
            [script, "http://nowhere"],
            env={**told, "FLOWER_LOGIN": "ops:wrong"},
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert (stranger.returncode, stranger.stdout) == (22, "")


@pytest.mark.parametrize(
    ("script", "works_as"),
    [("upload_with_node.mjs", works), ("batch_with_node.mjs", works_for_many)],
    ids=["one", "many"],
)
def test_node_speaks_to_the_workers_through_redis(
    environ: dict[str, str], image_server: Any, script: str, works_as: Callable[..., None]
) -> None:
    node = program("node")
    if not (EXAMPLES / "node_modules" / "celery-node").is_dir():
        missing("celery-node is not installed (npm install --prefix docs/examples)")
    works_as([node, EXAMPLES / script], image_server, environ)
