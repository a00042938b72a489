"""What a batch plans of a server that has more studies than it lists. No server, and a ledger on fakeredis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import fakeredis
import pytest

from courier.batches.store import Batch
from courier.errors import InvalidRequest
from courier.ledger.jobs import Ledger
from courier.settings import ServerSettings, Settings
from worker.batches.coordinator import BatchKind, PassContext
from worker.batches.deletions import StudyDeletions
from worker.batches.downloads import StudyDownloads
from worker.batches.migrations import StudyMigrations
from worker.jobs.attempt import Attempt
from worker.jobs.services import Services
from worker.pacs.fleet import Fleet
from worker.pacs.protocol import StudyPage


@pytest.fixture
def client() -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield client


class Long:
    """A server that has more studies than it lists."""

    server = ServerSettings(name="a", type="dcm4chee", url="http://host")

    def studies(self, *, filters: Any, limit: int, offset: int) -> StudyPage:
        if offset >= 2:
            raise InvalidRequest("No further.")
        return StudyPage([{"0020000D": {"vr": "UI", "Value": [f"1.{offset}"]}}], next_offset=offset + 1)


def listed(kind: BatchKind, order: Mapping[str, Any], client: fakeredis.FakeRedis) -> tuple[list[str], list[str]]:
    """What a kind plans of such a server, and the warnings."""
    ledger, fleet = Ledger(client), Fleet([cast(Any, Long())])
    attempt = Attempt("B", ledger.take("B", task="t", job={}).fence, 1, last=False, ledger=ledger)
    context = PassContext(
        Batch("B", "planning", "any", order), attempt, Services(Settings(), ledger, cast(Any, None), fleet)
    )
    return [one.text for page in kind.pages(context) for one in page], context.warnings


@pytest.mark.parametrize(
    ("kind", "order"), [(StudyDeletions(), {}), (StudyMigrations(), {"from_server": "a", "delete_source": True})]
)
def test_a_list_that_cannot_be_paged_to_its_end_says_so_where_the_next_order_finds_the_rest(
    client: fakeredis.FakeRedis, kind: BatchKind, order: Mapping[str, Any]
) -> None:
    studies, warnings = listed(kind, order, client)
    assert studies == ["1.0", "1.1"]
    assert "no more than 2 studies" in warnings[0]


@pytest.mark.parametrize(("kind", "order"), [(StudyDownloads(), {}), (StudyMigrations(), {"from_server": "a"})])
def test_and_is_refused_where_the_next_order_would_find_the_same_studies_again(
    client: fakeredis.FakeRedis, kind: BatchKind, order: Mapping[str, Any]
) -> None:
    with pytest.raises(InvalidRequest, match="narrow the filters") as caught:
        listed(kind, order, client)
    assert caught.value.server_name == "a"
