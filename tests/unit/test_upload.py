"""How one upload ends when its servers, its source or its ledger are not as they were at the attempt before.

The real upload and ledger (on fakeredis); the servers and the source are stand-ins that do what the test says.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import fakeredis
import pydicom
import pytest

from courier.errors import (
    CourierError,
    ImageAlreadyExists,
    NotFound,
    PacsRejected,
    PacsUnauthorized,
    PacsUnavailable,
    SourceDenied,
    StudyConflict,
)
from courier.ledger.jobs import PREFIX, Ledger
from courier.settings import ServerSettings, Settings
from sandbox.synthetic import image, new_uid
from worker.dicom.fingerprints import Rewrites
from worker.jobs.attempt import Heartbeat
from worker.jobs.runner import Deferred, Done, Failed, JobResult, execute
from worker.jobs.services import Services
from worker.jobs.upload import MAX_METADATA_BYTES, upload
from worker.pacs.fleet import Fleet
from worker.pacs.protocol import Fate, Found, Outcome, Part, Retrieved
from worker.storage.sources import Fetched

NO_ANSWER = PacsUnavailable("No answer.", server_name="a", details={"phase": "answer"})


class FakePacs:
    """A PACS as far as an upload asks it. What is in ``fails`` is raised by the call of that name.

    With ``late`` set, what is pushed is kept there and arrives when the test says so.
    """

    keeps_bytes = True
    hiding = None
    rewrites = Rewrites()

    def __init__(self, name: str) -> None:
        self.server = ServerSettings(name=name, type="dicomweb", url=f"http://{name}")
        self.images: dict[str, Found] = {}
        self.files: dict[str, bytes] = {}
        self.fails: dict[str, CourierError] = {}
        self.more_metadata: dict[str, Any] = {}
        self.loses_the_answer = self.says_it_is_storing = False
        self.late: list[Found] | None = None
        self.finds = 0
        self.retrieved = 0

    def find(self, level: str, uid: str) -> list[Found]:
        self.finds += level == "image"
        self._perhaps("find")
        found = [one for one in self.images.values() if uid in (one.study_instance_uid, one.sop_instance_uid)]
        return [replace(one, level=cast(Any, level)) for one in found]

    def store(self, parts: Sequence[Part]) -> list[Outcome]:
        self._perhaps("store")
        (part,) = parts
        uid = part.instance.sop_instance_uid
        if uid in self.images:
            return [Outcome(uid, Fate.ALREADY_THERE)]
        self.files[uid] = _bytes(part)
        if self.late is not None:
            self.late.append(_received(part))
            if self.says_it_is_storing:
                return [Outcome(uid, Fate.PENDING)]
            raise NO_ANSWER
        self.keep(_received(part))
        if self.loses_the_answer:
            raise NO_ANSWER
        return [Outcome(uid, Fate.STORED)]

    def keep(self, one: Found) -> None:
        self.images[str(one.sop_instance_uid)] = one

    @contextmanager
    def retrieve(self, found: Found) -> Iterator[Iterator[Retrieved]]:
        self._perhaps("retrieve")
        self.retrieved += 1
        yield iter([Retrieved(None, iter([self.files[str(found.sop_instance_uid)]]))])

    def metadata(self, found: Found) -> list[dict[str, Any]]:
        self._perhaps("metadata")
        return [{"00080018": {"vr": "UI", "Value": [found.sop_instance_uid]}, **self.more_metadata}]

    def _perhaps(self, call: str) -> None:
        if call in self.fails:
            raise self.fails[call]


def _bytes(part: Part) -> bytes:
    with part.open() as file:
        return file.read()


def _received(part: Part) -> Found:
    one = part.instance
    return Found("image", one.study_instance_uid, one.series_instance_uid, one.sop_instance_uid)


@dataclass
class FakeSource:
    """The source: an image or an error by its URL."""

    there: dict[str, bytes | CourierError] = field(default_factory=dict)

    def fetch(self, url: str) -> Fetched:
        content = self.there[url]
        if isinstance(content, CourierError):
            raise content
        return Fetched(io.BytesIO(content), len(content), hashlib.sha256(content).hexdigest(), url)


class SingleUploadBench:
    """A worker's desk with servers ``a`` and ``b``, at which a job has two attempts."""

    def __init__(self, client: fakeredis.FakeRedis, *names: str) -> None:
        self.client, self.ledger = client, Ledger(client)
        self.servers = {name: FakePacs(name) for name in names}
        self.files = FakeSource()
        self.services = Services(
            settings=Settings.model_validate({"jobs": {"max_attempts": 2, "backoff_base_s": 0.01}}),
            ledger=self.ledger,
            sources=cast(Any, self.files),
            fleet=Fleet(cast(Any, list(self.servers.values()))),
            rng=random.Random(1),
        )

    def execute(self, job_id: str, url: str = "", **job: Any) -> JobResult:
        """One attempt at the job, for which it is time."""
        self.client.zadd(f"{PREFIX}due", {job_id: 0})
        self.ledger.sweep()
        message = {"image_url": url or job_id, **job}
        heartbeat = Heartbeat(self.ledger, lambda *_: None)
        return execute(
            upload, task="pacs.upload", job_id=job_id, message=message, services=self.services, heartbeat=heartbeat
        )


