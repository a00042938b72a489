"""Deletions by the batch whose copies are kept and brought back, driven by hand over a real Redis."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from courier.batches.store import Batches
from sandbox.processes import SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import BatchSite, payload
from worker.batches import deletions
from worker.batches.backups import back_up
from worker.batches.coordinator import Coordinator
from worker.batches.delete_all import delete_all
from worker.batches.deletions import CONFIRMATION, delete_many
from worker.batches.downloads import download_all
from worker.batches.migrations import migrate
from worker.jobs.runner import Deferred
from worker.pacs.fleet import Fleet
from worker.pacs.protocol import Found


@pytest.fixture(params=["msdicom", "orthanc"])
def keeper(request: pytest.FixtureRequest, batch_site: Callable[..., BatchSite], tmp_path: Path) -> BatchSite:
    """One server, called ward, that keeps bytes."""
    url = (
        request.getfixturevalue("sandbox").msdicom if request.param == "msdicom" else request.getfixturevalue("orthanc")
    )
    return batch_site([{"name": "ward", "type": request.param, "url": url}], downloads={"folders": [str(tmp_path)]})


@pytest.fixture
def site(batch_site: Callable[..., BatchSite], sandbox: SandboxPart, tmp_path: Path) -> BatchSite:
    return batch_site(sandbox.servers(), downloads={"folders": [str(tmp_path)]})


def undone(site: BatchSite) -> list[str]:
    payload(site.go_on(Coordinator.undo, "undo"))
    return site.ends("undo")


def test_nothing_comes_back_beside_another_file_under_one_of_its_uids(keeper: BatchSite, tmp_path: Path) -> None:
    study, untouched = new_uid(), new_uid()
    replaced, lacking = f"{study}.1.1", f"{study}.1.2"
    for uid in (replaced, lacking):
        keeper.put_file("ward", image(study, sop=uid, side=16, seed=1))
    keeper.put("ward", untouched)
    payload(keeper.delete(study, untouched, backup=tmp_path.as_uri()))
    keeper.put_file("ward", image(study, sop=replaced, side=16, seed=2))
    assert undone(keeper) == ["study_conflict", "undone"]
    refused = keeper.rows[0].passes["undo"]
    assert (refused.status, replaced in refused.message) == ("refused", True)
    assert keeper.on("ward", study) == {replaced}, "and of the study nothing was stored"

    keeper.fleet["ward"].delete(Found("study", study), permanent=True)
    keeper.put_file("ward", image(study, sop=replaced, side=16, seed=1))
    assert undone(keeper) == ["undone"] * 2, "the same file once more is what was kept"
    assert keeper.on("ward", study) == {replaced, lacking}
    told = keeper.rows[0].passes["undo"].result["servers"]["ward"]
    assert told == {"restored": 1, "compared": "bytes"}


def test_where_bytes_are_not_kept_the_elements_are_compared_and_the_result_says_so(
    site: BatchSite, tmp_path: Path
) -> None:
    study = new_uid()
    uids = site.put("dcm4chee", study)
    payload(site.delete(study, servers=["dcm4chee"], backup=tmp_path.as_uri()))
    assert undone(site) == ["undone"]
    assert site.on("dcm4chee", study) == uids
    assert site.rows[0].passes["undo"].result["servers"]["dcm4chee"] == {"restored": 2, "compared": "elements"}


@pytest.mark.parametrize(
    ("now", "name"),
    [
        ({"seed": 2}, "PixelData (7FE0,0010)"),
        ({"seed": 1, "ImageLaterality": "L"}, "ImageLaterality (0020,0062)"),
        ({"seed": 1, "PatientID": "OTHER"}, "PatientID (0010,0020)"),
    ],
)
def test_nothing_comes_back_beside_another_image_where_bytes_are_not_kept(
    site: BatchSite, tmp_path: Path, now: dict[str, Any], name: str
) -> None:
    study = new_uid()
    replaced, lacking = f"{study}.1.1", f"{study}.1.2"
    for uid in (replaced, lacking):
        site.put_file("dcm4chee", image(study, sop=uid, side=16, seed=1))
    payload(site.delete(study, servers=["dcm4chee"], backup=tmp_path.as_uri()))
    site.put_file("dcm4chee", image(study, sop=replaced, side=16, **now))
    assert undone(site) == ["study_conflict"]
    assert name in site.rows[0].passes["undo"].message
    assert site.on("dcm4chee", study) == {replaced}, "and nothing was stored"


@pytest.mark.parametrize("server", ["msdicom", "dcm4chee"])
@pytest.mark.parametrize(
    ("now", "name"),
    [
        ({"seed": 2}, "PixelData (7FE0,0010)"),
        ({"ImageLaterality": "L"}, "ImageLaterality (0020,0062)"),
        ({"PatientID": "OTHER"}, "PatientID (0010,0020)"),
    ],
)
def test_a_study_that_has_another_image_than_its_backup_stays(
    site: BatchSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str, now: dict[str, Any], name: str
) -> None:
    study = new_uid()
    sop = f"{study}.1.1"
    site.put_file(server, image(study, sop=sop, side=16))

    def kept_and_replaced(*args: Any) -> Any:
        kept = back_up(*args)
        site.fleet[server].delete(Found("study", study), permanent=True)
        site.put_file(server, image(study, sop=sop, side=16, **now))
        return kept

    monkeypatch.setattr(deletions, "back_up", kept_and_replaced)
    payload(site.delete(study, servers=[server], backup=tmp_path.as_uri()))
    assert site.ends() == ["study_conflict"]
    assert name in site.rows[0].outcome.message
    assert site.on(server, study) == {sop}


def test_a_study_stays_where_there_is_no_room_for_its_copy(
    site: BatchSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = new_uid()
    uids = site.put("msdicom", study)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = payload(site.delete(study, backup=tmp_path.as_uri()))
    assert [row.outcome.status for row in site.rows] == ["refused"]
    assert done["failures_total"] == 1
    assert "the disk is full" in site.rows[0].outcome.message
    assert site.on("msdicom", study) == uids
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_study_that_is_nowhere_loses_its_claim_when_a_batch_deletes_it(site: BatchSite) -> None:
    study, listed = new_uid(), new_uid()
    site.put("msdicom", listed)
    for uid in (study, listed):
        site.ledger.claim_study(uid, server="msdicom", job_id="U")
    payload(site.delete(study, listed))
    assert [row.outcome.status for row in site.rows] == ["not_there", "deleted"]
    assert [site.ledger.claimed_server(uid) for uid in (study, listed)] == [None, None]


@pytest.mark.parametrize("name", ["delete", "delete_all", "migrate", "download"])
def test_a_batch_that_has_begun_is_not_refused_when_a_server_of_it_leaves_the_settings(
    site: BatchSite, tmp_path: Path, name: str
) -> None:
    """Its items say so, each for itself; what is on the other server is done."""
    here, gone = new_uid(), new_uid()
    site.put("msdicom", gone)
    site.put("dcm4chee", here)
    both = ["msdicom", "dcm4chee"]
    task, work, message = {
        "delete": ("pacs.batch.delete", delete_many, {"items": [gone], "servers": both}),
        "delete_all": ("pacs.delete_all", delete_all, {"servers": both, "confirm": CONFIRMATION}),
        "migrate": ("pacs.batch.migrate", migrate, {"items": [gone], "from_server": both[0], "to_server": both[1]}),
        "download": (
            "pacs.batch.download",
            download_all,
            {"items": [gone], "servers": both, "destination": tmp_path.as_uri()},
        ),
    }[name]
    store = Batches(site.ledger)

    def has_begun() -> bool:
        batch = store.get(site.batch)
        return batch is not None and batch.of("apply").begun_ms is not None

    assert isinstance(site.see_to_its_end(task, work, site.batch, message, until=has_begun), Deferred)
    fleet, site.fleet = site.fleet, Fleet([site.fleet["dcm4chee"]])
    payload(site.see_to_its_end(task, work, site.batch, message))
    told = {row.item.text: row.outcome for row in site.rows}
    assert (told[gone].status, told[gone].code) == ("failed", "invalid_request")
    assert "any more" in told[gone].message
    site.fleet = fleet
    assert len(site.on("msdicom", gone)) == 2
    assert bool(site.on("dcm4chee", here)) is (name != "delete_all")
