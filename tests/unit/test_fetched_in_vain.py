"""No file is fetched only to find out that its job has to wait: for a server that is left alone, or for another job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import fakeredis
import pytest

from courier.batches.store import Item
from courier.errors import PacsUnavailable
from courier.ledger.breakers import BREAKER, CHANGES, Breakers
from courier.ledger.jobs import PREFIX, Ledger
from sandbox.synthetic import image, new_uid
from tests.unit.test_upload import SingleUploadBench, refused, stored
from worker.batches.coordinator import PassCheckpoint
from worker.batches.coordinator import PassContext as ChunkDesk
from worker.batches.uploads import Uploads
from worker.jobs.attempt import Attempt
from worker.jobs.runner import Deferred
from worker.storage.sources import Fetched


@pytest.fixture
def client() -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield client


class Counting(SingleUploadBench):
    """A worker's desk with breakers, which counts what is fetched."""

    def __init__(self, client: fakeredis.FakeRedis, *names: str) -> None:
        super().__init__(client, *names)
        self.fetched: list[str] = []
        self.services = replace(self.services, breakers=Breakers(client))
        fetch = self.files.fetch

        def count(url: str) -> Fetched:
            self.fetched.append(url)
            return fetch(url)

        self.files.fetch = count  # type: ignore[method-assign]
        for server in self.servers.values():
            cast(Any, server).request_bytes = None

    def open(self, breaker: str, *, for_ms: int = 60_000, probing: bool = False) -> None:
        now_ms = int(self.ledger.clock_s() * 1000)
        fields = {"until_ms": now_ms + for_ms, **({"probe": "p", "probe_until_ms": now_ms + 9000} if probing else {})}
        self.client.hset(f"{PREFIX}{BREAKER}{breaker}", mapping=cast(Any, fields))

    def close(self, breaker: str) -> None:
        self.client.delete(f"{PREFIX}{BREAKER}{breaker}")

    def chunk(self, *urls: str, server: str = "", job_id: str = "B.apply.0") -> list[Any]:
        """One attempt at a chunk of a batch, with the memo of the one before."""
        self.client.hset(f"courier:job:{job_id}", "lease_ms", 0)
        taken = self.ledger.take(job_id, task="pacs.batch.chunk", job={})
        attempt = Attempt(
            job_id, taken.fence, taken.attempt, last=False, ledger=self.ledger, checkpoint=taken.checkpoint
        )
        context = ChunkDesk(
            cast(Any, None), attempt, self.services, pass_checkpoint=PassCheckpoint.of(taken.checkpoint, throttle={})
        )
        return list(Uploads(context).execute([Item(number, server, url) for number, url in enumerate(urls)]))


@pytest.fixture
def bench(client: fakeredis.FakeRedis) -> Counting:
    bench = Counting(client, "a", "b")
    for name in "ijk":
        bench.files.there[name] = image(new_uid())
    return bench


@pytest.mark.parametrize(
    ("breaker", "server"),
    [("a", None), ("b", None), ("b", "a"), (f"a{CHANGES}", "a")],
)
def test_a_job_that_needs_a_server_whose_circuit_is_open_fetches_nothing(
    bench: Counting, breaker: str, server: str | None
) -> None:
    order = {"server": server} if server else {}
    bench.open(breaker)
    for name in "ijk":
        assert isinstance(bench.execute(name, **order), Deferred)
    assert bench.fetched == []
    assert bench.ledger.parked() == {breaker.removesuffix(CHANGES): 3}
    assert bench.ledger.read_record("i")["attempts"] == "0"
    bench.close(breaker)
    assert stored(bench.execute("i", **order))["attempts"] == 1


def test_the_only_server_there_is_is_the_one_that_has_to_take_changes(client: fakeredis.FakeRedis) -> None:
    bench = Counting(client, "a")
    bench.files.there["i"] = image(new_uid())
    bench.open(f"a{CHANGES}")
    assert isinstance(bench.execute("i"), Deferred)
    assert bench.fetched == []


def test_a_server_that_takes_no_changes_keeps_no_job_from_another_one(bench: Counting) -> None:
    bench.open(f"a{CHANGES}")
    assert stored(bench.execute("i"))["server_name"] == "b"
    assert stored(bench.execute("j", server="b"))["server_name"] == "b"


def test_one_job_may_ask_whether_a_server_is_well_again_and_the_others_fetch_nothing_meanwhile(bench: Counting) -> None:
    bench.open("a", for_ms=-1)
    assert stored(bench.execute("i"))["status"] == "stored"
    bench.open("a", for_ms=-1, probing=True)
    assert isinstance(bench.execute("j"), Deferred)
    assert bench.fetched == ["i"]


