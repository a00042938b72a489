"""`pacs server` on a real worker: a server is taken out of service and comes back, and every job ends as it should."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from courier.ledger.suspensions import FRESH_S
from producer import Courier
from sandbox.processes import SandboxPart, poll
from sandbox.synthetic import image, new_uid

WAIT_S = 60


@pytest.fixture(autouse=True)
def in_service(courier: Courier) -> Iterator[None]:
    """What one test has ordered is over for the next one."""
    yield
    for name, suspension in courier.servers.suspended().items():
        if suspension.state == "paused":
            courier.servers.resume(name)


def waits_with(handle, code: str) -> dict:
    """The reason of a job that waits with ``code``, as soon as it does."""
    found: dict = {}

    def waits() -> bool:
        found.clear()
        found.update(handle.waiting() or {})
        return found.get("code") == code

    assert poll(waits, timeout_s=WAIT_S), found
    return found


def obeyed(courier: Courier, code: str) -> None:
    """Return when the worker obeys: a look-up for what is nowhere then ends, or waits, with ``code``."""

    def one() -> bool:
        handle = courier.exists("study", new_uid())
        poll(lambda: handle.report().over or handle.waiting() is not None, timeout_s=WAIT_S)
        report = handle.report()
        said = report.error.code if report.error is not None else (handle.waiting() or {}).get("code")
        return said == code

    assert poll(one, timeout_s=WAIT_S)


def suspension_of(pacs, name: str) -> dict | None:
    _, answer, _ = pacs("status", "--server", name)
    return answer["servers"][0]["suspension"]


def test_jobs_wait_for_a_paused_server_and_go_on_when_it_is_resumed(
    courier: Courier, pacs, sandbox: SandboxPart, image_server, put
):
    known = new_uid()
    put(sandbox.msdicom, image(known))
    status, order, _ = pacs("server", "pause", "dcm4chee", "--requested-by", "ana", "--reason", "disk swap")
    assert (status, order["changed"], order["suspension"]["state"]) == (0, True, "paused")

    obeyed(courier, "server_paused")
    upload = courier.upload(image_server.put("paused.dcm", image(new_uid())))
    reason = waits_with(upload, "server_paused")
    assert reason["server_name"] == "dcm4chee"
    assert "set by ana" in reason["message"]
    assert "disk swap" in reason["message"]
    lookup = courier.exists("study", new_uid())
    waits_with(lookup, "server_paused")

    found = courier.exists("study", known).result(timeout_s=WAIT_S)
    assert found["server_name"] == "msdicom"
    said = suspension_of(pacs, "dcm4chee")
    assert (said["set_by"], said["reason"], said["until"]) == ("ana", "disk swap", None)
    assert suspension_of(pacs, "msdicom") is None

    sandbox.load(anew=True)
    waits_with(courier.upload(image_server.put("also.dcm", image(new_uid()))), "server_paused")
    assert sandbox.load()["dcm4chee"]["total"] == 0

    assert pacs("server", "resume", "dcm4chee")[0] == 0
    obeyed(courier, "not_found")
    assert upload.result(timeout_s=WAIT_S)["attempts"] == 1
    assert poll(lambda: lookup.report().over, timeout_s=WAIT_S)
    assert suspension_of(pacs, "dcm4chee") is None


def test_what_is_under_way_at_a_server_that_is_paused_ends(courier: Courier, pacs, sandbox: SandboxPart, image_server):
    sandbox.set_fault("msdicom", "store", latency_ms=4 * FRESH_S * 1000)
    under_way = courier.upload(image_server.put("slow.dcm", image(new_uid())), server="msdicom")
    assert poll(lambda: under_way.stage() == "push", timeout_s=WAIT_S)
    assert pacs("server", "pause", "msdicom")[0] == 0
    ended = under_way.result(timeout_s=WAIT_S)
    assert (ended["status"], ended["server_name"], ended["warnings"]) == ("stored", "msdicom", [])


def test_a_server_that_is_not_known_is_refused(pacs):
    status, _, said = pacs("server", "pause", "msdicm")
    assert status == 2
    assert "did you mean msdicom?" in said
