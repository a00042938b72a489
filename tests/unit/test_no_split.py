"""No study is ever split: several jobs of one study, interleaved call by call, while servers fail and are left alone,
and while operators pause them and put them into maintenance.

The real upload, ledger, claims and breakers (on fakeredis); the servers are stand-ins whose every call stops until the
test lets it go on, with a fate that Hypothesis draws. Decision 3 says why it has to hold.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast

import fakeredis
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from courier.errors import CourierError, PacsUnavailable
from courier.ledger.breakers import BREAKER, CHANGES, Breakers
from courier.ledger.jobs import PREFIX, Ledger
from courier.ledger.suspensions import Suspensions
from courier.settings import ServerSettings, Settings
from sandbox.synthetic import image, new_uid
from worker.dicom.instances import identify
from worker.jobs.runner import Done, Failed, JobResult, execute
from worker.jobs.services import Services
from worker.jobs.upload import upload
from worker.pacs.fleet import Fleet
from worker.pacs.in_service import suspended, suspended_error
from worker.pacs.protocol import Deletion, DeletionFate, Fate, Found, Outcome, Part, Retrieved
from worker.storage.sources import Fetched

STUDY = new_uid()
IMAGES = [image(STUDY, side=8) for _ in range(8)]
FILES = {identify(io.BytesIO(content)).sop_instance_uid: content for content in IMAGES}
NAMES = ("a", "b")
ENDS = ("image_already_exists", "study_conflict", "pacs_rejected", "cancelled")
#: What becomes of one call: it works, fails before or after its effect, the worker dies before or after it, or, if it
#: is a push, the server refuses the image for good, or says that it is storing it, which it shows later.
FATES = (
    "works",
    "works",
    "fails before",
    "fails after",
    "dies before",
    "dies after",
    "refused",
    "refused",
    "is storing",
)

T = TypeVar("T")


class Killed(BaseException):
    """The worker dies here."""


class InTurn(Fleet):
    """Asks one after the other in the job's own thread, so that the test decides the order."""

    def gather(self, questions: Sequence[Callable[[], T]]) -> list[T | CourierError]:
        answers: list[T | CourierError] = []
        for question in questions:
            try:
                answers.append(question())
            except CourierError as error:
                answers.append(error)
        return answers


@dataclass
class Work:
    """One job's attempt in a thread of its own, which runs only while the test waits for it."""

    current: ClassVar[threading.local] = threading.local()
    go_on: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    stands: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    fate: str = "works"
    result: JobResult | None = None
    killed: bool = False
    over: bool = False
    thread: threading.Thread | None = None

    def start(self, attempt: Callable[[], JobResult]) -> None:
        def run() -> None:
            Work.current.work = self
            try:
                self.result = attempt()
            except Killed:
                self.killed = True
            finally:
                self.over = True
                self.stands.release()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert self.stands.acquire(timeout=30)

    def step(self, fate: str) -> None:
        """Let its next call happen, and what follows up to the one after that."""
        self.fate = fate
        self.go_on.release()
        assert self.stands.acquire(timeout=30)
        if self.over and self.thread:
            self.thread.join()

    def at_a_call(self) -> str:
        self.stands.release()
        assert self.go_on.acquire(timeout=60)
        return self.fate


