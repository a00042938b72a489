"""docker/Dockerfile, step by step in a folder: what it copies can be installed, and holds what commands start."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.packages import ROOT, run, succeeded

#: Stands for pip in a layer: writes down what is to be installed, or builds the wheel of the folder.
PIP = """\
#!/bin/sh
case "$*" in
  "install --constraint constraints.txt --requirement requirements.txt") cp requirements.txt wanted.txt ;;
  "install --no-deps .") exec {python} -m pip wheel --no-index --no-deps --no-build-isolation -w wheel . ;;
  *) echo "unforeseen: pip $*" >&2; exit 1 ;;
esac
"""
EXTRAS = ("worker", "s3", "azure", "sandbox", "telemetry")


def steps() -> list[tuple[str, str]]:
    text = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines if re.match("[A-Z]+ ", line)]


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image's working folder after the last step."""
    folder, tools = tmp_path_factory.mktemp("image"), tmp_path_factory.mktemp("tools")
    (tools / "pip").write_text(PIP.format(python=shlex.quote(sys.executable)), encoding="utf-8")
    for name in ("useradd", "install"):
        (tools / name).write_text("#!/bin/sh\n", encoding="utf-8")
    (tools / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    for step, words in steps():
        if step == "COPY":
            *names, target = words.split()
            for name in names:
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                copy(ROOT / name, folder / target)
        elif step == "RUN":
            environ = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
            succeeded(run("sh", "-c", words, cwd=folder, environ=environ))
    return folder


def test_the_layer_of_dependencies_installs_all_that_the_image_needs(image_folder: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {*project["dependencies"], *(wish for name in EXTRAS for wish in project["optional-dependencies"][name])}
    assert set((image_folder / "wanted.txt").read_text(encoding="utf-8").splitlines()) == wanted


def test_the_package_is_built_of_what_is_copied(image_folder: Path) -> None:
    assert [path.name.partition("-")[0] for path in (image_folder / "wheel").iterdir()] == ["pacs_courier"]


def test_every_module_that_a_command_starts_is_in_the_image(image_folder: Path) -> None:
    compose = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    assert set(yaml.safe_load(compose)["services"]) >= {"worker", "flower", "sandbox"}
    texts = [compose, *(words for step, words in steps() if step in ("CMD", "HEALTHCHECK"))]
    modules = {name for text in texts for name in re.findall(r'(?:-m|-A)[", ]+([a-z][a-z.]*)', text)}
    modules |= set(re.findall(r"- -m\n\s*- (\S+)", compose))
    assert modules == {"sandbox", "worker.app", "worker.flower", "worker.health"}
    find = "import importlib.util, sys; print(*(importlib.util.find_spec(name).origin for name in sys.argv[1:]))"
    origins = succeeded(run(sys.executable, "-c", find, *sorted(modules), cwd=image_folder)).split()
    assert len(origins) == 4
    assert all(origin.startswith(str(image_folder)) for origin in origins)
    usage = succeeded(run(sys.executable, "-m", "sandbox", "--help", cwd=image_folder))
    assert "--msdicom-port" in usage
