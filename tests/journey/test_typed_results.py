"""What each operation really returns is what its method says: keys, values and nothing beside them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from pydantic import TypeAdapter

from courier.messages import BatchJob
from producer import BatchStateResult, Courier, Handle
from sandbox.synthetic import image, new_uid
from tests.stow import stow

WAIT_S = 60
TASKS = Path(__file__).parents[2] / "worker" / "tasks"


class Recorded(Courier):
    """A `Courier` that keeps the names of the tasks that it has enqueued."""

    tasks: set[str]

    def enqueue(self, task, *arguments, **options):
        self.tasks.add(task)
        return super().enqueue(task, *arguments, **options)


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def courier(worker, out):
    running = worker(jobs={"max_attempts": 2, "sweep_s": 0.1}, downloads={"folders": [str(out)]})
    with Recorded(running.settings) as courier:
        courier.tasks = set()
        yield courier


def returned(method, *arguments, **options):
    """The result of a method's job, which is of the method's type."""
    (kind,) = get_args(get_type_hints(method, localns={"Handle": Handle})["return"])
    handle = method(*arguments, **options)
    is_of(kind, handle.result(timeout_s=WAIT_S))
    return handle


def is_of(kind, result):
    assert TypeAdapter(kind).validate_python(result, strict=True) == result


def test_every_operation_returns_what_its_type_says(courier, sandbox, image_server, out):
    study, other = new_uid(), new_uid()
    uploaded = returned(courier.upload, image_server.put("first.dcm", image(study)), requested_by="tests").result()
    stow(sandbox.msdicom, image(other))
    stow(sandbox.dcm4chee, image(other), image(other, seed=2))
    returned(courier.exists, "study", other, mode="both", metadata=True)
    returned(courier.metadata, "image", uploaded["image_uid"])
    for ask in (courier.status, courier.storage, courier.database, courier.studies, courier.audit):
        returned(ask)
    returned(courier.trace, uploaded["image_uid"])
    for format in ("zip", "files"):
        returned(courier.download, other, (out / format).as_uri(), format=format)
    returned(courier.delete, "study", other, dry_run=True)
    returned(courier.delete, "image", uploaded["image_uid"])
    returned(courier.delete_all, dry_run=True)
    batches(courier, sandbox, image_server, out)
    returned(courier.delete_all, "delete all studies")
    assert courier.tasks == names_of_tasks() - {"pacs.batch.chunk"}, "an operation is not tried here"


def batches(courier, sandbox, image_server, out):
    batch, studies = courier.batch, [new_uid() for _ in range(3)]
    urls = [image_server.put(f"{study}.dcm", image(study)) for study in studies]
    planned = returned(batch.upload, [*urls, image_server.put("page.html", b"<html>")], dry_run=True)
    returned(batch.apply, planned.id)
    courier.delete("study", studies[0]).result(timeout_s=WAIT_S)
    for go_on in (batch.verify, batch.retry, batch.undo):
        returned(go_on, planned.id)
    is_of(*ending(batch, planned.id))
    moved, kept = new_uid(), new_uid()
    stow(sandbox.msdicom, image(moved), image(kept))
    returned(batch.migrate, [moved], from_server="msdicom", to_server="dcm4chee")
    returned(batch.download, [kept, moved], destination=(out / "many").as_uri())
    deleted = returned(batch.delete, [kept, new_uid()], backup=(out / "kept").as_uri())
    returned(batch.undo, deleted.id)
    again = returned(batch.upload, urls, dry_run=True).id
    for verb in ("show", "pause", "resume", "cancel"):
        asked = courier.enqueue(f"pacs.batch.{verb}", BatchJob, {"batch_id": again})
        is_of(BatchStateResult, asked.result(timeout_s=WAIT_S))


def ending(batch, batch_id):
    return get_type_hints(type(batch).ending)["return"], batch.ending(batch.get(batch_id))


def names_of_tasks():
    sources = [path.read_text(encoding="utf-8") for path in TASKS.glob("*.py")]
    return {name for source in sources for name in re.findall(r'name="(pacs\.[a-z_.]+)"', source)}


def test_two_handles_of_one_job_both_come_with_its_end(courier, image_server):
    url = image_server.put("one.dcm", image(new_uid()))
    first = courier.upload(url, idempotency_key="once")
    handles = [first, courier.upload(url, idempotency_key="once"), courier.handle(first.id), courier.status()]
    ended = list(courier.as_completed(handles, timeout_s=WAIT_S))
    assert sorted(map(id, (handle for handle, _ in ended))) == sorted(map(id, handles))
    assert {report.result["server_name"] for handle, report in ended if handle.id == first.id} in (
        {"msdicom"},
        {"dcm4chee"},
    )
