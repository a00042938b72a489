"""The contract as it is written down: schemas are those of the code, every task and command has its section."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import cast

import click
import pytest

from courier import schema
from courier.errors import CourierError, InvalidRequest, NotFound, from_payload
from courier.messages import StudiesJob, UploadJob, read_job
from producer.cli import main

ROOT = Path(__file__).parents[2]
JOBS = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")
CLI = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")

BATCH = cast(click.Group, main.load("batch"))


def task_names() -> set[str]:
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "worker" / "tasks").glob("*.py"))
    return {name for source in sources for name in re.findall(r'name="(pacs\.[a-z_.]+)"', source)}


def test_the_schemas_in_the_docs_are_those_of_the_code() -> None:
    kept = {path.name: path.read_text(encoding="utf-8") for path in schema.FOLDER.glob("*.json")}
    made = {name: schema.written(document) for name, document in schema.schemas().items()}
    assert kept == made, "run: python -m courier.schema"


def test_writing_them_takes_away_those_whose_class_is_gone(tmp_path: Path) -> None:
    (tmp_path / "GoneJob.json").write_text("{}", encoding="utf-8")
    schema.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(schema.schemas())


def test_a_schema_says_what_a_message_must_and_may_hold() -> None:
    upload = schema.schemas()["UploadJob.json"]
    assert upload["required"] == ["image_url"]
    assert set(upload["properties"]) == set(UploadJob.model_fields)
    assert set(schema.schemas()["Error.json"]["required"]) == set(NotFound("x").payload)


@pytest.mark.parametrize("keyword", ["\ud800", "x" * 65])
def test_a_filter_by_what_no_keyword_can_be_is_refused(keyword: str) -> None:
    with pytest.raises(InvalidRequest, match="filters"):
        read_job(StudiesJob, {"filters": {keyword: "x"}})


def test_the_error_schema_names_every_code() -> None:
    codes = schema.schemas()["Error.json"]["properties"]["code"]["enum"]
    assert codes == sorted({kind.code for kind in CourierError.subclasses()})
    assert all(type(from_payload({"code": code, "message": ""})) is not CourierError for code in codes)
    assert [code for code in codes if f"`{code}`" not in JOBS] == []


@pytest.mark.parametrize("task", sorted(task_names()))
def test_every_task_has_a_section_that_links_its_schemas(task: str) -> None:
    section = re.search(rf"^## `{re.escape(task)}`.*?(?=^## |\Z)", JOBS, re.MULTILINE | re.DOTALL)
    assert section, f"docs/jobs.md lacks a section ## `{task}`"
    linked = re.findall(r"schema/(\w+\.json)", section[0])
    assert linked
    assert [name for name in linked if not (schema.FOLDER / name).exists()] == []


def test_every_example_of_a_message_is_valid() -> None:
    kinds = {kind.__name__: kind for kind in schema._below(schema.Job)}
    sections = re.findall(r"^## `(pacs\.[a-z_.]+)`(.*?)(?=^## |\Z)", JOBS, re.MULTILINE | re.DOTALL)
    for task, section in sections:
        kind = kinds[re.findall(r"schema/(\w+Job)\.json", section)[0]]
        examples = re.findall(r"```json\n(\{\"job\".*?)\n```", section, re.DOTALL)
        assert examples, f"{task} has no example message"
        for example in examples:
            read_job(kind, json.loads(example)["job"])


@pytest.mark.parametrize("name", ["\ud800", "a\nb", "x" * 100_000, "https://user:secret@h/?sig=secret"])
def test_a_refusal_names_a_field_so_that_it_can_stand_in_a_line(name: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read_job(StudiesJob, {"filters": {name: 1}})
    assert refusal.value.message.isprintable()
    assert len(refusal.value.message) < 200
    assert "secret" not in refusal.value.message


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_has_a_section_that_names_its_options(command: str) -> None:
    section = re.search(rf"^## `pacs {command}.*?(?=^## |\Z)", CLI, re.MULTILINE | re.DOTALL)
    assert section, f"docs/cli.md lacks a section ## `pacs {command} …`"
    options = [one for one in main.load(command).params if isinstance(one, click.Option)]
    names = [option.opts[0] for option in options]
    assert [name for name in names if name not in section[0] and name not in ("--json", "--timeout")] == []


@pytest.mark.parametrize("command", sorted(BATCH.commands))
def test_every_command_of_batches_is_told_with_its_options(command: str) -> None:
    section = re.search(r"^## `pacs batch`.*?(?=^## |\Z)", CLI, re.MULTILINE | re.DOTALL)
    assert section
    assert f"`{command}`" in section[0]
    options = [one.opts[0] for one in BATCH.commands[command].params if isinstance(one, click.Option)]
    assert [name for name in options if name not in section[0] and name not in ("--json", "--timeout")] == []
