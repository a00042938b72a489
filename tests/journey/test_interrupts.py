"""Commands that are interrupted by a real signal: what they say, what goes on, and what does not."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from celery import Celery

from producer import Courier
from sandbox.images import ImageServer
from sandbox.processes import SandboxPart
from sandbox.synthetic import image, new_uid
from tests.journey.conftest import Steady
from tests.stow import stow

WAIT_S = 30
INTERRUPTED = 130


def is_there(url: str, study: str) -> bool:
    answer = requests.get(f"{url}/studies/{study}/instances", headers={"Accept": "application/dicom+json"}, timeout=10)
    return answer.status_code == 200 and bool(answer.json())


class Started:
    """A command in a process of its own, interrupted when ``when`` says so."""

    def __init__(self, config: Path, *words: str, stdin: Any = subprocess.DEVNULL) -> None:
        code = "from producer.cli import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            env={**os.environ, "PACS_CONFIG": str(config), "COLUMNS": "200"},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_connected(self) -> None:
        """Until it has asked something of Redis: before that it is still being loaded."""
        files = Path(f"/proc/{self.process.pid}/fd")
        deadline = time.monotonic() + WAIT_S
        while not _has_socket(files):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> tuple[int, str, str]:
        assert self.process.poll() is None, self.process.communicate()
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=WAIT_S)
        assert "Aborted" not in out + err
        assert "Traceback" not in out + err
        return self.process.returncode, out, err


def _has_socket(files: Path) -> bool:
    """Whether one of a process' open files is a socket. One that is closed at this moment is none."""
    try:
        return any("socket:" in os.readlink(one) for one in files.iterdir())
    except FileNotFoundError:
        return False


@pytest.fixture
def start(steady: Steady) -> Iterator[Callable[..., Started]]:
    begun: list[Started] = []

    def run(*words: str, **more: Any) -> Started:
        begun.append(Started(steady.config, *words, **more))
        return begun[-1]

    yield run
    for one in begun:
        one.process.kill()
        one.process.communicate()


@pytest.fixture
def jobs(steady: Steady) -> Callable[..., list[str]]:
    """The ids of the jobs of a task, waited for until there are ``count`` in a state."""
    with Courier(steady.settings) as courier:
        assert courier.ledger is not None
        client = courier.ledger.client
        before = set(client.keys("courier:job:*"))

    def found(task: str, *, count: int = 1, state: str | None = None) -> list[str]:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            new = [key for key in client.keys("courier:job:*") if key not in before]
            records = {key.removeprefix("courier:job:"): client.hgetall(key) for key in new}
            ids = [
                job_id
                for job_id, one in records.items()
                if one.get("task") == task and state in (None, one.get("state"))
            ]
            if len(ids) >= count:
                return ids
            time.sleep(0.05)
        raise AssertionError(f"no {task} is {state}")

    return found


@pytest.fixture
def deaf(steady: Steady, plain: Celery, sandbox: SandboxPart) -> Iterator[Callable[[], None]]:
    """The worker takes no messages until this is called."""
    queues = ("pacs", "pacs.batches", "pacs.admin")

    def change(act: Callable[..., Any]) -> None:
        for queue in queues:
            assert act(queue, reply=True, timeout=WAIT_S, limit=1)

    def listen() -> None:
        change(plain.control.add_consumer)

    change(plain.control.cancel_consumer)
    yield listen
    listen()


READINGS = [
    ("pacs.exists", ("exists", "study", "{study}")),
    ("pacs.metadata", ("metadata", "study", "{study}")),
    ("pacs.list_studies", ("studies",)),
    ("pacs.status", ("status",)),
    ("pacs.trace", ("trace", "{study}")),
    ("pacs.audit", ("audit",)),
    ("pacs.upload", ("upload", "{url}")),
]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(("task", "words"), READINGS)
def test_an_interrupted_command_names_its_job_and_the_job_goes_on(
    start: Callable[..., Started],
    jobs: Callable[..., list[str]],
    courier: Courier,
    sandbox: SandboxPart,
    image_server: ImageServer,
    task: str,
    words: tuple[str, ...],
    as_json: bool,
) -> None:
    study = new_uid()
    url = image_server.put("a.dcm", image(study, side=8))
    stow(sandbox.dcm4chee, image(study, side=8))
    for server in ("msdicom", "dcm4chee"):
        sandbox.set_fault(server, "*", latency_ms=1500)
    command = start(*(word.format(study=study, url=url) for word in words), *(["--json"] if as_json else []))
    (job_id,) = jobs(task, state="running")
    status, out, err = command.interrupt()
    assert (status, out) == (INTERRUPTED, "")
    assert f"Job {job_id} goes on" in err
    assert f"pacs result {job_id}" in err
    assert f"pacs cancel {job_id}" in err
    sandbox.reset_faults()
    assert courier.handle(job_id).report().status != "failed"
    for _, report in courier.as_completed([courier.handle(job_id)], timeout_s=WAIT_S):
        assert report.error is None or report.error.payload["code"] != "cancelled"