@pytest.fixture
def client() -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield client


@pytest.fixture
def bench(client: fakeredis.FakeRedis) -> SingleUploadBench:
    return SingleUploadBench(client, "a", "b")


def stored(result: JobResult) -> dict[str, Any]:
    assert isinstance(result, Done), result
    return result.payload


def refused(result: JobResult) -> CourierError:
    assert isinstance(result, Failed), result
    return result.error


@pytest.mark.parametrize(
    "error", [PacsRejected("a answered 406."), PacsUnauthorized("a answered 403."), PacsUnavailable("Away.")]
)
def test_what_is_stored_ends_as_stored_whatever_its_server_says_of_the_metadata(
    bench: SingleUploadBench, error: CourierError
) -> None:
    bench.files.there["j"] = image(new_uid())
    bench.servers["a"].fails["metadata"] = error
    result = bench.execute("j")
    if isinstance(result, Deferred):  # time might have cured it
        result = bench.execute("j")
    payload = stored(result)
    assert (payload["status"], payload["server_name"]) == ("stored", "a")
    assert (payload["metadata"], payload["warnings"]) == ({}, ["metadata_unavailable"])


@pytest.mark.parametrize("error", [PacsRejected("a answered 406."), PacsUnavailable("Away.")])
def test_what_is_known_to_be_stored_ends_as_stored_though_its_server_is_silent_ever_after(
    bench: SingleUploadBench, error: CourierError
) -> None:
    bench.files.there["j"] = image(new_uid())
    bench.servers["a"].fails["metadata"] = PacsUnavailable("Away.")
    assert isinstance(bench.execute("j"), Deferred)
    bench.servers["a"].fails["find"] = error
    assert stored(bench.execute("j"))["warnings"] == ["metadata_unavailable"]


@pytest.mark.parametrize("frames", [1, 40_000, 100_000])
def test_the_metadata_in_a_result_are_cut_down_to_uids_above_a_bound(bench: SingleUploadBench, frames: int) -> None:
    positions = {"vr": "SQ", "Value": [{"00209157": {"vr": "UL", "Value": [1, frame]}} for frame in range(frames)]}
    bench.servers["a"].more_metadata = {"52009230": positions}
    bench.files.there["j"] = image(new_uid())
    payload = stored(bench.execute("j"))
    is_small = frames == 1
    assert ("52009230" in payload["metadata"]) == is_small
    assert payload["metadata"]["00080018"]["Value"] == [payload["image_uid"]]
    assert payload["warnings"] == ([] if is_small else ["metadata_reduced_to_uids"])
    assert len(json.dumps(payload)) < MAX_METADATA_BYTES


def with_other_bytes(body: bytes) -> bytes:
    ds = pydicom.dcmread(io.BytesIO(body))
    ds.PatientComments = "another file with the same UIDs"
    copy = io.BytesIO()
    ds.save_as(copy)
    return copy.getvalue()


def sop_of(body: bytes) -> str:
    return str(pydicom.dcmread(io.BytesIO(body)).SOPInstanceUID)


def dead_after_an_uncertain_push(bench: SingleUploadBench, job_id: str, body: bytes) -> None:
    """What it pushed has not arrived, but nobody told it so."""
    bench.files.there[job_id] = body
    bench.servers["a"].fails["store"] = NO_ANSWER
    assert isinstance(bench.execute(job_id), Deferred)
    assert refused(bench.execute(job_id)).code == "pacs_unavailable"
    del bench.servers["a"].fails["store"]