def test_a_job_whose_push_met_a_server_that_takes_no_changes_fetches_again_only_when_it_does(bench: Counting) -> None:
    server = bench.servers["a"].server.name
    away = PacsUnavailable("a took no changes.", server_name=server, details={"phase": "resting"})
    away.open_circuit, away.is_attempt = f"a{CHANGES}", False
    bench.servers["a"].fails["store"] = away
    assert isinstance(bench.execute("i"), Deferred)
    bench.open(f"a{CHANGES}")
    for _ in range(3):
        assert isinstance(bench.execute("i"), Deferred)
    assert bench.fetched == ["i"]


def image_lock(bench: Counting, uid: str, study: str) -> int:
    """Another job has the image."""
    taken = bench.ledger.take("other", task="pacs.upload", job={})
    assert bench.ledger.lock_image(uid, job_id="other", fence=taken.fence, into=(study, f"{study}.1")) is None
    return taken.fence


def end(ledger: Ledger, fence: int) -> None:
    ledger.finish("other", fence, outcome={"payload": {}}, code="done", task="pacs.upload", job={})


def test_a_job_that_waits_for_another_ones_image_fetches_once_and_again_when_it_may(bench: Counting) -> None:
    study, sop = new_uid(), new_uid()
    bench.files.there["i"] = image(study, sop=sop)
    fence = image_lock(bench, sop, study)
    for _ in range(5):
        assert isinstance(bench.execute("i"), Deferred)
    assert bench.fetched == ["i"]
    assert "job other" in bench.ledger.read_record("i")["message"]
    end(bench.ledger, fence)
    assert stored(bench.execute("i"))["server_name"] == "a"
    assert bench.fetched == ["i", "i"]


def test_a_job_that_waits_for_a_deletion_of_its_study_fetches_once(bench: Counting) -> None:
    study = new_uid()
    bench.files.there["i"] = image(study)
    taken = bench.ledger.take("other", task="pacs.delete", job={})
    assert bench.ledger.lock_for_delete(study, job_id="other", fence=taken.fence) is None
    for _ in range(5):
        assert isinstance(bench.execute("i"), Deferred)
    assert bench.fetched == ["i"]
    end(bench.ledger, taken.fence)
    assert stored(bench.execute("i"))["status"] == "stored"


def test_a_source_that_gives_another_image_when_the_wait_is_over_is_taken_at_its_word(bench: Counting) -> None:
    study, sop = new_uid(), new_uid()
    bench.files.there["i"] = image(study, sop=sop)
    fence = image_lock(bench, sop, study)
    assert isinstance(bench.execute("i"), Deferred)
    end(bench.ledger, fence)
    bench.files.there["i"] = other = image(new_uid())
    assert stored(bench.execute("i"))["image_uid"] != sop
    bench.files.there["j"] = image(study, sop=sop)
    assert stored(bench.execute("j"))["image_uid"] == sop, "no job holds the first one any more"
    assert other


def test_a_job_that_waits_and_is_cancelled_says_so_without_a_fetch(bench: Counting) -> None:
    study, sop = new_uid(), new_uid()
    bench.files.there["i"] = image(study, sop=sop)
    image_lock(bench, sop, study)
    assert isinstance(bench.execute("i"), Deferred)
    bench.ledger.cancel("i")
    assert refused(bench.execute("i")).code == "cancelled"
    assert bench.fetched == ["i"]


@pytest.mark.parametrize(("breaker", "server"), [("a", ""), ("b", ""), (f"a{CHANGES}", "a")])
def test_a_batch_fetches_nothing_for_a_server_whose_circuit_is_open(bench: Counting, breaker: str, server: str) -> None:
    bench.open(breaker)
    results = bench.chunk("i", "j", "k", server=server)
    assert {one.open_circuit for one in results} == {breaker}
    assert bench.fetched == []
    bench.close(breaker)
    assert [one.status for one in bench.chunk("i", server=server)] == ["stored"]


def test_a_batch_fetches_once_what_another_job_has(bench: Counting) -> None:
    study, sop = new_uid(), new_uid()
    bench.files.there["i"] = image(study, sop=sop)
    fence = image_lock(bench, sop, study)
    assert [one and one.status for one in bench.chunk("i", "j")] == [None, "stored"]
    for _ in range(3):
        assert bench.chunk("i") == [None]
    assert bench.fetched.count("i") == 1
    end(bench.ledger, fence)
    assert [one.status for one in bench.chunk("i")] == ["stored"]
    assert bench.fetched.count("i") == 2
