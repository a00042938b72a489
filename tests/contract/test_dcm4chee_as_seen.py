"""What was seen on a running DCM4CHEE and the sandbox imitates: by single uploads, batches and migrations."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pydicom
import pytest
import requests

from courier.batches.store import CHUNK_ITEMS
from courier.errors import CourierError, PacsRejected, PacsUnavailable
from courier.ledger.breakers import CHANGES, Breakers
from courier.ledger.slots import Slots
from courier.settings import ServerSettings
from sandbox.images import ImageServer
from sandbox.processes import HOST, RedisPart, SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import BatchSite, payload
from worker.batches.coordinator import Coordinator
from worker.dicom.instances import identify
from worker.jobs import delete_lock
from worker.jobs.attempt import Attempt
from worker.jobs.delete import delete
from worker.jobs.placement import FAULTS_OF_AN_IMAGE
from worker.jobs.runner import Done, Failed, JobResult
from worker.jobs.servers import status, storage
from worker.jobs.upload import upload
from worker.pacs.dcm4chee import storage_state
from worker.pacs.fleet import Fleet
from worker.pacs.guard import Guard
from worker.pacs.protocol import Found, Pacs
from worker.pacs.registry import connect
from worker.pacs.transport import kind_of_status

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
#: More than an image is blamed after, and no more: where an archive stays in trouble, all of them are made.
ATTEMPTS = 20


class Ward(BatchSite):
    """Both sandbox servers behind breakers that a second failure in a row would open, and a server of files."""

    def __init__(self, redis: RedisPart, sandbox: SandboxPart, images: ImageServer, folder: Path) -> None:
        super().__init__(
            redis.ledger_url,
            sandbox.servers(),
            jobs={"max_attempts": ATTEMPTS, "backoff_base_s": 0.01, "backoff_cap_s": 0.02, "grace_s": 1},
            breaker={"failures": 2, "window_s": 600},
            sources={"allow_hosts": [f"{HOST}:*"], "allow_private_networks": True},
            downloads={"folders": [str(folder)]},
        )
        self.sandbox, self.images = sandbox, images
        self.breakers = Breakers(self.ledger.client, self.settings.breaker)
        guard = Guard(self.breakers, Slots(self.ledger.client), self.settings.servers)
        self.fleet.close()
        self.fleet = Fleet([connect(server, guard) for server in self.settings.servers])

    def file(self, content: bytes) -> str:
        return self.images.put(f"{new_uid()}.dcm", content)

    def send(self, content: bytes, server: str | None = "dcm4chee") -> JobResult:
        message = {"image_url": self.file(content), **({"server": server} if server else {})}
        return self.see_to_its_end("pacs.upload", upload, new_uid(), message)

    def refusal(self, result: JobResult) -> CourierError:
        assert isinstance(result, Failed), result
        return result.error

    @property
    def failures(self) -> int:
        states = self.breakers.read(["dcm4chee", "dcm4chee" + CHANGES])
        return sum(state.failures for state in states.values())

    def pushes(self) -> int:
        return self.sandbox.load()["dcm4chee"]["total"]


@pytest.fixture
def ward(redis: RedisPart, sandbox: SandboxPart, image_server: ImageServer, tmp_path: Path) -> Iterator[Ward]:
    opened = Ward(redis, sandbox, image_server, tmp_path)
    yield opened
    opened.close()


def without_patient_id(study: str, sop: str | None = None) -> bytes:
    ds = pydicom.dcmread(io.BytesIO(image(study, sop=sop, side=8)))
    del ds.PatientID
    file = io.BytesIO()
    ds.save_as(file)
    return file.getvalue()


BAD: dict[str, Callable[[str], bytes]] = {
    "too long": lambda study: image(study, side=8, StudyDescription="x" * 300),
    "NUL": lambda study: image(study, side=8, AccessionNumber="a\0b"),
    "of the series": lambda study: image(study, side=8, SeriesDescription="x" * 300),
    "of the study alone": lambda study: image(study, side=8, StudyID="y" * 256),
}


# 1.1: images without Patient ID


def test_images_without_patient_id_that_arrive_together_are_all_stored(ward: Ward) -> None:
    study = new_uid()
    ward.sandbox.set_fault("dcm4chee", "store", latency_ms=[0, 100])
    uids = [new_uid() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(lambda uid: ward.send(without_patient_id(study, uid)), uids))
    assert all(isinstance(result, Done) for result in verdicts), verdicts
    assert ward.on("dcm4chee", study) == set(uids)


def test_images_without_patient_id_in_two_batches_are_all_stored(ward: Ward) -> None:
    study, uids = new_uid(), [new_uid() for _ in range(4)]
    ward.sandbox.set_fault("dcm4chee", "store", times=1, failure_reason=0xA778)
    urls = [ward.file(without_patient_id(study, uid)) for uid in uids]
    payload(ward.upload(*urls, server="dcm4chee"))
    assert (ward.ends(), ward.on("dcm4chee", study)) == (["stored"] * 4, set(uids))


def test_a_patient_id_of_the_file_that_contradicts_the_study_stays_a_conflict(ward: Ward) -> None:
    ward.sandbox.set_fault("dcm4chee", "store", failure_reason=0xA778)
    error = ward.refusal(ward.send(image(new_uid(), side=8)))
    assert error.payload["code"] == "study_conflict"


# 1.2: what cannot be stored


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_cannot_be_stored_is_refused_at_the_first_attempt(ward: Ward, kind: str) -> None:
    ward.sandbox.load(anew=True)
    error = ward.refusal(ward.send(BAD[kind](new_uid())))
    assert isinstance(error, PacsRejected)
    assert error.details["failure_reason"] == 272
    assert "The archive cannot store" in error.message
    assert "correct the file" in error.message
    assert ward.failures == 0


@pytest.mark.parametrize("kind", [kind for kind in BAD if kind != "of the study alone"])
def test_bad_files_among_good_ones_hold_no_batch(ward: Ward, kind: str) -> None:
    study = new_uid()
    good = [ward.file(image(study, side=8)) for _ in range(4)]
    bad = [ward.file(BAD[kind](study)) for _ in range(3)]
    payload(ward.upload(good[0], *bad, *good[1:], server="dcm4chee"))
    assert sorted(ward.ends()) == ["pacs_rejected"] * 3 + ["stored"] * 4
    assert ward.failures == 0


def test_a_text_that_the_study_has_already_keeps_no_later_image_out(ward: Ward) -> None:
    study = new_uid()
    ward.put_file("dcm4chee", image(study, side=8))
    assert isinstance(ward.send(BAD["of the study alone"](study)), Done)
    assert len(ward.on("dcm4chee", study)) == 2


def test_bad_files_are_named_by_a_migration(ward: Ward) -> None:
    study = new_uid()
    for _ in range(3):
        ward.put_file("msdicom", image(study, side=8))
    ward.put_file("msdicom", image(study, side=8, StudyDescription="x" * 60))
    bad = new_uid()
    ward.put_file("msdicom", image(study, sop=bad, side=8))
    ward.sandbox.set_fault("dcm4chee", "store", fail_image=bad)
    payload(ward.order(study))
    (row,) = ward.rows
    assert row.outcome.code == "pacs_rejected"
    assert bad in row.outcome.message
    assert len(ward.on("dcm4chee", study)) == 4
    assert ward.failures == 0


def test_five_failures_at_one_image_while_others_are_stored_are_its_own(ward: Ward) -> None:
    bad = new_uid()
    ward.sandbox.set_fault("dcm4chee", "store", fail_image=bad)
    job, message = new_uid(), {"image_url": ward.file(image(new_uid(), sop=bad, side=8)), "server": "dcm4chee"}
    looked: list[int] = []

    def others_are_stored() -> bool:
        looked.append(1)
        if len(looked) == 2:
            assert isinstance(ward.send(image(new_uid(), side=8)), Done)
        return False

    error = ward.refusal(ward.see_to_its_end("pacs.upload", upload, job, message, until=others_are_stored))
    assert isinstance(error, PacsRejected)
    assert f"It has failed {FAULTS_OF_AN_IMAGE} times at this image, and stored others meanwhile." in error.message
    assert ward.ledger.read_record(job)["attempts"] == str(FAULTS_OF_AN_IMAGE)
    assert ward.failures == 0


def test_five_failures_while_nothing_else_is_stored_are_the_archives(ward: Ward) -> None:
    bad = new_uid()
    ward.sandbox.set_fault("dcm4chee", "store", fail_image=bad)
    error = ward.refusal(ward.send(image(new_uid(), sop=bad, side=8)))
    assert isinstance(error, PacsUnavailable)
    assert ward.failures == 0


@pytest.mark.parametrize("trouble", ["storage", "storage full", "health"])
def test_an_archive_that_is_in_trouble_blames_no_image(ward: Ward, trouble: str) -> None:
    study, bad = new_uid(), new_uid()
    ward.sandbox.set_fault("dcm4chee", "store", fail_image=bad)
    faults: dict[str, Any] = {
        "storage": {"storage_down": True},
        "storage full": {"disk_full": "272"},
        "health": {"database_down": True},
    }
    ward.sandbox.set_fault("dcm4chee", trouble.split(maxsplit=1)[0], **faults[trouble])
    urls = [ward.file(image(study, side=8)), ward.file(image(study, sop=bad, side=8))]
    payload(ward.upload(*urls, server="dcm4chee", verify=False))
    assert ward.ends() == ["stored", "pacs_unavailable"]


def test_one_bad_image_of_a_batch_is_given_up_after_five_times(ward: Ward) -> None:
    study, bad = new_uid(), new_uid()
    ward.sandbox.set_fault("dcm4chee", "store", fail_image=bad)
    urls = [ward.file(image(study, side=8)), ward.file(image(study, side=8)), ward.file(image(study, sop=bad, side=8))]
    payload(ward.upload(*urls, server="dcm4chee", verify=False))
    assert ward.ends() == ["stored", "stored", "pacs_rejected"]
    assert ward.failures == 0


# 1.3: a deletion that a crash has cut off


@pytest.fixture
def residue(ward: Ward) -> str:
    """A study of two images of which the archive says for ever that it is deleting it."""
    study = new_uid()
    ward.put("dcm4chee", study)
    ward.sandbox.set_fault("dcm4chee", "delete", crash_in_delete=True, times=1)
    with pytest.raises(PacsUnavailable):
        ward.fleet["dcm4chee"].delete(Found("study", study), permanent=True)
    ward.breakers.succeeded("dcm4chee" + CHANGES)
    return study


@pytest.fixture
def minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five minutes pass in a moment."""
    monkeypatch.setattr(delete_lock, "DELETING_S", 0.2)
    monkeypatch.setattr("worker.jobs.runner.ASK_AGAIN_S", 0.1)


