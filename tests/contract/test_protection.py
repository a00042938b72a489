"""Servers that are protected from deletions, and orders too large to go unconfirmed: every path to a deletion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from courier.batches.planner import Planned, Planner
from courier.batches.store import Batches
from courier.errors import ConfirmationRequired, CourierError, InvalidRequest
from sandbox.images import ImageServer
from sandbox.processes import HOST, SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import BatchSite, payload
from worker.batches.coordinator import Coordinator
from worker.batches.delete_all import delete_all
from worker.jobs.delete import delete
from worker.jobs.runner import Failed
from worker.jobs.upload import upload
from worker.pacs.registry import connect

SENTENCE = "delete all studies"


@pytest.fixture
def site_of(
    batch_site: Callable[..., BatchSite], sandbox: SandboxPart, orthanc: str, tmp_path: Path
) -> Callable[..., BatchSite]:
    """Opens a place with all three servers: ``site_of(msdicom="never")``; another policy, the same servers."""

    def build(max_studies: int | None = None, **deletions: str) -> BatchSite:
        servers = [*sandbox.servers(), {"name": "orthanc", "type": "orthanc", "url": orthanc}]
        limit = {} if max_studies is None else {"deletions": {"max_studies_per_order": max_studies}}
        return batch_site(
            [{**one, "deletions": deletions.get(one["name"], "allow")} for one in servers],
            downloads={"folders": [str(tmp_path)]},
            sources={"allow_hosts": [f"{HOST}:*"], "allow_private_networks": True},
            **limit,
        )

    return build


def one(site: BatchSite, level: str, uid: str, **fields: Any) -> Any:
    """`pacs.delete`, to its end."""
    return site.see_to_its_end("pacs.delete", delete, new_uid(), {"level": level, "uid": uid, **fields})


def everything(site: BatchSite, **fields: Any) -> Any:
    message = {"confirm": SENTENCE, **fields}
    return site.see_to_its_end("pacs.delete_all", delete_all, site.batch, message)


def refused(result: Any, kind: type[CourierError] = InvalidRequest) -> CourierError:
    assert isinstance(result, Failed), result
    assert type(result.error) is kind, result.error
    return result.error


def on(site: BatchSite, study: str) -> dict[str, int]:
    return {name: len(images) for name in site.fleet.names if (images := site.on(name, study))}


# --- single deletions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["msdicom", "dcm4chee", "orthanc"])
@pytest.mark.parametrize("permanent", [True, False])
def test_a_deletion_that_names_a_protected_server_is_refused_as_a_whole(
    site_of: Callable[..., BatchSite], server: str, permanent: bool
) -> None:
    site, study, sop = site_of(**{server: "never"}), new_uid(), new_uid()
    for name in site.fleet.names:
        site.put_file(name, image(study, sop=sop, side=16))
    for level, uid in (("study", study), ("series", f"{study}.1"), ("image", sop)):
        for dry_run in (False, True):
            error = refused(one(site, level, uid, servers=site.fleet.names, permanent=permanent, dry_run=dry_run))
            assert (error.server_name, 'deletions = "never"' in error.message) == (server, True)
    assert on(site, study) == dict.fromkeys(site.fleet.names, 1)


@pytest.mark.parametrize("level", ["study", "series", "image"])
def test_a_deletion_that_names_no_server_leaves_the_protected_one_and_says_so(
    site_of: Callable[..., BatchSite], level: str
) -> None:
    site, study, sop = site_of(msdicom="never", dcm4chee="hide"), new_uid(), new_uid()
    for name in site.fleet.names:
        site.put_file(name, image(study, sop=sop, side=16))
    uid = {"study": study, "series": f"{study}.1", "image": sop}[level]
    done = payload(one(site, level, uid))
    assert {entry["server_name"]: entry["status"] for entry in done["servers"]} == {
        "msdicom": "refused",
        "dcm4chee": "refused",
        "orthanc": "deleted",
    }
    assert [bool(entry["error"]) for entry in done["servers"]] == [True, True, False]
    assert on(site, study) == {"msdicom": 1, "dcm4chee": 1}
    error = refused(one(site, level, uid))
    assert [entry["status"] for entry in error.details["servers"]] == ["refused", "refused", "not_there"]
    hidden = payload(one(site, level, uid, servers=["dcm4chee"], permanent=False))
    assert hidden["servers"][0]["status"] == "hidden"
    assert on(site, study) == {"msdicom": 1}


# --- batches of deletions -------------------------------------------------------------------------------------------


def test_a_batch_that_names_a_protected_server_is_refused_before_it_is_planned(
    site_of: Callable[..., BatchSite], tmp_path: Path
) -> None:
    site, study = site_of(msdicom="never", dcm4chee="hide"), new_uid()
    site.put("msdicom", study)
    site.put("dcm4chee", study)
    for servers in (["msdicom"], ["dcm4chee"], ["orthanc", "msdicom"]):
        for more in ({}, {"backup": tmp_path.as_uri()}, {"dry_run": True}):
            refused(site.delete(study, servers=servers, **more))
    refused(everything(site, servers=["dcm4chee"]))
    refused(everything(site, servers=["msdicom"], permanent=False))
    assert Batches(site.ledger).get(site.batch) is None
    assert list(tmp_path.iterdir()) == [], "and no copy was written"
    assert on(site, study) == {"msdicom": 2, "dcm4chee": 2}


def test_a_batch_that_names_no_server_refuses_what_only_protected_servers_have(
    site_of: Callable[..., BatchSite],
) -> None:
    site, alone, both = site_of(msdicom="never"), new_uid(), new_uid()
    site.put("msdicom", alone)
    site.put("msdicom", both)
    site.put("orthanc", both)
    done = payload(site.delete(alone, both))
    assert site.ends() == ["invalid_request", "invalid_request"]
    assert (on(site, alone), on(site, both)) == ({"msdicom": 2}, {"msdicom": 2})
    assert site.rows[1].outcome.result["servers"]["orthanc"] == "deleted"
    assert 'deletions = "never"' in site.rows[1].outcome.message
    assert done["failures_total"] == 2


def test_everything_on_every_server_leaves_what_is_protected(
    site_of: Callable[..., BatchSite], sandbox: SandboxPart
) -> None:
    site, kept, gone = site_of(msdicom="never", orthanc="never"), new_uid(), new_uid()
    site.put("msdicom", kept)
    site.put("dcm4chee", gone)
    sandbox.load(anew=True)
    done = payload(everything(site))
    assert (on(site, kept), on(site, gone)) == ({"msdicom": 2}, {})
    counts = {entry["server_name"]: entry for entry in done["servers"]}
    assert (counts["msdicom"]["refused"], counts["dcm4chee"]["deleted"]) == (1, 1)
    nowhere = site_of(msdicom="never", orthanc="never", dcm4chee="never")
    nowhere.batch = "C"
    refused(everything(nowhere))


def test_a_plan_whose_line_names_a_protected_server_is_refused_line_by_line(site_of: Callable[..., BatchSite]) -> None:
    site, study, other = site_of(msdicom="never"), new_uid(), new_uid()
    for name in ("msdicom", "dcm4chee"):
        site.put(name, study)
    site.put("dcm4chee", other)
    batches = Batches(site.ledger)
    batches.open(site.batch, kind="delete", order={"permanent": True, "survey": True}, concurrency=1)
    with Planner(batches, site.batch) as planner:
        planner.add_all(
            Planned(uid, server) for uid, server in ((study, "msdicom"), (study, "dcm4chee"), (other, "dcm4chee"))
        )
        planner.freeze()
    payload(site.delete(planned=True))
    assert site.ends() == ["invalid_request", "deleted", "deleted"]
    assert on(site, study) == {"msdicom": 2}


def test_a_policy_that_was_set_after_the_plan_holds_when_it_is_applied(site_of: Callable[..., BatchSite]) -> None:
    before, study = site_of(), new_uid()
    before.put("msdicom", study)
    payload(before.delete(study, servers=["msdicom"], dry_run=True))
    after = site_of(msdicom="never")
    refused(after.go_on(Coordinator.apply, "apply"))
    assert on(after, study) == {"msdicom": 2}
    assert Batches(after.ledger).get("B").state == "planned"  # type: ignore[union-attr]
    payload(site_of().go_on(Coordinator.apply, "apply"))
    assert on(after, study) == {}


# --- moves, undo, cleanup -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["hide", "never"])
@pytest.mark.parametrize(
    ("source", "target"), [("msdicom", "dcm4chee"), ("dcm4chee", "orthanc"), ("orthanc", "msdicom")]
)
def test_a_move_from_a_protected_server_is_refused_before_anything_is_copied(
    site_of: Callable[..., BatchSite], source: str, target: str, policy: str
) -> None:
    site, study = site_of(**{source: policy}), new_uid()
    site.put(source, study)
    error = refused(site.order(study, from_server=source, to_server=target, delete_source=True))
    assert error.server_name == source
    assert on(site, study) == {source: 2}
    site.batch = "C"
    payload(site.order(study, from_server=source, to_server=target))
    assert on(site, study) == {source: 2, target: 2}, "a copy deletes nothing"


def test_a_move_that_was_planned_before_its_source_was_protected_deletes_nothing(
    site_of: Callable[..., BatchSite],
) -> None:
    before, study = site_of(), new_uid()
    before.put("msdicom", study)
    payload(before.order(study, delete_source=True, dry_run=True))
    after = site_of(msdicom="hide")
    refused(after.go_on(Coordinator.apply, "apply"))
    assert on(after, study) == {"msdicom": 2}


def test_the_undo_of_a_migration_to_a_protected_server_brings_and_removes_nothing(
    site_of: Callable[..., BatchSite],
) -> None:
    before, study = site_of(), new_uid()
    before.put("msdicom", study)
    payload(before.order(study, delete_source=True))
    assert on(before, study) == {"dcm4chee": 2}
    after = site_of(dcm4chee="never")
    error = refused(after.go_on(Coordinator.undo, "undo"))
    assert error.server_name == "dcm4chee"
    assert on(after, study) == {"dcm4chee": 2}
    payload(site_of().go_on(Coordinator.undo, "undo"))
    assert on(after, study) == {"msdicom": 2}


def test_the_undo_of_uploads_leaves_what_is_on_a_protected_server(
    site_of: Callable[..., BatchSite], image_server: ImageServer
) -> None:
    before, study = site_of(), new_uid()
    payload(before.upload(image_server.put("a.dcm", image(study, side=16))))
    after = site_of(msdicom="hide")
    payload(after.go_on(Coordinator.undo, "undo"))
    assert after.ends("undo") == ["invalid_request"]
    assert on(after, study) == {"msdicom": 1}


def test_the_undo_of_uploads_to_one_protected_server_is_refused_as_a_whole(
    site_of: Callable[..., BatchSite], image_server: ImageServer
) -> None:
    before, study = site_of(), new_uid()
    payload(before.upload(image_server.put("a.dcm", image(study, side=16)), server="orthanc"))
    refused(site_of(orthanc="never").go_on(Coordinator.undo, "undo"))
    assert on(before, study) == {"orthanc": 1}


def test_what_a_broken_store_left_behind_is_not_removed_from_a_protected_server(
    site_of: Callable[..., BatchSite], image_server: ImageServer, sandbox: SandboxPart
) -> None:
    site, study = site_of(msdicom="never"), new_uid()
    deletes: list[str] = []
    plain = connect(site.settings.servers[0])
    site.fleet["msdicom"]._pacs.delete = lambda *_, **__: deletes.append("delete")  # type: ignore[attr-defined]
    sandbox.set_fault("msdicom", "store", pending_45071="never", times=1)
    url = image_server.put("a.dcm", image(study, side=16))
    message = {"image_url": url, "server": "msdicom"}
    result = site.see_to_its_end("pacs.upload", upload, new_uid(), message)
    assert isinstance(result, Failed)
    assert "protected" in result.error.message
    assert deletes == []
    assert plain.find("study", study) == []


# --- large orders ---------------------------------------------------------------------------------------------------


def confirmed(site: BatchSite, command: str, studies: int) -> Any:
    return site.go_on(getattr(Coordinator, command), command, confirm_studies=studies)


def test_a_batch_above_the_limit_stays_planned_until_its_exact_number_is_confirmed(
    site_of: Callable[..., BatchSite],
) -> None:
    site, studies = site_of(2), [new_uid() for _ in range(3)]
    for study in studies:
        site.put("msdicom", study)
        site.put("dcm4chee", study)
    error = refused(site.delete(*studies), ConfirmationRequired)
    assert error.details == {"batch_id": "B", "command": "apply", "studies": 3, "max_studies_per_order": 2}
    assert "pacs batch apply B --confirm-studies 3" in error.message
    assert Batches(site.ledger).get("B").state == "planned"  # type: ignore[union-attr]
    refused(site.go_on(Coordinator.apply, "apply"), ConfirmationRequired)
    for wrong in (2, 4, 0):
        refused(confirmed(site, "apply", wrong), ConfirmationRequired)
    assert all(on(site, study) == {"msdicom": 2, "dcm4chee": 2} for study in studies)
    payload(confirmed(site, "apply", 3))
    assert all(on(site, study) == {} for study in studies)


def test_an_order_may_bring_its_number_and_is_held_to_it(site_of: Callable[..., BatchSite]) -> None:
    site, studies = site_of(2), [new_uid() for _ in range(3)]
    for study in studies:
        site.put("msdicom", study)
    payload(site.delete(*studies, new_uid(), confirm_studies=3))  # what is nowhere is no study of it
    assert all(on(site, study) == {} for study in studies)
    site.batch, study = "C", new_uid()
    site.put("msdicom", study)
    refused(site.delete(study, confirm_studies=2), ConfirmationRequired)
    assert on(site, study) == {"msdicom": 2}, "a wrong number is refused below the limit as well"


def test_everything_is_counted_by_studies_and_not_by_items(site_of: Callable[..., BatchSite]) -> None:
    site, studies = site_of(3, orthanc="never"), [new_uid() for _ in range(2)]
    for study in studies:
        site.put("msdicom", study)
        site.put("dcm4chee", study)
    assert payload(everything(site))["items"] >= 4
    assert [on(site, study) for study in studies] == [{}, {}]


def test_everything_above_the_limit_needs_its_number_beside_the_sentence(site_of: Callable[..., BatchSite]) -> None:
    site, studies = site_of(1, orthanc="never"), [new_uid() for _ in range(2)]
    for study in studies:
        site.put("msdicom", study)
    error = refused(everything(site), ConfirmationRequired)
    assert error.details["studies"] == 2
    payload(confirmed(site, "apply", 2))
    assert [on(site, study) for study in studies] == [{}, {}]


def test_a_move_above_the_limit_copies_nothing_before_it_is_confirmed(site_of: Callable[..., BatchSite]) -> None:
    site, studies = site_of(1), [new_uid() for _ in range(2)]
    for study in studies:
        site.put("msdicom", study)
    error = refused(site.order(*studies, delete_source=True), ConfirmationRequired)
    assert error.details["studies"] == 2
    assert [on(site, study) for study in studies] == [{"msdicom": 2}] * 2
    payload(confirmed(site, "apply", 2))
    assert [on(site, study) for study in studies] == [{"dcm4chee": 2}] * 2
    assert refused(site.go_on(Coordinator.undo, "undo"), ConfirmationRequired).details["studies"] == 2
    assert [on(site, study) for study in studies] == [{"dcm4chee": 2}] * 2
    payload(confirmed(site, "undo", 2))
    assert [on(site, study) for study in studies] == [{"msdicom": 2}] * 2


def test_a_retry_and_a_verification_that_delete_are_counted_anew(
    site_of: Callable[..., BatchSite], sandbox: SandboxPart
) -> None:
    site, studies = site_of(1), [new_uid() for _ in range(2)]
    for study in studies:
        site.put("msdicom", study)
    sandbox.set_fault("dcm4chee", "store", status=503)
    payload(site.order(*studies, delete_source=True, confirm_studies=2))
    sandbox.reset_faults()
    assert site.ends() == ["pacs_unavailable"] * 2
    error = refused(site.go_on(Coordinator.retry, "retry"), ConfirmationRequired)
    assert (error.details["command"], error.details["studies"]) == ("retry", 2)
    payload(confirmed(site, "retry", 2))
    assert [on(site, study) for study in studies] == [{"dcm4chee": 2}] * 2
    payload(site.go_on(Coordinator.verify, "verify"))  # nothing is left to be deleted


def test_the_undo_of_uploads_is_counted_by_the_studies_it_deletes_from(
    site_of: Callable[..., BatchSite], image_server: ImageServer
) -> None:
    site, studies = site_of(1), [new_uid() for _ in range(2)]
    urls = [image_server.put(f"{study}.{n}.dcm", image(study, side=16)) for study in studies for n in range(2)]
    payload(site.upload(*urls))
    assert refused(site.go_on(Coordinator.undo, "undo"), ConfirmationRequired).details["studies"] == 2
    payload(confirmed(site, "undo", 2))
    assert [on(site, study) for study in studies] == [{}, {}]
