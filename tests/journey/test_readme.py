"""What README.md shows is what happens: its examples are run as they stand, against real parts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from courier.settings import Settings
from sandbox.images import ImageServer
from sandbox.processes import RedisPart
from sandbox.samples import sample_bytes

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
IMAGES = {"ct.dcm": "CT_small.dcm", "mr.dcm": "MR_small.dcm", "us.dcm": "examples_rgb_color.dcm"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def python_with(words: str) -> str:
    (block,) = [block for block in blocks("python") if words in block]
    return block


@pytest.fixture
def here(image_server: ImageServer, redis: RedisPart) -> Any:
    """An example with the addresses of this machine in the place of those it shows."""
    for name, sample in IMAGES.items():
        image_server.put(name, sample_bytes(sample))

    def placed(example: str) -> str:
        example = example.replace("https://images.example.org", image_server.base)
        return re.sub(r"redis://localhost:6379/(\d)", rf"redis://127.0.0.1:{redis.port}/\1", example)

    return placed


def run_python(example: str, config: Path) -> str:
    environ = {**os.environ, "PACS_CONFIG": str(config)}
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_examples_for_python_say_who_stored_the_image(worker: Any, here: Any) -> None:
    config = worker().config
    with_our_library = here(python_with("import Courier"))
    assert re.match(r"msdicom created http://\S+/viewer/\S+\n", run_python(with_our_library, config))
    assert run_python(with_our_library, config) == "already on msdicom\n"
    assert run_python(here(python_with("import Celery")), config) == "msdicom\n"


def test_the_examples_for_a_shell_end_with_status_zero(
    worker: Any, here: Any, image_server: ImageServer, tmp_path: Path
) -> None:
    config = worker().config
    (tmp_path / "urls.txt").write_text(f"{image_server.url('us.dcm')}\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("pacs ")]
    assert len(commands) >= 2
    for command in commands:
        done = subprocess.run(
            here(command),
            shell=True,
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "PACS_CONFIG": str(config)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        assert "msdicom" in done.stdout


def test_the_configuration_is_valid() -> None:
    (block,) = blocks("toml")
    settings = Settings.model_validate(tomllib.loads(block))
    assert settings.servers[0].name == "msdicom"


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) >= 6
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_knows_the_commands_it_names() -> None:
    named = set(re.findall(r"(?:^|`|=\S+ )make ([a-z]+)", README, re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"run", "test"} <= named <= targets