def is_residue(error: CourierError) -> bool:
    says = "an administrator of the archive has to clear the study there" in error.message
    return isinstance(error, PacsUnavailable) and error.details["study_deleting"] is True and says


@pytest.mark.usefixtures("minutes")
def test_an_upload_into_a_study_that_is_deleted_for_ever_is_a_dead_letter(ward: Ward, residue: str) -> None:
    error = ward.refusal(ward.send(image(residue, side=8)))
    assert is_residue(error)
    assert error.details["study_uid"] == residue
    (letter,) = ward.ledger.dead_letters()
    assert letter.code == "pacs_unavailable"
    assert 1 < int(ward.ledger.read_record(letter.job_id)["attempts"]) < ATTEMPTS
    assert ward.failures == 0


@pytest.mark.usefixtures("minutes")
def test_a_deletion_that_was_cut_off_is_a_dead_letter_when_it_is_ordered_again(ward: Ward, residue: str) -> None:
    message = {"level": "study", "uid": residue}
    error = ward.refusal(ward.see_to_its_end("pacs.delete", delete, new_uid(), message))
    assert is_residue(error)
    assert {one["status"] for one in error.details["servers"]} == {"not_there", "unavailable"}


@pytest.mark.usefixtures("minutes")
def test_items_of_batches_fail_with_what_an_administrator_has_to_do(ward: Ward, residue: str) -> None:
    good = image(new_uid(), side=8)
    payload(ward.upload(ward.file(image(residue, side=8)), ward.file(good), server="dcm4chee", verify=False))
    assert ward.ends() == ["pacs_unavailable", "stored"]
    assert "an administrator of the archive" in ward.rows[0].outcome.message
    ward.batch = "C"
    ward.put("msdicom", residue)
    payload(ward.order(residue))
    assert ward.ends() == ["pacs_unavailable"]
    assert "an administrator of the archive" in ward.rows[0].outcome.message


