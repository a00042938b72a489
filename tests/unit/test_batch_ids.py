"""An id of a batch is part of the names of keys: one that would be taken for another key is refused everywhere."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

import fakeredis
import pytest

from courier.batches.planner import Planned, Planner
from courier.batches.store import Batches
from courier.errors import InvalidRequest, NotFound
from courier.ledger.jobs import Ledger
from courier.settings import Settings
from producer.batches import BatchClient
from worker.batches import coordinator as batch_jobs
from worker.batches import delete_all, uploads
from worker.jobs.attempt import Heartbeat
from worker.jobs.runner import Failed, Work, execute
from worker.jobs.services import Services
from worker.pacs.fleet import Fleet

BAD = ["B:outcomes:apply", "B:results:apply", "B:", "two words", "B\n", "B\x7f", "B\u2028", "x" * 201]


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        ledger = Ledger(client)
        batches = Batches(ledger)
        batches.open("B", kind="upload", order={}, concurrency=4)
        with Planner(batches, "B") as planner:
            planner.add_all([Planned("http://h/a.dcm", skip="no"), Planned("http://h/b.dcm")])
            planner.freeze()
        yield ledger


def ended(ledger: Ledger, work: Work, task: str, message: Mapping[str, Any], job_id: str = "j") -> str:
    services = Services(
        settings=Settings(), ledger=ledger, sources=cast(Any, None), fleet=Fleet([]), rng=random.Random(1)
    )
    result = execute(
        work, task=task, job_id=job_id, message=message, services=services, heartbeat=Heartbeat(ledger, lambda *_: None)
    )
    assert isinstance(result, Failed)
    assert result.error.code != "invalid_request" or "batch" in result.error.message
    return result.error.code


@pytest.mark.parametrize("batch_id", BAD)
def test_a_message_about_a_batch_that_cannot_be_called_so_is_refused_at_once(ledger: Ledger, batch_id: str) -> None:
    message = {"batch_id": batch_id}
    assert ended(ledger, batch_jobs.show, "pacs.batch.show", message) == "invalid_request"


def test_what_can_be_a_batch_and_is_none_is_not_found(ledger: Ledger) -> None:
    for number, batch_id in enumerate(("b", "B.apply.0", "order/7@host", "Größe")):
        code = ended(ledger, batch_jobs.show, "pacs.batch.show", {"batch_id": batch_id}, f"j{number}")
        assert code == "not_found"


@pytest.mark.parametrize("job_id", BAD[:5])
def test_an_order_whose_own_id_cannot_be_that_of_a_batch_is_refused_at_once(ledger: Ledger, job_id: str) -> None:
    items = [{"image_url": "http://h/c.dcm"}]
    assert ended(ledger, uploads.upload_all, "pacs.batch.upload", {"items": items}, job_id) == "invalid_request"
    order = {"confirm": "delete all studies"}
    assert ended(ledger, delete_all.delete_all, "pacs.delete_all", order, f"x{job_id}") == "invalid_request"
    assert Batches(ledger).get("B") is not None


def test_a_program_is_told_so_too(ledger: Ledger) -> None:
    client = BatchClient(ledger, cast(Any, SimpleNamespace()))
    for steer in (client.get, client.pause, client.cancel, lambda one: list(client.report(one))):
        with pytest.raises(InvalidRequest, match="id of a batch"):
            steer("B:outcomes:apply")
        with pytest.raises(NotFound):
            client.get("unknown")
