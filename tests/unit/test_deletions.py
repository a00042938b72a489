"""What a deletion ends as: a table over what each server finds and does, with a ledger on fakeredis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import fakeredis
import pytest

from courier.batches.planner import Planned, Planner
from courier.batches.store import Batch, Batches, Item, ItemOutcome, Row
from courier.errors import (
    Cancelled,
    CourierError,
    InvalidRequest,
    InvalidUid,
    PacsMisanswered,
    PacsRejected,
    PacsUnauthorized,
    PacsUnavailable,
    StudyConflict,
)
from courier.ledger.jobs import Ledger
from courier.settings import ServerSettings, Settings
from worker.batches.coordinator import PassContext
from worker.batches.delete_all import StudyDeletions
from worker.batches.deletions import _check_not_elsewhere
from worker.jobs.attempt import Attempt, Postpone
from worker.jobs.delete import delete
from worker.jobs.services import Services
from worker.pacs.fleet import Fleet
from worker.pacs.protocol import Deletion, DeletionFate, Found

DELETED, HIDDEN = Deletion(DeletionFate.DELETED), Deletion(DeletionFate.HIDDEN, "Later.")
GONE, REFUSED = Deletion(DeletionFate.NOT_THERE), Deletion(DeletionFate.REFUSED, "No.")
SILENT, LOCKED = PacsUnavailable("a is silent."), PacsUnauthorized("Log in.")
HERE, NOWHERE = [Found("study", "1.2")], cast(list[Found], [])


@dataclass
class Stub:
    """A server that finds and deletes what the test says."""

    name: str
    finds: list[Found] | CourierError = field(default_factory=lambda: HERE)
    deletes: Deletion | CourierError = DELETED
    promise: Deletion = DELETED
    asked: list[str] = field(default_factory=list)
    hiding: None = None

    @property
    def server(self) -> ServerSettings:
        return ServerSettings(name=self.name, type="dicomweb", url="http://host")

    def find(self, level: str, uid: str) -> list[Found]:
        self.asked.append("find")
        return cast(list[Found], _answer_of(self.finds))

    def delete(self, found: Found, *, permanent: bool) -> Deletion:
        self.asked.append("delete")
        answer = cast(Deletion, _answer_of(self.deletes))
        if answer.fate in (DeletionFate.DELETED, DeletionFate.HIDDEN):
            self.finds, self.deletes = NOWHERE, GONE
        return answer

    def deletion(self, level: str, *, permanent: bool) -> Deletion:
        return self.promise

    def instances(self, found: Found) -> Iterator[Found]:
        yield from () if self.finds is NOWHERE else (found, found)


def _answer_of(answer: Any) -> Any:
    if isinstance(answer, CourierError):
        raise type(answer)(answer.message, server_name="a", server_type="dicomweb")
    return answer


@dataclass
class DeletionBench:
    client: fakeredis.FakeRedis
    servers: list[Stub]

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.client)
        self.services = Services(Settings(), self.ledger, cast(Any, None), Fleet(cast(Any, self.servers)))

    def run(self, job_id: str = "j1") -> Attempt:
        taken = self.ledger.take(job_id, task="pacs.delete", job={})
        return Attempt(
            job_id,
            taken.fence,
            taken.attempt,
            last=False,
            ledger=self.ledger,
            checkpoint=taken.checkpoint,
            cancelled=taken.cancelled,
        )

    def delete(self, job_id: str = "j1", **fields: Any) -> dict[str, str] | CourierError:
        """Statuses by server, or the error, after one attempt at the job."""
        attempt = self.run(job_id)
        try:
            answer = delete({"level": "study", "uid": "1.2", **fields}, attempt, self.services)
        except CourierError as error:
            self.ledger.park(job_id, attempt.fence, delay_s=0, code="", message="")
            return error
        self.ledger.finish(job_id, attempt.fence, outcome={}, code="done", task="pacs.delete", job={})
        return {entry["server_name"]: entry["status"] for entry in answer["servers"]}


@pytest.fixture
def client() -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield client


@pytest.mark.parametrize(
    ("a", "b", "end"),
    [
        ((HERE, DELETED), (HERE, HIDDEN), {"a": "deleted", "b": "hidden"}),
        ((NOWHERE, GONE), (HERE, DELETED), {"a": "not_there", "b": "deleted"}),
        ((HERE, REFUSED), (HERE, DELETED), {"a": "refused", "b": "deleted"}),
        ((HERE, PacsRejected("No.")), (HERE, DELETED), {"a": "refused", "b": "deleted"}),
        ((HERE, LOCKED), (HERE, DELETED), {"a": "refused", "b": "deleted"}),
        ((HERE, GONE), (HERE, DELETED), {"a": "not_there", "b": "deleted"}),
        ((NOWHERE, GONE), (NOWHERE, GONE), "not_found"),
        ((HERE, REFUSED), (NOWHERE, GONE), "pacs_rejected"),
        ((SILENT, GONE), (NOWHERE, GONE), "pacs_unavailable"),
        ((SILENT, GONE), (HERE, DELETED), "pacs_unavailable"),
        ((HERE, SILENT), (HERE, DELETED), "pacs_unavailable"),
        ((LOCKED, GONE), (HERE, DELETED), "pacs_unauthorized"),
        ((LOCKED, GONE), (SILENT, DELETED), "pacs_unavailable"),
        ((InvalidUid("No."), GONE), (NOWHERE, GONE), "invalid_uid"),
    ],
)
def test_a_deletion_ends_as_its_servers_answered(client: fakeredis.FakeRedis, a: Any, b: Any, end: Any) -> None:
    ended = DeletionBench(client, [Stub("a", *a), Stub("b", *b)]).delete()
    assert (ended.code if isinstance(ended, CourierError) else ended) == end


def test_the_next_attempt_asks_only_the_server_that_was_silent(client: fakeredis.FakeRedis) -> None:
    a, b = Stub("a", SILENT), Stub("b")
    bench = DeletionBench(client, [a, b])
    first = bench.delete()
    assert isinstance(first, CourierError)
    assert [entry["status"] for entry in first.details["servers"]] == ["unavailable", "deleted"]
    assert "b (deleted)" in first.message
    a.finds, seen = HERE, len(b.asked)
    assert bench.delete() == {"a": "deleted", "b": "deleted"}
    assert "delete" not in b.asked[seen:]


@pytest.mark.parametrize(("promise", "status"), [(DELETED, "deleted"), (HIDDEN, "hidden")])
def test_a_delete_whose_answer_was_lost_is_what_the_dialect_makes_of_it(
    client: fakeredis.FakeRedis, promise: Deletion, status: str
) -> None:
    a = Stub("a", deletes=PacsMisanswered("Lost."), promise=promise)
    bench = DeletionBench(client, [a])
    assert isinstance(bench.delete(), PacsMisanswered)
    a.finds, a.deletes = NOWHERE, GONE
    assert bench.delete() == {"a": status}


def test_a_dry_run_deletes_nothing_and_shows_what_is_known(client: fakeredis.FakeRedis) -> None:
    servers = [Stub("a", SILENT), Stub("b", promise=HIDDEN), Stub("c", promise=REFUSED), Stub("d", NOWHERE)]
    ended = DeletionBench(client, servers).delete(dry_run=True)
    assert ended == {"a": "unavailable", "b": "would_hide", "c": "refused", "d": "not_there"}
    assert all("delete" not in stub.asked for stub in servers)


def test_the_claim_on_a_study_goes_when_every_server_says_that_it_is_gone(client: fakeredis.FakeRedis) -> None:
    a, b = Stub("a"), Stub("b")
    bench = DeletionBench(client, [a, b])
    bench.ledger.claim_study("1.2", server="a", job_id="j0")
    bench.delete("j1", servers=["a"])
    assert bench.ledger.claimed_server("1.2") == "a"
    a.finds, a.deletes, b.finds = HERE, DELETED, SILENT
    bench.delete("j2", servers=["a"])
    assert bench.ledger.claimed_server("1.2") == "a"
    a.finds = b.finds = HERE
    a.deletes = b.deletes = DELETED
    bench.delete("j3")
    assert bench.ledger.claimed_server("1.2") is None


def test_a_study_that_is_nowhere_loses_its_claim_when_it_is_deleted(client: fakeredis.FakeRedis) -> None:
    a, b = Stub("a", NOWHERE), Stub("b", SILENT)
    bench = DeletionBench(client, [a, b])
    bench.ledger.claim_study("1.2", server="a", job_id="j0")
    ended = bench.delete(servers=["a"])
    assert isinstance(ended, CourierError)
    assert (ended.code, bench.ledger.claimed_server("1.2")) == ("not_found", "a"), "b may have it"
    b.finds = NOWHERE
    assert isinstance(bench.delete(dry_run=True), CourierError)
    assert isinstance(bench.delete("j2", level="image"), CourierError)
    assert bench.ledger.claimed_server("1.2") == "a"
    ended = bench.delete()
    assert isinstance(ended, CourierError)
    assert (ended.code, bench.ledger.claimed_server("1.2"), bench.ledger.placed()) == ("not_found", None, {"a": 0})


@pytest.mark.parametrize(("level", "uid"), [("study", "1.2"), ("series", "1.2.1"), ("image", "1.2.1.1")])
def test_a_deletion_waits_for_who_is_storing(client: fakeredis.FakeRedis, level: str, uid: str) -> None:
    a = Stub("a")
    bench = DeletionBench(client, [a])
    upload = bench.run("j0")
    bench.ledger.lock_image("1.2.1.1", job_id="j0", fence=upload.fence, into=("1.2", "1.2.1"))
    with pytest.raises(Postpone, match="j0"):
        bench.delete(level=level, uid=uid)
    assert a.asked == []


def test_an_item_of_a_batch_waits_too_and_the_others_go_on(client: fakeredis.FakeRedis) -> None:
    bench = DeletionBench(client, [Stub("a")])
    upload = bench.run("j0")
    bench.ledger.lock_image("1.2.1.1", job_id="j0", fence=upload.fence, into=("1.2", "1.2.1"))
    batch = Batch("B", "running", "delete", {"permanent": True}, ("a",), {"a": "dicomweb"})
    items = [Item(0, "a", "1.2"), Item(1, "a", "1.3")]
    context = PassContext(batch, bench.run("B.0"), bench.services)
    assert StudyDeletions().apply(items, context, resumed=set()) == [None, ItemOutcome(items[1], "deleted")]
    late = bench.run("j9")
    assert bench.ledger.lock_image("1.3.1", job_id="j9", fence=late.fence, into=("1.3", "1.3.2")) is None


def test_an_item_says_of_each_server_what_the_batch_did_there_however_many_attempts_it_took(
    client: fakeredis.FakeRedis,
) -> None:
    a, b = Stub("a"), Stub("b", deletes=SILENT)
    c = Stub("c", deletes=PacsRejected("No."))
    d = Stub("d", deletes=GONE)
    bench = DeletionBench(client, [a, b, c, d])
    batches = Batches(bench.ledger)
    batches.open("B", kind="delete", order={"permanent": True}, concurrency=1)
    with Planner(batches, "B") as planner:
        planner.add_all([Planned("1.2")])
        planner.freeze()
    batch = batches.get("B")
    assert batch is not None

    def attempt(resumed: set[int]) -> Any:
        rows = {row.item.number: row for row in batches.chunk_rows(batch, 0, ["apply"])}
        client.hset("courier:job:B.0", "lease_ms", 0)
        context = PassContext(batch, bench.run("B.0"), bench.services, rows=rows)
        return StudyDeletions().apply([row.item for row in rows.values()], context, resumed=resumed)[0]

    assert isinstance(attempt(set()), PacsUnavailable)
    b.deletes = DELETED
    outcome = attempt({0})
    assert outcome.result["servers"] == {"a": "deleted", "b": "deleted", "c": "refused", "d": "not_there"}
    assert (outcome.status, outcome.code, outcome.server) == ("refused", "pacs_rejected", "c")


def test_what_was_kept_and_is_gone_counts_as_deleted_so_that_it_can_be_taken_back(client: fakeredis.FakeRedis) -> None:
    bench = DeletionBench(client, [Stub("a", NOWHERE, GONE)])
    batch = Batch("B", "running", "delete", {"permanent": True, "keep": "file:///out/"}, ("a",))
    kept = {"a": {"url": "file:///out/1.zip", "images": 1, "images_sha256": "0" * 64}}
    item = Item(0, "a", "1.2")
    known = ItemOutcome(item, "open", result={"kept": kept, "elsewhere": []})
    context = PassContext(batch, bench.run("B.0"), bench.services, rows={0: Row(item, {"apply": known})})
    (outcome,) = StudyDeletions().apply([item], context, resumed=set())  # a retry knows of no attempt before it
    assert isinstance(outcome, ItemOutcome)
    assert (outcome.status, outcome.result["kept"]) == ("deleted", kept)


@pytest.mark.parametrize(
    ("elsewhere", "planned", "conflict"),
    [([], (), True), (["b"], (), False), ([], ("a", "b"), False)],
    ids=["has begun anew", "was there before", "has come back too"],
)
def test_a_study_on_another_server_keeps_a_copy_from_coming_back_only_if_it_is_new_there(
    client: fakeredis.FakeRedis, elsewhere: list[str], planned: tuple[str, ...], conflict: bool
) -> None:
    bench = DeletionBench(client, [Stub("a", NOWHERE), Stub("b")])
    item = Item(0, "a", "1.2")
    known = ItemOutcome(item, "deleted", result={"kept": {"a": {}}, "elsewhere": elsewhere})
    batch = Batch("B", "undoing", "delete", {"keep": "file:///out/"}, planned)
    context = PassContext(batch, bench.run("B.0"), bench.services, rows={0: Row(item, {"apply": known})})
    with pytest.raises(StudyConflict) if conflict else nullcontext():
        _check_not_elsewhere(item, context)


def test_an_item_is_not_deleted_on_a_server_that_came_into_the_settings_after_the_plan(
    client: fakeredis.FakeRedis,
) -> None:
    bench = DeletionBench(client, [Stub("a"), Stub("b")])
    batch = Batch("B", "running", "delete", {"permanent": True}, (), {"a": "dicomweb"})
    context = PassContext(batch, bench.run("B.0"), bench.services)
    item = Item(0, "", "1.2")
    assert StudyDeletions().preflight([item], context, resumed=set()) == [
        ItemOutcome(item, "planned", server="a", result={"on": ["a"]})
    ]
    assert StudyDeletions().apply([item], context, resumed=set()) == [ItemOutcome(item, "deleted", server="a")]
    assert "delete" not in bench.servers[1].asked


@pytest.mark.parametrize("keep", [None, "file:///out/"])
def test_an_item_is_not_deleted_on_a_server_that_the_order_does_not_name(
    client: fakeredis.FakeRedis, keep: str | None
) -> None:
    bench = DeletionBench(client, [Stub("a"), Stub("b")])
    batch = Batch("B", "running", "delete", {"permanent": True, "servers": ["a"], "keep": keep}, ("a", "b"))
    context = PassContext(batch, bench.run("B.0"), bench.services)
    (answer,) = StudyDeletions().apply([Item(0, "b", "1.2")], context, resumed=set())
    assert isinstance(answer, InvalidRequest)
    assert "delete" not in bench.servers[1].asked


def test_a_deletion_that_is_cancelled_half_way_says_where_it_was_done(client: fakeredis.FakeRedis) -> None:
    a, b = Stub("a"), Stub("b", finds=SILENT)
    bench = DeletionBench(client, [a, b])
    first = bench.delete()
    assert isinstance(first, PacsUnavailable)
    assert (a.finds, bench.ledger.cancel("j1", unless="begun")) == (NOWHERE, "begun")
    b.finds = HERE
    assert bench.ledger.cancel("j1") == "waiting"
    ended = bench.delete()
    assert isinstance(ended, Cancelled)
    assert "Done already on a (deleted)" in ended.message
    assert [entry["status"] for entry in ended.details["servers"]] == ["deleted"]
    assert "delete" not in b.asked


@pytest.mark.parametrize(
    ("state", "unless", "answer", "is_cancelled"),
    [
        ("queued", "taken", "queued", True),
        ("queued", "begun", "queued", True),
        ("running", "taken", "taken", False),
        ("running", "begun", "running", True),
        ("begun", "begun", "begun", False),
        ("begun", None, "running", True),
        ("waiting", "taken", "taken", False),
        ("waiting", "begun", "waiting", True),
        ("", "begun", "", False),
    ],
)
def test_a_job_is_cancelled_unless_it_has_come_too_far(
    client: fakeredis.FakeRedis, state: str, unless: Any, answer: str, is_cancelled: bool
) -> None:
    ledger = Ledger(client)
    if state:
        ledger.submit("j", task="pacs.delete", job={})
    if state not in ("", "queued"):
        fence = ledger.take("j", task="pacs.delete", job={}).fence
        if state == "begun":
            assert ledger.write_intent("j", fence, {"begun": {}})
        if state == "waiting":
            ledger.park("j", fence, delay_s=60, code="pacs_unavailable", message="")
    assert ledger.cancel("j", unless=unless) == answer
    assert bool(client.hexists("courier:job:j", "cancel")) is is_cancelled
    if state == "running" and is_cancelled:
        assert not ledger.write_intent("j", fence, {"begun": {}}), "it can begin nothing any more"


@pytest.mark.parametrize(
    ("finds", "said", "left"),
    [
        (HERE, "An earlier attempt on a was not completed", ["a"]),
        (NOWHERE, "Done already on a (deleted)", None),
        (PacsRejected("Bad question.", server_name="a"), "An earlier attempt on a was not completed", ["a"]),
    ],
)
def test_a_deletion_that_is_cancelled_after_a_try_that_failed_deletes_nothing_more(
    client: fakeredis.FakeRedis, finds: Any, said: str, left: list[str] | None
) -> None:
    a = Stub("a", deletes=SILENT)
    bench = DeletionBench(client, [a])
    assert isinstance(bench.delete(), PacsUnavailable)
    bench.ledger.cancel("j1")
    a.asked.clear()
    a.finds = finds
    ended = bench.delete()
    assert isinstance(ended, Cancelled)
    assert said in ended.message
    assert ended.details.get("may_be_deleted_on") == left
    assert "delete" not in a.asked


def without_a(bench: DeletionBench) -> None:
    """No running worker knows the server ``a`` any more."""
    bench.services = replace(bench.services, fleet=Fleet(cast(Any, [one for one in bench.servers if one.name != "a"])))


@pytest.mark.parametrize("named", [{}, {"servers": ["a", "b"]}])
@pytest.mark.parametrize("a", [{"deletes": SILENT}, {"finds": SILENT}], ids=["begun", "not asked"])
def test_a_deletion_that_began_does_not_end_without_its_server_and_says_what_is_done(
    client: fakeredis.FakeRedis, a: Any, named: Any
) -> None:
    bench = DeletionBench(client, [Stub("a", **a), Stub("b")])
    assert isinstance(bench.delete(**named), PacsUnavailable)
    both = bench.services
    without_a(bench)
    ended = bench.delete(**named)
    if "finds" in a and not named:
        assert ended == {"b": "deleted"}, "the order is about all servers, and a is none any more"
        return
    assert isinstance(ended, PacsUnavailable), ended
    assert (ended.server_name, "Done already on b (deleted)." in ended.message) == ("a", True)
    assert [entry["status"] for entry in ended.details["servers"]] == ["deleted"]
    bench.services, bench.servers[0].finds, bench.servers[0].deletes = both, HERE, DELETED
    assert bench.delete(**named) == {"a": "deleted", "b": "deleted"}


def test_what_was_deleted_on_a_server_that_has_left_the_settings_stands_in_the_result(
    client: fakeredis.FakeRedis,
) -> None:
    bench = DeletionBench(client, [Stub("a"), Stub("b", deletes=SILENT)])
    assert isinstance(bench.delete(), PacsUnavailable)
    without_a(bench)
    bench.servers[1].deletes = DELETED
    assert bench.delete() == {"a": "deleted", "b": "deleted"}


def test_a_cancelled_deletion_says_that_it_may_be_gone_on_a_server_that_has_left_the_settings(
    client: fakeredis.FakeRedis,
) -> None:
    bench = DeletionBench(client, [Stub("a", deletes=SILENT), Stub("b")])
    assert isinstance(bench.delete(), PacsUnavailable)
    bench.ledger.cancel("j1")
    without_a(bench)
    ended = bench.delete()
    assert isinstance(ended, Cancelled)
    assert ended.details["may_be_deleted_on"] == ["a"]
    assert "Done already on b (deleted)." in ended.message


def test_a_cancelled_deletion_waits_for_a_server_that_does_not_say_what_it_did(client: fakeredis.FakeRedis) -> None:
    a = Stub("a", deletes=SILENT)
    bench = DeletionBench(client, [a])
    bench.delete()
    bench.ledger.cancel("j1")
    a.finds = SILENT
    assert isinstance(bench.delete(), PacsUnavailable)
    assert bench.ledger.read_record("j1")["state"] in ("running", "waiting")
