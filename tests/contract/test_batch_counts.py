"""The counts per server of batches over real servers: each server that was touched has its row, and no other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sandbox.images import ImageServer
from sandbox.processes import HOST, SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import BatchSite, payload
from worker.batches.coordinator import Coordinator

Rows = dict[str, dict[str, int]]


@pytest.fixture
def site_of(batch_site: Callable[..., BatchSite], sandbox: SandboxPart, tmp_path: Path) -> Callable[..., BatchSite]:
    def build(**deletions: str) -> BatchSite:
        servers = [{**one, "deletions": deletions.get(one["name"], "allow")} for one in sandbox.servers()]
        places = {"allow_hosts": [f"{HOST}:*"], "allow_private_networks": True, "folders": [str(tmp_path)]}
        return batch_site(servers, downloads={"folders": [str(tmp_path)]}, sources=places)

    return build


@pytest.fixture
def site(site_of: Callable[..., BatchSite]) -> BatchSite:
    return site_of()


def rows(done: Mapping[str, Any]) -> Rows:
    """The counts of a result, by server, as far as they are any."""
    return {
        row["server_name"]: {name: n for name, n in row.items() if isinstance(n, int) and n} for row in done["servers"]
    }


def test_a_direct_deletion_on_two_servers_counts_for_both(site: BatchSite) -> None:
    both, alone, nowhere = new_uid(), new_uid(), new_uid()
    site.put("msdicom", both)
    site.put("dcm4chee", both)
    site.put("dcm4chee", alone)
    done = payload(site.delete(both, alone, nowhere, verify=False))
    assert done["totals"] == {"deleted": 2, "not_there": 1}
    assert rows(done) == {"msdicom": {"deleted": 1, "not_there": 1}, "dcm4chee": {"deleted": 2}}


def test_a_deletion_that_one_server_refuses_counts_what_the_other_did(site_of: Callable[..., BatchSite]) -> None:
    site, study = site_of(msdicom="never"), new_uid()
    site.put("msdicom", study)
    site.put("dcm4chee", study)
    done = payload(site.delete(study))
    assert (done["totals"], done["failures_total"]) == ({"refused": 1}, 1)
    assert rows(done) == {"msdicom": {"refused": 1}, "dcm4chee": {"deleted": 1}}


def test_a_deletion_that_was_half_done_is_counted_where_it_was_done_and_whole_after_a_retry(
    site: BatchSite, sandbox: SandboxPart
) -> None:
    study = new_uid()
    site.put("msdicom", study)
    site.put("dcm4chee", study)
    sandbox.set_fault("dcm4chee", "reject", status=503)
    done = payload(site.delete(study))
    assert rows(done) == {"msdicom": {"deleted": 1}, "dcm4chee": {"failed": 1}}
    sandbox.reset_faults()
    again = payload(site.go_on(Coordinator.retry, "retry"))
    assert again["totals"] == {"deleted": 1}
    assert rows(again) == {name: {"deleted": 1, "verified": 1} for name in ("msdicom", "dcm4chee")}


def test_what_comes_back_is_counted_on_each_server(site: BatchSite, tmp_path: Path) -> None:
    study = new_uid()
    site.put("msdicom", study)
    site.put("dcm4chee", study)
    payload(site.delete(study, backup=tmp_path.as_uri(), verify=False))
    undone = payload(site.go_on(Coordinator.undo, "undo"))
    assert undone["passes"]["undo"]["totals"] == {"undone": 1}
    assert rows(undone) == {name: {"deleted": 1, "undone": 1} for name in ("msdicom", "dcm4chee")}


def test_a_move_counts_what_was_copied_and_what_was_deleted(site: BatchSite) -> None:
    study, stays = new_uid(), new_uid()
    for one in (study, stays):
        site.put("msdicom", one)
    done = payload(site.order(study, stays, delete_source=True))
    there: Rows = {"dcm4chee": {"copied": 2, "verified": 2}, "msdicom": {"deleted": 2}}
    assert rows(done) == there
    assert rows(payload(site.go_on(Coordinator.verify, "verify"))) == there, "and once, however often it is looked at"
    back = rows(payload(site.go_on(Coordinator.undo, "undo")))
    assert (back["msdicom"], back["dcm4chee"]["undone"]) == ({"deleted": 2, "undone": 2}, 2)


def test_files_that_never_reached_a_server_are_counted_under_none(
    site: BatchSite, image_server: ImageServer, tmp_path: Path
) -> None:
    good = image_server.put("good.dcm", image(new_uid(), side=16))
    text = image_server.put("text.dcm", b"no image")
    unreachable = "http://127.0.0.1:9/a.dcm"
    done = payload(site.upload(good, text, f"{good}-not-there", unreachable, "ftp://host/a.dcm", server="dcm4chee"))
    assert (done["totals"]["stored"], done["failures_total"]) == (1, 4)
    assert rows(done) == {"dcm4chee": {"stored": 1, "verified": 1}}
    assert {one["server_name"] for one in done["failures"]} == {None}
    assert [row.outcome.server_name for row in site.rows] == ["dcm4chee", "", "", "", ""]


def test_what_a_server_refuses_is_counted_there(
    site: BatchSite, image_server: ImageServer, sandbox: SandboxPart
) -> None:
    study = new_uid()
    site.put("msdicom", study)
    elsewhere = image_server.put("elsewhere.dcm", image(study, side=16))
    done = payload(site.upload(elsewhere, server="dcm4chee"))
    assert rows(done) == {"msdicom": {"refused": 1}}, "it is the study on msdicom that keeps it from dcm4chee"
    site.batch = "C"
    sandbox.set_fault("dcm4chee", "store", failure_reason=43264)
    bad = image_server.put("bad.dcm", image(new_uid(), side=16))
    assert rows(payload(site.upload(bad, server="dcm4chee"))) == {"dcm4chee": {"refused": 1}}


def test_files_that_a_folder_lists_and_the_plan_leaves_out_are_at_no_server(site: BatchSite, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.dcm").write_bytes(image(new_uid(), side=16))
    (folder / "DICOMDIR").write_bytes(b"")
    done = payload(site.upload(source=f"{folder.as_uri()}/", server="dcm4chee"))
    assert done["totals"] == {"stored": 1, "skipped": 1}
    assert rows(done) == {"dcm4chee": {"planned": 1, "stored": 1, "verified": 1}}