def test_a_replayed_letter_does_not_take_what_another_job_has_stored_since_for_its_own(
    bench: SingleUploadBench,
) -> None:
    body = image(new_uid())
    dead_after_an_uncertain_push(bench, "dead", body)
    bench.files.there["other"] = with_other_bytes(body)
    theirs = stored(bench.execute("other"))
    bench.ledger.replay("dead")
    error = refused(bench.execute("dead"))
    assert isinstance(error, ImageAlreadyExists)
    assert (error.server_name, error.details["same_bytes"]) == ("a", False)
    assert (error.details["sha256"], error.details["stored_sha256"]) == (
        hashlib.sha256(body).hexdigest(),
        theirs["sha256"],
    )
    receipt = bench.ledger.receipt(sop_of(body))
    assert receipt is not None
    assert (receipt.job_id, receipt.sha256) == ("other", theirs["sha256"])


def test_a_replayed_letter_waits_for_whoever_has_its_image_now(bench: SingleUploadBench) -> None:
    body = image(new_uid())
    dead_after_an_uncertain_push(bench, "dead", body)
    bench.files.there["other"] = body
    bench.servers["a"].fails["store"] = NO_ANSWER
    assert isinstance(bench.execute("other"), Deferred)
    bench.ledger.replay("dead")
    finds = bench.servers["a"].finds
    assert isinstance(bench.execute("dead"), Deferred)
    assert bench.servers["a"].finds == finds, "whatever it found might be the other's"
    del bench.servers["a"].fails["store"]
    assert stored(bench.execute("other"))["server_name"] == "a"
    assert refused(bench.execute("dead")).details["same_bytes"] is True


def test_a_replayed_letter_whose_push_has_arrived_ends_as_stored(bench: SingleUploadBench) -> None:
    bench.files.there["j"] = image(new_uid())
    server = bench.servers["a"]
    server.loses_the_answer = True
    assert isinstance(bench.execute("j"), Deferred)
    server.fails["find"] = PacsUnavailable("Away.")
    assert refused(bench.execute("j")).code == "pacs_unavailable"
    server.fails.clear()
    bench.ledger.replay("j")
    assert stored(bench.execute("j"))["status"] == "stored"


def test_a_receipt_of_an_image_that_somebody_has_deleted_since_does_not_make_a_push_another_jobs(
    bench: SingleUploadBench,
) -> None:
    body = image(new_uid())
    bench.files.there.update(first=body, second=with_other_bytes(body))
    stored(bench.execute("first"))
    bench.servers["a"].images.clear()  # not by a job
    bench.servers["a"].loses_the_answer = True
    assert isinstance(bench.execute("second"), Deferred)
    assert bench.ledger.receipt(sop_of(body)) is None
    payload = stored(bench.execute("second"))
    receipt = bench.ledger.receipt(sop_of(body))
    assert receipt is not None
    assert (receipt.job_id, receipt.sha256) == ("second", payload["sha256"])


def after_a_push_that_may_still_arrive(bench: SingleUploadBench) -> list[Found]:
    """The job ``j`` has pushed to ``a``, which has not stored it yet and has not answered in time."""
    bench.files.there["j"] = image(new_uid())
    bench.servers["a"].late = late = []
    assert isinstance(bench.execute("j"), Deferred)
    return late


def test_a_refusal_after_a_push_that_may_still_arrive_names_the_server_to_look_on(bench: SingleUploadBench) -> None:
    (image_of_it,) = after_a_push_that_may_still_arrive(bench)
    bench.files.there["j"] = SourceDenied("The source answered 403.", details={"status": 403})
    error = refused(bench.execute("j"))
    assert isinstance(error, SourceDenied)
    assert error.message == (
        "The source answered 403; an earlier push of the image to a may still arrive, so look for it there."
    )
    assert (error.details["status"], error.details["may_be_on"]) == (403, "a")
    assert error.details["image_uid"] == image_of_it.sop_instance_uid


