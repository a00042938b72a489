"""The engine of batches over a ledger on fakeredis, with a kind whose items do what the test says."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import fakeredis
import pytest

from worker.batches import CHUNK_ITEMS, CHUNK_TASK, Batch, Batches, Item, Settled
from worker.errors import Cancelled, CourierError, PacsUnavailable
from worker.jobs.batches import GROUP_ITEMS, WIDTH, Desk, chunk, conduct
from worker.jobs.carry import Done, Failed, Parked, carry
from worker.jobs.run import NotYet, Pulse, Run
from worker.jobs.tools import Tools
from worker.ledger import PREFIX, LeaseLost, Ledger
from worker.settings import Settings

STUDIES = [f"1.2.{number}" for number in range(CHUNK_ITEMS * (WIDTH + 1) + 7)]
SERVERS = {"a": "msdicom", "b": "dcm4chee"}


@dataclass
class Imagined:
    """A kind whose servers list ``lists`` and whose items answer ``answers``, else are deleted."""

    lists: dict[str, list[list[str]]] = field(default_factory=lambda: {"a": [STUDIES], "b": []})
    answers: dict[str, Any] = field(default_factory=dict)
    groups: list[tuple[list[str], set[int]]] = field(default_factory=list)

    def pages(self, pacs: Any, order: Mapping[str, Any], warnings: list[str]) -> Iterator[list[str]]:
        yield from self.lists[pacs]

    def apply(self, items: Sequence[Item], desk: Desk, *, resumed: set[int]) -> list[Settled | CourierError | None]:
        self.groups.append(([item.text for item in items], resumed))
        return [self._one(item) for item in items]

    def _one(self, item: Item) -> Settled | CourierError | None:
        answer = self.answers.get(item.text, "deleted")
        if isinstance(answer, BaseException) and not isinstance(answer, CourierError):
            raise answer
        return Settled(item, answer) if isinstance(answer, str) else answer


@dataclass
class Bench:
    client: fakeredis.FakeRedis
    kind: Imagined = field(default_factory=Imagined)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.client)
        self.batches = Batches(self.ledger)
        settings = Settings.model_validate({"jobs": {"max_attempts": 2, "max_deaths": 2}})
        fleet = cast(Any, {name: name for name in SERVERS})
        self.tools = Tools(settings, self.ledger, cast(Any, None), fleet, rng=random.Random(1))
        self.batches.open("B", kind="imagined", servers=SERVERS, order={}, width=WIDTH)

    @property
    def batch(self) -> Batch:
        batch = self.batches.get("B")
        assert batch is not None
        return batch

    def conduct(self, *, dry_run: bool = False) -> Batch | NotYet | Cancelled:
        """One look of the conductor, as a job of the ledger."""
        claim = self.ledger.claim("B", task="t", job={})
        run = Run("B", claim.fence, 1, last=False, ledger=self.ledger)
        try:
            return conduct(self.kind, self.batch, run, self.tools, dry_run=dry_run)
        except (NotYet, Cancelled) as end:
            return end
        finally:
            self.ledger.park("B", claim.fence, delay_s=0, code="", message="", counts=False)

    def due(self) -> list[int]:
        """The chunks that a sweep would send now."""
        return sorted(job.job["chunk"] for job in self.ledger.sweep() if job.task == CHUNK_TASK)

    def do(self, number: int) -> Any:
        """A delivered message for a chunk, carried as any job."""
        job = {"version": 1, "batch_id": "B", "chunk": number}
        work = lambda message, run, tools: chunk(message, run, tools, kinds={"imagined": self.kind})  # noqa: E731
        pulse = Pulse(self.ledger, lambda *_: None)
        return carry(work, task=CHUNK_TASK, job_id=f"B.{number}", message=job, tools=self.tools, pulse=pulse)

    def again(self, number: int) -> Any:
        """The same when it is due again."""
        self.client.zadd(f"{PREFIX}due", {f"B.{number}": 0})
        self.ledger.sweep()
        return self.do(number)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield Bench(client)


def test_a_plan_holds_every_item_once_and_little_more_than_its_text(bench: Bench) -> None:
    bench.kind.lists = {"a": [STUDIES[:300], STUDIES[250:]], "b": [["1.2.0"], [], ["9.9"]]}
    bench.conduct()
    batch = bench.batch
    assert (batch.items, batch.chunks) == (len(STUDIES) + 2, WIDTH + 2)
    assert batch.counts == {"a": {"planned": len(STUDIES)}, "b": {"planned": 2}}
    planned = [one.item for one in bench.batches.report(batch)]
    assert sorted(item.number for item in planned) == list(range(batch.items))
    assert {item.text for item in planned if item.server == "a"} == set(STUDIES)
    stored = sum(len(text) for text in bench.client.hvals(f"{PREFIX}batch:B:plan"))
    assert stored + bench.client.strlen(f"{PREFIX}batch:B:outcomes") <= sum(len(item.text) + 4 for item in planned)
    assert not bench.client.exists(f"{PREFIX}batch:B:seen")


def test_a_plan_that_broke_begins_again(bench: Bench) -> None:
    def pages() -> Iterator[list[str]]:
        yield STUDIES[:200]
        raise PacsUnavailable("Later.")

    bench.kind.lists = {"a": cast(Any, pages()), "b": []}
    with pytest.raises(PacsUnavailable):
        bench.conduct()
    assert bench.batch.state == "planning"
    bench.kind.lists = {"a": [STUDIES[:3]], "b": []}
    bench.conduct()
    assert (bench.batch.state, bench.batch.items) == ("running", 3)


def test_a_dry_run_plans_and_does_nothing(bench: Bench) -> None:
    batch = bench.conduct(dry_run=True)
    assert isinstance(batch, Batch)
    assert (batch.state, batch.items) == ("planned", len(STUDIES))
    assert bench.due() == []


def test_chunks_begin_as_others_end_and_the_batch_is_done_when_all_are(bench: Bench) -> None:
    assert isinstance(bench.conduct(), NotYet)
    assert bench.due() == list(range(WIDTH))
    assert isinstance(bench.do(1), Done)
    assert bench.due() == [WIDTH]
    assert isinstance(bench.conduct(), NotYet)
    for number in (0, 2, 3, WIDTH, WIDTH + 1):
        assert isinstance(bench.do(number), Done)
    batch = bench.conduct()
    assert isinstance(batch, Batch)
    assert (batch.state, batch.settled) == ("done", len(STUDIES))
    assert batch.counts["a"] == {"planned": len(STUDIES), "deleted": len(STUDIES)}
    texts = [text for group, _ in bench.kind.groups for text in group]
    assert sorted(texts) == sorted(STUDIES)
    assert max(len(group) for group, _ in bench.kind.groups) == GROUP_ITEMS


def test_nothing_to_do_is_done_at_once(bench: Bench) -> None:
    bench.kind.lists = {"a": [], "b": [[]]}
    batch = bench.conduct()
    assert isinstance(batch, Batch)
    assert (batch.state, batch.items) == ("done", 0)


def test_a_silent_server_leaves_its_items_open_for_the_next_attempt_then_failed(bench: Bench) -> None:
    bench.kind.lists = {"a": [STUDIES[:10]], "b": [["9.1", "9.2"]]}
    bench.kind.answers = {"1.2.3": PacsUnavailable("Later.")}
    bench.conduct()
    assert isinstance(bench.do(0), Parked)
    assert bench.batch.counts["b"] == {"planned": 2, "deleted": 2}
    assert bench.batch.counts["a"] == {"planned": 10, "deleted": 7}  # what came after the group was not tried
    assert isinstance(bench.again(0), Done)
    assert bench.batch.counts["a"] == {"planned": 10, "deleted": 9, "failed": 1}
    assert bench.kind.groups[-1][1] == {3}  # it may have been done in the first attempt
    (failure,) = bench.batches.failures(bench.batch, 10)
    assert (failure.item.text, failure.code, failure.message) == ("1.2.3", "pacs_unavailable", "Later.")
    assert isinstance(bench.conduct(), Batch)


def test_an_item_in_another_jobs_hands_is_waited_for(bench: Bench) -> None:
    bench.kind.lists = {"a": [STUDIES[:3]], "b": []}
    bench.kind.answers = {"1.2.1": None}
    bench.conduct()
    for _ in range(4):
        assert isinstance(bench.again(0), Parked)
    bench.kind.answers.clear()
    assert isinstance(bench.again(0), Done)
    assert bench.kind.groups[-1] == (["1.2.1"], set())


def test_a_worker_that_dies_in_a_chunk_leaves_the_rest_to_the_next(bench: Bench) -> None:
    bench.kind.lists = {"a": [STUDIES[:20]], "b": []}
    bench.kind.answers = {"1.2.9": SystemExit()}
    bench.conduct()
    with pytest.raises(SystemExit):
        bench.do(0)
    assert bench.batch.counts["a"] == {"planned": 20, "deleted": GROUP_ITEMS}
    bench.kind.answers = {f"1.2.{number}": "not_there" for number in range(GROUP_ITEMS)}
    bench.client.hset(f"{PREFIX}job:B.0", "lease_ms", 0)
    assert isinstance(bench.do(0), Done)
    assert bench.kind.groups[-2] == (STUDIES[8:16], set(range(8, 16)))
    assert bench.batch.counts["a"] == {"planned": 20, "deleted": 20}


def test_a_chunk_whose_job_is_a_dead_letter_has_failed_and_the_batch_goes_on(bench: Bench) -> None:
    bench.kind.lists = {"a": [STUDIES[:20]], "b": []}
    bench.conduct()
    for _ in range(2):  # killed, and killed again
        bench.ledger.claim("B.0", task=CHUNK_TASK, job={"version": 1, "batch_id": "B", "chunk": 0})
        bench.client.hset(f"{PREFIX}job:B.0", "lease_ms", 0)
    assert isinstance(bench.do(0), Failed)
    batch = bench.conduct()
    assert isinstance(batch, Batch)
    assert batch.counts["a"] == {"planned": 20, "failed": 20}
    assert {one.code for one in bench.batches.report(batch)} == {"poisoned"}


def test_a_late_holder_settles_nothing_and_nothing_is_settled_twice(bench: Bench) -> None:
    bench.kind.lists = {"a": [STUDIES[:2]], "b": []}
    bench.conduct()
    late = bench.ledger.claim("B.0", task=CHUNK_TASK, job={})
    bench.client.hset(f"{PREFIX}job:B.0", "lease_ms", 0)
    holder = bench.ledger.claim("B.0", task=CHUNK_TASK, job={})
    first, _ = (one.item for one in bench.batches.items(bench.batch, 0))
    with pytest.raises(LeaseLost):
        bench.batches.settle("B", [Settled(first, "failed")], job_id="B.0", fence=late.fence)
    for status in ("deleted", "not_there"):
        bench.batches.settle("B", [Settled(first, cast(Any, status))], job_id="B.0", fence=holder.fence)
    assert bench.batch.counts["a"] == {"planned": 2, "deleted": 1}


def test_a_paused_batch_begins_nothing_until_it_is_resumed(bench: Bench) -> None:
    bench.conduct()
    bench.batches.steer("B", "paused", out_of=["running"])
    assert isinstance(bench.do(0), Parked)
    assert isinstance(bench.conduct(), NotYet)
    assert bench.batch.settled == 0
    bench.batches.steer("B", "running", out_of=["paused"])
    assert isinstance(bench.again(0), Done)
    assert bench.batch.settled == CHUNK_ITEMS


def test_a_cancelled_batch_ends_when_what_is_under_way_has_ended(bench: Bench) -> None:
    bench.conduct()
    bench.do(0)
    bench.batches.steer("B", "cancelled", out_of=["running"])
    assert isinstance(bench.conduct(), NotYet)
    for number in range(1, bench.batch.begun):
        assert isinstance(bench.do(number), Done)
    end = bench.conduct()
    assert isinstance(end, Cancelled)
    assert end.details["settled"] == CHUNK_ITEMS
    assert bench.batches.steer("B", "running", out_of=["paused"]) == "cancelled"


def test_a_batch_whose_own_job_was_cancelled_stops(bench: Bench) -> None:
    bench.conduct()
    bench.client.hset(f"{PREFIX}job:B", "state", "done")
    assert isinstance(bench.do(0), Done)
    assert (bench.batch.state, bench.batch.settled) == ("cancelled", 0)


def test_all_batches_are_listed_until_they_expire(bench: Bench) -> None:
    bench.batches.open("C", kind="imagined", servers={"a": "orthanc"}, order={}, width=1)
    assert {batch.id for batch in bench.batches.list()} == {"B", "C"}
    bench.client.delete(f"{PREFIX}batch:B")
    assert [batch.id for batch in bench.batches.list()] == ["C"]
    assert bench.client.zcard(f"{PREFIX}batches") == 1
