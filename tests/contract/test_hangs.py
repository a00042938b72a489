"""A file at which a server hangs: twice, then it is not sent again, and costs nothing but itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sandbox import processes as parts
from sandbox.images import ImageServer
from sandbox.processes import SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import BatchSite, payload
from tests.hanging import Hanging, hanging
from worker.batches.coordinator import Coordinator
from worker.jobs.runner import Done, Failed, JobResult
from worker.jobs.upload import upload

SOURCES = {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True}


@pytest.fixture
def ward(sandbox: SandboxPart) -> Iterator[Hanging]:
    """MSDICOM, which hangs at what the test says."""
    with hanging(sandbox.msdicom) as server:
        yield server


@pytest.fixture
def site(batch_site: Callable[..., BatchSite], sandbox: SandboxPart, ward: Hanging) -> BatchSite:
    servers = [
        {"name": "msdicom", "type": "msdicom", "url": ward.url, "read_timeout_s": 1},
        next(server for server in sandbox.servers() if server["name"] == "dcm4chee"),
    ]
    built = batch_site(servers, sources=SOURCES)
    built.settings = built.settings.model_copy(
        update={"jobs": built.settings.jobs.model_copy(update={"max_attempts": 8})}
    )
    return built


def send(site: BatchSite, url: str, job_id: str) -> JobResult:
    message = {"image_url": url, "server": "msdicom"}
    return site.see_to_its_end("pacs.upload", upload, job_id, message)


def end(result: JobResult) -> str:
    return result.error.code if isinstance(result, Failed) else str(result)


def test_a_file_at_which_a_server_hangs_twice_is_a_dead_letter_and_sent_by_no_other_job(
    site: BatchSite, ward: Hanging, image_server: ImageServer
) -> None:
    sop = new_uid()
    ward.at = [sop.encode()]
    url = image_server.put("a.dcm", image(new_uid(), sop=sop, side=8))
    result = send(site, url, "j1")
    assert isinstance(result, Failed)
    assert (result.error.code, result.error.server_name) == ("poisoned", "msdicom")
    assert result.error.details["hangs"] == 2
    assert result.error.details["image_uid"] == sop
    assert (ward.seen(sop.encode()), site.ledger.read_record("j1")["state"]) == (2, "dead")
    assert end(send(site, url, "j2")) == "poisoned"
    assert ward.seen(sop.encode()) == 2


def test_a_dead_letter_that_is_replayed_is_sent_again(
    site: BatchSite, ward: Hanging, image_server: ImageServer
) -> None:
    sop = new_uid()
    ward.at = [sop.encode()]
    url = image_server.put("a.dcm", image(new_uid(), sop=sop, side=8))
    send(site, url, "j1")
    assert site.ledger.replay("j1")
    assert end(send(site, url, "j1")) == "poisoned"
    assert ward.seen(sop.encode()) == 4, "two times more after the replay"
    ward.at = []
    assert site.ledger.replay("j1")
    assert isinstance(send(site, url, "j1"), Done)


def test_another_file_with_the_same_uid_is_another_file(
    site: BatchSite, ward: Hanging, image_server: ImageServer
) -> None:
    study, sop = new_uid(), new_uid()
    ward.at = [b"Damaged^File"]
    send(site, image_server.put("a.dcm", image(study, sop=sop, side=8, PatientName="Damaged^File")), "j1")
    assert isinstance(send(site, image_server.put("b.dcm", image(study, sop=sop, side=8)), "j2"), Done)


def test_one_hang_costs_an_attempt_and_no_more(site: BatchSite, ward: Hanging, image_server: ImageServer) -> None:
    sop = new_uid()
    ward.at = [sop.encode()]
    url = image_server.put("a.dcm", image(new_uid(), sop=sop, side=8))
    ward.limit = 1
    assert isinstance(send(site, url, "j1"), Done)
    assert ward.seen(sop.encode()) == 2


@pytest.mark.parametrize("at", [0, 5, 9], ids=["first", "in the middle", "last"])
def test_in_a_batch_such_a_file_costs_only_itself(
    site: BatchSite, ward: Hanging, image_server: ImageServer, at: int
) -> None:
    study, uids = new_uid(), [new_uid() for _ in range(10)]
    ward.at = [uids[at].encode()]
    urls = [image_server.put(f"{uid}.dcm", image(study, sop=uid, side=8)) for uid in uids]
    payload(site.upload(*urls, server="msdicom"))
    expected = ["stored"] * 10
    expected[at] = "poisoned"
    assert site.ends() == expected
    assert ward.seen(ward.at[0]) == 2
    assert site.on("msdicom", study) == set(uids) - {uids[at]}

    bad = ward.at[0]
    ward.at = []
    payload(site.go_on(Coordinator.retry, "retry"))
    assert site.ends() == ["stored"] * 10
    assert ward.seen(bad) == 3
    payload(site.go_on(Coordinator.undo, "undo"))
    assert site.on("msdicom", study) == set()


def test_in_a_migration_such_an_image_costs_only_itself_and_is_named(site: BatchSite, ward: Hanging) -> None:
    study, other = new_uid(), new_uid()
    uids, others = site.put("dcm4chee", study, 5), site.put("dcm4chee", other, 2)
    bad = min(uids)
    ward.at = [bad.encode()]
    payload(site.order(study, other, from_server="dcm4chee", to_server="msdicom"))
    first, second = site.rows
    assert (first.outcome.status, first.outcome.code, second.outcome.status) == ("failed", "poisoned", "copied")
    assert site.on("msdicom", study) == uids - {bad}
    assert site.on("msdicom", other) == others
    assert ward.seen(bad.encode()) == 2

    ward.at = []
    payload(site.go_on(Coordinator.retry, "retry"))
    assert site.ends() == ["copied"] * 2
    assert site.on("msdicom", study) == uids
    payload(site.go_on(Coordinator.undo, "undo"))
    assert site.on("msdicom", study) == set()


def test_an_item_whose_file_the_batch_has_never_sent_is_no_image_of_the_batchs(
    site: BatchSite, ward: Hanging, image_server: ImageServer
) -> None:
    study, sop = new_uid(), new_uid()
    content = image(study, sop=sop, side=8)
    url = image_server.put("a.dcm", content)
    ward.at = [sop.encode()]
    send(site, url, "j1")
    payload(site.upload(url, image_server.put("b.dcm", image(study, side=8)), server="msdicom"))
    assert site.ends() == ["poisoned", "stored"]
    ward.at = []
    site.put_file("msdicom", content)
    payload(site.go_on(Coordinator.undo, "undo"))
    assert site.on("msdicom", study) == {sop}, "what another has stored stays"


def test_two_such_files_are_sent_twice_each(site: BatchSite, ward: Hanging, image_server: ImageServer) -> None:
    study, uids = new_uid(), [new_uid() for _ in range(6)]
    ward.at = [uids[1].encode(), uids[4].encode()]
    urls = [image_server.put(f"{uid}.dcm", image(study, sop=uid, side=8)) for uid in uids]
    payload(site.upload(*urls, server="msdicom"))
    assert site.ends() == ["stored", "poisoned", "stored", "stored", "poisoned", "stored"]
    assert [ward.seen(mark) for mark in ward.at] == [2, 2]


def test_a_server_that_hangs_at_every_file_is_itself_in_trouble(
    site: BatchSite, ward: Hanging, image_server: ImageServer
) -> None:
    """Two files, in turn, as two jobs that wait for one server: neither is given up for the server's fault."""
    urls = [image_server.put(f"{number}.dcm", image(new_uid(), side=8)) for number in range(2)]
    ward.at = [b"DICM"]
    jobs: dict[str, Any] = {f"j{number}": {"image_url": url, "server": "msdicom"} for number, url in enumerate(urls)}
    for _ in range(3):
        for job_id, message in jobs.items():
            site.see_to_its_end("pacs.upload", upload, job_id, message, until=lambda: True)
            site.ledger.client.zadd(site.ledger.key("due"), {job_id: 0})
            site.ledger.sweep()
    assert {site.ledger.read_record(job_id)["state"] for job_id in jobs} != {"dead"}
    ward.at = []
    for job_id, message in jobs.items():
        assert isinstance(site.see_to_its_end("pacs.upload", upload, job_id, message), Done)
