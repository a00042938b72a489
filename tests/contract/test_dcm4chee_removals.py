"""Images that come into a study of DCM4CHEE while it is removed stay; a rejection that stops half-way is completed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import requests

from courier.errors import PacsUnavailable
from sandbox.processes import SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import BatchSite, payload
from worker.batches import deletions, study_migration
from worker.batches.coordinator import Coordinator
from worker.jobs.delete import delete
from worker.pacs.protocol import DeletionFate, Found, Hiding

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
EXPIRED, SAFETY = "113039%5EDCM", "113037%5EDCM"


@pytest.fixture
def site(batch_site: Callable[..., BatchSite], sandbox: SandboxPart, tmp_path: Path) -> BatchSite:
    jobs = {"max_attempts": 4, "backoff_base_s": 0.01, "backoff_cap_s": 0.05, "grace_s": 1}
    return batch_site(sandbox.servers(), downloads={"folders": [str(tmp_path)]}, jobs=jobs)


def hiding(site: BatchSite) -> Hiding:
    found = site.fleet["dcm4chee"].hiding
    assert found is not None
    return found


def hidden(site: BatchSite, study: str) -> set[str]:
    return {str(one.sop_instance_uid) for one in hiding(site).images(study) or ()}


def reject(sandbox: SandboxPart, path: str, code: str = EXPIRED, aet: str = "DCM4CHEE") -> int:
    url = sandbox.dcm4chee.replace("/aets/DCM4CHEE/", f"/aets/{aet}/")
    return requests.post(f"{url}/studies/{path}/reject/{code}", timeout=60).status_code


def shown_by(sandbox: SandboxPart, study: str, aet: str) -> int:
    url = sandbox.dcm4chee.replace("/aets/DCM4CHEE/", f"/aets/{aet}/")
    return int(requests.get(f"{url}/studies/{study}/instances/count", timeout=60).json()["count"])


class Late:
    """An image of another program that comes before a call to the server, once; the other calls pass."""

    def __init__(
        self, site: BatchSite, study: str, monkeypatch: pytest.MonkeyPatch, *, at: str, series: str = ""
    ) -> None:
        self.uid, self.came, self._series = new_uid(), False, series or f"{study}.9"
        pacs = cast(Any, site.fleet["dcm4chee"])
        holder = pacs.hiding if at == "delete_hidden" else pacs
        real = getattr(holder, at)

        def late(*args: Any, **more: Any) -> Any:
            if not self.came:
                self.came = True
                site.put_file("dcm4chee", image(study, series=self._series, sop=self.uid, side=8))
            return real(*args, **more)

        monkeypatch.setattr(holder, at, late)


def undo(site: BatchSite) -> None:
    payload(site.go_on(Coordinator.undo, "undo"))


# What comes in between


@pytest.mark.parametrize("at", ["delete", "delete_hidden"])
def test_the_undo_of_a_migration_leaves_what_came_in_between_and_reports_it(
    site: BatchSite, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    study = new_uid()
    ours = site.put("msdicom", study, 3)
    payload(site.order(study))
    late = Late(site, study, monkeypatch, at=at)
    undo(site)
    assert (site.ends("undo"), site.on("dcm4chee", study), site.on("msdicom", study)) == (["undone"], {late.uid}, ours)
    row = site.rows[0].passes["undo"]
    assert ("shown again: " if at == "delete" else "and stay: ") + late.uid in row.message
    assert (row.result["removed"], row.result["left"], row.result["hidden"]) == (3, 1, True)
    assert hidden(site, study) == ours


def test_the_undo_of_a_migration_without_late_images_deletes_for_good(site: BatchSite, sandbox: SandboxPart) -> None:
    study = new_uid()
    site.put("msdicom", study, 2)
    payload(site.order(study))
    undo(site)
    assert (site.ends("undo"), shown_by(sandbox, study, "AS_RECEIVED")) == (["undone"], 0)
    assert site.rows[0].passes["undo"].result["hidden"] is False


def test_the_undo_of_a_migration_leaves_what_came_into_a_whole_series(
    site: BatchSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = new_uid()
    theirs = {site_put(site, "dcm4chee", study, series=f"{study}.5")}
    ours = site.put("msdicom", study, 2)
    payload(site.order(study))
    late = Late(site, study, monkeypatch, at="delete", series=f"{study}.1")
    undo(site)
    assert site.on("dcm4chee", study) == theirs | {late.uid}
    assert hidden(site, study) == ours


def site_put(site: BatchSite, server: str, study: str, *, series: str) -> str:
    uid = new_uid()
    site.put_file(server, image(study, series=series, sop=uid, side=8))
    return uid


@pytest.mark.parametrize("at", ["delete", "delete_hidden"])
def test_a_move_brings_what_came_in_between_before_its_source_goes(
    site: BatchSite, sandbox: SandboxPart, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    study = new_uid()
    uids = site.put("dcm4chee", study, 3)
    late = Late(site, study, monkeypatch, at=at)
    payload(site.order(study, from_server="dcm4chee", to_server="msdicom", delete_source=True))
    assert (site.ends("verify"), late.came) == (["verified"], True)
    assert site.on("msdicom", study) == uids | {late.uid}
    assert (site.on("dcm4chee", study), shown_by(sandbox, study, "AS_RECEIVED")) == (set(), 0)


@pytest.mark.parametrize("at", ["delete", "delete_hidden"])
def test_a_deletion_with_a_backup_deletes_nothing_that_came_after_the_backup(
    site: BatchSite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: str
) -> None:
    study = new_uid()
    uids = site.put("dcm4chee", study, 3)
    late = Late(site, study, monkeypatch, at=at)
    payload(site.delete(study, servers=["dcm4chee"], backup=tmp_path.as_uri()))
    assert (site.ends(), site.on("dcm4chee", study)) == (["invalid_request"], uids | {late.uid})
    assert late.uid in site.rows[0].outcome.message
    assert hidden(site, study) == set()


def test_what_others_have_hidden_before_stays_hidden_when_a_removal_is_taken_back(
    site: BatchSite, sandbox: SandboxPart, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = new_uid()
    uids = site.put("dcm4chee", study, 2)
    theirs = site_put(site, "dcm4chee", study, series=f"{study}.5")
    assert reject(sandbox, f"{study}/series/{study}.5/instances/{theirs}") == 200
    late = Late(site, study, monkeypatch, at="delete")
    payload(site.delete(study, servers=["dcm4chee"], backup=tmp_path.as_uri()))
    assert (site.on("dcm4chee", study), hidden(site, study)) == (uids | {late.uid}, {theirs})


@pytest.mark.parametrize("kind", ["undo", "move", "backup"])
def test_an_attempt_that_died_between_hiding_and_deleting_deletes_no_late_image(
    site: BatchSite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    study = new_uid()
    server = "msdicom" if kind == "undo" else "dcm4chee"
    uids = site.put(server, study, 2)
    if kind == "undo":
        payload(site.order(study))
    late, died = Late(site, study, monkeypatch, at="delete"), []
    there = cast(Any, hiding(site))
    images = there.images

    def dies(study_uid: str) -> Any:
        if late.came and not died:
            died.append(study_uid)
            raise PacsUnavailable("gone", server_name="dcm4chee", server_type="dcm4chee")
        return images(study_uid)

    monkeypatch.setattr(there, "images", dies)
    if kind == "undo":
        undo(site)
    elif kind == "move":
        payload(site.order(study, from_server="dcm4chee", to_server="msdicom", delete_source=True))
    else:
        payload(site.delete(study, servers=["dcm4chee"], backup=tmp_path.as_uri()))
    assert died
    if kind == "move":
        assert (site.ends("verify"), site.on("msdicom", study)) == (["verified"], uids | {late.uid})
    elif kind == "undo":
        assert (site.ends("undo"), site.on("dcm4chee", study)) == (["undone"], {late.uid})
    else:
        assert (site.ends(), site.on("dcm4chee", study)) == (["invalid_request"], uids | {late.uid})


@pytest.mark.parametrize("kind", ["undo", "move", "backup", "hide", "upload"])
def test_an_archive_that_does_not_say_what_it_hides_is_asked_image_by_image(
    site: BatchSite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    study = new_uid()
    monkeypatch.setattr(hiding(site), "images", lambda _: None)
    uids = site.put("msdicom" if kind == "undo" else "dcm4chee", study, 2)
    if kind == "undo":
        payload(site.order(study))
    late = Late(site, study, monkeypatch, at="delete")
    if kind == "undo":
        undo(site)
        assert (site.ends("undo"), site.on("dcm4chee", study)) == (["undone"], {late.uid})
    elif kind == "move":
        payload(site.order(study, from_server="dcm4chee", to_server="msdicom", delete_source=True))
        assert (site.ends("verify"), site.on("msdicom", study)) == (["verified"], uids | {late.uid})
    elif kind == "backup":
        payload(site.delete(study, servers=["dcm4chee"], backup=tmp_path.as_uri()))
        assert (site.ends(), site.on("dcm4chee", study)) == (["invalid_request"], {late.uid})
    else:
        late.came = True
        payload(site.delete(study, servers=["dcm4chee"], permanent=False))
        assert (site.ends(), site.on("dcm4chee", study)) == (["hidden"], set())


# On servers that cannot hide: the study is looked at again directly before


@pytest.mark.parametrize("kind", ["undo", "move", "backup"])
def test_where_nothing_can_be_hidden_an_image_that_came_before_the_last_look_stays(
    site: BatchSite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    study, late, came = new_uid(), new_uid(), list[str]()
    uids = site.put("dcm4chee" if kind == "undo" else "msdicom", study, 2)
    module: Any = deletions if kind == "backup" else study_migration
    name = {"undo": "remove_images", "move": "remove_study", "backup": "remove_backed_up"}[kind]
    remove = getattr(module, name)

    def after_another(*args: Any, **more: Any) -> Any:
        if not came:
            came.append(late)
            site.put_file("msdicom", image(study, series=f"{study}.9", sop=late, side=8))
        return remove(*args, **more)

    if kind == "undo":
        payload(site.order(study, from_server="dcm4chee", to_server="msdicom"))
    monkeypatch.setattr(module, name, after_another)
    if kind == "undo":
        undo(site)
        assert (site.ends("undo"), site.on("msdicom", study)) == (["undone"], {late})
        assert site.rows[0].passes["undo"].result["left"] == 1
    elif kind == "move":
        payload(site.order(study, delete_source=True))
        assert (site.ends("verify"), site.on("msdicom", study)) == (["verified"], set())
        assert site.on("dcm4chee", study) == uids | {late}
    else:
        payload(site.delete(study, servers=["msdicom"], backup=tmp_path.as_uri()))
        assert (site.ends(), site.on("msdicom", study)) == (["invalid_request"], uids | {late})


# A rejection that stops half-way


@pytest.mark.parametrize("servers", [None, ["dcm4chee"]], ids=["everywhere", "named"])
def test_a_deletion_whose_rejection_stopped_half_way_is_completed(
    site: BatchSite, sandbox: SandboxPart, servers: list[str] | None
) -> None:
    study = new_uid()
    site.put("dcm4chee", study, 2)
    sandbox.set_fault("dcm4chee", "reject", crash_in_reject=True, times=1)
    message = {"level": "study", "uid": study, **({"servers": servers} if servers else {})}
    done = payload(site.see_to_its_end("pacs.delete", delete, new_uid(), message))
    assert "deleted" in [one["status"] for one in done["servers"]]
    assert shown_by(sandbox, study, "AS_RECEIVED") == 0


@pytest.mark.parametrize("kind", ["batch", "backup", "move", "undo"])
def test_batches_complete_a_rejection_that_stopped_half_way(
    site: BatchSite, sandbox: SandboxPart, tmp_path: Path, kind: str
) -> None:
    study = new_uid()
    uids = site.put("msdicom" if kind == "undo" else "dcm4chee", study, 2)
    if kind == "undo":
        payload(site.order(study))
    sandbox.set_fault("dcm4chee", "reject", crash_in_reject=True, times=1)
    if kind == "undo":
        undo(site)
        assert site.ends("undo") == ["undone"]
    elif kind == "move":
        payload(site.order(study, from_server="dcm4chee", to_server="msdicom", delete_source=True))
        assert (site.ends("verify"), site.on("msdicom", study)) == (["verified"], uids)
    else:
        more = {"backup": tmp_path.as_uri()} if kind == "backup" else {}
        payload(site.delete(study, servers=["dcm4chee"], **more))
        assert site.ends() == ["deleted"]
    assert shown_by(sandbox, study, "AS_RECEIVED") == 0


def half_way(sandbox: SandboxPart, path: str) -> None:
    sandbox.set_fault("dcm4chee", "reject", crash_in_reject=True, times=1)
    assert reject(sandbox, path) == 500


def test_a_series_that_was_left_half_way_holds_no_deletion_of_its_study(site: BatchSite, sandbox: SandboxPart) -> None:
    study = new_uid()
    site.put("dcm4chee", study, 2)
    site_put(site, "dcm4chee", study, series=f"{study}.2")
    half_way(sandbox, f"{study}/series/{study}.2")
    deletion = site.fleet["dcm4chee"].delete(Found("study", study), permanent=True)
    assert (deletion.fate, shown_by(sandbox, study, "AS_RECEIVED")) == (DeletionFate.DELETED, 0)


def test_a_rejection_that_is_completed_hides_and_shows_nothing_else(site: BatchSite, sandbox: SandboxPart) -> None:
    study = new_uid()
    uids = site.put("dcm4chee", study, 2)
    unsafe = site_put(site, "dcm4chee", study, series=f"{study}.2")
    half_way(sandbox, f"{study}/series/{study}.1")
    assert reject(sandbox, f"{study}/series/{study}.2", SAFETY) == 200
    late = site_put(site, "dcm4chee", study, series=f"{study}.3")
    assert hiding(site).delete_hidden(study).fate is DeletionFate.REFUSED
    assert cast(Any, hiding(site)).complete(study) is True
    assert (hidden(site, study), shown_by(sandbox, study, "IOCM_PAT_SAFETY")) == (uids, 1), unsafe
    assert late in site.on("dcm4chee", study)
    assert hiding(site).delete_hidden(study).fate is DeletionFate.REFUSED


def test_a_study_that_is_not_hidden_is_not_completed(site: BatchSite, sandbox: SandboxPart) -> None:
    study = new_uid()
    uids = site.put("dcm4chee", study, 2)
    assert cast(Any, hiding(site)).complete(study) is False
    assert hiding(site).delete_hidden(study).fate is DeletionFate.REFUSED
    assert hiding(site).delete_hidden(new_uid()).fate is DeletionFate.NOT_THERE
    assert (site.on("dcm4chee", study), shown_by(sandbox, study, "IOCM_EXPIRED")) == (uids, 0)
