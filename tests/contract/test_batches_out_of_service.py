"""Batches while one of their servers is paused or in maintenance: items for it wait, those of the others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from courier.batches.store import Batches, Row
from courier.ledger.breakers import Breakers
from courier.ledger.elsewhere import ElsewhereStudies
from courier.ledger.slots import Slots
from courier.ledger.suspensions import Suspensions
from sandbox import processes as parts
from sandbox.images import ImageServer
from sandbox.processes import RedisPart, SandboxPart
from sandbox.synthetic import image, new_uid
from tests.batch_site import BatchSite
from worker.batches.deletions import delete_many
from worker.batches.study_copy import images_on
from worker.batches.uploads import upload_all
from worker.jobs.runner import Deferred, Done, JobResult
from worker.jobs.services import Services
from worker.pacs.fleet import Fleet
from worker.pacs.guard import Guard
from worker.pacs.registry import connect

SOURCES = {"allow_hosts": [f"{parts.HOST}:*"], "allow_private_networks": True}


class OrderedSite(BatchSite):
    """A worker that obeys an operator at once; ``looks`` are how often it was asked what is ordered."""

    def __init__(self, ledger_url: str, servers: list[dict[str, Any]], **sections: Any) -> None:
        super().__init__(ledger_url, servers, **sections)
        names = [server.name for server in self.settings.servers]
        self.looks = 0
        self.suspensions = Suspensions(self.ledger.client, names, clock=self._later)
        self.breakers = Breakers(self.ledger.client)
        guard = Guard(self.breakers, Slots(self.ledger.client), self.settings.servers, suspensions=self.suspensions)
        self.fleet.close()
        self.fleet = Fleet([connect(server, guard) for server in self.settings.servers])

    def _later(self) -> float:
        self.looks += 1
        return float(self.looks)

    @property
    def services(self) -> Services:
        before = super().services
        return Services(**{**vars(before), "suspensions": self.suspensions, "breakers": self.breakers})

    @property
    def batches(self) -> Batches:
        return Batches(self.ledger)

    def outcomes(self) -> list[Row]:
        batch = self.batches.get(self.batch)
        assert batch is not None
        return list(self.batches.rows(batch))

    def upload_items(self, items: list[Any], until: Callable[[], bool] = lambda: False) -> JobResult:
        return self.see_to_its_end("pacs.batch.upload", upload_all, self.batch, {"items": items}, until=until)

    def delete_items(self, items: list[Any], until: Callable[[], bool] = lambda: False) -> JobResult:
        return self.see_to_its_end("pacs.batch.delete", delete_many, self.batch, {"items": items}, until=until)

    def is_there(self, name: str, study: str) -> bool:
        """Asked by a connection of the test's own, which stands under no order."""
        server = next(server for server in self.settings.servers if server.name == name)
        return bool(images_on(connect(server), study))


@pytest.fixture
def site(redis: RedisPart, sandbox: SandboxPart) -> Iterator[OrderedSite]:
    opened = OrderedSite(redis.ledger_url, sandbox.servers(), sources=SOURCES)
    yield opened
    opened.close()


def end_it(site: OrderedSite, name: str) -> None:
    site.suspensions.end(name, "paused")
    site.suspensions.end(name, "maintenance")
    site.ledger.wake_parked()


def is_settled(site: OrderedSite, count: int) -> Callable[[], bool]:
    """Whether so many items are done, and the rest waits for a server out of service."""
    return lambda: (
        site.batches.get(site.batch) is not None
        and sum(row.outcome.status != "open" for row in site.outcomes()) == count
        and sum(site.ledger.parked().values()) > 0
    )


def done(result: JobResult) -> dict[str, Any]:
    assert isinstance(result, Done), result
    return result.payload


