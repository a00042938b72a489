"""One file that a server cannot take costs only itself, in a single upload, a batch and a migration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sandbox import processes as parts
from sandbox.images import ImageServer
from sandbox.processes import SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import Site, payload
from tests.poison import poisonous
from worker.batches.coordinator import Conductor

SOURCES = {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True}


@pytest.fixture
def site(batch_site: Callable[..., Site], sandbox: SandboxPart, orthanc: str) -> Site:
    servers = [*sandbox.servers(), {"name": "orthanc", "type": "orthanc", "url": orthanc}]
    return batch_site(servers, sources=SOURCES)


@pytest.mark.parametrize("at", [0, 3, 9], ids=["first", "in the middle", "last"])
def test_a_file_at_which_orthanc_gives_up_costs_only_itself_in_a_batch(
    site: Site, image_server: ImageServer, at: int
) -> None:
    study = new_uid()
    files = [image(study, side=8) for _ in range(9)]
    files.insert(at, poisonous(study))
    urls = [image_server.put(f"{number}.dcm", content) for number, content in enumerate(files)]
    payload(site.upload(*urls, server="orthanc"))
    expected = ["stored"] * 9
    expected.insert(at, "pacs_rejected")
    assert site.told() == expected
    assert len(site.on("orthanc", study)) == 9


def test_two_such_files_cost_only_themselves(site: Site, image_server: ImageServer) -> None:
    study = new_uid()
    files = [poisonous(study), image(study, side=8), poisonous(study), image(study, side=8)]
    urls = [image_server.put(f"{number}.dcm", content) for number, content in enumerate(files)]
    payload(site.upload(*urls, server="orthanc"))
    assert site.told() == ["pacs_rejected", "stored", "pacs_rejected", "stored"]


def test_what_was_stored_before_the_bad_file_is_the_batchs_and_is_taken_back_with_it(
    site: Site, image_server: ImageServer
) -> None:
    study = new_uid()
    files = [image(study, side=8), image(study, side=8), poisonous(study)]
    urls = [image_server.put(f"{number}.dcm", content) for number, content in enumerate(files)]
    payload(site.upload(*urls, server="orthanc"))
    assert site.told() == ["stored", "stored", "pacs_rejected"]
    payload(site.go_on(Conductor.undo, "undo"))
    assert site.on("orthanc", study) == set()


def test_such_a_file_costs_only_itself_in_a_migration_and_is_named(site: Site, sandbox: SandboxPart) -> None:
    study, bad = new_uid(), new_uid()
    uids = site.put("msdicom", study, 4)
    site.put_file("msdicom", poisonous(study, sop=bad))
    uids |= site.put("msdicom", study, 3)
    payload(site.order(study, to_server="orthanc"))
    (row,) = site.rows
    assert (row.settled.status, row.settled.code) == ("refused", "pacs_rejected")
    assert bad in row.settled.message
    assert site.on("orthanc", study) == uids


def test_a_400_of_msdicom_to_several_images_is_none_of_each_of_them(
    site: Site, image_server: ImageServer, sandbox: SandboxPart
) -> None:
    study = new_uid()
    urls = [image_server.put(f"{number}.dcm", image(study, side=8)) for number in range(4)]
    sandbox.set_mood("msdicom", "store", status=400, times=1)
    payload(site.upload(*urls, server="msdicom"))
    assert site.told() == ["stored"] * 4


def test_a_400_to_the_images_of_a_migration_is_none_of_each_of_them(site: Site, sandbox: SandboxPart) -> None:
    study = new_uid()
    uids = site.put("dcm4chee", study, 4)
    sandbox.set_mood("msdicom", "store", status=400, times=1)
    payload(site.order(study, from_server="dcm4chee", to_server="msdicom"))
    assert (site.told(), site.on("msdicom", study)) == (["copied"], uids)


def test_an_image_that_is_never_answered_is_named(site: Site, sandbox: SandboxPart) -> None:
    study = new_uid()
    (uid,) = site.put("dcm4chee", study, 1)
    sandbox.set_mood("msdicom", "store", status=400)
    told: Any = site.order(study, from_server="dcm4chee", to_server="msdicom")
    payload(told)
    (row,) = site.rows
    assert (row.settled.status, row.settled.code) == ("failed", "pacs_misanswered")
    assert uid in row.settled.message
