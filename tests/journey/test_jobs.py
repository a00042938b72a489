"""`pacs jobs`, `pacs cancel` and `pacs top` on a real worker: what an operator sees, and what a cancellation does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from producer import Courier
from producer.cli import main
from sandbox.images import ImageServer
from sandbox.processes import SandboxPart, poll
from sandbox.synthetic import image, new_uid
from tests.journey.conftest import Steady
from tests.terminals import in_terminal

WAIT_S = 60


@pytest.fixture(autouse=True)
def nothing_left(courier: Courier) -> Iterator[None]:
    yield
    for row in courier.jobs(states=("running", "waiting", "queued"), limit=1000).rows:
        courier.cancel(row.job_id)
    for letter in courier.dead.list():
        courier.dead.purge(letter.job_id)


def run(*words: str, piped: str | None = None) -> tuple[int, str, str]:
    ended = CliRunner().invoke(main, list(words), input=piped)
    return ended.exit_code, ended.stdout, ended.stderr


@pytest.fixture
def listed(steady: Steady, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, dict[str, Any]]]:
    """The rows of `pacs jobs`, by id."""
    monkeypatch.setenv("PACS_CONFIG", str(steady.config))

    def rows(*words: str) -> dict[str, dict[str, Any]]:
        status, out, _ = run("jobs", *words, "--json")
        assert status == 0
        found = [json.loads(line) for line in out.splitlines()]
        return {row["job_id"]: row for row in found}

    return rows


def test_jobs_that_run_wait_and_ended_are_listed_and_cancelled_each_as_it_can_be(
    courier: Courier,
    listed: Callable[..., dict[str, dict[str, Any]]],
    image_server: ImageServer,
    sandbox: SandboxPart,
) -> None:
    over = courier.upload(
        image_server.put("over.dcm", image(new_uid(), side=8)), requested_by="r.lee", reason="order 7"
    )
    over.result(timeout_s=WAIT_S)
    dead = courier.upload(image_server.put("dead.dcm", status=503))
    assert poll(lambda: dead.report().over, timeout_s=WAIT_S)
    sandbox.set_fault("msdicom", "store", latency_ms=15_000)
    url = image_server.put("a.dcm", image(new_uid(), side=8))
    pushing = courier.upload(url)
    assert poll(lambda: pushing.stage() == "push", timeout_s=WAIT_S, every_s=0.02)
    waiting = courier.upload(url)
    assert poll(lambda: (waiting.waiting() or {}).get("code") == "other_job", timeout_s=WAIT_S, every_s=0.02)

    rows = listed()
    assert (rows[pushing.id]["state"], rows[pushing.id]["server_name"]) == ("running", "msdicom")
    assert rows[over.id]["state"] == "done"
    assert (rows[over.id]["requested_by"], rows[over.id]["reason"]) == ("r.lee", "order 7")
    assert (rows[dead.id]["state"], rows[dead.id]["code"]) == ("dead", "source_unreachable")
    assert poll(lambda: waiting.id in listed("--reason", "other_job"), timeout_s=WAIT_S), "it looks again now and then"
    assert set(listed("--state", "dead")) == {dead.id}
    assert pushing.id in listed("--server", "msdicom", "--state", "running")

    batch = courier.batch.upload([image_server.put("b.dcm", image(new_uid(), side=8))])
    wanted = [waiting.id, pushing.id, over.id, dead.id, batch.id, "no-such-job", pushing.id[:8]]
    status, out, _ = run("cancel", *wanted, "--json")
    told = {entry["job_id"]: entry for entry in json.loads(out)}
    assert (status, [told[job_id]["outcome"] for job_id in wanted]) == (
        1,
        ["cancelled", "begun", "over", "dead", "batch", "unknown", "unknown"],
    )
    assert [told[job_id]["cancelled"] for job_id in wanted] == [True] + 6 * [False]
    assert f"pacs batch cancel {batch.id}" in told[batch.id]["message"]
    assert pushing.id in told[pushing.id[:8]]["message"]
    assert poll(lambda: waiting.report().over, timeout_s=WAIT_S)
    assert waiting.report().error.payload["code"] == "cancelled"
    sandbox.reset_faults()
    assert pushing.result(timeout_s=WAIT_S)["status"] == "stored"
    assert poll(lambda: courier.batch.get(batch.id).state == "done", timeout_s=WAIT_S), "its batch was not cancelled"


def test_jobs_are_cancelled_through_a_pipe(
    courier: Courier,
    listed: Callable[..., dict[str, dict[str, Any]]],
    image_server: ImageServer,
    sandbox: SandboxPart,
) -> None:
    sandbox.set_fault("msdicom", "store", latency_ms=15_000)
    url = image_server.put("c.dcm", image(new_uid(), side=8))
    first = courier.upload(url)
    assert poll(lambda: first.stage() == "push", timeout_s=WAIT_S, every_s=0.02)
    others = [courier.upload(url) for _ in range(3)]
    rows: dict[str, dict[str, Any]] = {}

    def all_wait() -> bool:
        """Each of them looks again now and then, and runs for that moment."""
        rows.update(listed("--state", "waiting", "--kind", "upload"))
        return {one.id for one in others} <= set(rows)

    assert poll(all_wait, timeout_s=WAIT_S)
    lines = "".join(f"{json.dumps(rows[one.id])}\n" for one in others)
    status, out, _ = run("cancel", "-", "--json", piped=f"{lines}\n{others[0].id}\n")
    assert status == 0
    assert {entry["job_id"] for entry in json.loads(out)} >= {one.id for one in others}
    assert poll(lambda: all(one.report().over for one in others), timeout_s=WAIT_S)
    assert {one.report().error.payload["code"] for one in others} == {"cancelled"}


def test_a_picture_of_everything_is_shown_once_without_a_terminal_and_ended_by_q_on_one(
    courier: Courier, steady: Steady, listed: Callable[..., dict[str, dict[str, Any]]]
) -> None:
    status, out, _ = run("top")
    assert (status, "msdicom" in out, "closed" in out, "workers: 1" in out) == (0, True, True, True)
    status, out, _ = run("top", "--once", "--json")
    document = json.loads(out)
    assert (status, [one["server_name"] for one in document["servers"]]) == (0, ["msdicom", "dcm4chee"])
    ended = in_terminal(("top",), columns=120, env={"PACS_CONFIG": str(steady.config)}, typed="q")
    assert (ended.status, "msdicom" in ended.shown, "Traceback" in ended.shown) == (0, True, False)
