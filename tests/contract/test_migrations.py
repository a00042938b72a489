"""Batches of migrations, driven by hand over a real Redis: between the sandbox's two servers, beside a real Orthanc."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from courier.batches.store import Batches
from courier.ledger.jobs import PREFIX
from sandbox.processes import SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import BatchSite, payload
from worker.batches import study_copy
from worker.batches.coordinator import Coordinator
from worker.batches.migrations import StudyMigrations
from worker.jobs.runner import Deferred, Failed


@pytest.fixture
def site(batch_site: Callable[..., BatchSite], sandbox: SandboxPart, orthanc: str) -> BatchSite:
    return batch_site([*sandbox.servers(), {"name": "orthanc", "type": "orthanc", "url": orthanc}])


def test_what_could_not_be_brought_is_failed_retried_and_taken_back_whole(
    site: BatchSite, sandbox: SandboxPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_copy, "REQUEST_IMAGES", 1)
    study, other = new_uid(), new_uid()
    uids, there = site.put("msdicom", study, 3), site.put("dcm4chee", study, 1)
    site.put("msdicom", other, 3)
    sandbox.set_fault("dcm4chee", "store", commit_then_drop=True)
    payload(site.order(study, other))
    assert site.ends() == ["pacs_unavailable"] * 2
    assert len(site.on("dcm4chee", study)) == 3, "one has arrived in each attempt, and nobody said so"

    sandbox.reset_faults()
    uids |= site.put("msdicom", study, 1)
    assert payload(site.go_on(Coordinator.retry, "retry"))["passes"]["verify"]["totals"] == {"verified": 2}
    assert site.ends() == ["copied"] * 2
    assert site.on("dcm4chee", study) == uids | there
    payload(site.go_on(Coordinator.undo, "undo"))
    assert site.ends("undo") == ["undone"] * 2
    assert site.on("dcm4chee", study) == there
    assert site.on("dcm4chee", other) == set()


def test_what_failed_for_good_can_be_taken_back_as_well(
    site: BatchSite, sandbox: SandboxPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_copy, "REQUEST_IMAGES", 1)
    study = new_uid()
    site.put("msdicom", study, 3)
    there = site.put("dcm4chee", study, 1)
    sandbox.set_fault("dcm4chee", "store", commit_then_drop=True)
    payload(site.order(study))
    payload(site.go_on(Coordinator.undo, "undo"))
    assert site.on("dcm4chee", study) == there


def test_a_study_that_another_job_stores_into_waits_for_it(site: BatchSite) -> None:
    study = new_uid()
    uids = site.put("msdicom", study)
    taken = site.ledger.take("U", task="pacs.upload", job={})
    site.ledger.lock_image("1.2.3", job_id="U", fence=taken.fence, into=[study, f"{study}.1"])
    waited = site.order(study, until=lambda: "job U is" in site.ledger.read_record("B.apply.0").get("message", ""))
    assert isinstance(waited, Deferred)
    assert site.ends() == ["open"]
    assert site.on("dcm4chee", study) == set()
    site.ledger.finish("U", taken.fence, outcome={}, code="done", task="pacs.upload", job={})
    payload(site.order(study))
    assert (site.ends(), site.on("dcm4chee", study)) == (["copied"], uids)
    assert site.ledger.uid_record(study).holder is None, "and lets go of it"


def test_the_claim_of_a_study_goes_where_the_study_goes(site: BatchSite) -> None:
    study, unclaimed = new_uid(), new_uid()
    site.put("msdicom", study)
    site.put("msdicom", unclaimed)
    site.ledger.claim_study(study, server="msdicom", job_id="U")
    payload(site.order(study, unclaimed, delete_source=True))
    assert site.ledger.claimed_server(study) == "dcm4chee"
    assert site.ledger.claimed_server(unclaimed) is None
    assert site.ledger.placed() == {"msdicom": 0, "dcm4chee": 1}
    payload(site.go_on(Coordinator.undo, "undo"))
    assert site.ledger.claimed_server(study) == "msdicom"
    assert len(site.on("msdicom", study)) == 2


def test_a_copy_leaves_the_claim_where_it_is(site: BatchSite) -> None:
    study = new_uid()
    site.put("msdicom", study)
    site.ledger.claim_study(study, server="msdicom", job_id="U")
    payload(site.order(study))
    assert site.ledger.claimed_server(study) == "msdicom"


def test_the_preflight_counts_and_warns(site: BatchSite) -> None:
    new, whole, split, gone = (new_uid() for _ in range(4))
    site.put("msdicom", new, 3)
    alike = image(whole, side=16)
    for server in ("msdicom", "dcm4chee"):
        site.put_file(server, alike)
    site.put("msdicom", split)
    site.put("orthanc", split, 1)
    done = payload(site.order(new, whole, split, gone, dry_run=True))
    assert (done["state"], site.ends("survey")) == ("planned", ["planned", "planned", "planned", "not_found"])
    preflights = [row.passes["survey"] for row in site.rows]
    assert (preflights[0].result["images"], preflights[0].result["missing"]) == (3, 3)
    assert preflights[1].result["missing"] == 0
    assert "whole: 1 images" in preflights[1].message
    assert "it is on orthanc too" in preflights[2].message
    assert site.on("dcm4chee", new) == set(), "nothing has happened"
    payload(site.go_on(Coordinator.apply, "apply"))
    assert site.ends() == ["copied", "already_there", "copied", "not_found"]
    assert site.ends("verify") == ["verified", "verified", "verified", "open"]
    assert "1 images were compared element by element" in site.rows[1].passes["verify"].message


@pytest.mark.parametrize("way", [("msdicom", "orthanc"), ("orthanc", "msdicom")], ids="-to-".join)
def test_a_study_that_is_whole_on_both_is_verified_by_its_bytes(site: BatchSite, way: tuple[str, str]) -> None:
    alike, unlike = new_uid(), new_uid()
    wrong = f"{unlike}.2"
    for server, seed in zip(way, (1, 2), strict=True):
        site.put_file(server, image(alike, sop=f"{alike}.1", side=16))
        site.put_file(server, image(unlike, sop=f"{unlike}.1", side=16))
        site.put_file(server, image(unlike, sop=wrong, side=16, seed=seed))
    done = payload(site.order(alike, unlike, from_server=way[0], to_server=way[1]))
    assert (site.ends(), site.ends("verify")) == (["already_there"] * 2, ["verified", "study_conflict"])
    assert [row.passes["verify"].status for row in site.rows] == ["verified", "differs"]
    assert site.rows[0].passes["verify"].result["compared"] == 1
    assert site.rows[1].passes["verify"].result["different"] == [wrong]
    assert done["failures_total"] == 1
    payload(site.go_on(Coordinator.undo, "undo"))
    assert [row.passes["undo"].status for row in site.rows] == ["kept"] * 2
    assert [len(site.on(server, study)) for server in way for study in (alike, unlike)] == [1, 2, 1, 2]


def test_a_study_that_is_whole_on_both_is_still_moved(site: BatchSite) -> None:
    study = new_uid()
    alike = image(study, side=16)
    for server in ("msdicom", "dcm4chee"):
        site.put_file(server, alike)
    payload(site.order(study, delete_source=True))
    assert (site.ends("survey"), site.ends(), site.ends("verify")) == (["planned"], ["already_there"], ["verified"])
    assert site.on("msdicom", study) == set()
    payload(site.go_on(Coordinator.undo, "undo"))
    assert len(site.on("msdicom", study)) == len(site.on("dcm4chee", study)) == 1


def test_a_second_verification_of_what_was_moved_looks_at_the_target(site: BatchSite) -> None:
    study = new_uid()
    site.put("msdicom", study)
    payload(site.order(study, delete_source=True))
    payload(site.go_on(Coordinator.verify, "verify"))
    assert site.ends("verify") == ["verified"]
    payload(site.go_on(Coordinator.undo, "undo"))
    assert len(site.on("msdicom", study)) == 2


def test_an_undo_that_was_cancelled_in_the_middle_is_not_undone_by_verify_and_can_be_ended(
    site: BatchSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StudyMigrations, "group_items", 1)
    first, second = new_uid(), new_uid()
    there = {study: site.put("msdicom", study) for study in (first, second)}
    payload(site.order(first, second, delete_source=True))
    move_claim, cancelled = site.ledger.move_claim, []

    def cancel(*_: Any, **__: Any) -> None:  # as soon as the first study is back
        if not cancelled:
            cancelled.append(Batches(site.ledger).cancel(site.batch))

    monkeypatch.setattr(site.ledger, "move_claim", lambda *what, **more: (move_claim(*what, **more), cancel()))
    stopped = site.go_on(Coordinator.undo, "undo")
    assert isinstance(stopped, Failed)
    assert "cancelled in its undo after 1 of 2 items" in stopped.error.message
    back = [study for study in (first, second) if site.on("msdicom", study)]
    (left,) = {first, second} - set(back)

    refused = site.go_on(Coordinator.verify, "verify")
    assert isinstance(refused, Failed)
    assert "undo it to its end" in refused.error.message
    assert [site.on("msdicom", study) for study in (*back, left)] == [there[back[0]], set()]
    assert [site.on("dcm4chee", study) for study in (*back, left)] == [set(), there[left]]
    payload(site.go_on(Coordinator.undo, "undo"))
    assert site.ends("undo") == ["undone"] * 2
    assert {study: site.on("msdicom", study) for study in there} == there
    assert not any(site.on("dcm4chee", study) for study in there)


def test_studies_of_a_server_that_has_gone_from_the_settings_have_failed(
    site: BatchSite, batch_site: Callable[..., BatchSite], sandbox: SandboxPart
) -> None:
    study = new_uid()
    site.put("msdicom", study)
    payload(site.order(study, dry_run=True))
    without = batch_site(sandbox.servers()[:1])
    payload(without.go_on(Coordinator.apply, "apply"))
    assert site.ends() == ["invalid_request"]
    payload(site.go_on(Coordinator.retry, "retry"))
    assert site.ends() == ["copied"]


@pytest.mark.parametrize("ends", [("msdicom", "msdicom"), ("msdicom", "elsewhere"), ("elsewhere", "msdicom")])
def test_nothing_starts_between_servers_that_cannot_be(site: BatchSite, ends: tuple[str, str]) -> None:
    result = site.order(new_uid(), from_server=ends[0], to_server=ends[1])
    assert isinstance(result, Failed)
    assert result.error.payload["code"] == "invalid_request"
    assert Batches(site.ledger).get("B") is None


def test_nothing_is_deleted_that_nobody_would_verify(site: BatchSite) -> None:
    result = site.order(new_uid(), delete_source=True, verify=False)
    assert isinstance(result, Failed)
    assert "delete_source needs verify" in result.error.message


@pytest.mark.parametrize("dry_run", [False, True])
def test_nothing_is_moved_to_the_same_archive_under_another_name(
    batch_site: Callable[..., BatchSite], orthanc: str, dry_run: bool
) -> None:
    kinds = ("orthanc", "dicomweb")
    site = batch_site([{"name": kind, "type": kind, "url": orthanc} for kind in kinds])
    study = new_uid()
    uids = site.put("orthanc", study, 2)
    ends = {"from_server": "orthanc", "to_server": "dicomweb"}
    result = site.order(study, delete_source=True, dry_run=dry_run, **ends)
    assert isinstance(result, Failed)
    assert "orthanc and dicomweb are one archive" in result.error.message
    assert site.on("orthanc", study) == uids
    assert Batches(site.ledger).get("B") is None


def unlike(site: BatchSite, study: str) -> str:
    """An image that dcm4chee had before, with another element; its UID."""
    sop = f"{study}.7"
    for server, laterality in (("msdicom", "R"), ("dcm4chee", "L")):
        site.put_file(server, image(study, sop=sop, side=16, ImageLaterality=laterality))
    return sop


def test_a_study_of_which_the_target_had_another_image_differs_and_stays_and_the_report_names_the_element(
    site: BatchSite,
) -> None:
    study, good = new_uid(), new_uid()
    sop = unlike(site, study)
    site.put("msdicom", good)
    payload(site.order(study, good, delete_source=True))
    assert (site.ends(), site.ends("verify")) == (["already_there", "copied"], ["study_conflict", "verified"])
    verified = site.rows[0].passes["verify"]
    assert (verified.status, verified.result["different"]) == ("differs", [sop])
    assert verified.result["tags"] == {sop: ["ImageLaterality (0020,0062)"]}
    assert "ImageLaterality (0020,0062)" in verified.message
    assert [site.on("msdicom", one) for one in (study, good)] == [{sop}, set()]
    payload(site.go_on(Coordinator.undo, "undo"))
    assert [row.passes["undo"].status for row in site.rows] == ["kept", "undone"]
    assert site.on("dcm4chee", study) == {sop}


def test_an_image_with_too_little_said_about_it_is_told_to_be_compared_by_its_uid(site: BatchSite) -> None:
    study = new_uid()
    unlike(site, study)
    payload(site.order(study, digests="none"))
    verified = site.rows[0].passes["verify"]
    assert (verified.status, verified.result["compared_elements"]) == ("verified", 0)
    assert verified.message == 'Only UIDs were compared: the order says digests "none".'


def test_a_move_that_was_looked_at_again_says_that_it_has_nothing_to_compare_with(site: BatchSite) -> None:
    study = new_uid()
    site.put("msdicom", study)
    payload(site.order(study, delete_source=True))
    assert "2 images were compared element by element" in site.rows[0].passes["verify"].message
    payload(site.go_on(Coordinator.verify, "verify"))
    assert "Of 2 images only UIDs were compared" in site.rows[0].passes["verify"].message


@pytest.mark.parametrize("digests", ["sample", "none"])
def test_a_move_that_would_compare_less_is_refused(site: BatchSite, digests: str) -> None:
    result = site.order(new_uid(), delete_source=True, digests=digests)
    assert isinstance(result, Failed)
    assert result.error.payload["code"] == "invalid_request"
    assert 'delete_source needs digests "all"' in result.error.message


@pytest.mark.parametrize("digests", ["sample", "none"])
@pytest.mark.parametrize("wish", ["apply", "retry", "verify"])
def test_an_order_of_0_1_0_that_compares_less_compares_all_before_it_deletes(
    site: BatchSite, digests: str, wish: str
) -> None:
    study = new_uid()
    uids = {unlike(site, study), *site.put("msdicom", study)}
    payload(site.order(study, dry_run=wish == "apply"))
    key = f"{PREFIX}batch:{site.batch}"
    order = json.loads(site.ledger.client.hget(key, "order"))
    order |= {"delete_source": True, "digests": digests, "dry_run": False}
    site.ledger.client.hset(key, "order", json.dumps(order))
    if wish == "retry":
        site.ledger.client.hset(key, "state", "cancelled")
    site.go_on(getattr(Coordinator, wish), wish)
    assert site.rows[0].passes["verify"].status == "differs"
    assert site.on("msdicom", study) == uids


def test_all_that_match_a_filter_are_listed_and_brought(site: BatchSite) -> None:
    studies = [new_uid() for _ in range(3)]
    for study in studies:
        site.put("msdicom", study, 1)
    wanted = {"items": None, "filters": {"StudyInstanceUID": studies[1]}}
    payload(site.order(**wanted))
    assert [row.item.text for row in site.rows] == [studies[1]]
    assert [len(site.on("dcm4chee", study)) for study in studies] == [0, 1, 0]