class InterleavedPacs:
    """A PACS as far as an upload asks it."""

    keeps_bytes = True
    hiding = None

    def __init__(self, name: str, breakers: Breakers) -> None:
        self.server = ServerSettings(name=name, type="dicomweb", url=f"http://{name}")
        self._breakers = breakers
        self.images: set[tuple[str, str]] = set()
        self.arriving: set[tuple[str, str]] = set()
        self.down = False

    def find(self, level: str, uid: str) -> list[Found]:
        def look() -> list[Found]:
            there = [one for one in self.images if one[0 if level == "study" else 1] == uid]
            return [Found(cast(Any, level), study, f"{study}.1", sop) for study, sop in there]

        return self._call(look, changes=False)

    def store(self, parts: Sequence[Part]) -> list[Outcome]:
        uids = (parts[0].instance.study_instance_uid, parts[0].instance.sop_instance_uid)

        def keep() -> list[Outcome]:
            if uids in self.arriving:
                return begin()
            self.images.add(uids)
            return [Outcome(uids[1], Fate.STORED)]

        def refuse() -> list[Outcome]:
            return [Outcome(uids[1], Fate.REJECTED)]

        def begin() -> list[Outcome]:
            self.arriving.add(uids)
            return [Outcome(uids[1], Fate.PENDING)]

        return self._call(keep, changes=True, instead={"refused": refuse, "is storing": begin})

    def delete(self, found: Found, *, permanent: bool) -> Deletion:
        def remove() -> Deletion:
            for kept in (self.images, self.arriving):
                kept.discard((found.study_instance_uid, str(found.sop_instance_uid)))
            return Deletion(DeletionFate.DELETED)

        return self._call(remove, changes=True)

    def arrive(self) -> None:
        self.images |= self.arriving
        self.arriving.clear()

    @contextmanager
    def retrieve(self, found: Found) -> Iterator[Iterator[Retrieved]]:
        yield self._call(lambda: iter([Retrieved(None, iter([FILES[str(found.sop_instance_uid)]]))]), changes=False)

    def metadata(self, found: Found) -> list[dict[str, Any]]:
        return self._call(lambda: [{}], changes=False)

    def _call(
        self, effect: Callable[[], T], *, changes: bool, instead: Mapping[str, Callable[[], T]] | None = None
    ) -> T:
        fate = cast(Work, Work.current.work).at_a_call()
        name = self.server.name
        if (suspension := suspended().get(name)) is not None:
            raise suspended_error(self.server, suspension)
        for breaker in (name, name + CHANGES) if changes else (name,):
            if self._breakers.read([breaker])[breaker].name == "open":
                raise self._error("resting", open_circuit=breaker)
        if self.down:
            raise self._error("connect")
        if fate == "dies before":
            raise Killed
        if fate == "fails before":
            raise self._error("answer")
        if instead and fate in instead:
            return instead[fate]()
        answer = effect()
        if fate == "dies after":
            raise Killed
        if fate == "fails after":
            raise self._error("answer")
        return answer

    def _error(self, phase: str, *, open_circuit: str | None = None) -> PacsUnavailable:
        error = PacsUnavailable("No.", server_name=self.server.name, server_type="dicomweb", details={"phase": phase})
        error.open_circuit, error.is_attempt = open_circuit, open_circuit is None
        return error


class NumberedSource:
    def fetch(self, url: str) -> Fetched:
        content = IMAGES[int(url[-1])]
        return Fetched(io.BytesIO(content), len(content), hashlib.sha256(content).hexdigest(), "http://host/x")


class NoHeartbeat:
    @contextmanager
    def keep_alive(self, _: object) -> Iterator[None]:
        yield

    def show(self, *_: object) -> None:
        pass


