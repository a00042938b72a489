"""One file that a server cannot take costs only itself, in a single upload, a batch and a migration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sandbox import processes as parts
from sandbox.images import ImageServer
from sandbox.processes import SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import BatchSite, payload
from tests.poison import poisonous
from worker.batches.coordinator import Coordinator

SOURCES = {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True}


@pytest.fixture
def site(batch_site: Callable[..., BatchSite], sandbox: SandboxPart, orthanc: str) -> BatchSite:
    servers = [*sandbox.servers(), {"name": "orthanc", "type": "orthanc", "url": orthanc}]
    return batch_site(servers, sources=SOURCES)


@pytest.mark.parametrize("at", [0, 3, 9], ids=["first", "in the middle", "last"])
def test_a_file_at_which_orthanc_gives_up_costs_only_itself_in_a_batch(
    site: BatchSite, image_server: ImageServer, at: int
) -> None:
    study = new_uid()
    files = [image(study, side=8) for _ in range(9)]
    files.insert(at, poisonous(study))
    urls = [image_server.put(f"{number}.dcm", content) for number, content in enumerate(files)]
    payload(site.upload(*urls, server="orthanc"))
    expected = ["stored"] * 9
    expected.insert(at, "pacs_rejected")
    assert site.ends() == expected
    assert len(site.on("orthanc", study)) == 9


def test_two_such_files_cost_only_themselves(site: BatchSite, image_server: ImageServer) -> None:
    study = new_uid()
    files = [poisonous(study), image(study, side=8), poisonous(study), image(study, side=8)]
    urls = [image_server.put(f"{number}.dcm", content) for number, content in enumerate(files)]
    payload(site.upload(*urls, server="orthanc"))
    assert site.ends() == ["pacs_rejected", "stored", "pacs_rejected", "stored"]


def test_what_was_stored_before_the_bad_file_is_the_batchs_and_is_taken_back_with_it(
    site: BatchSite, image_server: ImageServer
) -> None:
    study = new_uid()
    files = [image(study, side=8), image(study, side=8), poisonous(study)]
    urls = [image_server.put(f"{number}.dcm", content) for number, content in enumerate(files)]
    payload(site.upload(*urls, server="orthanc"))
    assert site.ends() == ["stored", "stored", "pacs_rejected"]
    payload(site.go_on(Coordinator.undo, "undo"))
    assert site.on("orthanc", study) == set()


def test_such_a_file_costs_only_itself_in_a_migration_and_is_named(site: BatchSite, sandbox: SandboxPart) -> None:
    study, bad = new_uid(), new_uid()
    uids = site.put("msdicom", study, 4)
    site.put_file("msdicom", poisonous(study, sop=bad))
    uids |= site.put("msdicom", study, 3)
    payload(site.order(study, to_server="orthanc"))
    (row,) = site.rows
    assert (row.outcome.status, row.outcome.code) == ("refused", "pacs_rejected")
    assert bad in row.outcome.message
    assert site.on("orthanc", study) == uids


def test_a_400_of_msdicom_to_several_images_is_none_of_each_of_them(
    site: BatchSite, image_server: ImageServer, sandbox: SandboxPart
) -> None:
    study = new_uid()
    urls = [image_server.put(f"{number}.dcm", image(study, side=8)) for number in range(4)]
    sandbox.set_fault("msdicom", "store", status=400, times=1)
    payload(site.upload(*urls, server="msdicom"))
    assert site.ends() == ["stored"] * 4


def test_a_400_to_the_images_of_a_migration_is_none_of_each_of_them(site: BatchSite, sandbox: SandboxPart) -> None:
    study = new_uid()
    uids = site.put("dcm4chee", study, 4)
    sandbox.set_fault("msdicom", "store", status=400, times=1)
    payload(site.order(study, from_server="dcm4chee", to_server="msdicom"))
    assert (site.ends(), site.on("msdicom", study)) == (["copied"], uids)


def test_an_image_that_is_never_answered_is_named(site: BatchSite, sandbox: SandboxPart) -> None:
    study = new_uid()
    (uid,) = site.put("dcm4chee", study, 1)
    sandbox.set_fault("msdicom", "store", status=400)
    told: Any = site.order(study, from_server="dcm4chee", to_server="msdicom")
    payload(told)
    (row,) = site.rows
    assert (row.outcome.status, row.outcome.code) == ("failed", "pacs_misanswered")
    assert uid in row.outcome.message
