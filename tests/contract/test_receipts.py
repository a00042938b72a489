"""What the ledger remembers of pushes and deletions, and what a trace makes of it, over real servers and Redis."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sandbox import processes as parts
from sandbox.images import ImageServer
from sandbox.processes import SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import BatchSite, payload
from worker.batches.coordinator import Coordinator
from worker.jobs.delete import delete
from worker.jobs.runner import Deferred, Done, Failed, JobResult, execute
from worker.jobs.trace import trace
from worker.jobs.upload import upload
from worker.pacs.protocol import Found

SIDE = 16


@pytest.fixture
def site(batch_site: Callable[..., BatchSite], sandbox: SandboxPart, tmp_path: Path) -> BatchSite:
    return batch_site(
        sandbox.servers(),
        downloads={"folders": [str(tmp_path)]},
        sources={"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True},
    )


@pytest.fixture
def put(image_server: ImageServer) -> Callable[[bytes], str]:
    return lambda content: image_server.put(f"{hashlib.sha256(content).hexdigest()}.dcm", content)


def did(site: BatchSite, work: Any, task: str, job_id: str | None = None, **job: Any) -> JobResult:
    job_id = job_id or new_uid()
    while isinstance(
        result := execute(
            work, task=task, job_id=job_id, message=job, services=site.services, heartbeat=site.heartbeat
        ),
        Deferred,
    ):
        site.ledger.wake_now(job_id)
    return result


def uploaded(site: BatchSite, url: str, **job: Any) -> dict[str, Any]:
    result = did(site, upload, "pacs.upload", image_url=url, **job)
    assert isinstance(result, Done), result
    return result.payload


def refused(site: BatchSite, url: str, **job: Any) -> dict[str, Any]:
    result = did(site, upload, "pacs.upload", image_url=url, **job)
    assert isinstance(result, Failed), result
    assert result.error.payload["code"] == "image_already_exists"
    return dict(result.error.details)


def traced(site: BatchSite, uid: str) -> dict[str, Any]:
    result = did(site, trace, "pacs.trace", uid=uid)
    assert isinstance(result, Done), result
    return result.payload


def deleted(site: BatchSite, level: str, uid: str, **job: Any) -> JobResult:
    return did(site, delete, "pacs.delete", level=level, uid=uid, **job)


# --- every deletion voids, at every level --------------------------------------------------------------------------


def _single(level: str, site: BatchSite, uids: dict[str, str]) -> None:
    assert isinstance(deleted(site, level, uids[level]), Done)


def _hidden(site: BatchSite, uids: dict[str, str]) -> None:
    assert isinstance(deleted(site, "study", uids["study"], permanent=False, servers=["dcm4chee"]), Done)


def _in_a_batch(site: BatchSite, uids: dict[str, str]) -> None:
    payload(site.delete(uids["study"]))


def _moved(site: BatchSite, uids: dict[str, str]) -> None:
    payload(site.order(uids["study"], from_server="msdicom", to_server="dcm4chee", delete_source=True))


@pytest.mark.parametrize(
    ("server", "delete_it"),
    [
        ("msdicom", partial(_single, "image")),
        ("dcm4chee", partial(_single, "image")),
        ("msdicom", partial(_single, "series")),
        ("msdicom", partial(_single, "study")),
        ("dcm4chee", partial(_single, "study")),
        ("dcm4chee", _hidden),
        ("msdicom", _in_a_batch),
        ("msdicom", _moved),
    ],
)
def test_a_receipt_does_not_outlive_its_image(
    site: BatchSite, put: Callable[[bytes], str], server: str, delete_it: Callable[[BatchSite, dict[str, str]], None]
) -> None:
    study, sop = new_uid(), new_uid()
    stored = uploaded(site, put(image(study, sop=sop, side=SIDE)), server=server)
    assert site.ledger.receipt(sop) is not None
    delete_it(site, {"image": sop, "series": stored["series_uid"], "study": study})
    assert site.ledger.receipt(sop) is None
    told = traced(site, sop)
    assert told["receipt"]["state"] == "deleted"
    assert told["receipt"]["voided_by"]
    assert server not in told["present"]


def test_a_deletion_voids_what_was_stored_on_its_server_and_before_it(
    site: BatchSite, put: Callable[[bytes], str]
) -> None:
    study, sop, other = new_uid(), new_uid(), new_uid()
    content = image(study, sop=sop, side=SIDE)
    uploaded(site, put(content), server="dcm4chee")
    uploaded(site, put(image(other, sop=f"{other}.9", side=SIDE)))
    deleted(site, "study", study, servers=["msdicom"])
    assert site.ledger.receipt(sop) is not None, "it is on the other server"
    deleted(site, "study", study)
    assert site.ledger.receipt(sop) is None
    assert site.ledger.receipt(f"{other}.9") is not None
    again = uploaded(site, put(content), server="dcm4chee")
    receipt = site.ledger.receipt(sop)
    assert receipt is not None
    assert receipt.job_id == again["job_id"]


def test_a_worker_that_dies_before_its_deletion_leaves_no_receipt_that_may_be_wrong(
    site: BatchSite, put: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledBeforeDeletion(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise KilledBeforeDeletion

    study, sop = new_uid(), new_uid()
    uploaded(site, put(image(study, sop=sop, side=SIDE)))
    monkeypatch.setattr(type(site.fleet["msdicom"]), "delete", die)
    with pytest.raises(KilledBeforeDeletion):
        deleted(site, "study", study)
    assert site.ledger.receipt(sop) is None
    told = traced(site, sop)
    assert told["present"] == ["msdicom"]
    assert "was to delete it" in told["why"]
    assert "what is there now was not removed, or has been stored since" in told["why"]


def test_an_undone_batch_of_uploads_voids_the_receipt_that_it_renewed(
    site: BatchSite, put: Callable[[bytes], str]
) -> None:
    study, sop = new_uid(), new_uid()
    content = image(study, sop=sop, side=SIDE)
    uploaded(site, put(content))
    site.fleet["msdicom"].delete(Found("study", study), permanent=True)  # by another program
    payload(site.upload(put(content), verify=False))
    receipt = site.ledger.receipt(sop)
    assert receipt is not None
    assert receipt.job_id.startswith(f"{site.batch}.apply")
    payload(site.go_on(Coordinator.undo, "undo"))
    assert site.ledger.receipt(sop) is None


def test_a_migration_leaves_a_receipt_of_the_study_which_its_undo_voids(
    site: BatchSite, put: Callable[[bytes], str]
) -> None:
    study, sop = new_uid(), new_uid()
    uploaded(site, put(image(study, sop=sop, side=SIDE)), server="msdicom")
    payload(site.order(study))
    by_server = {push["server_name"]: push for push in traced(site, study)["pushes"]}
    copied = by_server["dcm4chee"]
    assert (copied["kind"], copied["images"], copied["state"]) == ("copy", 1, "there")
    assert copied["job_id"].startswith(site.batch)
    assert (by_server["msdicom"]["kind"], by_server["msdicom"]["state"]) == ("upload", "there")
    payload(site.go_on(Coordinator.undo, "undo"))
    (copied,) = (push for push in traced(site, study)["pushes"] if push["kind"] == "copy")
    assert copied["state"] == "deleted"
    assert traced(site, study)["present"] == ["msdicom"]


def test_a_copy_over_an_image_that_others_deleted_makes_its_receipt_doubtful(
    site: BatchSite, put: Callable[[bytes], str]
) -> None:
    study, sop = new_uid(), new_uid()
    uploaded(site, put(image(study, sop=sop, side=SIDE, seed=1)), server="dcm4chee")
    site.fleet["dcm4chee"].delete(Found("study", study), permanent=True)  # by another program
    site.put_file("msdicom", image(study, sop=sop, side=SIDE, seed=2))
    payload(site.order(study))
    assert site.ledger.receipt(sop) is None
    assert traced(site, sop)["receipt"]["state"] == "replaced"


def test_what_is_brought_back_from_a_backup_leaves_a_receipt_of_the_study(
    site: BatchSite, put: Callable[[bytes], str], tmp_path: Path
) -> None:
    study, sop = new_uid(), new_uid()
    uploaded(site, put(image(study, sop=sop, side=SIDE)))
    payload(site.delete(study, backup=tmp_path.as_uri()))
    assert site.ledger.receipt(sop) is None
    payload(site.go_on(Coordinator.undo, "undo"))
    pushes = {push["kind"]: push for push in traced(site, study)["pushes"]}
    assert (pushes["copy"]["images"], pushes["copy"]["state"]) == (1, "there")
    assert pushes["upload"]["state"] == "deleted"
    assert f"Job {pushes['copy']['job_id']} put images of the study there" in traced(site, study)["why"]
    assert traced(site, sop)["receipt"]["state"] == "deleted"


# --- the bytes that are there now ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stored_by", ["another program", "a batch", "a migration"])
@pytest.mark.parametrize("same", [True, False])
def test_same_bytes_is_right_whatever_has_replaced_the_image_since(
    site: BatchSite, put: Callable[[bytes], str], stored_by: str, same: bool
) -> None:
    """A job stores file 1; another program deletes it; file 2 is stored by others; then file 2, or 1, comes again."""
    study, sop = new_uid(), new_uid()
    first, second = (image(study, sop=sop, side=SIDE, seed=seed) for seed in (1, 2))
    uploaded(site, put(first), server="msdicom")
    site.fleet["msdicom"].delete(Found("study", study), permanent=True)
    if stored_by == "another program":
        site.put_file("msdicom", second)
    elif stored_by == "a batch":
        payload(site.upload(put(second), verify=False))
    else:
        site.put_file("dcm4chee", second)
        payload(site.order(study, from_server="dcm4chee", to_server="msdicom"))
        site.fleet["dcm4chee"].delete(Found("study", study), permanent=True)
    there = next(iter(site.fleet["msdicom"].instances(Found("study", study))))
    with site.fleet["msdicom"].retrieve(there) as files:
        now = b"".join(next(iter(files)).chunks)
    details = refused(site, put(now if same else first))
    assert (details["same_bytes"], details["same_bytes_reason"]) == (same, None)
    assert details["stored_sha256"] == hashlib.sha256(now).hexdigest()


@pytest.mark.parametrize(
    ("own", "then", "tags"),
    [
        ({}, {}, ["IssuerOfPatientID (0010,0021)"]),
        ({"PatientID": ""}, {}, ["PatientID (0010,0020)", "IssuerOfPatientID (0010,0021)"]),
        ({"IssuerOfPatientID": "HOSPITAL"}, {"PatientComments": "seen"}, ["PatientComments (0010,4000)"]),
        ({}, {"ImageLaterality": "L"}, ["IssuerOfPatientID (0010,0021)", "ImageLaterality (0020,0062)"]),
    ],
    ids=["the issuer", "a PatientID that was made up", "another file", "more than the archive adds"],
)
def test_the_original_of_a_copy_that_came_from_dcm4chee_differs_in_elements_that_are_named(
    site: BatchSite, put: Callable[[bytes], str], own: dict[str, Any], then: dict[str, Any], tags: list[str]
) -> None:
    """``then``: what is said otherwise in the file that comes once the archive's copy is on the other server."""
    study, sop = new_uid(), new_uid()
    site.put_file("dcm4chee", image(study, sop=sop, side=SIDE, **own))
    payload(site.order(study, from_server="dcm4chee", to_server="msdicom"))
    site.fleet["dcm4chee"].delete(Found("study", study), permanent=True)
    details = refused(site, put(image(study, sop=sop, side=SIDE, **{**own, **then})))
    assert details["same_bytes"] is False, "and they are not called the same"
    assert (details["tags"], details["made_by"]) == (tags, [] if then else ["dcm4chee"])