def test_a_cancelled_job_does_not_say_that_nothing_was_pushed_if_something_was(bench: SingleUploadBench) -> None:
    after_a_push_that_may_still_arrive(bench)
    bench.ledger.cancel("j")
    bench.files.there["j"] = AssertionError("it must not be fetched again")  # type: ignore[assignment]
    error = refused(bench.execute("j"))
    assert (error.code, error.details["may_be_on"]) == ("cancelled", "a")
    assert error.message == (
        "The job was cancelled; an earlier push of the image to a may still arrive, so look for it there."
    )


def test_a_job_that_is_cancelled_before_its_first_push_says_so(bench: SingleUploadBench) -> None:
    bench.files.there["j"] = image(new_uid())
    bench.servers["a"].fails["find"] = PacsUnavailable("Away.")
    assert isinstance(bench.execute("j"), Deferred)
    bench.ledger.cancel("j")
    error = refused(bench.execute("j"))
    assert (error.message, error.details) == ("The job was cancelled before it began.", {"source": "j"})


def test_what_arrives_while_its_job_is_being_refused_is_stored(bench: SingleUploadBench) -> None:
    (image_of_it,) = after_a_push_that_may_still_arrive(bench)

    class Slow(FakeSource):
        def fetch(self, url: str) -> Fetched:
            bench.servers["a"].keep(image_of_it)
            raise SourceDenied("The source answered 403.")

    bench.services = replace(bench.services, sources=cast(Any, Slow()))
    payload = stored(bench.execute("j"))
    assert (payload["status"], payload["server_name"], payload["attempts"]) == ("stored", "a", 2)


def test_a_claim_on_a_server_that_has_left_the_settings_binds_nobody(client: fakeredis.FakeRedis) -> None:
    study = new_uid()
    before, after = SingleUploadBench(client, "old", "b"), SingleUploadBench(client, "new", "b")
    before.files.there["j0"] = image(study)
    stored(before.execute("j0"))
    before.servers["old"].images.clear()  # not by a job
    assert before.ledger.claimed_server(study) == "old"
    after.files.there.update(j1=image(study), j2=image(study))
    after.servers["b"].fails["find"] = PacsUnavailable("Away.")
    assert isinstance(after.execute("j1"), Deferred)
    assert after.ledger.claimed_server(study) == "old", "the server that is away may have the study"
    del after.servers["b"].fails["find"]
    payload = stored(after.execute("j1"))
    assert (payload["server_name"], payload["study_action"], payload["route"]["reason"]) == (
        "new",
        "created",
        "new_study",
    )
    assert after.ledger.claimed_server(study) == "new"
    assert stored(after.execute("j2", server="new"))["study_action"] == "updated"


def test_jobs_that_find_a_void_claim_agree_on_one_server(client: fakeredis.FakeRedis) -> None:
    ledger = Ledger(client)
    ledger.claim_study("1.2", server="old", job_id="j0")
    claims = [ledger.claim_study("1.2", server=name, job_id=name, among=["a", "b"]) for name in ("b", "a")]
    assert [(claim.server, claim.first) for claim in claims] == [("b", True), ("b", False)]
    assert ledger.placed() == {"old": 0, "b": 1}


# --- a claim goes with its reason ---------------------------------------------------------------------------------


def refuse_all(bench: SingleUploadBench, name: str, error: CourierError | None = None) -> None:
    bench.servers[name].fails["store"] = error or PacsRejected(f"{name} takes no such image.", server_name=name)


@pytest.mark.parametrize(
    "error",
    [PacsRejected("No such SOP class."), StudyConflict("Another patient."), PacsRejected("The server answered 415.")],
)
def test_a_claim_under_which_nothing_was_stored_goes_with_the_job_that_was_refused(
    bench: SingleUploadBench, error: CourierError
) -> None:
    study = new_uid()
    bench.files.there.update(bad=image(study), good=image(study))
    refuse_all(bench, "a", error)
    assert refused(bench.execute("bad")).code == error.code
    assert bench.ledger.claimed_server(study) is None
    assert bench.ledger.placed() == {"a": 0}
    payload = stored(bench.execute("good", server="b"))
    assert (payload["server_name"], payload["route"]["reason"], payload["study_action"]) == (
        "b",
        "requested",
        "created",
    )
    assert bench.ledger.placed() == {"a": 0, "b": 1}


