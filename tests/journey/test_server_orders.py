"""`pacs server` on a real worker: a server is taken out of service and comes back, and every job ends as it should."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests

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
        end = courier.servers.resume if suspension.state == "paused" else courier.servers.end_maintenance
        end(name)


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


def has(url: str, study: str) -> int:
    """How many images of a study a server has, asked by hand."""
    answer = requests.get(f"{url}/studies/{study}/instances", headers={"Accept": "application/dicom+json"}, timeout=10)
    return len(answer.json()) if answer.status_code == 200 else 0


def put_into_maintenance(courier: Courier, pacs) -> None:
    """MSDICOM, for two hours at most, by ana."""
    who = ("--requested-by", "ana", "--reason", "new disks")
    status, order, _ = pacs("server", "maintenance", "msdicom", "--until", "2h", *who)
    assert (status, order["suspension"]["state"]) == (0, "maintenance")
    assert order["suspension"]["until"] > order["suspension"]["since"]
    obeyed(courier, "pacs_unavailable")


def test_work_on_the_others_goes_on_in_a_maintenance_and_its_end_is_followed_by_an_audit(
    courier: Courier, pacs, sandbox: SandboxPart, image_server
):
    known = new_uid()
    courier.upload(image_server.put("known.dcm", image(known)), server="msdicom").result(timeout_s=WAIT_S)
    put_into_maintenance(courier, pacs)
    sandbox.load(anew=True)

    stored = courier.upload(image_server.put("new.dcm", image(new_uid()))).result(timeout_s=WAIT_S)
    assert (stored["server_name"], stored["not_asked"], stored["warnings"]) == ("dcm4chee", ["msdicom"], ["not_asked"])
    waits = courier.upload(image_server.put("of-known.dcm", image(known)))
    assert waits_with(waits, "server_maintenance")["server_name"] == "msdicom"
    status, listed, _ = pacs("studies")
    assert (status, listed["complete"]) == (3, False)
    assert sandbox.load()["msdicom"]["total"] == 0
    assert suspension_of(pacs, "msdicom")["set_by"] == "ana"

    status, order, _ = pacs("server", "maintenance", "msdicom", "--end")
    assert (status, order["ended"]["set_by"], order["suspension"]) == (0, "ana", None)
    assert order["audit"]["studies"] == 1
    audited = courier.handle(order["audit"]["job_id"]).result(timeout_s=WAIT_S)
    assert (audited["maintenance"], audited["studies"], audited["split"]) == ("msdicom", 1, 0)
    assert pacs("audit", "--maintenance", "msdicom")[1]["studies"] == 1
    assert waits.result(timeout_s=WAIT_S)["server_name"] == "msdicom"


def test_a_deletion_in_a_maintenance_is_made_up_for_at_its_end_and_one_of_all_studies_is_refused(
    courier: Courier, pacs, sandbox: SandboxPart, put
):
    gone = new_uid()
    for url in (sandbox.msdicom, sandbox.dcm4chee):
        put(url, image(gone))
    put_into_maintenance(courier, pacs)
    sandbox.load(anew=True)
    status, deleted, _ = pacs("delete", "study", gone, "--yes", "--requested-by", "bo")
    assert status == 1
    outcomes = {entry["server_name"]: entry for entry in deleted["servers"]}
    assert (outcomes["msdicom"]["status"], outcomes["dcm4chee"]["status"]) == ("not_asked", "deleted")
    later = courier.handle(outcomes["msdicom"]["follow_up_job_id"])
    waits_with(later, "server_maintenance")
    status, _, said = pacs("delete-all", "--yes", "--confirm", "delete all studies")
    assert status == 2
    assert "set by ana" in said
    assert sandbox.load()["msdicom"]["total"] == 0
    assert (has(sandbox.msdicom, gone), has(sandbox.dcm4chee, gone)) == (1, 0)

    assert pacs("server", "maintenance", "msdicom", "--end")[0] == 0
    (entry,) = later.result(timeout_s=WAIT_S)["servers"]
    assert (entry["server_name"], entry["status"]) == ("msdicom", "deleted")
    assert has(sandbox.msdicom, gone) == 0
    assert courier.ledger.read_record(later.id)["requested_by"] == "bo"


def test_a_server_that_is_not_known_is_refused(pacs):
    status, _, said = pacs("server", "pause", "msdicm")
    assert status == 2
    assert "did you mean msdicom?" in said