def test_where_files_are_rewritten_nothing_is_said_of_bytes(site: BatchSite, put: Callable[[bytes], str]) -> None:
    content = image(new_uid(), side=SIDE)
    uploaded(site, put(content), server="dcm4chee")
    details = refused(site, put(content))
    assert (details["same_bytes"], details["same_bytes_reason"]) == (None, "server_rewrites_files")
    assert (details["stored_sha256"], details["receipt_sha256"]) == (None, hashlib.sha256(content).hexdigest())


def test_orthanc_gives_back_the_bytes_that_are_compared(
    batch_site: Callable[..., BatchSite], orthanc: str, put: Callable[[bytes], str]
) -> None:
    sources = {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True}
    site = batch_site([{"name": "ward", "type": "orthanc", "url": orthanc}], sources=sources)
    study, sop = new_uid(), new_uid()
    first, second = (image(study, sop=sop, side=SIDE, seed=seed) for seed in (1, 2))
    uploaded(site, put(first))
    assert refused(site, put(first))["same_bytes"] is True
    assert refused(site, put(first[132:]))["same_bytes"] is True
    assert refused(site, put(second))["same_bytes"] is False


# --- trace: what is, and what was ----------------------------------------------------------------------------------


def test_a_trace_says_where_an_image_is_by_the_servers_alone(
    site: BatchSite, sandbox: SandboxPart, put: Callable[[bytes], str]
) -> None:
    study, sop = new_uid(), new_uid()
    stored = uploaded(site, put(image(study, sop=sop, side=SIDE)))
    there = traced(site, sop)
    assert (there["server_name"], there["present"], there["receipt"]["state"]) == ("msdicom", ["msdicom"], "there")
    assert f"Job {stored['job_id']} was to push it there" in there["why"], "others may have replaced it since"

    site.fleet["msdicom"].delete(Found("study", study), permanent=True)  # by another program
    gone = traced(site, sop)
    assert (gone["server_name"], gone["server_type"], gone["viewer_url"], gone["present"]) == (None, None, "", [])
    assert gone["receipt"]["state"] == "gone"
    assert gone["why"].startswith("No server has it. The ledger's last word is msdicom: Job ")
    assert "no job of ours deleted it since" in gone["why"]

    site.put_file("dcm4chee", image(study, sop=sop, side=SIDE))
    elsewhere = traced(site, sop)
    assert (elsewhere["server_name"], elsewhere["present"]) == ("dcm4chee", ["dcm4chee"])
    assert (elsewhere["receipt"]["server_name"], elsewhere["receipt"]["state"]) == ("msdicom", "gone")
    assert stored["job_id"] not in elsewhere["why"]

    sandbox.set_fault("msdicom", "*", refuse=True)
    site.fleet["dcm4chee"].delete(Found("study", study), permanent=True)
    silent = traced(site, sop)
    assert (silent["present"], silent["receipt"]["state"]) == ([], "unknown")
    assert silent["why"].startswith("No server that answered has it, and msdicom did not answer.")


def test_a_trace_of_a_deleted_study_tells_who_deleted_it_and_when(site: BatchSite, put: Callable[[bytes], str]) -> None:
    study, sop = new_uid(), new_uid()
    stored = uploaded(site, put(image(study, sop=sop, side=SIDE)))
    ended = deleted(site, "study", study)
    assert isinstance(ended, Done)
    told = traced(site, sop)
    assert told["server_name"] is None
    receipt = told["receipt"]
    assert (receipt["state"], receipt["voided_by"]) == ("deleted", ended.payload["job_id"])
    assert receipt["stored_at"] <= receipt["voided_at"]
    assert f"Job {stored['job_id']} stored it on msdicom" in told["why"]
    assert f"job {ended.payload['job_id']} was to delete it" in told["why"]
    of_study = traced(site, study)["why"]
    assert f"Job {stored['job_id']} put images of the study there" in of_study
    assert f"job {ended.payload['job_id']} was to delete it" in of_study