def test_a_claim_goes_with_a_job_that_is_cancelled_while_it_waits_to_push(bench: SingleUploadBench) -> None:
    study = new_uid()
    bench.files.there["j"] = image(study)
    bench.servers["a"].fails["store"] = PacsUnavailable("Away.", server_name="a", details={"phase": "connect"})
    assert isinstance(bench.execute("j"), Deferred)
    assert bench.ledger.claimed_server(study) == "a"
    bench.ledger.cancel("j")
    assert refused(bench.execute("j")).code == "cancelled"
    assert bench.ledger.claimed_server(study) is None


def test_a_claim_goes_with_a_job_whose_source_is_gone_at_its_second_attempt(bench: SingleUploadBench) -> None:
    study = new_uid()
    bench.files.there["j"] = image(study)
    bench.servers["a"].fails["store"] = PacsUnavailable("Away.", server_name="a", details={"phase": "connect"})
    assert isinstance(bench.execute("j"), Deferred)
    bench.files.there["j"] = SourceDenied("The source answered 403.")
    assert refused(bench.execute("j")).code == "source_denied"
    assert bench.ledger.claimed_server(study) is None


def test_a_claim_goes_with_a_job_whose_source_gives_an_image_of_another_study_now(bench: SingleUploadBench) -> None:
    study, other = new_uid(), new_uid()
    bench.files.there["j"] = image(study)
    bench.servers["a"].fails["store"] = PacsUnavailable("Away.", server_name="a", details={"phase": "connect"})
    assert isinstance(bench.execute("j"), Deferred)
    del bench.servers["a"].fails["store"]
    bench.files.there["j"] = image(other)
    assert stored(bench.execute("j"))["study_uid"] == other
    assert (bench.ledger.claimed_server(study), bench.ledger.claimed_server(other)) == (None, "a")


def test_a_claim_stays_while_another_job_stores_under_it_and_goes_with_the_last_one(bench: SingleUploadBench) -> None:
    study = new_uid()
    bench.files.there.update(first=image(study), second=image(study), third=image(study))
    second = bench.servers["a"]
    refuse_all(bench, "a")
    store = second.store

    def while_it_pushes(parts: Sequence[Part]) -> list[Outcome]:
        second.store = store  # type: ignore[method-assign]
        assert refused(bench.execute("first")).code == "pacs_rejected"
        assert bench.ledger.claimed_server(study) == "a", "the second job is pushing under it"
        error = refused(bench.execute("third", server="b"))
        assert (error.code, error.server_name) == ("study_conflict", "a")
        return store(parts)

    second.store = while_it_pushes  # type: ignore[method-assign]
    assert refused(bench.execute("second")).code == "pacs_rejected"
    assert bench.ledger.claimed_server(study) is None


def test_a_claim_stays_when_a_push_may_still_arrive_and_goes_when_its_dead_letter_is_purged(
    bench: SingleUploadBench,
) -> None:
    body = image(new_uid())
    study = str(pydicom.dcmread(io.BytesIO(body)).StudyInstanceUID)
    dead_after_an_uncertain_push(bench, "dead", body)
    bench.files.there.update(bad=image(study), asked=image(study))
    refuse_all(bench, "a")
    assert refused(bench.execute("bad")).code == "pacs_rejected"
    assert bench.ledger.claimed_server(study) == "a"
    assert refused(bench.execute("asked", server="b")).code == "study_conflict"
    assert bench.ledger.purge("dead")
    assert bench.ledger.claimed_server(study) is None
    bench.files.there["again"] = image(study)
    assert stored(bench.execute("again", server="b"))["server_name"] == "b"


def test_a_refused_job_whose_earlier_push_may_still_arrive_leaves_its_claim(bench: SingleUploadBench) -> None:
    (image_of_it,) = after_a_push_that_may_still_arrive(bench)
    bench.files.there["j"] = SourceDenied("The source answered 403.")
    assert refused(bench.execute("j")).details["may_be_on"] == "a"
    assert bench.ledger.claimed_server(image_of_it.study_instance_uid) == "a"


def after_its_server_said_that_it_is_storing_it(bench: SingleUploadBench) -> Found:
    bench.servers["a"].says_it_is_storing = True
    (image_of_it,) = after_a_push_that_may_still_arrive(bench)
    return image_of_it


