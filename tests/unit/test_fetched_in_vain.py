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
from tests.unit.test_upload import Desk, refused, stored
from worker.batches.coordinator import Desk as ChunkDesk
from worker.batches.coordinator import Notes
from worker.batches.uploads import Uploads
from worker.jobs.attempt import Run
from worker.jobs.runner import Parked
from worker.storage.sources import Fetched


@pytest.fixture
def client() -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield client


class Counting(Desk):
    """A worker's desk with breakers, which counts what is fetched."""

    def __init__(self, client: fakeredis.FakeRedis, *names: str) -> None:
        super().__init__(client, *names)
        self.fetched: list[str] = []
        self.tools = replace(self.tools, breakers=Breakers(client))
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
        claim = self.ledger.claim(job_id, task="pacs.batch.chunk", job={})
        run = Run(job_id, claim.fence, claim.attempt, last=False, ledger=self.ledger, memo=claim.memo)
        desk = ChunkDesk(cast(Any, None), run, self.tools, notes=Notes.of(claim.memo, pace={}))
        return list(Uploads(desk).carry([Item(number, server, url) for number, url in enumerate(urls)]))


@pytest.fixture
def desk(client: fakeredis.FakeRedis) -> Counting:
    desk = Counting(client, "a", "b")
    for name in "ijk":
        desk.files.there[name] = image(new_uid())
    return desk


@pytest.mark.parametrize(
    ("breaker", "server"),
    [("a", None), ("b", None), ("b", "a"), (f"a{CHANGES}", "a")],
)
def test_a_job_that_needs_a_server_that_is_left_alone_fetches_nothing(
    desk: Counting, breaker: str, server: str | None
) -> None:
    wish = {"server": server} if server else {}
    desk.open(breaker)
    for name in "ijk":
        assert isinstance(desk.carry(name, **wish), Parked)
    assert desk.fetched == []
    assert desk.ledger.parked() == {breaker.removesuffix(CHANGES): 3}
    assert desk.ledger.look("i")["attempts"] == "0"
    desk.close(breaker)
    assert stored(desk.carry("i", **wish))["attempts"] == 1


def test_the_only_server_there_is_is_the_one_that_has_to_take_changes(client: fakeredis.FakeRedis) -> None:
    desk = Counting(client, "a")
    desk.files.there["i"] = image(new_uid())
    desk.open(f"a{CHANGES}")
    assert isinstance(desk.carry("i"), Parked)
    assert desk.fetched == []


def test_a_server_that_takes_no_changes_keeps_no_job_from_another_one(desk: Counting) -> None:
    desk.open(f"a{CHANGES}")
    assert stored(desk.carry("i"))["server_name"] == "b"
    assert stored(desk.carry("j", server="b"))["server_name"] == "b"


def test_one_job_may_ask_whether_a_server_is_well_again_and_the_others_fetch_nothing_meanwhile(desk: Counting) -> None:
    desk.open("a", for_ms=-1)
    assert stored(desk.carry("i"))["status"] == "stored"
    desk.open("a", for_ms=-1, probing=True)
    assert isinstance(desk.carry("j"), Parked)
    assert desk.fetched == ["i"]


def test_a_job_whose_push_met_a_server_that_takes_no_changes_fetches_again_only_when_it_does(desk: Counting) -> None:
    server = desk.servers["a"].server.name
    away = PacsUnavailable("a took no changes.", server_name=server, details={"phase": "resting"})
    away.resting, away.is_attempt = f"a{CHANGES}", False
    desk.servers["a"].fails["store"] = away
    assert isinstance(desk.carry("i"), Parked)
    desk.open(f"a{CHANGES}")
    for _ in range(3):
        assert isinstance(desk.carry("i"), Parked)
    assert desk.fetched == ["i"]


def holding(desk: Counting, uid: str, study: str) -> int:
    """Another job has the image."""
    claim = desk.ledger.claim("other", task="pacs.upload", job={})
    assert desk.ledger.hold_image(uid, job_id="other", fence=claim.fence, into=(study, f"{study}.1")) is None
    return claim.fence


def end(ledger: Ledger, fence: int) -> None:
    ledger.finish("other", fence, outcome={"payload": {}}, code="done", task="pacs.upload", job={})


def test_a_job_that_waits_for_another_ones_image_fetches_once_and_again_when_it_may(desk: Counting) -> None:
    study, sop = new_uid(), new_uid()
    desk.files.there["i"] = image(study, sop=sop)
    fence = holding(desk, sop, study)
    for _ in range(5):
        assert isinstance(desk.carry("i"), Parked)
    assert desk.fetched == ["i"]
    assert "job other" in desk.ledger.look("i")["message"]
    end(desk.ledger, fence)
    assert stored(desk.carry("i"))["server_name"] == "a"
    assert desk.fetched == ["i", "i"]


def test_a_job_that_waits_for_a_deletion_of_its_study_fetches_once(desk: Counting) -> None:
    study = new_uid()
    desk.files.there["i"] = image(study)
    claim = desk.ledger.claim("other", task="pacs.delete", job={})
    assert desk.ledger.shut(study, job_id="other", fence=claim.fence) is None
    for _ in range(5):
        assert isinstance(desk.carry("i"), Parked)
    assert desk.fetched == ["i"]
    end(desk.ledger, claim.fence)
    assert stored(desk.carry("i"))["status"] == "stored"


def test_a_source_that_gives_another_image_when_the_wait_is_over_is_taken_at_its_word(desk: Counting) -> None:
    study, sop = new_uid(), new_uid()
    desk.files.there["i"] = image(study, sop=sop)
    fence = holding(desk, sop, study)
    assert isinstance(desk.carry("i"), Parked)
    end(desk.ledger, fence)
    desk.files.there["i"] = other = image(new_uid())
    assert stored(desk.carry("i"))["image_uid"] != sop
    desk.files.there["j"] = image(study, sop=sop)
    assert stored(desk.carry("j"))["image_uid"] == sop, "no job holds the first one any more"
    assert other


def test_a_job_that_waits_and_is_cancelled_says_so_without_a_fetch(desk: Counting) -> None:
    study, sop = new_uid(), new_uid()
    desk.files.there["i"] = image(study, sop=sop)
    holding(desk, sop, study)
    assert isinstance(desk.carry("i"), Parked)
    desk.ledger.cancel("i")
    assert refused(desk.carry("i")).code == "cancelled"
    assert desk.fetched == ["i"]


@pytest.mark.parametrize(("breaker", "server"), [("a", ""), ("b", ""), (f"a{CHANGES}", "a")])
def test_a_batch_fetches_nothing_for_a_server_that_is_left_alone(desk: Counting, breaker: str, server: str) -> None:
    desk.open(breaker)
    results = desk.chunk("i", "j", "k", server=server)
    assert {one.resting for one in results} == {breaker}
    assert desk.fetched == []
    desk.close(breaker)
    assert [one.status for one in desk.chunk("i", server=server)] == ["stored"]


def test_a_batch_fetches_once_what_another_job_has(desk: Counting) -> None:
    study, sop = new_uid(), new_uid()
    desk.files.there["i"] = image(study, sop=sop)
    fence = holding(desk, sop, study)
    assert [one and one.status for one in desk.chunk("i", "j")] == [None, "stored"]
    for _ in range(3):
        assert desk.chunk("i") == [None]
    assert desk.fetched.count("i") == 1
    end(desk.ledger, fence)
    assert [one.status for one in desk.chunk("i")] == ["stored"]
    assert desk.fetched.count("i") == 2
