"""Claims of new studies, raced for by threads over a real Redis, while servers refuse and jobs ask for servers."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from courier.ledger.jobs import PREFIX, Ledger, Receipt

TASK, NAMES, JOBS = "pacs.upload", ("a", "b", "c"), 12


@pytest.fixture
def ledger(redis_url: str) -> Iterator[Ledger]:
    ledger = Ledger.connect(redis_url, worker="w")
    yield ledger
    ledger.close()


@dataclass
class Servers:
    """Which images of the study each server has."""

    images: dict[str, set[str]] = field(default_factory=lambda: {name: set() for name in NAMES})
    lock: threading.Lock = field(default_factory=threading.Lock)

    def with_study(self) -> list[str]:
        return [name for name in NAMES if self.has_study(name)]

    def has_study(self, name: str) -> bool:
        with self.lock:
            return bool(self.images[name])

    def store(self, name: str, image: str) -> None:
        with self.lock:
            self.images[name].add(image)


def upload(ledger: Ledger, study: str, job_id: str, servers: Servers, rng: random.Random) -> None:
    """As an upload does it: hold, ask each server, claim, push or be refused, receipt, end."""
    wanted, refused = rng.choice([None, None, *NAMES]), rng.random() < 0.5
    image = f"{study}.{job_id}"
    fence = ledger.take(job_id, task=TASK, job={}).fence
    ledger.lock_image(image, job_id=job_id, fence=fence, into=(study,))
    there = servers.with_study()
    if there:
        target = there[0] if wanted in (None, there[0]) else None
    else:
        proposal = wanted or rng.choice(NAMES)
        claim = ledger.claim_study(
            study, server=proposal, job_id=job_id, asked_for=wanted is not None, in_history=False
        )
        target = claim.server if wanted in (None, claim.server) else None
    if target and not refused:
        ledger.write_intent(job_id, fence, {"uncertain": True})
        servers.store(target, image)
        ledger.stored(image, study, Receipt(job_id, target, "aa", 1))
    ledger.finish(job_id, fence, outcome={}, code="done", task=TASK, job={})


@pytest.mark.parametrize("seed", range(4))
def test_no_race_of_refusals_and_of_servers_that_are_asked_for_splits_a_study(ledger: Ledger, seed: int) -> None:
    rng = random.Random(seed)
    studies = {f"1.{seed}.{number}": Servers() for number in range(15)}
    with ThreadPoolExecutor(JOBS) as pool:
        for study, servers in studies.items():
            jobs = [(f"{study}-{number}", random.Random(rng.random())) for number in range(JOBS)]
            list(pool.map(lambda job, at=(study, servers): upload(ledger, at[0], job[0], at[1], job[1]), jobs))
    assert any(servers.with_study() for servers in studies.values())
    for study, servers in studies.items():
        on = servers.with_study()
        assert len(on) <= 1
        claimed = ledger.client.hgetall(f"{PREFIX}study:{study}")
        assert not [field for field in claimed if field.startswith("follower:")]
        assert (claimed.get("server") in on) if claimed else not on, "without an image there is no claim"
    given = {name: sum(servers.has_study(name) for servers in studies.values()) for name in NAMES}
    assert {name: ledger.placed().get(name, 0) for name in NAMES} == given