@pytest.mark.parametrize("until", ["it waits", "it is a dead letter"])
def test_a_study_whose_server_says_that_it_is_storing_an_image_of_it_stays_there(
    bench: SingleUploadBench, until: str
) -> None:
    being_stored = after_its_server_said_that_it_is_storing_it(bench)
    study = being_stored.study_instance_uid
    bench.files.there.update(asked=image(study), other=image(study))
    if until == "it is a dead letter":
        assert refused(bench.execute("j")).code == "pacs_unavailable"
    error = refused(bench.execute("asked", server="b"))
    assert (error.code, error.details["requested"], error.server_name) == ("study_conflict", "b", "a")
    bench.servers["a"].keep(being_stored)
    bench.servers["a"].late = None
    assert stored(bench.execute("other"))["server_name"] == "a"
    assert not bench.servers["b"].images


def test_a_job_that_is_cancelled_while_its_server_is_storing_its_image_says_where_to_look(
    bench: SingleUploadBench,
) -> None:
    being_stored = after_its_server_said_that_it_is_storing_it(bench)
    bench.ledger.cancel("j")
    error = refused(bench.execute("j"))
    assert (error.code, error.details["may_be_on"]) == ("cancelled", "a")
    assert bench.ledger.claimed_server(being_stored.study_instance_uid) == "a"


def test_an_image_that_has_arrived_as_its_server_said_exists_already(bench: SingleUploadBench) -> None:
    being_stored = after_its_server_said_that_it_is_storing_it(bench)
    bench.servers["a"].keep(being_stored)
    error = refused(bench.execute("j"))
    assert (error.code, error.details["same_bytes"]) == ("image_already_exists", True)
    assert "may_be_on" not in error.details


def of_version_0_1(bench: SingleUploadBench, study: str, *, claimed_by: str, state: str, checkpoint: str = "") -> None:
    """What its job ``old`` and the claim of its study look like: nobody follows it, and when it asked is not known."""
    bench.client.hset(f"{PREFIX}study:{study}", mapping={"server": "a", "claimed_by": claimed_by, "claimed_ms": "1"})
    bench.client.hset(f"{PREFIX}placed", "a", 1)
    record = {
        "state": state,
        "task": "pacs.upload",
        "fence": "1",
        "lease_ms": "0",
        **({"memo": checkpoint} if checkpoint else {}),
    }
    bench.client.hset(f"{PREFIX}job:old", mapping=record)
    if state != "dead":
        bench.client.sadd(f"{PREFIX}storing:{study}", "old")


@pytest.mark.parametrize(
    ("state", "claimed_by"), [("running", "old"), ("running", "gone"), ("waiting", "gone"), ("dead", "old")]
)
def test_a_claim_of_version_0_1_binds_while_a_job_of_its_may_still_push(
    bench: SingleUploadBench, state: str, claimed_by: str
) -> None:
    study, other = new_uid(), new_uid()
    checkpoint = f'{{"instance":{{"study_instance_uid":"{study}"}},"server":"a","uncertain":true}}'
    of_version_0_1(bench, study, claimed_by=claimed_by, state=state, checkpoint=checkpoint)
    bench.files.there.update(bad=image(study), asked=image(study), elsewhere=image(other))
    refuse_all(bench, "a")
    assert refused(bench.execute("bad")).code == "pacs_rejected"
    assert refused(bench.execute("asked", server="b")).code == "study_conflict"
    assert bench.ledger.claimed_server(study) == "a"
    assert stored(bench.execute("elsewhere", server="b"))["server_name"] == "b"


@pytest.mark.parametrize(("state", "memo"), [("done", ""), ("waiting", '{"uncertain":false}'), ("dead", "")])
def test_a_claim_of_version_0_1_whose_jobs_push_no_more_gives_way(
    bench: SingleUploadBench, state: str, memo: str
) -> None:
    study = new_uid()
    of_version_0_1(bench, study, claimed_by="old", state=state, checkpoint=memo)
    bench.files.there.update(asked=image(study))
    assert stored(bench.execute("asked", server="b"))["server_name"] == "b"
    assert bench.ledger.placed() == {"a": 0, "b": 1}


def test_what_version_0_1_may_just_have_stored_keeps_its_claim_from_a_job_that_has_asked_already(
    bench: SingleUploadBench,
) -> None:
    study = new_uid()
    of_version_0_1(bench, study, claimed_by="old", state="done")
    bench.client.hset(f"{PREFIX}study:{study}", "opened_by", "old")
    bench.files.there.update(asked=image(study), again=image(study))
    assert refused(bench.execute("asked", server="b")).code == "study_conflict"
    assert stored(bench.execute("again", server="b"))["server_name"] == "b"