def test_a_job_that_no_worker_has_taken_yet_goes_on_too(
    start: Callable[..., Started], jobs: Callable[..., list[str]], deaf: Callable[[], None]
) -> None:
    commands = {
        "pacs.download": start("download", new_uid(), "/nowhere/a.zip"),
        "pacs.storage": start("storage", "--json"),
        "pacs.delete": start("delete", "study", new_uid(), "--dry-run"),
    }
    for task, command in commands.items():
        (job_id,) = jobs(task)
        status, out, err = command.interrupt()
        assert (status, out, f"Job {job_id} goes on" in err) == (INTERRUPTED, "", True)
    deaf()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_deletion_that_no_worker_has_taken_is_cancelled_and_said_to_be(
    start: Callable[..., Started],
    jobs: Callable[..., list[str]],
    courier: Courier,
    sandbox: SandboxPart,
    deaf: Callable[[], None],
    number: signal.Signals,
) -> None:
    study = new_uid()
    stow(sandbox.msdicom, image(study, side=8))
    command = start("delete", "study", study, "--yes")
    (job_id,) = jobs("pacs.delete")
    status, out, err = command.interrupt(number)
    assert (status, out) == (INTERRUPTED, "")
    assert f"Job {job_id} was cancelled before it began; nothing was deleted." in err
    deaf()
    assert [
        report.error.payload["code"] for _, report in courier.as_completed([courier.handle(job_id)], timeout_s=WAIT_S)
    ] == ["cancelled"]  # type: ignore[union-attr]
    assert is_there(sandbox.msdicom, study)


def test_a_deletion_whose_server_is_still_asked_is_cancelled(
    start: Callable[..., Started], jobs: Callable[..., list[str]], sandbox: SandboxPart
) -> None:
    for level in ("study", "series", "image"):
        study, sop = new_uid(), new_uid()
        stow(sandbox.msdicom, image(study, sop=sop, side=8))
        sandbox.set_fault("msdicom", "query", latency_ms=1500)
        known = set(jobs("pacs.delete", count=0))
        command = start(
            "delete", level, {"study": study, "series": f"{study}.1", "image": sop}[level], "--yes", "--json"
        )
        jobs("pacs.delete", count=len(known) + 1)
        (job_id,) = set(jobs("pacs.delete", count=1, state="running")) - known
        status, out, err = command.interrupt()
        assert (status, out) == (INTERRUPTED, "")
        assert f"Job {job_id} was cancelled before it began; nothing was deleted." in err
        sandbox.reset_faults()
        time.sleep(2)
        assert is_there(sandbox.msdicom, study)


def test_a_deletion_that_has_begun_goes_on_and_is_said_to(
    start: Callable[..., Started], jobs: Callable[..., list[str]], courier: Courier, sandbox: SandboxPart
) -> None:
    for server, operation in (("msdicom", "delete"), ("dcm4chee", "reject"), ("dcm4chee", "delete")):
        study, url = new_uid(), getattr(sandbox, server)
        stow(url, image(study, side=8))
        sandbox.set_fault(server, operation, latency_ms=2000)
        known = set(jobs("pacs.delete", count=0))
        command = start("delete", "study", study, "--yes")
        jobs("pacs.delete", count=len(known) + 1)
        (job_id,) = set(jobs("pacs.delete", count=1, state="running")) - known
        handle = courier.handle(job_id)
        while handle.stage() != "delete":
            time.sleep(0.05)
        status, out, err = command.interrupt()
        assert (status, out) == (INTERRUPTED, "")
        assert f"The deletion has begun and goes on: job {job_id}." in err
        assert handle.result(timeout_s=WAIT_S)["operation"] == "delete"
        assert not is_there(url, study)
        sandbox.reset_faults()


def test_an_interruption_at_the_question_begins_nothing(start: Callable[..., Started], sandbox: SandboxPart) -> None:
    study = new_uid()
    stow(sandbox.msdicom, image(study, side=8))
    for words, question in (
        (("delete", "study", study), "Delete this study?"),
        (("batch", "delete", study), "Delete these studies?"),
        (("delete-all",), "to go on"),
    ):
        master, terminal = pty.openpty()
        command = start(*words, stdin=terminal)
        shown = ""
        while question not in shown:
            assert command.process.poll() is None, shown
            shown += command.process.stdout.read(1)  # type: ignore[union-attr]
        time.sleep(1)  # input() drops an interruption that comes while it writes its prompt
        status, _, err = command.interrupt()
        os.close(master)
        os.close(terminal)
        assert status == INTERRUPTED
        assert "Nothing was changed." in err
        assert is_there(sandbox.msdicom, study)


def test_the_end_of_the_input_at_the_question_is_no_yes(start: Callable[..., Started], sandbox: SandboxPart) -> None:
    study = new_uid()
    stow(sandbox.msdicom, image(study, side=8))
    master, terminal = pty.openpty()
    command = start("delete", "study", study, stdin=terminal)
    os.write(master, b"\x04")
    out, err = command.process.communicate(timeout=WAIT_S)
    os.close(master)
    os.close(terminal)
    assert (command.process.returncode, "Aborted" in out + err) == (1, False)
    assert "Nothing was begun." in err
    assert is_there(sandbox.msdicom, study)