class JobsOfOneStudy(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.client = fakeredis.FakeRedis(decode_responses=True)
        self.ledger = Ledger(self.client)
        self.breakers = Breakers(self.client)
        looks = itertools.count()
        self.suspensions = Suspensions(self.client, NAMES, clock=lambda: float(next(looks)))
        self.servers = [InterleavedPacs(name, self.breakers) for name in NAMES]
        self.jobs: dict[str, dict[str, Any]] = {}
        self.works: dict[str, Work] = {}
        self.ends: dict[str, JobResult] = {}

    @initialize(policy=st.sampled_from(["preferred", "weighted", "balanced"]), seed=st.integers(0, 9))
    def open(self, policy: str, seed: int) -> None:
        self.services = Services(
            settings=Settings.model_validate({"routing": {"policy": policy}, "jobs": {"max_attempts": 1000}}),
            ledger=self.ledger,
            sources=cast(Any, NumberedSource()),
            fleet=InTurn(cast(Any, self.servers), threads=1),
            breakers=self.breakers,
            suspensions=self.suspensions,
            rng=random.Random(seed),
        )
        for number in range(2):
            self.order(number, None, again=False)

    @rule(number=st.integers(0, len(IMAGES) - 1), server=st.sampled_from([None, None, *NAMES]), again=st.booleans())
    def order(self, number: int, server: str | None, again: bool) -> None:
        """The same image may be ordered twice."""
        job_id = f"{number}{'again' if again else ''}"
        if job_id not in self.jobs:
            self.jobs[job_id] = {"image_url": f"http://host/{number}", "server": server}
            self._begin(job_id)

    @precondition(lambda self: self.works)
    @rule(data=st.data(), calls=st.integers(1, 5), fate=st.sampled_from(FATES))
    def go_on(self, data: st.DataObject, calls: int, fate: str) -> None:
        """Some calls of one job; the fate is that of the last."""
        job_id = data.draw(st.sampled_from(sorted(self.works)))
        for call in range(calls):
            if job_id in self.works:
                self._step(job_id, fate if call == calls - 1 else "works")

    @rule(number=st.integers(0, len(IMAGES) - 1), server=st.sampled_from(NAMES), fate=st.sampled_from(FATES))
    def order_and_push(self, number: int, server: str, fate: str) -> None:
        """One job up to its push, whose fate it is; where all goes well, that is its fifth call."""
        self.order(number, server, again=False)
        for call in range(5):
            if str(number) in self.works:
                self._step(str(number), fate if call == 4 else "works")

    @precondition(lambda self: self._idle())
    @rule(data=st.data())
    def wake(self, data: st.DataObject) -> None:
        self._begin(data.draw(st.sampled_from(self._idle())))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.ledger.cancel(data.draw(st.sampled_from(sorted(self.jobs))))

    @rule(name=st.sampled_from(NAMES), trouble=st.sampled_from(["down", "shut", "half-open", "open", "no changes"]))
    def befall(self, name: str, trouble: str) -> None:
        server = self.servers[NAMES.index(name)]
        server.down = trouble == "down"
        for breaker in (name, name + CHANGES):
            self.client.delete(PREFIX + BREAKER + breaker)
        if trouble in ("half-open", "open", "no changes"):
            until_s = self.client.time()[0] + (-1 if trouble == "half-open" else 1000)
            key = PREFIX + BREAKER + name + (CHANGES if trouble == "no changes" else "")
            self.client.hset(key, "until_ms", int(until_s) * 1000)

    @rule(name=st.sampled_from(NAMES), ordered=st.sampled_from(["maintenance", "maintenance", "paused", "in service"]))
    def order_out_of_service(self, name: str, ordered: str) -> None:
        self.suspensions.end(name, "paused")
        self.suspensions.end(name, "maintenance")
        if ordered == "maintenance":
            self.suspensions.maintain(name, set_by="ana")
        elif ordered == "paused":
            self.suspensions.pause(name, set_by="ana")

    @rule(name=st.sampled_from(NAMES))
    def show_what_was_being_stored(self, name: str) -> None:
        self.servers[NAMES.index(name)].arrive()

    @rule()
    def let_all_end(self) -> None:
        """And long after: a claim is kept for longer than any job lasts."""
        for name in NAMES:
            self.befall(name, "shut")
            self.order_out_of_service(name, "in service")
            self.show_what_was_being_stored(name)
        self._finish()
        self.claims_are_as_they_were_given()
        self.client.delete(f"{PREFIX}study:{STUDY}")

    @invariant()
    def the_study_is_on_one_server_at_most(self) -> None:
        assert sum(bool(server.images) for server in self.servers) <= 1

    def claims_are_as_they_were_given(self) -> None:
        """Of jobs that have all ended, no claim is left under which nothing was stored."""
        claim = self.client.hgetall(f"{PREFIX}study:{STUDY}")
        doubtful = any(isinstance(end, Failed) and "may_be_on" in end.error.details for end in self.ends.values())
        assert not claim or "opened_by" in claim or doubtful
        assert all(count >= 0 for count in self.ledger.placed().values())

    def teardown(self) -> None:
        """Everybody is well again: then every job ends, and who says "stored" says so of the one server."""
        self.let_all_end()
        self.the_study_is_on_one_server_at_most()
        assert self.ends.keys() == self.jobs.keys()
        for job_id, end in self.ends.items():
            if isinstance(end, Done):
                held = next(one for one in self.servers if one.server.name == end.payload["server_name"])
                assert (STUDY, end.payload["image_uid"]) in held.images
            else:
                assert isinstance(end, Failed)
                assert end.error.code in ENDS, job_id
        self.claims_are_as_they_were_given()
        self.client.close()

    def _finish(self) -> None:
        for _ in range(20):
            for job_id in self._idle():
                self._begin(job_id)
            while self.works:
                self._step(min(self.works), "works")

    def _idle(self) -> list[str]:
        """Neither over nor under way."""
        return sorted(self.jobs.keys() - self.works.keys() - self.ends.keys())

    def _begin(self, job_id: str) -> None:
        job_key = f"{PREFIX}job:{job_id}"
        if self.client.hget(job_key, "state") == "waiting":
            self.client.hset(job_key, "woken", 1)
        self.client.delete(*self.client.keys(f"{PREFIX}died:*") or ["none"])
        work = self.works[job_id] = Work()
        job = self.jobs[job_id]
        heartbeat = cast(Any, NoHeartbeat())
        work.start(
            lambda: execute(
                upload, task="pacs.upload", job_id=job_id, message=job, services=self.services, heartbeat=heartbeat
            )
        )
        self._note_end(job_id)

    def _step(self, job_id: str, fate: str) -> None:
        self.works[job_id].step(fate)
        self._note_end(job_id)

    def _note_end(self, job_id: str) -> None:
        work = self.works[job_id]
        if not work.over:
            return
        del self.works[job_id]
        if work.killed:
            self.client.hset(f"{PREFIX}job:{job_id}", "lease_ms", 0)
        elif isinstance(work.result, Done | Failed):
            self.ends[job_id] = work.result


class MoreJobsOfOneStudy(JobsOfOneStudy):
    """The same, at greater length."""


JobsOfOneStudy.TestCase.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
MoreJobsOfOneStudy.TestCase.settings = settings(max_examples=400, stateful_step_count=40, deadline=None)
test_no_interleaving_of_jobs_and_troubles_splits_a_study = JobsOfOneStudy.TestCase
#: In `make chaos`.
test_none_of_four_hundred_interleavings_splits_a_study = pytest.mark.full(
    pytest.mark.timeout(900)(MoreJobsOfOneStudy.TestCase)
)