def test_a_dead_letter_that_pushed_nothing_leaves_no_claim(bench: SingleUploadBench) -> None:
    study = new_uid()
    bench.files.there["j"] = image(study)
    bench.servers["a"].fails["store"] = PacsUnavailable("Away.", server_name="a", details={"phase": "connect"})
    assert isinstance(bench.execute("j"), Deferred)
    assert refused(bench.execute("j")).code == "pacs_unavailable"
    assert bench.ledger.claimed_server(study) is None


def test_a_server_that_refuses_the_account_keeps_no_study_from_another_one(bench: SingleUploadBench) -> None:
    study = new_uid()
    bench.files.there.update(first=image(study), asked=image(study))
    bench.servers["a"].fails["store"] = PacsUnauthorized(
        "a answered 403.", server_name="a", details={"phase": "answer"}
    )
    assert refused(bench.execute("first")).code == "pacs_unauthorized"
    assert stored(bench.execute("asked", server="b"))["server_name"] == "b"
    bench.ledger.replay("first")
    assert stored(bench.execute("first"))["server_name"] == "b"


def test_a_server_that_is_asked_for_is_taken_though_the_study_was_once_stored_on_another(
    bench: SingleUploadBench,
) -> None:
    study = new_uid()
    bench.files.there.update(first=image(study), second=image(study), third=image(study))
    stored(bench.execute("first"))
    bench.servers["a"].images.clear()  # not by a job
    assert stored(bench.execute("second", server="b"))["server_name"] == "b"
    assert (bench.ledger.claimed_server(study), bench.ledger.placed()) == ("b", {"a": 0, "b": 1})
    assert stored(bench.execute("third"))["server_name"] == "b"


def test_a_server_that_is_asked_for_is_taken_from_a_job_that_only_waits(bench: SingleUploadBench) -> None:
    study = new_uid()
    bench.files.there.update(waits=image(study), asked=image(study))
    bench.servers["a"].fails["store"] = PacsUnavailable("Away.", server_name="a", details={"phase": "connect"})
    assert isinstance(bench.execute("waits"), Deferred)
    assert stored(bench.execute("asked", server="b"))["server_name"] == "b"
    del bench.servers["a"].fails["store"]
    assert stored(bench.execute("waits"))["server_name"] == "b"


# --- is it the same file? -----------------------------------------------------------------------------------------


def put_by_others(bench: SingleUploadBench, body: bytes) -> None:
    """Another program has replaced the image on ``a`` (deleted it, then stored this file)."""
    bench.servers["a"].files[sop_of(body)] = body


def with_a_preamble(body: bytes) -> bytes:
    return b"II*\0" + bytes(124) + body[128:]


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("ours_first", [True, False])
def test_same_bytes_is_of_what_the_server_has_now_and_not_of_the_receipt(
    bench: SingleUploadBench, ours_first: bool
) -> None:
    """A job of ours stored one file, another program the other one since; then one of both comes again."""
    first = image(new_uid())
    second = with_other_bytes(first)
    bench.files.there.update(first=first, again=first if ours_first else second)
    stored(bench.execute("first"))
    put_by_others(bench, second)
    details = refused(bench.execute("again")).details
    assert (details["same_bytes"], details["same_bytes_reason"]) == (not ours_first, None)
    assert (details["stored_sha256"], details["receipt_sha256"]) == (digest(second), digest(first))


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ({"ImageLaterality": "L"}, "the two differ in ImageLaterality (0020,0062)."),
        ({"PatientID": "P2"}, "the two differ in PatientID (0010,0020)."),
        (
            {"PatientSex": "F"},
            "the two differ in PatientSex (0010,0040), as b may have added or changed in what it gave back.",
        ),
    ],
)
def test_the_elements_in_which_another_file_differs_are_named_without_their_values(
    bench: SingleUploadBench, then: dict[str, str], said: str
) -> None:
    study, sop = new_uid(), new_uid()
    bench.servers["b"].rewrites = Rewrites(added=frozenset((0x00100020,)), changed=frozenset((0x00100040,)))
    bench.files.there.update(first=image(study, sop=sop), again=image(study, sop=sop))
    stored(bench.execute("first"))
    put_by_others(bench, image(study, sop=sop, **then))
    error = refused(bench.execute("again"))
    assert error.message == f"The image is already on a, with other bytes: {said}"
    assert (error.details["same_bytes"], len(error.details["tags"])) == (False, 1)


