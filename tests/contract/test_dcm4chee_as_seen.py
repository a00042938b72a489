"""What was seen on a running DCM4CHEE and the sandbox imitates: by single uploads, batches and migrations."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pydicom
import pytest

from sandbox.images import ImageServer
from sandbox.processes import HOST, RedisPart, SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import Site, payload
from worker.breakers import CHANGES, Breakers
from worker.errors import CourierError, PacsRejected, PacsUnavailable
from worker.jobs.carry import Done, Failed, Verdict
from worker.jobs.placement import FAULTS_OF_AN_IMAGE
from worker.jobs.upload import upload
from worker.pacs.fleet import Fleet
from worker.pacs.guard import Guard
from worker.pacs.registry import connect
from worker.slots import Slots

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ATTEMPTS = 8


class Ward(Site):
    """Both sandbox servers behind breakers that a second failure in a row would open, and a server of files."""

    def __init__(self, redis: RedisPart, sandbox: SandboxPart, images: ImageServer) -> None:
        super().__init__(
            redis.ledger_url,
            sandbox.servers(),
            jobs={"max_attempts": ATTEMPTS, "backoff_base_s": 0.01, "backoff_cap_s": 0.02, "grace_s": 1},
            breaker={"failures": 2, "window_s": 600},
            sources={"allow_hosts": [HOST], "allow_private_networks": True},
        )
        self.sandbox, self.images = sandbox, images
        self.breakers = Breakers(self.ledger.client, self.settings.breaker)
        guard = Guard(self.breakers, Slots(self.ledger.client), self.settings.servers)
        self.fleet.close()
        self.fleet = Fleet([connect(server, guard) for server in self.settings.servers])

    def file(self, content: bytes) -> str:
        return self.images.put(f"{new_uid()}.dcm", content)

    def send(self, content: bytes, server: str | None = "dcm4chee") -> Verdict:
        message = {"image_url": self.file(content), **({"server": server} if server else {})}
        return self.see_to_its_end("pacs.upload", upload, new_uid(), message)

    def refusal(self, verdict: Verdict) -> CourierError:
        assert isinstance(verdict, Failed), verdict
        return verdict.error

    @property
    def failures(self) -> int:
        states = self.breakers.read(["dcm4chee", "dcm4chee" + CHANGES])
        return sum(state.failures for state in states.values())

    def pushes(self) -> int:
        return self.sandbox.load()["dcm4chee"]["total"]


@pytest.fixture
def ward(redis: RedisPart, sandbox: SandboxPart, image_server: ImageServer) -> Iterator[Ward]:
    opened = Ward(redis, sandbox, image_server)
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
    "late text": lambda study: image(study, side=8, StudyID="y" * 256),
}


# 1.1: images without Patient ID


def test_images_without_patient_id_that_arrive_together_are_all_stored(ward: Ward) -> None:
    study = new_uid()
    ward.sandbox.set_mood("dcm4chee", "store", latency_ms=[0, 100])
    uids = [new_uid() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(lambda uid: ward.send(without_patient_id(study, uid)), uids))
    assert all(isinstance(verdict, Done) for verdict in verdicts), verdicts
    assert ward.on("dcm4chee", study) == set(uids)


def test_images_without_patient_id_in_two_batches_are_all_stored(ward: Ward) -> None:
    study, uids = new_uid(), [new_uid() for _ in range(4)]
    ward.sandbox.set_mood("dcm4chee", "store", times=1, failure_reason=0xA778)
    urls = [ward.file(without_patient_id(study, uid)) for uid in uids]
    payload(ward.upload(*urls, server="dcm4chee"))
    assert (ward.told(), ward.on("dcm4chee", study)) == (["stored"] * 4, set(uids))


def test_a_patient_id_of_the_file_that_contradicts_the_study_stays_a_conflict(ward: Ward) -> None:
    ward.sandbox.set_mood("dcm4chee", "store", failure_reason=0xA778)
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


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_among_good_ones_hold_no_batch(ward: Ward, kind: str) -> None:
    study = new_uid()
    good = [ward.file(image(study, side=8)) for _ in range(4)]
    bad = [ward.file(BAD[kind](study)) for _ in range(3)]
    payload(ward.upload(good[0], *bad, *good[1:], server="dcm4chee"))
    assert sorted(ward.told()) == ["pacs_rejected"] * 3 + ["stored"] * 4
    assert ward.failures == 0


def test_bad_files_are_named_by_a_migration(ward: Ward) -> None:
    study = new_uid()
    for _ in range(3):
        ward.put_file("msdicom", image(study, side=8))
    ward.put_file("msdicom", image(study, side=8, StudyDescription="x" * 60))
    bad = new_uid()
    ward.put_file("msdicom", image(study, sop=bad, side=8))
    ward.sandbox.set_mood("dcm4chee", "store", fail_image=bad)
    payload(ward.order(study))
    (row,) = ward.rows
    assert row.settled.code == "pacs_rejected"
    assert bad in row.settled.message
    assert len(ward.on("dcm4chee", study)) == 4
    assert ward.failures == 0


def test_five_failures_at_one_image_while_others_are_stored_are_its_own(ward: Ward) -> None:
    bad = new_uid()
    ward.sandbox.set_mood("dcm4chee", "store", fail_image=bad)
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
    assert ward.ledger.look(job)["attempts"] == str(FAULTS_OF_AN_IMAGE)
    assert ward.failures == 0


def test_five_failures_while_nothing_else_is_stored_are_the_archives(ward: Ward) -> None:
    bad = new_uid()
    ward.sandbox.set_mood("dcm4chee", "store", fail_image=bad)
    error = ward.refusal(ward.send(image(new_uid(), sop=bad, side=8)))
    assert isinstance(error, PacsUnavailable)
    assert ward.failures == 0


@pytest.mark.parametrize("trouble", ["storage", "storage full", "health"])
def test_an_archive_that_is_in_trouble_blames_no_image(ward: Ward, trouble: str) -> None:
    study, bad = new_uid(), new_uid()
    ward.sandbox.set_mood("dcm4chee", "store", fail_image=bad)
    moods: dict[str, Any] = {
        "storage": {"storage_down": True},
        "storage full": {"disk_full": "272"},
        "health": {"database_down": True},
    }
    ward.sandbox.set_mood("dcm4chee", trouble.split(maxsplit=1)[0], **moods[trouble])
    urls = [ward.file(image(study, side=8)), ward.file(image(study, sop=bad, side=8))]
    payload(ward.upload(*urls, server="dcm4chee", verify=False))
    assert ward.told() == ["stored", "pacs_unavailable"]


def test_one_bad_image_of_a_batch_is_given_up_after_five_times(ward: Ward) -> None:
    study, bad = new_uid(), new_uid()
    ward.sandbox.set_mood("dcm4chee", "store", fail_image=bad)
    urls = [ward.file(image(study, side=8)), ward.file(image(study, side=8)), ward.file(image(study, sop=bad, side=8))]
    payload(ward.upload(*urls, server="dcm4chee", verify=False))
    assert ward.told() == ["stored", "stored", "pacs_rejected"]
    assert ward.failures == 0