@pytest.mark.parametrize(
    "words", [("batch", "delete", "{study}", "--yes"), ("delete-all", "--confirm", "delete all studies")]
)
def test_a_batch_of_deletions_that_has_not_begun_is_cancelled(
    start: Callable[..., Started],
    jobs: Callable[..., list[str]],
    courier: Courier,
    sandbox: SandboxPart,
    deaf: Callable[[], None],
    words: tuple[str, ...],
) -> None:
    study = new_uid()
    stow(sandbox.msdicom, image(study, side=8))
    command = start(*(word.format(study=study) for word in words))
    (job_id,) = jobs("pacs.batch.delete" if words[0] == "batch" else "pacs.delete_all")
    status, out, err = command.interrupt()
    assert (status, out) == (INTERRUPTED, "")
    assert f"Batch {job_id} was cancelled before it began; nothing was deleted." in err
    deaf()
    list(courier.as_completed([courier.handle(job_id)], timeout_s=WAIT_S))
    assert is_there(sandbox.msdicom, study)


def test_a_batch_of_deletions_that_has_begun_goes_on(
    start: Callable[..., Started], jobs: Callable[..., list[str]], courier: Courier, sandbox: SandboxPart
) -> None:
    study = new_uid()
    stow(sandbox.msdicom, image(study, side=8))
    sandbox.set_fault("msdicom", "delete", latency_ms=3000)
    command = start("batch", "delete", study, "--yes")
    (job_id,) = jobs("pacs.batch.delete")
    while (batch := courier.batch.get(job_id)).state != "running":
        time.sleep(0.05)
    status, _, err = command.interrupt()
    assert status == INTERRUPTED
    assert f"The deletion has begun. The batch goes on. Come back with: pacs batch watch {batch.id}" in err
    assert courier.handle(job_id).result(timeout_s=WAIT_S)["totals"] == {"deleted": 1}
    assert not is_there(sandbox.msdicom, study)


def test_of_several_uploads_each_job_is_named(
    start: Callable[..., Started],
    jobs: Callable[..., list[str]],
    courier: Courier,
    image_server: ImageServer,
    sandbox: SandboxPart,
) -> None:
    urls = [image_server.put(f"{n}.dcm", image(new_uid(), side=8)) for n in range(3)]
    sandbox.set_fault("msdicom", "*", latency_ms=1500)
    command = start("upload", *urls)
    ids = jobs("pacs.upload", count=3)
    status, out, err = command.interrupt()
    assert (status, out) == (INTERRUPTED, "")
    assert "3 jobs go on. Follow one: pacs result ID. Cancel one: pacs cancel ID." in err
    assert all(job_id in err for job_id in ids)
    sandbox.reset_faults()
    ended = courier.as_completed([courier.handle(job_id) for job_id in ids], timeout_s=WAIT_S)
    assert [report.status for _, report in ended] == ["done"] * 3


def test_a_job_of_somebody_else_is_never_cancelled_by_who_looks_at_it(
    start: Callable[..., Started], courier: Courier, sandbox: SandboxPart, deaf: Callable[[], None]
) -> None:
    study = new_uid()
    stow(sandbox.msdicom, image(study, side=8))
    handle = courier.delete("study", study)
    command = start("result", handle.id, "--timeout", "60")
    command.wait_connected()
    status, out, err = command.interrupt()
    assert (status, out, f"Job {handle.id} goes on" in err) == (INTERRUPTED, "", True)
    deaf()
    assert handle.result(timeout_s=WAIT_S)["operation"] == "delete"


def test_a_job_is_cancelled_by_its_id_unless_it_has_begun_or_is_over(
    pacs: Callable[..., tuple[int, Any, str]], courier: Courier, sandbox: SandboxPart, deaf: Callable[[], None]
) -> None:
    study = new_uid()
    stow(sandbox.msdicom, image(study, side=8))
    waiting = courier.delete("study", study)
    status, told, _ = pacs("cancel", waiting.id)
    assert (status, told["cancelled"], told["job_id"]) == (0, True, waiting.id)
    deaf()
    list(courier.as_completed([waiting], timeout_s=WAIT_S))
    assert is_there(sandbox.msdicom, study)
    status, told, _ = pacs("cancel", waiting.id)
    assert (status, told["error"]["code"]) == (0, "cancelled")

    sandbox.set_fault("msdicom", "delete", latency_ms=5000)
    begun = courier.delete("study", study)
    while begun.stage() != "delete":
        time.sleep(0.05)
    status, told, err = pacs("cancel", begun.id)
    assert (status, told["cancelled"], "has begun and goes on" in err) == (1, False, True)
    assert begun.result(timeout_s=WAIT_S)["operation"] == "delete"
    status, told, err = pacs("cancel", begun.id)
    assert (status, told["cancelled"], "is over" in err) == (1, False, True)
    assert pacs("cancel", "no-such-job")[0] == 1