def test_another_encoding_has_other_bytes_and_no_elements_to_name(bench: SingleUploadBench) -> None:
    body, file = image(new_uid()), io.BytesIO()
    ds = pydicom.dcmread(io.BytesIO(body))
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    ds.save_as(file, implicit_vr=True, little_endian=True)
    bench.files.there.update(first=body, again=body)
    stored(bench.execute("first"))
    put_by_others(bench, file.getvalue())
    error = refused(bench.execute("again"))
    assert (error.message, "tags" in error.details) == ("The image is already on a, with other bytes.", False)


@pytest.mark.parametrize(
    ("stored_as", "came_as"),
    [
        (lambda body: body, lambda body: body),
        (lambda body: body, lambda body: body[132:]),
        (with_a_preamble, lambda body: body),
        (lambda body: body, with_a_preamble),
        (with_a_preamble, lambda body: body[132:]),
    ],
)
def test_preambles_make_no_difference(bench: SingleUploadBench, stored_as: Any, came_as: Any) -> None:
    body = image(new_uid())
    bench.files.there.update(first=body, again=came_as(body), other=came_as(with_other_bytes(body)))
    stored(bench.execute("first"))
    put_by_others(bench, stored_as(body))
    assert refused(bench.execute("again")).details["same_bytes"] is True
    assert refused(bench.execute("other")).details["same_bytes"] is False


@pytest.mark.parametrize("reason", ["server_rewrites_files", "too_large", "server_did_not_answer", "gone_meanwhile"])
def test_where_bytes_cannot_be_compared_nothing_is_said_of_them_but_why(
    bench: SingleUploadBench, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    body, server = image(new_uid()), bench.servers["a"]
    bench.files.there.update(first=body, again=body)
    stored(bench.execute("first"))
    match reason:
        case "server_rewrites_files":
            server.keeps_bytes = False
        case "too_large":
            monkeypatch.setattr("worker.jobs.same_bytes.COMPARED_BYTES", len(body) - 1)
        case "server_did_not_answer":
            server.fails["retrieve"] = PacsUnavailable("Away.")
        case _:
            server.fails["retrieve"] = NotFound("Gone.")
    error = refused(bench.execute("again"))
    assert [error.details[name] for name in ("same_bytes", "same_bytes_reason", "stored_sha256")] == [
        None,
        reason,
        None,
    ]
    assert error.message == "The image is already on a."
    assert error.details["receipt_sha256"] == digest(body)
    assert server.retrieved == 0


def test_an_image_that_has_grown_too_large_to_be_ours_has_other_bytes(
    bench: SingleUploadBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = image(new_uid())
    bench.files.there.update(first=body, again=body)
    stored(bench.execute("first"))
    put_by_others(bench, body + bytes(1000))
    monkeypatch.setattr("worker.jobs.same_bytes.COMPARED_BYTES", len(body))
    details = refused(bench.execute("again")).details
    assert (details["same_bytes"], details["stored_sha256"]) == (False, None)


def test_a_push_that_was_not_answered_does_not_make_another_programs_file_ours(bench: SingleUploadBench) -> None:
    after_a_push_that_may_still_arrive(bench)
    ours = cast(bytes, bench.files.there["j"])
    (found,) = bench.servers["a"].late or []
    bench.servers["a"].keep(found)
    put_by_others(bench, with_other_bytes(ours))
    error = refused(bench.execute("j"))
    assert (error.code, error.details["same_bytes"]) == ("image_already_exists", False)
    assert error.details["stored_sha256"] == digest(with_other_bytes(ours))


def test_a_push_that_was_not_answered_is_ours_if_its_file_is_there(bench: SingleUploadBench) -> None:
    after_a_push_that_may_still_arrive(bench)
    (found,) = bench.servers["a"].late or []
    bench.servers["a"].keep(found)
    payload = stored(bench.execute("j"))
    assert (payload["status"], bench.servers["a"].retrieved) == ("stored", 1)
