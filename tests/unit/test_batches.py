"""The engine of batches over a ledger on fakeredis, with a kind whose items do what the test says."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import fakeredis
import pytest

from courier.batches.planner import Planned, Planner
from courier.batches.result import end_payload
from courier.batches.store import CHUNK_ITEMS, CHUNK_TASK, PASSES, Batch, Batches, Item, ItemOutcome, Pass
from courier.errors import Cancelled, CourierError, InvalidRequest, PacsRejected, PacsUnavailable
from courier.ledger.jobs import PREFIX, DueJob, LeaseLost, Ledger
from courier.redaction import redact_job
from courier.settings import ServerSettings, Settings
from producer.batches import plan_lines
from worker.batches.chunks import chunk
from worker.batches.coordinator import CONCURRENCY, Coordinator, ItemResult, PassContext, PassHandler, coordinated
from worker.batches.uploads import upload_all
from worker.jobs.attempt import Attempt, Heartbeat, Postpone
from worker.jobs.batch_slots import BatchSlots
from worker.jobs.runner import Deferred, Done, Failed, execute
from worker.jobs.services import Services

STUDIES = [f"1.2.{number}" for number in range(CHUNK_ITEMS * (CONCURRENCY + 1) + 7)]
SERVERS = {"a": "msdicom", "b": "dcm4chee"}
GROUP_ITEMS = 8
USUAL: dict[Pass, str] = {"survey": "planned", "apply": "deleted", "verify": "verified", "undo": "undone"}


@dataclass
class Imagined:
    """A kind whose servers list ``lists`` and whose items answer ``answers``, else are ``usual`` for the pass."""

    lists: dict[str, list[list[str]]] = field(default_factory=lambda: {"a": [STUDIES], "b": []})
    answers: dict[str, Any] = field(default_factory=dict)
    groups: list[tuple[list[str], set[int]]] = field(default_factory=list)
    has: tuple[Pass, ...] = ("apply",)
    group_items: int = GROUP_ITEMS
    doing: Pass = "apply"

    @property
    def passes(self) -> dict[Pass, PassHandler]:
        works: dict[Pass, PassHandler] = {
            "survey": self.preflight,
            "apply": self.apply,
            "verify": self.verify,
            "undo": self.undo,
        }
        return {which: works[which] for which in self.has}

    def check(self, item: Planned) -> Planned:
        return item

    def pages(self, context: PassContext) -> Iterator[list[Planned]]:
        for server, pages in self.lists.items():
            for page in pages:
                yield [Planned(text, server) for text in page]

    def preflight(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:
        return self._each(items, resumed, "planned", "survey")

    def apply(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:
        return self._each(items, resumed, "deleted", "apply")

    def verify(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:
        assert all(context.known(item).status == "deleted" for item in items)
        return self._each(items, resumed, "verified", "verify")

    def undo(self, items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:
        return self._each(items, resumed, "undone", "undo")

    def _each(self, items: Sequence[Item], resumed: set[int], usual: str, which: Pass) -> list[ItemResult]:
        self.groups.append(([item.text for item in items], resumed))
        return [
            self._one(item, usual) if which == self.doing else ItemOutcome(item, cast(Any, usual)) for item in items
        ]

    def _one(self, item: Item, usual: str) -> ItemResult:
        answer = self.answers.get(item.text, usual)
        if isinstance(answer, BaseException) and not isinstance(answer, CourierError):
            raise answer
        return ItemOutcome(item, cast(Any, answer)) if isinstance(answer, str) else answer


@dataclass(frozen=True)
class NamedServer:
    server: ServerSettings


class Imaginary(dict[str, NamedServer]):
    """A fleet without servers behind it."""

    @property
    def names(self) -> list[str]:
        return list(self)

    def through(self, wrap: Any) -> Imaginary:
        return self

    def __missing__(self, name: str) -> NamedServer:
        raise InvalidRequest(f"No server is called {name}.")


def fleet_of(servers: Mapping[str, str]) -> Any:
    settings = [ServerSettings.model_validate({"name": n, "type": t, "url": "http://host"}) for n, t in servers.items()]
    return Imaginary({server.name: NamedServer(server) for server in settings})


@dataclass
class BatchBench:
    client: fakeredis.FakeRedis
    kind: Imagined = field(default_factory=Imagined)
    sent: list[DueJob] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.client)
        self.batches = Batches(self.ledger)
        settings = Settings.model_validate({"jobs": {"max_attempts": 2, "max_deaths": 2}})
        fleet = fleet_of(SERVERS)
        self.services = Services(
            settings, self.ledger, cast(Any, None), fleet, rng=random.Random(1), wake=self.sent.extend
        )
        self.open()

    def open(self, kind: str = "imagined", **order: Any) -> None:
        self.client.delete(f"{PREFIX}batch:B")
        self.batches.open("B", kind=kind, servers=SERVERS, order=order, concurrency=CONCURRENCY)

    @property
    def batch(self) -> Batch:
        batch = self.batches.get("B")
        assert batch is not None
        return batch

    def coordinate(self, command: str = "order", job_id: str = "B") -> Batch | Postpone | CourierError:
        """One look of a coordinator, as a job of the ledger."""
        self.client.zadd(f"{PREFIX}due", {job_id: 0})
        taken = self.ledger.take(job_id, task="t", job={})
        attempt = Attempt(job_id, taken.fence, 1, last=False, ledger=self.ledger)
        coordinator = Coordinator(self.kind, "B", attempt, self.services, may_be_empty=True)
        try:
            end = cast(Batch, getattr(coordinator, command)())
        except Postpone as wait:
            self.ledger.park(job_id, taken.fence, delay_s=0, code="", message="", wait="growing")
            return wait
        except CourierError as error:
            self.ledger.finish(job_id, taken.fence, outcome={"payload": {}}, code="done", task="t", job={})
            return error
        self.ledger.finish(job_id, taken.fence, outcome={"payload": {}}, code="done", task="t", job={})
        return end

    def see_through(self, command: str = "order", job_id: str = "B") -> Batch | Postpone | CourierError:
        """Look after it until it is over, and do every chunk whose message is sent."""
        for _ in range(20):
            end = self.coordinate(command, job_id)
            while self.sent:
                job = self.sent.pop(0)
                if job.task == CHUNK_TASK:
                    self.execute(job)
            if not isinstance(end, Postpone):
                return end
        raise AssertionError("it does not end")

    def due(self) -> list[int]:
        """The chunks whose messages were sent since the last look."""
        chunks = sorted(job.job["chunk"] for job in self.sent if job.task == CHUNK_TASK)
        self.sent.clear()
        return chunks

    def do(self, number: int, which: Pass = "apply") -> Any:
        """A delivered message for a chunk, carried as any job."""
        job = {"version": 1, "batch_id": "B", "pass": which, "chunk": number}
        return self.execute(DueJob(f"B.{which}.{number}", CHUNK_TASK, job))

    def execute(self, job: DueJob) -> Any:
        kinds = {"imagined": self.kind, "upload": self.kind}
        work = lambda message, run, tools: chunk(message, run, tools, kinds=kinds)  # noqa: E731
        heartbeat = Heartbeat(self.ledger, lambda *_: None)
        return execute(
            work, task=job.task, job_id=job.job_id, message=job.job, services=self.services, heartbeat=heartbeat
        )

    def again(self, number: int) -> Any:
        """The same when it is due again."""
        self.client.zadd(f"{PREFIX}due", {f"B.apply.{number}": 0})
        self.ledger.sweep()
        return self.do(number)


@pytest.fixture
def bench() -> Iterator[BatchBench]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield BatchBench(client)


def test_a_plan_holds_every_item_once_in_less_than_its_text(bench: BatchBench) -> None:
    bench.kind.lists = {"a": [STUDIES[:300], STUDIES[250:]], "b": [["1.2.0"], [], ["9.9"]]}
    bench.coordinate()
    batch = bench.batch
    assert (batch.items, batch.chunks) == (len(STUDIES) + 2, CONCURRENCY + 2)
    assert batch.counts == {"a": {"planned": len(STUDIES)}, "b": {"planned": 2}}
    planned = [one.item for one in bench.batches.report(batch)]
    assert [item.number for item in planned] == list(range(batch.items))
    assert {item.text for item in planned if item.server == "a"} == set(STUDIES)
    assert [row.item for row in bench.batches.rows(batch)] == planned
    key = f"{PREFIX}batch:B:plan:{batch.planner}"
    stored = sum(int(bench.client.hstrlen(key, str(chunk))) for chunk in range(batch.chunks))
    assert 0 < stored < sum(len(item.text) for item in planned)


def test_a_plan_that_broke_begins_again(bench: BatchBench) -> None:
    def pages() -> Iterator[list[str]]:
        yield STUDIES[:200]
        raise PacsUnavailable("Later.")

    bench.kind.lists = {"a": cast(Any, pages()), "b": []}
    assert isinstance(bench.coordinate(), PacsUnavailable)
    assert not bench.batch.frozen
    bench.client.hset(f"{PREFIX}job:B", "state", "queued")
    bench.batches.steer("B", "planning", out_of=["cancelled"])
    bench.kind.lists = {"a": [STUDIES[:3]], "b": []}
    bench.coordinate()
    assert (bench.batch.state, bench.batch.items) == ("running", 3)


def test_a_plan_that_nobody_writes_on_and_no_job_waits_for_is_cancelled_and_says_why(bench: BatchBench) -> None:
    def an_hour_later() -> None:
        at_ms = bench.client.hget(f"{PREFIX}batch:B", "planned_ms")
        bench.client.hset(f"{PREFIX}batch:B", "planned_ms", int(cast(Any, at_ms)) - 3_600_000)

    with Planner(bench.batches, "B") as planner:
        an_hour_later()
        planner.add_all(Planned(text, "a") for text in STUDIES[:150])
        planner.freeze()
    assert bench.batch.state == "planning"  # it was written on since
    bench.client.hset(f"{PREFIX}job:B", "state", "queued")
    an_hour_later()
    assert bench.batch.state == "planning"  # a job waits for a worker, however long
    bench.client.delete(f"{PREFIX}job:B")
    assert bench.batch.state == "cancelled"
    assert [warning for warning in bench.batch.warnings if "interrupted" in warning]
    assert isinstance(bench.see_through(), Cancelled)  # should the message come after all
    assert bench.due() == []


def test_of_two_who_plan_the_same_batch_only_the_later_one_is_believed(bench: BatchBench) -> None:
    with Planner(bench.batches, "B") as slow:
        slow.add_all(Planned(text, "a", skip="not this one") for text in STUDIES[:150])
        with Planner(bench.batches, "B") as quick:
            quick.add_all(Planned(text, "b") for text in STUDIES[150:160])
            slow.add_all(Planned(text, "a") for text in STUDIES[200:])
            quick.freeze()
        with pytest.raises(Cancelled):
            slow.freeze()
    rows = list(bench.batches.rows(bench.batch))
    assert [(row.item.text, row.item.server) for row in rows] == [(text, "b") for text in STUDIES[150:160]]
    assert {row.outcome.status for row in rows} == {"open"}


def test_a_plan_says_what_it_leaves_out_and_where_and_how_large_things_are(bench: BatchBench) -> None:
    with Planner(bench.batches, "B") as planner:
        assert planner.add(Planned("http://host/1\tx", size_bytes=7))
        assert not planner.add(Planned("http://host/1\tx", size_bytes=7))
        assert planner.add(Planned("http://host/1\tx", "b"))
        assert planner.add(Planned("http://host/2", "elsewhere", 9, skip="it is there"))
        for wrong in ("", "two\nlines", "\udcff"):
            with pytest.raises(InvalidRequest):
                planner.add(Planned(wrong))
        assert (planner.items, planner.repeated, planner.bytes) == (3, 1, 7)
        planner.freeze(warnings=["one"])
    batch = bench.batch
    assert (batch.items, batch.bytes, batch.warnings, batch.servers) == (3, 7, ("one",), ("a", "b", "elsewhere"))
    assert batch.planned == {"": 1, "b": 1, "elsewhere": 1}
    assert batch.of("apply").counts == {"elsewhere": {"skipped": 1}}
    first, second, third = bench.batches.rows(batch)
    assert (first.item, second.item.server) == (Item(0, "", "http://host/1\tx", 7), "b")
    assert (third.outcome.status, third.outcome.message, third.item.size_bytes) == ("skipped", "it is there", 9)


def test_a_plan_refuses_what_cannot_be_read_and_that_counts_among_the_failures(bench: BatchBench) -> None:
    with Planner(bench.batches, "B") as planner:
        planner.add_all(Planned(f"http://host/{number}", skip="no image") for number in range(150))
        planner.add_all(
            Planned(f"zip+http://host/a.zip!/{number}", "", 9, "encrypted", "source_not_allowed")
            for number in range(120)
        )
        planner.freeze()
    batch = bench.batch
    assert batch.of("apply").counts == {"": {"skipped": 150, "refused": 120}}
    told = end_payload(batch, bench.batches, job_id="B")
    assert (told["failures_total"], told["totals"]) == (120, {"skipped": 150, "refused": 120})
    assert {(one["status"], one["code"], one["message"]) for one in told["failures"]} == {
        ("refused", "source_not_allowed", "encrypted")
    }
    assert bench.batches.reopen(batch, "apply", ["failed"]) == 0, "a retry cannot help"
    lines = [line for row in bench.batches.rows(batch) for line in plan_lines(row)]
    assert {(line.do, line.why) for line in lines} == {("skip", "no image"), ("skip", "source_not_allowed: encrypted")}


def test_a_dry_run_plans_and_does_nothing_until_the_plan_is_applied(bench: BatchBench) -> None:
    bench.open(dry_run=True)
    bench.kind.has = ("survey", "apply")
    bench.kind.doing = "survey"
    no = PacsRejected("It is locked.", server_name="a")
    bench.kind.answers = {"1.2.0": "skipped", "1.2.1": no}
    batch = bench.see_through()
    assert isinstance(batch, Batch)
    assert (batch.state, batch.items) == ("planned", len(STUDIES))
    assert batch.of("survey").totals == {"planned": len(STUDIES) - 2, "skipped": 1, "refused": 1}
    assert batch.of("apply").totals == {"skipped": 1, "refused": 1}
    assert isinstance(bench.coordinate("retry", "J"), InvalidRequest)
    batch = bench.see_through("apply", "K")
    assert isinstance(batch, Batch)
    assert batch.state == "done"
    assert batch.of("apply").totals == {"skipped": 1, "refused": 1, "deleted": len(STUDIES) - 2}
    (refused,) = bench.batches.failures(batch, 10)
    assert (refused.item.text, refused.code, refused.message) == ("1.2.1", "pacs_rejected", "It is locked.")


def test_chunks_begin_as_others_end_and_the_batch_is_done_when_all_are(bench: BatchBench) -> None:
    assert isinstance(bench.coordinate(), Postpone)
    assert bench.due() == list(range(CONCURRENCY))
    assert isinstance(bench.do(1), Done)
    assert bench.due() == [CONCURRENCY]
    assert isinstance(bench.coordinate(), Postpone)
    for number in (0, 2, 3, CONCURRENCY, CONCURRENCY + 1):
        assert isinstance(bench.do(number), Done)
    assert [job.job_id for job in bench.sent][-1:] == ["B"]  # the last one wakes the coordinator
    batch = bench.coordinate()
    assert isinstance(batch, Batch)
    assert (batch.state, batch.settled) == ("done", len(STUDIES))
    assert batch.counts["a"] == {"planned": len(STUDIES), "deleted": len(STUDIES)}
    texts = [text for group, _ in bench.kind.groups for text in group]
    assert sorted(texts) == sorted(STUDIES)
    assert max(len(group) for group, _ in bench.kind.groups) == GROUP_ITEMS


def test_all_passes_walk_over_the_same_items_and_each_keeps_what_it_found(bench: BatchBench) -> None:
    bench.kind.has = ("survey", "apply", "verify", "undo")
    bench.kind.lists = {"a": [STUDIES[:120]], "b": []}
    here = ItemOutcome(Item(3, "a", "1.2.3"), "deleted", result={"size_bytes": 40, "sha256": "abc"}, server="b")
    other = ItemOutcome(Item(9, "a", "1.2.9"), "deleted", "odd", "Why.", {"sha256": None, "images": [1, 2]})
    bench.kind.answers = {"1.2.3": here, "1.2.4": PacsRejected("No."), "1.2.9": other}
    batch = bench.see_through()
    assert isinstance(batch, Batch)
    assert (batch.state, batch.of("apply").bytes) == ("done", 40)
    assert batch.of("verify").totals == {"verified": 119}  # nothing was done to the refused one
    assert batch.counts["b"] == {"planned": 0, "deleted": 1}
    bench.kind.doing = "verify"
    bench.kind.answers = {"1.2.5": "missing"}
    batch = bench.see_through("verify", "V")
    assert isinstance(batch, Batch)
    assert batch.of("verify").totals == {"verified": 118, "missing": 1}
    batch = bench.see_through("undo", "U")
    assert isinstance(batch, Batch)
    assert (batch.state, batch.of("undo").totals) == ("undone", {"undone": 119})
    row = list(bench.batches.rows(batch))[3].as_json(batch.types)
    assert (row["study_uid"], row["server_name"], row["server_type"], row["size_bytes"]) == (
        "1.2.3",
        "b",
        "dcm4chee",
        40,
    )
    assert row["result"] == {"size_bytes": 40, "sha256": "abc"}
    assert list(bench.batches.rows(batch))[9].outcome == other
    assert [row[which]["status"] for which in ("survey", "verify", "undo")] == ["planned", "verified", "undone"]


def test_retry_opens_what_failed_and_nothing_else(bench: BatchBench) -> None:
    bench.kind.has = ("apply", "verify")
    bench.kind.answers = {"1.2.3": PacsUnavailable("Later."), "1.2.250": PacsUnavailable("Later."), "1.2.9": "skipped"}
    bench.coordinate()
    for number in (0, 1, 2, 3, 4, 5, 0, 2):
        bench.again(number)
    assert isinstance(bench.coordinate(), Postpone)
    batch = bench.see_through()
    assert isinstance(batch, Batch)
    assert batch.of("apply").totals == {"deleted": len(STUDIES) - 3, "failed": 2, "skipped": 1}
    bench.kind.answers.clear()
    bench.kind.groups.clear()
    batch = bench.see_through("retry", "R")
    assert isinstance(batch, Batch)
    assert (batch.state, batch.of("apply").totals) == ("done", {"deleted": len(STUDIES) - 1, "skipped": 1})
    assert batch.of("verify").totals == {"verified": len(STUDIES) - 1}
    assert [group for group, _ in bench.kind.groups] == [["1.2.3"], ["1.2.250"]] * 2  # apply, then verify
    assert isinstance(bench.coordinate("retry", "S"), InvalidRequest)


def test_retry_does_an_upload_again_that_verify_found_missing_as_if_it_had_never_been_done(bench: BatchBench) -> None:
    bench.open("upload")
    receipts = {text: {"sha256": text} for text in ("1.2.3", "1.2.4", "1.2.250")}
    bench.kind.answers = {
        text: ItemOutcome(Item(int(text[4:]), "a", text), "deleted", result=receipt)
        for text, receipt in receipts.items()
    }
    bench.see_through()
    bench.kind.has, bench.kind.doing = ("apply", "verify"), "verify"
    bench.kind.answers = {"1.2.3": "missing", "1.2.250": "missing", "1.2.4": "differs"}
    bench.see_through("verify", "V")
    assert bench.batch.of("verify").totals == {"verified": len(STUDIES) - 3, "missing": 2, "differs": 1}
    bench.kind.doing, bench.kind.answers = "apply", {"1.2.3": "refused"}
    bench.kind.groups.clear()
    batch = bench.see_through("retry", "R")
    assert isinstance(batch, Batch)
    assert [group for group, _ in bench.kind.groups] == [["1.2.3"], ["1.2.250"], ["1.2.4"], ["1.2.250"]]
    assert batch.of("apply").totals == {"deleted": len(STUDIES) - 1, "refused": 1}
    assert batch.of("verify").totals == {"verified": len(STUDIES) - 1}
    told = {row.item.text: row.outcome.result for row in bench.batches.rows(batch) if row.outcome.result}
    assert told == {"1.2.4": receipts["1.2.4"]}, "what is gone is nobody's to take back"
    assert isinstance(bench.coordinate("retry", "S"), InvalidRequest)


def test_retry_leaves_to_the_verification_of_other_kinds_what_it_found_missing(bench: BatchBench) -> None:
    bench.kind.has, bench.kind.doing, bench.kind.answers = ("apply", "verify"), "verify", {"1.2.3": "missing"}
    bench.see_through()
    assert isinstance(bench.coordinate("retry", "R"), InvalidRequest)
    assert bench.batch.of("apply").totals == {"deleted": len(STUDIES)}


def test_a_plan_that_was_declined_is_not_done_by_a_retry(bench: BatchBench) -> None:
    bench.kind.has = ("survey", "apply")
    bench.open(dry_run=True)
    planned = bench.see_through()
    assert isinstance(planned, Batch)
    assert planned.state == "planned"
    bench.batches.cancel("B")
    bench.kind.groups.clear()
    refused = bench.see_through("retry", "R")
    assert isinstance(refused, InvalidRequest)
    assert "not begun" in refused.message
    assert (bench.batch.state, bench.kind.groups) == ("cancelled", [])


def test_what_a_cancelled_batch_left_open_can_be_gone_on_with(bench: BatchBench) -> None:
    bench.coordinate()
    bench.do(0)
    bench.batches.cancel("B")
    for number in range(1, bench.batch.of("apply").begun):
        assert isinstance(bench.do(number), Done)
    assert isinstance(bench.coordinate(), Cancelled)
    batch = bench.see_through("retry", "R")
    assert isinstance(batch, Batch)
    assert (batch.state, batch.settled) == ("done", len(STUDIES))
    texts = [text for group, _ in bench.kind.groups for text in group]
    assert sorted(texts) == sorted(STUDIES)


def test_a_batch_has_one_coordinator_at_a_time(bench: BatchBench) -> None:
    bench.coordinate()
    for command in ("apply", "retry", "verify", "undo"):
        assert isinstance(bench.coordinate(command, f"J{command}"), InvalidRequest)
    assert bench.batch.coordinator == "B"
    end = bench.see_through()
    assert isinstance(end, Batch)
    refusal = bench.coordinate("undo", "U")
    assert isinstance(refusal, InvalidRequest)
    assert "no undo" in refusal.message
    assert bench.batch.state == "done"


def test_nothing_to_do_is_refused_unless_that_is_as_it_may_be(bench: BatchBench) -> None:
    bench.kind.lists = {"a": [], "b": [[]]}
    taken = bench.ledger.take("B", task="t", job={})
    attempt = Attempt("B", taken.fence, 1, last=False, ledger=bench.ledger)
    with pytest.raises(InvalidRequest, match="nothing to do"):
        Coordinator(bench.kind, "B", attempt, bench.services).order()
    assert bench.batch.state == "cancelled"
    bench.open()
    bench.client.hset(f"{PREFIX}job:B", "state", "queued")
    batch = bench.coordinate()
    assert isinstance(batch, Batch)
    assert (batch.state, batch.items) == ("done", 0)


def test_a_silent_server_leaves_its_items_open_for_the_next_attempt_then_failed(bench: BatchBench) -> None:
    bench.kind.lists = {"a": [STUDIES[:10]], "b": [["9.1", "9.2"]]}
    silence = PacsUnavailable("Later.")
    bench.kind.answers = dict.fromkeys(STUDIES[:8], silence)
    bench.coordinate()
    assert isinstance(bench.do(0), Deferred)
    assert bench.batch.counts == {"a": {"planned": 10}, "b": {"planned": 2, "deleted": 2}}
    assert [text for group, _ in bench.kind.groups for text in group] == [*STUDIES[:8], "9.1", "9.2"]
    bench.kind.answers = {"1.2.3": silence}
    assert isinstance(bench.again(0), Done)
    assert bench.batch.counts["a"] == {"planned": 10, "deleted": 9, "failed": 1}
    assert bench.kind.groups[-2] == (["1.2.8", "1.2.9", *STUDIES[:6]], set(range(6)))  # they may have been done before
    (failure,) = bench.batches.failures(bench.batch, 10)
    assert (failure.item.text, failure.code, failure.message) == ("1.2.3", "pacs_unavailable", "Later.")
    assert isinstance(bench.coordinate(), Batch)


def test_an_item_that_always_fails_keeps_no_other_of_its_chunk_from_its_turn(bench: BatchBench) -> None:
    bench.kind.group_items = 1
    bench.kind.lists = {"a": [STUDIES[:6]], "b": []}
    bench.kind.answers = {"1.2.0": PacsUnavailable("Later.")}
    bench.coordinate()
    assert isinstance(bench.do(0), Deferred)
    assert isinstance(bench.again(0), Done)
    assert bench.batch.counts["a"] == {"planned": 6, "deleted": 5, "failed": 1}


def test_an_item_whose_server_is_not_configured_any_more_has_failed_and_the_others_go_on(bench: BatchBench) -> None:
    bench.kind.lists = {"a": [STUDIES[:150]], "b": [["9.1", "9.2"]]}
    bench.coordinate()
    del bench.services.fleet["a"]  # type: ignore[attr-defined]
    bench.sent.clear()
    for number in (0, 1):
        assert isinstance(bench.do(number), Done)
    batch = bench.coordinate()
    assert isinstance(batch, Batch)
    assert batch.counts == {"a": {"planned": 150, "failed": 150}, "b": {"planned": 2, "deleted": 2}}
    failure = bench.batches.failures(batch, 1)[0]
    assert (failure.code, "No server is called a any more" in failure.message) == ("invalid_request", True)


@pytest.mark.parametrize(
    "order", [{"server": "a"}, {"servers": ["a", "b"]}, {"from_server": "a", "to_server": "b"}, {"to_server": "a"}, {}]
)
def test_an_item_without_a_server_of_its_own_has_failed_if_one_of_the_order_or_the_preflight_is_gone(
    bench: BatchBench, order: dict[str, Any]
) -> None:
    """Failed and not refused: it can be tried again when the server is back, and nothing was done elsewhere."""
    bench.kind.lists = {"": [["9.1", "9.2"]]}
    bench.kind.preflight = lambda items, *_, **__: [  # type: ignore[method-assign]
        ItemOutcome(item, "planned", result={} if order else {"on": ["a", "b"]}) for item in items
    ]
    bench.kind.has = ("survey", "apply")
    bench.open(**order, survey=True, verify=False, dry_run=True)
    assert isinstance(bench.see_through(), Batch)
    del bench.services.fleet["a"]  # type: ignore[attr-defined]
    batch = bench.see_through("apply", "A")
    assert isinstance(batch, Batch)
    assert batch.of("apply").totals == {"failed": 2}
    assert "No server is called a any more" in bench.batches.failures(batch, 1)[0].message


@pytest.mark.parametrize("which", ["verify", "undo"])
def test_what_was_done_on_a_server_that_is_gone_waits_for_it_and_the_rest_goes_on(
    bench: BatchBench, which: Pass
) -> None:
    bench.kind.lists = {"": [["9.1", "9.2"]]}
    bench.kind.has = ("apply", which)
    bench.open(verify=False)
    bench.kind.apply = lambda items, *_, **__: [  # type: ignore[method-assign]
        ItemOutcome(item, "deleted", server=server) for item, server in zip(items, "ab", strict=True)
    ]
    assert isinstance(bench.see_through(), Batch)
    gone = bench.services.fleet["a"]
    del bench.services.fleet["a"]  # type: ignore[attr-defined]
    done = {"verify": "verified", "undo": "undone"}[which]
    batch = bench.see_through(which, "V")
    assert isinstance(batch, Batch)
    assert batch.of(which).counts == {"a": {"failed": 1}, "": {done: 1}}
    assert bench.batches.failures(batch, 1, which)[0].message.endswith(f"then {which} the batch.")
    bench.services.fleet["a"] = gone  # type: ignore[index]
    batch = bench.see_through(which, "W")
    assert isinstance(batch, Batch)
    assert batch.of(which).totals == {done: 2}


def test_an_item_in_another_jobs_hands_is_waited_for(bench: BatchBench) -> None:
    bench.kind.lists = {"a": [STUDIES[:3]], "b": []}
    bench.kind.answers = {"1.2.1": None}
    bench.coordinate()
    for _ in range(4):
        assert isinstance(bench.again(0), Deferred)
    bench.kind.answers.clear()
    assert isinstance(bench.again(0), Done)
    assert bench.kind.groups[-1] == (["1.2.1"], set())


def test_a_worker_that_dies_in_a_chunk_leaves_the_rest_to_the_next(bench: BatchBench) -> None:
    bench.kind.lists = {"a": [STUDIES[:20]], "b": []}
    bench.kind.answers = {"1.2.9": SystemExit()}
    bench.coordinate()
    with pytest.raises(SystemExit):
        bench.do(0)
    assert bench.batch.counts["a"] == {"planned": 20, "deleted": GROUP_ITEMS}
    bench.kind.answers = {f"1.2.{number}": "not_there" for number in range(GROUP_ITEMS)}
    bench.client.hset(f"{PREFIX}job:B.apply.0", "lease_ms", 0)
    assert isinstance(bench.do(0), Done)
    assert bench.kind.groups[-9:] == [(STUDIES[16:20], set()), *(([STUDIES[n]], {n}) for n in range(8, 16))]
    assert bench.batch.counts["a"] == {"planned": 20, "deleted": 20}


def test_an_item_that_kills_every_worker_takes_no_other_with_it(bench: BatchBench) -> None:
    bench.services = replace(bench.services, settings=Settings.model_validate({"jobs": {"max_deaths": 3}}))
    bench.kind.lists = {"a": [STUDIES[:20]], "b": []}
    bench.kind.answers = {"1.2.9": SystemExit()}
    bench.coordinate()
    for _ in range(3):
        with pytest.raises(SystemExit):
            bench.do(0)
        bench.client.hset(f"{PREFIX}job:B.apply.0", "lease_ms", 0)
    assert isinstance(bench.do(0), Failed)
    batch = bench.coordinate()
    assert isinstance(batch, Batch)
    assert batch.counts["a"] == {"planned": 20, "deleted": 19, "failed": 1}
    (failure,) = bench.batches.failures(batch, 10)
    assert (failure.item.text, failure.code) == ("1.2.9", "poisoned")


def test_a_chunk_whose_job_is_a_dead_letter_has_failed_and_the_batch_goes_on(bench: BatchBench) -> None:
    bench.kind.lists = {"a": [STUDIES[:20]], "b": []}
    bench.coordinate()
    for _ in range(2):  # killed, and killed again
        message = {"version": 1, "batch_id": "B", "pass": "apply", "chunk": 0}
        bench.ledger.take("B.apply.0", task=CHUNK_TASK, job=message)
        bench.client.hset(f"{PREFIX}job:B.apply.0", "lease_ms", 0)
    assert isinstance(bench.do(0), Failed)
    batch = bench.coordinate()
    assert isinstance(batch, Batch)
    assert batch.counts["a"] == {"planned": 20, "failed": 20}
    assert {one.code for one in bench.batches.report(batch)} == {"poisoned"}
    batch = bench.see_through("retry", "R")
    assert isinstance(batch, Batch)
    assert batch.counts["a"] == {"planned": 20, "deleted": 20}


def test_what_a_dead_chunk_may_have_done_is_known_to_the_next_round(bench: BatchBench) -> None:
    def leave(items: Sequence[Item], context: PassContext) -> list[ItemOutcome]:
        return [ItemOutcome(items[7], "open", server="b", result=context.checkpoint)]

    bench.kind.leave = leave  # type: ignore[attr-defined]
    bench.coordinate()
    record = {"state": "dead", "code": "poisoned", "memo": json.dumps({"begun": [7], "kind": {"pushed": "1.2.7"}})}
    bench.client.hset(f"{PREFIX}job:B.apply.0", mapping=record)
    assert isinstance(bench.coordinate(), Postpone)
    rows = bench.batches.items(bench.batch, 0)
    assert {row.status for row in rows} == {"failed"}
    assert (rows[7].server, rows[7].code, rows[7].result) == ("b", "poisoned", {"pushed": "1.2.7"})
    assert rows[8].result == {}


def test_a_chunk_that_nobody_knows_any_more_is_written_down_again(bench: BatchBench) -> None:
    bench.kind.lists = {"a": [STUDIES[:20]], "b": []}
    bench.coordinate()
    bench.client.delete(f"{PREFIX}job:B.apply.0")
    bench.client.zrem(f"{PREFIX}due", "B.apply.0")
    bench.coordinate()
    (job,) = [job for job in bench.ledger.sweep() if job.task == CHUNK_TASK]
    assert isinstance(bench.execute(job), Done)
    assert isinstance(bench.coordinate(), Batch)


def test_a_late_holder_settles_nothing_and_nothing_is_settled_twice(bench: BatchBench) -> None:
    bench.kind.lists = {"a": [STUDIES[:2]], "b": []}
    bench.coordinate()
    late = bench.ledger.take("B.apply.0", task=CHUNK_TASK, job={})
    bench.client.hset(f"{PREFIX}job:B.apply.0", "lease_ms", 0)
    holder = bench.ledger.take("B.apply.0", task=CHUNK_TASK, job={})
    first, _ = (one.item for one in bench.batches.items(bench.batch, 0))
    late_one = [ItemOutcome(first, "failed")]
    with pytest.raises(LeaseLost):
        bench.batches.record_outcomes(bench.batch, "apply", 0, late_one, job_id="B.apply.0", fence=late.fence)
    for status in ("deleted", "not_there"):
        settled = [ItemOutcome(first, cast(Any, status))]
        bench.batches.record_outcomes(bench.batch, "apply", 0, settled, job_id="B.apply.0", fence=holder.fence)
    assert bench.batch.counts["a"] == {"planned": 2, "deleted": 1}


def in_pass(bench: BatchBench, which: Pass) -> tuple[str, str]:
    """Bring a batch into a pass; the wish and the job of its coordinator."""
    bench.kind.has = ("survey", "apply", "verify", "undo")
    if which == "undo":
        assert isinstance(bench.see_through(), Batch)
        assert isinstance(bench.coordinate("undo", "U"), Postpone)
        return "undo", "U"
    while bench.coordinate() and bench.batch.current != which:
        while bench.sent:
            job = bench.sent.pop(0)
            if job.task == CHUNK_TASK:
                bench.execute(job)
    return "order", "B"


@pytest.mark.parametrize("which", PASSES)
def test_a_paused_batch_begins_nothing_until_it_is_resumed(bench: BatchBench, which: Pass) -> None:
    command, job_id = in_pass(bench, which)
    bench.batches.pause("B")
    assert isinstance(bench.do(0, which), Deferred)
    assert isinstance(bench.coordinate(command, job_id), Postpone)
    assert (bench.batch.state, bench.batch.settled) == ("paused", 0)
    bench.batches.resume("B")
    bench.sent += [job for job in bench.ledger.sweep() if job.task == CHUNK_TASK]  # they are due at once
    end = bench.see_through(command, job_id)
    assert isinstance(end, Batch)
    assert end.of(which).settled == len(STUDIES)


@pytest.mark.parametrize("which", PASSES)
def test_a_batch_that_is_cancelled_in_any_pass_ends_and_can_be_gone_on_with(bench: BatchBench, which: Pass) -> None:
    command, job_id = in_pass(bench, which)
    assert isinstance(bench.do(0, which), Done)
    bench.sent.clear()
    bench.batches.cancel("B")
    for chunk_number in bench.batches.open_chunks(bench.batch, which):
        assert isinstance(bench.do(chunk_number, which), Done)
    end = bench.coordinate(command, job_id)
    assert isinstance(end, Cancelled)
    assert f"in its {which} after {CHUNK_ITEMS} of {len(STUDIES)} items" in end.message
    assert bench.batch.of(which).totals == {USUAL[which]: CHUNK_ITEMS}
    bench.kind.groups.clear()
    again = {"verify": "verify", "undo": "undo"}.get(which, "retry")
    end = bench.see_through(again, "R")
    assert isinstance(end, Batch)
    assert end.state == ("undone" if which == "undo" else "done")
    assert end.of("apply").totals == {"deleted": len(STUDIES)}
    done = [text for group, _ in bench.kind.groups for text in group]
    assert len(done) == {"survey": 2, "apply": 2, "verify": 1, "undo": 1}[which] * len(STUDIES) - (
        CHUNK_ITEMS if which in ("apply", "undo") else 0
    )


def test_a_chunk_ends_when_what_it_took_is_paid_and_one_that_is_stopped_at_once(bench: BatchBench) -> None:
    bench.open(bytes_per_s=1000)
    bench.kind.lists = {"a": [STUDIES[:3]], "b": []}
    bench.services = replace(bench.services, sleep=lambda _: None)
    bench.kind.answers = {"1.2.2": ItemOutcome(Item(2, "a", "1.2.2"), "deleted", result={"size_bytes": 40_000})}
    bench.coordinate()
    assert isinstance(bench.do(0), Deferred)
    assert (bench.batch.settled, bench.batch.of("apply").finished) == (3, 0)
    assert isinstance(bench.again(0), Deferred)
    assert [text for group, _ in bench.kind.groups for text in group] == STUDIES[:3]
    bench.batches.cancel("B")
    assert isinstance(bench.again(0), Done)
    assert bench.batch.of("apply").finished == 1


def test_who_finds_no_slot_makes_room_loses_no_attempt_and_has_its_turn_before_the_next_of_the_other(
    bench: BatchBench,
) -> None:
    batch_slots = BatchSlots(1)
    bench.services = replace(bench.services, batch_slots=batch_slots)
    bench.coordinate()
    assert batch_slots.take("another batch's chunk")
    for _ in range(4):
        assert isinstance(bench.again(0), Deferred)
    with batch_slots.taken():
        pass
    bench.sent.clear()
    assert isinstance(bench.do(1), Done)
    assert [job.job_id for job in bench.sent] == ["B.apply.0", f"B.apply.{CONCURRENCY}"]
    assert isinstance(bench.do(0), Done)


def test_a_message_of_a_round_that_is_over_does_nothing(bench: BatchBench) -> None:
    bench.kind.answers = {"1.2.3": PacsRejected("No.")}
    bench.coordinate()
    bench.batches.cancel("B")
    for number in range(CONCURRENCY):
        assert isinstance(bench.do(number), Done)
    assert isinstance(bench.coordinate(), Cancelled)
    assert isinstance(bench.coordinate("retry", "R"), Postpone)
    bench.client.delete(f"{PREFIX}job:B.apply.0")
    assert isinstance(bench.do(0), Done)
    assert bench.kind.groups == []
    assert bench.batch.of("apply").finished == 0


def test_a_cancelled_batch_ends_when_what_is_under_way_has_ended(bench: BatchBench) -> None:
    bench.coordinate()
    bench.do(0)
    bench.batches.cancel("B")
    assert isinstance(bench.coordinate(), Postpone)
    for number in range(1, bench.batch.of("apply").begun):
        assert isinstance(bench.do(number), Done)
    end = bench.coordinate()
    assert isinstance(end, Cancelled)
    assert end.details["settled"] == CHUNK_ITEMS
    assert bench.batches.resume("B") == "cancelled"


def test_a_batch_whose_coordinator_was_cancelled_stops_and_expires(bench: BatchBench) -> None:
    bench.coordinate()
    bench.client.hset(f"{PREFIX}job:B", "state", "done")
    assert isinstance(bench.do(0), Done)
    assert (bench.batch.state, bench.batch.settled) == ("cancelled", 0)
    assert all(bench.client.ttl(key) > 0 for key in bench.client.keys(f"{PREFIX}batch:B*"))


def test_a_batch_that_was_left_by_its_coordinator_expires_when_somebody_looks(bench: BatchBench) -> None:
    bench.kind.has = ("apply", "verify")
    bench.coordinate()
    bench.client.hset(f"{PREFIX}job:B", "state", "dead")
    assert bench.batch.state == "cancelled"
    assert all(bench.client.ttl(key) > 0 for key in bench.client.keys(f"{PREFIX}batch:B*"))
    assert isinstance(bench.coordinate("retry", "R"), Postpone)
    assert bench.batch.state == "running"
    assert all(bench.client.ttl(key) < 0 for key in bench.client.keys(f"{PREFIX}batch:B*"))


@pytest.mark.parametrize("wish", ["retry", "verify"])
def test_nothing_is_done_again_of_a_batch_that_is_being_taken_back(bench: BatchBench, wish: str) -> None:
    bench.kind.has = ("apply", "verify", "undo")
    bench.kind.answers = {"1.2.3": "failed"}
    assert isinstance(bench.see_through(), Batch)
    assert isinstance(bench.coordinate("undo", "U"), Postpone)
    bench.batches.cancel("B")
    bench.client.hset(f"{PREFIX}job:U", "state", "done")
    end = bench.coordinate(wish, "R")
    assert isinstance(end, InvalidRequest)
    assert "undo it to its end" in end.message
    assert bench.batch.of("apply").totals["failed"] == 1
    batch = bench.see_through("undo", "V")
    assert isinstance(batch, Batch)
    assert (batch.state, batch.of("undo").totals) == ("undone", {"undone": len(STUDIES) - 1})


def test_an_upload_order_that_is_refused_gives_up_the_plan_that_was_written_for_it(bench: BatchBench) -> None:
    attempt = Attempt("B", bench.ledger.take("B", task="t", job={}).fence, 1, last=False, ledger=bench.ledger)
    with pytest.raises(InvalidRequest):
        upload_all({"planned": True, "server": "nowhere"}, attempt, bench.services)
    assert bench.batch.state == "cancelled"


@pytest.mark.parametrize("wish", ["retry", "undo"])
def test_what_outlives_a_cancelled_coordinator_ends_before_the_batch_is_steered_anew(
    bench: BatchBench, wish: str
) -> None:
    bench.kind.has = ("apply", "undo")
    bench.coordinate()
    looks: list[Any] = []

    def apply(items: Sequence[Item], context: PassContext, *, resumed: set[int]) -> list[ItemResult]:
        if not looks:
            bench.client.hset(f"{PREFIX}job:B", "state", "done")
            looks.append(bench.coordinate(wish, "R"))
            looks.append(bench.batch.state)
        return [ItemOutcome(item, "deleted") for item in items]

    bench.kind.apply = apply  # type: ignore[method-assign]
    assert isinstance(bench.do(0), Done)
    assert isinstance(looks[0], Postpone)
    assert looks[1] == "cancelled"
    end = bench.see_through(wish, "R")
    assert isinstance(end, Batch)
    totals = end.of("apply").totals, end.of("undo").totals
    assert totals == (({"deleted": len(STUDIES)}, {}) if wish == "retry" else ({"deleted": 8}, {"undone": 8}))


def test_an_order_about_a_batch_is_a_job_with_a_result_of_its_own(bench: BatchBench) -> None:
    bench.kind.answers = {"1.2.3": PacsRejected("No.", server_name="a")}
    assert isinstance(bench.see_through(), Batch)
    bench.kind.has = ("apply", "verify")
    taken = bench.ledger.take("V", task="t", job={})
    attempt = Attempt("V", taken.fence, 1, last=False, ledger=bench.ledger)
    with pytest.raises(Postpone):
        coordinated(
            {"batch_id": "B"}, attempt, bench.services, kinds={"imagined": bench.kind}, command=Coordinator.verify
        )
    for job in list(bench.sent):
        bench.execute(job)
    while bench.sent:
        bench.execute(bench.sent.pop()) if bench.sent[-1].task == CHUNK_TASK else bench.sent.pop()
    told = coordinated(
        {"batch_id": "B"}, attempt, bench.services, kinds={"imagined": bench.kind}, command=Coordinator.verify
    )
    assert (told["job_id"], told["batch_id"], told["state"], told["pass"]) == ("V", "B", "done", "verify")
    assert told["passes"]["verify"]["totals"] == {"verified": len(STUDIES) - 1}
    assert [(one["item"], one["pass"], one["code"]) for one in told["failures"]] == [
        ("1.2.3", "apply", "pacs_rejected")
    ]
    assert told["failures_total"] == 1


def test_a_message_of_a_chunk_is_small_and_says_what_flower_shows(bench: BatchBench) -> None:
    bench.batches.open("N", kind="imagined", servers=SERVERS, order={}, concurrency=1, name="spring cleaning")
    with Planner(bench.batches, "N") as planner:
        planner.add_all(Planned(text, "a") for text in STUDIES)
        planner.freeze()
    bench.batches.take("N", "J")
    assert bench.batches.begin("N", "apply", job_id="J", out_of=["planning"])
    batch = bench.batches.get("N")
    assert batch is not None
    (job,) = bench.batches.fill(batch, "apply")
    assert len(json.dumps(job.job)) < 120
    assert "spring cleaning" in redact_job(job.job)
    assert '"chunk": 0' in redact_job(job.job)


def test_all_batches_are_listed_until_they_expire(bench: BatchBench) -> None:
    bench.batches.open("C", kind="imagined", servers={"a": "orthanc"}, order={}, concurrency=1)
    assert {batch.id for batch in bench.batches.list()} == {"B", "C"}
    bench.client.delete(f"{PREFIX}batch:B")
    assert [batch.id for batch in bench.batches.list()] == ["C"]
    assert bench.client.zcard(f"{PREFIX}batches") == 1