@pytest.mark.parametrize("away", ["msdicom", "dcm4chee"])
def test_uploads_go_to_the_other_server_and_those_for_this_one_wait(
    site: OrderedSite, image_server: ImageServer, away: str
) -> None:
    here = "dcm4chee" if away == "msdicom" else "msdicom"
    urls = [image_server.put(f"{number}.dcm", image(new_uid())) for number in range(4)]
    known = new_uid()
    site.ledger.copying(away, known, job_id="earlier")
    waiting = image_server.put("known.dcm", image(known))
    asks = image_server.put("asks.dcm", image(new_uid()))
    site.suspensions.maintain(away, set_by="ana")
    items = [*urls, waiting, {"item": asks, "server": away}]
    result = site.upload_items(items, until=is_settled(site, 4))
    assert isinstance(result, Deferred)
    stored = [row.outcome for row in site.outcomes() if row.outcome.status == "stored"]
    assert {one.server_name for one in stored} == {here}
    assert all(one.result["warnings"] == ["not_asked"] for one in stored)
    assert all(one.result["not_asked"] == [away] for one in stored)
    to_come = ElsewhereStudies(site.ledger.client).read(away)
    assert to_come is not None
    assert (to_come.studies, to_come.split) == (4, None)
    assert site.ledger.kind_of(to_come.job_id)[0] == "pacs.audit"
    end_it(site, away)
    payload = done(site.upload_items(items))
    assert (payload["totals"]["stored"], payload["failures_total"]) == (6, 0)
    assert {row.item.text: row.outcome.server_name for row in site.outcomes()}[asks] == away


def test_a_maintenance_that_begins_in_the_middle_of_a_load_splits_no_study_and_fails_no_item(
    site: OrderedSite, image_server: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies = [new_uid() for _ in range(6)]
    urls = [image_server.put(f"{n}.dcm", image(studies[n % 6])) for n in range(48)]
    fetch, fetched = site.sources.fetch, []

    def fetch_and_order(url: str) -> Any:
        fetched.append(url)
        if len(fetched) == 30:
            site.suspensions.maintain("msdicom", set_by="ana")
        return fetch(url)

    monkeypatch.setattr(site.sources, "fetch", fetch_and_order)
    site.upload_items(urls, until=lambda: len(fetched) > 48 and sum(site.ledger.parked().values()) > 0)
    monkeypatch.undo()
    end_it(site, "msdicom")
    payload = done(site.upload_items(urls))
    assert (payload["totals"]["stored"], payload["failures_total"]) == (48, 0)
    for study in studies:
        assert [bool(site.on(name, study)) for name in ("msdicom", "dcm4chee")].count(True) == 1
        assert sum(len(site.on(name, study)) for name in ("msdicom", "dcm4chee")) == 8


@pytest.mark.parametrize("state", ["paused", "maintenance"])
def test_deletions_on_the_other_server_go_on_and_none_fails_however_often_the_chunk_looks(
    site: OrderedSite, state: str
) -> None:
    here, there = [new_uid() for _ in range(3)], [new_uid() for _ in range(3)]
    for study in here:
        site.put("msdicom", study, 1)
    for study in there:
        site.put("dcm4chee", study, 1)
    order = site.suspensions.pause if state == "paused" else site.suspensions.maintain
    order("dcm4chee", set_by="ana")
    items: list[Any] = [{"item": study, "server": "msdicom"} for study in here]
    items += [{"item": study, "server": "dcm4chee"} for study in there]
    items = [one for pair in zip(items[:3], items[3:], strict=True) for one in pair]
    for _ in range(4):
        result = site.delete_items(items, until=is_settled(site, 3))
        assert isinstance(result, Deferred)
        for key in site.ledger.client.keys("*job:B.apply*"):
            site.ledger.client.hset(key, "woken", 1)
    assert [site.on("msdicom", study) for study in here] == [set()] * 3
    assert all(site.is_there("dcm4chee", study) for study in there)
    end_it(site, "dcm4chee")
    payload = done(site.delete_items(items))
    assert (payload["totals"]["deleted"], payload["failures_total"]) == (6, 0)


def test_a_move_that_began_before_a_maintenance_waits_for_its_end(site: OrderedSite) -> None:
    studies = [new_uid() for _ in range(2)]
    for study in studies:
        site.put("msdicom", study)
    site.order(*studies, delete_source=True, until=lambda: bool(site.batches.get(site.batch)))
    site.suspensions.maintain("dcm4chee", set_by="ana")
    result = site.order(*studies, delete_source=True, until=lambda: sum(site.ledger.parked().values()) > 0)
    assert isinstance(result, Deferred)
    end_it(site, "dcm4chee")
    payload = done(site.order(*studies, delete_source=True))
    assert payload["failures_total"] == 0
    assert [len(site.on("dcm4chee", study)) for study in studies] == [2, 2]
    assert [site.on("msdicom", study) for study in studies] == [set(), set()]