def test_a_deletion_that_ends_is_waited_for(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.jobs.runner.ASK_AGAIN_S", 0.1)
    ward.sandbox.set_fault("dcm4chee", "store", failure_reason=0xA77A, times=3)
    study = new_uid()
    assert isinstance(ward.send(image(study, side=8)), Done)
    assert len(ward.on("dcm4chee", study)) == 1


def test_a_job_waits_five_minutes_by_the_clock_of_redis(ward: Ward) -> None:
    for job_id, minutes_ago, over in (("A", 4.9, False), ("B", 5.1, True), ("C", 0, False)):
        since_ms = int((ward.ledger.clock_s() - minutes_ago * 60) * 1000)
        ward.ledger.client.hset(ward.ledger.key("deleting", job_id), "ward 1.2", since_ms)
        error = PacsUnavailable("x", server_name="ward", details={"study_deleting": True, "study_uid": "1.2"})
        assert delete_lock.is_given_up(error, job_id=job_id, ledger=ward.ledger) is over
        assert ("for 5 minutes" in error.message) is over
    other = PacsUnavailable("x", server_name="ward", details={"study_uid": "1.2"})
    assert not delete_lock.is_given_up(other, job_id="B", ledger=ward.ledger, last=True)


# 1.4: what is hidden, and what is elsewhere

QUALITY = "113001%5EDCM"


def hide(ward: Ward, study: str, code: str = QUALITY) -> None:
    """As a person does in the user interface of the archive."""
    url = ward.sandbox.dcm4chee
    assert requests.post(f"{url}/studies/{study}/reject/{code}", timeout=10).status_code == 200


@pytest.fixture
def hidden(ward: Ward) -> tuple[str, str, bytes]:
    """A study, its image, and the file of it; the archive hides it for reasons of quality."""
    study, sop = new_uid(), new_uid()
    content = image(study, sop=sop, side=8)
    ward.put_file("dcm4chee", content)
    hide(ward, study)
    return study, sop, content


def test_an_upload_of_what_was_rejected_for_quality_is_refused_at_once(
    ward: Ward, hidden: tuple[str, str, bytes]
) -> None:
    _, sop, content = hidden
    error = ward.refusal(ward.send(content))
    assert isinstance(error, PacsRejected)
    assert error.details["hidden_by"] == "113001^DCM"
    assert "correct the file" not in error.message
    record = ward.ledger.uid_record(sop)
    assert record.voided is not None
    assert [note.event for note in record.history if note.event == "waiting"] == []


def test_a_batch_names_what_is_hidden_and_stores_the_rest(ward: Ward, hidden: tuple[str, str, bytes]) -> None:
    study, _, content = hidden
    payload(ward.upload(ward.file(content), ward.file(image(study, side=8)), server="dcm4chee"))
    assert ward.ends() == ["pacs_rejected", "stored"]
    assert "113001^DCM" in ward.rows[0].outcome.message


def test_a_migration_does_not_count_what_is_hidden_as_added(ward: Ward, hidden: tuple[str, str, bytes]) -> None:
    study, sop, content = hidden
    ward.put_file("msdicom", content)
    ward.put_file("msdicom", image(study, side=8))
    payload(ward.order(study))
    (row,) = ward.rows
    assert row.outcome.code == "pacs_rejected"
    assert sop in row.outcome.message
    assert "113001^DCM" in row.outcome.message
    assert [sop in copied_set["uids"] for copied_set in row.outcome.result["parcels"]] == [False]


def test_what_a_hide_of_ours_has_hidden_comes_back(ward: Ward) -> None:
    study, sop = new_uid(), new_uid()
    content = image(study, sop=sop, side=8)
    ward.put_file("dcm4chee", content)
    hide(ward, study, "113039%5EDCM")
    assert isinstance(ward.send(content), Done)
    assert ward.on("dcm4chee", study) == {sop}


@pytest.fixture(params=["113001", "113037", "113039"])
def hidden_elsewhere(ward: Ward, request: pytest.FixtureRequest) -> tuple[str, str, str]:
    """An image, a study in which it is hidden, and with which code."""
    sop, other = new_uid(), new_uid()
    ward.put_file("dcm4chee", image(other, sop=sop, side=8))
    hide(ward, other, f"{request.param}%5EDCM")
    return sop, other, f"{request.param}^DCM"


def test_an_upload_of_what_is_hidden_in_another_study_is_refused_at_once(
    ward: Ward, hidden_elsewhere: tuple[str, str, str]
) -> None:
    sop, other, code = hidden_elsewhere
    study = new_uid()
    error = ward.refusal(ward.send(image(study, sop=sop, side=8)))
    assert isinstance(error, PacsRejected)
    assert (error.details["hidden_by"], error.details["in_study_uid"]) == (code, other)
    assert f"hidden in another study, {other}: it was rejected with {code}" in error.message
    assert ward.on("dcm4chee", study) == set()


def test_a_batch_refuses_what_is_hidden_in_another_study_and_stores_the_rest(
    ward: Ward, hidden_elsewhere: tuple[str, str, str]
) -> None:
    sop, other, code = hidden_elsewhere
    study = new_uid()
    payload(ward.upload(*(ward.file(image(study, sop=uid, side=8)) for uid in (sop, new_uid())), server="dcm4chee"))
    assert ward.ends() == ["pacs_rejected", "stored"]
    assert f"another study, {other}: it was rejected with {code}" in ward.rows[0].outcome.message


def test_a_migration_names_what_is_hidden_in_another_study(ward: Ward, hidden_elsewhere: tuple[str, str, str]) -> None:
    sop, other, code = hidden_elsewhere
    study = new_uid()
    ward.put_file("msdicom", image(study, sop=sop, side=8))
    payload(ward.order(study))
    (row,) = ward.rows
    assert row.outcome.code == "pacs_rejected"
    assert f"another study, {other}: it was rejected with {code}" in row.outcome.message


def test_what_a_hide_of_ours_has_hidden_in_another_series_does_not_come_back(ward: Ward) -> None:
    study, sop = new_uid(), new_uid()
    ward.put_file("dcm4chee", image(study, sop=sop, side=8))
    hide(ward, study, "113039%5EDCM")
    error = ward.refusal(ward.send(image(study, sop=sop, series=f"{study}.2", side=8)))
    assert (error.details["hidden_by"], error.details["in_series_uid"]) == ("113039^DCM", f"{study}.1")


@pytest.mark.parametrize("code", ["113037", "113038"])
def test_what_was_rejected_and_may_not_be_stored_again_is_no_fault_of_the_file(ward: Ward, code: str) -> None:
    study, sop = new_uid(), new_uid()
    content = image(study, sop=sop, side=8)
    ward.put_file("dcm4chee", content)
    hide(ward, study, f"{code}%5EDCM")
    error = ward.refusal(ward.send(content))
    assert (error.details["failure_reason"], error.details["hidden_by"]) == (0xA771, "unknown")
    assert "revoke the rejection there first" in error.message
    assert "correct the file" not in error.message


@pytest.mark.parametrize("by", ["no such entity", "no account for it", "it fails"])
def test_where_the_archive_does_not_say_it_stays_open(ward: Ward, hidden: tuple[str, str, bytes], by: str) -> None:
    _, _, content = hidden
    statuses = {"no such entity": 404, "no account for it": 403, "it fails": 500}
    hiding = cast(Any, ward.fleet["dcm4chee"]).hiding
    real = hiding._transport.exchange

    def exchange(request: Any) -> Any:
        if "/aets/AS_RECEIVED/" in request.target:
            kind = kind_of_status(statuses[by])
            raise hiding._transport.error(kind, "no", details={"status": statuses[by]})
        return real(request)

    hiding._transport.exchange = exchange
    error = ward.refusal(ward.send(content))
    assert error.payload["code"] == ("pacs_unavailable" if by == "it fails" else "pacs_misanswered")


@pytest.fixture
def elsewhere(ward: Ward) -> tuple[str, str]:
    """An image, and another study that the archive has it in."""
    sop, other = new_uid(), new_uid()
    ward.put_file("dcm4chee", image(other, sop=sop, side=8))
    return sop, other


def test_an_upload_of_what_is_in_another_study_says_so(ward: Ward, elsewhere: tuple[str, str]) -> None:
    sop, other = elsewhere
    error = ward.refusal(ward.send(image(new_uid(), sop=sop, side=8)))
    assert error.payload["code"] == "image_already_exists"
    assert f"already on dcm4chee, in another study ({other})" in error.message
    assert error.details["in_study_uid"] == other
    assert error.details["viewer_url"].endswith(other)


def test_a_batch_does_not_call_stored_what_is_in_another_study(ward: Ward, elsewhere: tuple[str, str]) -> None:
    sop, other = elsewhere
    study = new_uid()
    urls = [ward.file(image(study, side=8)), ward.file(image(study, sop=sop, side=8)), ward.file(image(study, side=8))]
    payload(ward.upload(*urls, server="dcm4chee"))
    assert ward.ends() == ["stored", "study_conflict", "stored"]
    assert f"in another study: {other}" in ward.rows[1].outcome.message
    assert "holds the study" not in ward.rows[1].outcome.message
    assert "correct its UIDs" in ward.rows[1].outcome.message


def test_a_migration_does_not_count_what_is_in_another_study_as_added(ward: Ward, elsewhere: tuple[str, str]) -> None:
    sop, other = elsewhere
    study = new_uid()
    ward.put_file("msdicom", image(study, sop=sop, side=8))
    (mine,) = ward.put("msdicom", study, 1)
    payload(ward.order(study))
    (row,) = ward.rows
    assert row.outcome.code == "study_conflict"
    assert f"in another study: {other}" in row.outcome.message
    assert [copied_set["uids"] for copied_set in row.outcome.result["parcels"]] == [[mine]]
    assert "grows" not in row.outcome.message


def test_an_image_that_the_archive_keeps_in_another_series_is_told_too(ward: Ward) -> None:
    study, sop = new_uid(), new_uid()
    ward.put_file("dcm4chee", image(study, sop=sop, side=8, series=f"{study}.1"))
    there = identify(io.BytesIO(image(study, sop=sop, side=8, series=f"{study}.2")))
    hiding = ward.fleet["dcm4chee"].hiding
    assert hiding is not None
    outcome = hiding.why_unseen(there)
    assert outcome is not None
    assert outcome.details == {"in_series_uid": f"{study}.1"}


# 1.5: what it says of itself


def entity(ward: Ward, title: str) -> Pacs:
    url = ward.sandbox.dcm4chee.replace("/aets/DCM4CHEE/", f"/aets/{title}/")
    return connect(ServerSettings(name="ward", type="dcm4chee", url=url))


def test_a_status_names_product_and_version_and_has_asked_the_database(ward: Ward) -> None:
    (entry,) = status({"servers": ["dcm4chee"]}, Attempt("j", 1, 1, last=False, ledger=ward.ledger), ward.services)[
        "servers"
    ]
    assert (entry["status"], entry["ready"]) == ("up", True)
    assert (entry["product"], entry["version"]) == ("dcm4chee-arc", "5.35.1")
    ward.sandbox.set_fault("dcm4chee", "health", database_down=True)
    (entry,) = status({"servers": ["dcm4chee"]}, Attempt("j", 1, 1, last=False, ledger=ward.ledger), ward.services)[
        "servers"
    ]
    assert (entry["status"], entry["ready"]) == ("degraded", False)
    assert "its database is in trouble" in entry["note"]


@pytest.mark.parametrize(
    ("title", "says"),
    [
        ("DCM4CHEE", ""),
        ("DCM4CHE", "it has no application entity DCM4CHE; there are "),
        ("AS_RECEIVED", "its application entity AS_RECEIVED takes no images"),
        ("WORKLIST", "its application entity WORKLIST takes no images"),
    ],
)
def test_a_status_says_whether_the_entity_of_the_url_may_store(ward: Ward, title: str, says: str) -> None:
    state = entity(ward, title).state()
    assert state.ready is (not says)
    assert says in state.note


def test_a_storage_beyond_its_threshold_is_full_whatever_its_disk_has(ward: Ward) -> None:
    ward.sandbox.set_fault("dcm4chee", "storage", disk_full="272")
    (entry,) = storage({"servers": ["dcm4chee"]}, Attempt("j", 1, 1, last=False, ledger=ward.ledger), ward.services)[
        "servers"
    ]
    assert (entry["free_bytes"], entry["total_bytes"] > 0, entry["used_bytes"] < entry["total_bytes"]) == (
        0,
        True,
        True,
    )
    assert "full: fs1 takes nothing more, because its threshold is exceeded (107 GB free)" in entry["note"]


@pytest.mark.parametrize(
    ("told", "is_well", "free"),
    [
        ([{}], True, 60),
        ([{"dcmStorageThresholdExceeded": "false"}], True, 60),
        ([{"dcmStorageThresholdExceeded": "2026-11-30T12:00:00"}], False, 0),
        ([{"dcmStorageThresholdExceeded": True}, {"usableSpace": 7}], True, 7),
        ([{"usableSpace": 0}], False, 0),
    ],
)
def test_a_storage_is_well_while_one_of_its_systems_has_room(
    told: list[dict[str, Any]], is_well: bool, free: int
) -> None:
    systems = [{"dcmStorageID": f"fs{n}", "totalSpace": 100, "usableSpace": 60, **one} for n, one in enumerate(told)]
    state = storage_state(systems)
    assert (state.is_well, state.free_bytes) == (is_well, free)


# 1.6: studies that are hidden


def test_a_study_of_which_all_images_are_hidden_is_deleted(ward: Ward) -> None:
    study = new_uid()
    ward.put("dcm4chee", study)
    hide(ward, study, "113039%5EDCM")
    assert ward.on("dcm4chee", study) == set()
    done = payload(
        ward.see_to_its_end("pacs.delete", delete, new_uid(), {"level": "study", "uid": study, "dry_run": True})
    )
    assert [one["status"] for one in done["servers"]] == ["not_there", "would_delete"]
    done = payload(ward.see_to_its_end("pacs.delete", delete, new_uid(), {"level": "study", "uid": study}))
    assert [one["status"] for one in done["servers"]] == ["not_there", "deleted"]
    hiding = ward.fleet["dcm4chee"].hiding
    assert hiding is not None
    assert hiding.find_study(study) == []


def test_what_is_hidden_is_not_there_for_who_hides(ward: Ward) -> None:
    study = new_uid()
    ward.put("dcm4chee", study)
    hide(ward, study, "113039%5EDCM")
    message = {"level": "study", "uid": study, "permanent": False}
    error = ward.refusal(ward.see_to_its_end("pacs.delete", delete, new_uid(), message))
    assert error.payload["code"] == "not_found"


def test_a_batch_deletes_what_is_hidden_and_keeps_no_copy_of_it(ward: Ward) -> None:
    study = new_uid()
    ward.put("dcm4chee", study)
    hide(ward, study, "113039%5EDCM")
    payload(ward.delete(study))
    assert (ward.ends(), ward.ends("verify")) == (["deleted"], ["verified"])


def test_no_backup_is_made_of_what_is_hidden_and_nothing_is_deleted(ward: Ward, tmp_path: Path) -> None:
    study = new_uid()
    ward.put("dcm4chee", study)
    hide(ward, study, "113039%5EDCM")
    payload(ward.delete(study, backup=tmp_path.as_uri()))
    assert ward.ends() == ["invalid_request"]
    assert "hides all images of the study" in ward.rows[0].outcome.message
    hiding = ward.fleet["dcm4chee"].hiding
    assert hiding is not None
    assert hiding.find_study(study) != []


# 1.6: what is hidden, and shown again


def undo(ward: Ward) -> dict[str, Any]:
    return payload(ward.go_on(Coordinator.undo, "undo"))


def reject(ward: Ward, study: str, sop: str, code: str) -> None:
    url = f"{ward.sandbox.dcm4chee}/studies/{study}/series/{study}.1/instances/{sop}"
    assert requests.post(f"{url}/reject/{code}", timeout=10).status_code == 200


def received(ward: Ward, study: str) -> list[dict[str, Any]]:
    """All that the archive has of a study, notes included."""
    url = ward.sandbox.dcm4chee.replace("/aets/DCM4CHEE/", "/aets/AS_RECEIVED/")
    answer = requests.get(f"{url}/studies/{study}/instances", timeout=10)
    return list(answer.json()) if answer.status_code == 200 else []


def notes(ward: Ward, study: str) -> int:
    return sum(one["00080016"]["Value"] == ["1.2.840.10008.5.1.4.1.1.88.59"] for one in received(ward, study))


def test_an_undo_of_a_hide_shows_the_same_images_again(ward: Ward) -> None:
    study = new_uid()
    uids = ward.put("dcm4chee", study, 3)
    payload(ward.delete(study, permanent=False, servers=["dcm4chee"]))
    assert (ward.ends(), ward.ends("verify"), ward.on("dcm4chee", study)) == (["hidden"], ["verified"], set())
    undo(ward)
    assert (ward.ends("undo"), ward.on("dcm4chee", study)) == (["undone"], uids)


@pytest.mark.parametrize("code", ["113037%5EDCM", "113038%5EDCM", "113039%5EDCM"])
def test_what_others_have_hidden_before_stays_hidden(ward: Ward, code: str) -> None:
    study = new_uid()
    uids = ward.put("dcm4chee", study, 3)
    theirs = min(uids)
    reject(ward, study, theirs, code)
    payload(ward.delete(study, permanent=False, servers=["dcm4chee"]))
    undo(ward)
    assert ward.ends("undo") == ["undone"]
    assert ward.on("dcm4chee", study) >= uids - {theirs}
    assert theirs not in ward.on("dcm4chee", study)


def test_a_hide_that_died_halfway_is_undone_too(ward: Ward) -> None:
    study = new_uid()
    uids = ward.put("dcm4chee", study, 2)
    ward.sandbox.set_fault("dcm4chee", "reject", commit_then_drop=True, times=1)
    payload(ward.delete(study, permanent=False, servers=["dcm4chee"]))
    assert (ward.ends(), ward.on("dcm4chee", study)) == (["hidden"], set())
    undo(ward)
    assert ward.on("dcm4chee", study) == uids


def test_a_hide_is_not_undone_where_the_archive_has_deleted_some_since(ward: Ward) -> None:
    study = new_uid()
    ward.put("dcm4chee", study, 2)
    payload(ward.delete(study, permanent=False, servers=["dcm4chee"]))
    late = new_uid()
    ward.put_file("dcm4chee", image(study, sop=late, side=8))
    reject(ward, study, late, "113039%5EDCM")
    undo(ward)
    assert ward.ends("undo") == ["study_conflict"]
    assert "revoke the rejection of its images" in ward.rows[0].passes["undo"].message
    assert ward.on("dcm4chee", study) == set()


def test_a_deletion_for_good_has_no_undo_without_a_backup(ward: Ward) -> None:
    study = new_uid()
    ward.put("dcm4chee", study, 1)
    payload(ward.delete(study, servers=["dcm4chee"]))
    undo(ward)
    assert ward.ends("undo") == ["invalid_request"]


def test_an_undo_of_an_upload_hides_a_study_at_once_also_across_chunks(ward: Ward) -> None:
    study = new_uid()
    number = 2 * CHUNK_ITEMS + 3
    payload(ward.upload(*(ward.file(image(study, side=8)) for _ in range(number)), server="dcm4chee", verify=False))
    assert len(ward.on("dcm4chee", study)) == number
    undo(ward)
    assert set(ward.ends("undo")) == {"undone"}
    assert (ward.on("dcm4chee", study), notes(ward, study)) == (set(), 1)


def test_an_undo_of_an_upload_leaves_what_others_have_stored_in_the_study(ward: Ward) -> None:
    study = new_uid()
    theirs = ward.put("dcm4chee", study, 1)
    payload(ward.upload(*(ward.file(image(study, side=8)) for _ in range(3)), server="dcm4chee", verify=False))
    undo(ward)
    assert (ward.ends("undo"), ward.on("dcm4chee", study)) == (["undone"] * 3, theirs)
    assert notes(ward, study) == 3


def test_what_came_in_between_is_shown_again_and_reported(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    study, late = new_uid(), new_uid()
    payload(ward.upload(*(ward.file(image(study, side=8)) for _ in range(3)), server="dcm4chee", verify=False))
    pacs = cast(Any, ward.fleet["dcm4chee"])
    delete_it = pacs.delete

    def delete_late(found: Found, *, permanent: bool) -> Any:
        ward.put_file("dcm4chee", image(study, sop=late, side=8))
        return delete_it(found, permanent=permanent)

    monkeypatch.setattr(pacs, "delete", delete_late)
    undo(ward)
    assert (ward.ends("undo"), ward.on("dcm4chee", study)) == (["undone"] * 3, {late})
    assert f"shown again: {late}" in ward.rows[0].passes["undo"].message


def test_what_others_have_hidden_of_the_study_before_stays_hidden_by_an_undo(ward: Ward) -> None:
    study, theirs = new_uid(), new_uid()
    ward.put_file("dcm4chee", image(study, sop=theirs, side=8))
    reject(ward, study, theirs, "113039%5EDCM")
    payload(ward.upload(*(ward.file(image(study, side=8)) for _ in range(2)), server="dcm4chee", verify=False))
    undo(ward)
    assert (ward.ends("undo"), ward.on("dcm4chee", study)) == (["undone"] * 2, set())
