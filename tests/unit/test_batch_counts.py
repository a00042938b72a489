"""On which servers an item of a batch is counted, whatever became of it there, and how the counts go back."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

import fakeredis
import pytest

from courier.batches.planner import Planned, Planner
from courier.batches.store import NOWHERE, Batch, Batches, Item, ItemOutcome, ItemStatus, Pass, Row, added_up
from courier.ledger.jobs import PREFIX, Ledger
from producer.cli.batch_tables import write_csv

TYPES = {"a": "orthanc", "b": "dcm4chee", "c": "msdicom"}
LISTED, LOOSE = Item(0, "a", "1.2"), Item(0, "", "1.2")


@pytest.mark.parametrize(
    ("one", "outcomes"),
    [
        (ItemOutcome(LISTED, "deleted"), {"a": "deleted"}),
        (ItemOutcome(LOOSE, "deleted", server="b"), {"b": "deleted"}),
        (ItemOutcome(LOOSE, "not_there"), {}),
        (ItemOutcome(LISTED, "failed", server=NOWHERE), {}),
        (ItemOutcome(LOOSE, "refused", server="a", result={"servers": {"a": "refused", "b": "deleted"}}),
         {"a": "refused", "b": "deleted"}),
        (ItemOutcome(LOOSE, "failed", server="b", result={"servers": {"a": "deleted", "c": "hidden"}}),
         {"b": "failed", "a": "deleted", "c": "hidden"}),
        (ItemOutcome(LISTED, "undone", result={"servers": {"a": {"restored": 2}, "b": {"restored": 1}}}),
         {"a": "undone", "b": "undone"}),
        (ItemOutcome(LISTED, "deleted", result={"servers": ["b"]}), {"a": "deleted"}),
        (ItemOutcome(LISTED, "deleted", result={"servers": {"b": "vanished"}}), {"a": "deleted", "b": "deleted"}),
    ],
)  # fmt: skip
def test_an_item_is_at_each_server_that_it_has_come_to(one: ItemOutcome, outcomes: Mapping[str, str]) -> None:
    assert one.outcomes == outcomes
    assert list(one.outcomes)[:1] == ([one.server_name] if one.server_name else [])


class CountBench:
    """A batch of a few items, and a job that settles them."""

    def __init__(self, client: fakeredis.FakeRedis, items: int = 3) -> None:
        self.client, ledger = client, Ledger(client)
        self.batches = Batches(ledger)
        self.batches.open("B", kind="delete", order={}, servers=TYPES, concurrency=1)
        with Planner(self.batches, "B") as planner:
            planner.add_all(Planned(f"1.{number}") for number in range(items))
            planner.freeze()
        self.fence = ledger.take("j", task="t", job={}).fence

    @property
    def batch(self) -> Batch:
        batch = self.batches.get("B")
        assert batch is not None
        return batch

    def record_outcome(self, number: int, status: ItemStatus, which: Pass = "apply", **told: Any) -> None:
        item = Item(number, "", f"1.{number}")
        self.batches.record_outcomes(
            self.batch, which, 0, [ItemOutcome(item, status, **told)], job_id="j", fence=self.fence
        )


@pytest.fixture
def bench() -> Iterator[CountBench]:
    with fakeredis.FakeRedis(decode_responses=True) as client:
        yield CountBench(client)


def test_the_rows_of_servers_count_what_each_did_and_the_totals_count_items(bench: CountBench) -> None:
    both: Mapping[str, Any] = {"server": "a", "result": {"servers": {"a": "deleted", "b": "deleted"}}}
    bench.record_outcome(0, "deleted", **both)
    bench.record_outcome(0, "deleted", **both)  # what comes late is not counted again
    bench.record_outcome(
        1, "refused", server="a", result={"servers": {"a": "refused", "b": "hidden", "c": "not_there"}}
    )
    bench.record_outcome(2, "failed", server=NOWHERE, code="source_not_found")
    batch = bench.batch
    assert batch.of("apply").totals == {"deleted": 1, "refused": 1, "failed": 1}
    assert batch.settled == 3
    assert batch.outcomes == {
        "": {"failed": 1},
        "a": {"deleted": 1, "refused": 1},
        "b": {"deleted": 1, "hidden": 1},
        "c": {"not_there": 1},
    }
    rows = {row["server_name"]: row for row in batch.as_json()["servers"]}
    assert rows["b"] == {"server_name": "b", "server_type": "dcm4chee", "planned": 0, "deleted": 1, "hidden": 1}
    assert list(rows) == ["a", "b", "c"], "what came to no server is under none"


@pytest.mark.parametrize(
    "told",
    [
        {"server": "b", "result": {"servers": {"a": "deleted"}}},
        {"server": NOWHERE},
        {"server": "a", "result": {"servers": {"a": "failed", "b": "deleted", "c": "deleted"}}},
    ],
)
def test_what_is_opened_again_is_taken_from_every_server_that_counted_it(
    bench: CountBench, told: dict[str, Any]
) -> None:
    bench.record_outcome(1, "deleted", server="c")
    bench.record_outcome(0, "failed", code="pacs_unavailable", **told)
    assert bench.batches.reopen(bench.batch, "apply", ["failed"]) == 1
    assert bench.batch.outcomes == {"c": {"deleted": 1}}
    bench.record_outcome(0, "deleted", server="a", result={"servers": {"a": "deleted", "b": "deleted"}})
    assert bench.batch.outcomes == {"c": {"deleted": 1}, "a": {"deleted": 1}, "b": {"deleted": 1}}


def test_what_an_attempt_noted_of_an_open_item_counts_once_it_has_failed(bench: CountBench) -> None:
    bench.record_outcome(0, "open", server="a", result={"servers": {"a": "deleted"}})
    assert bench.batch.outcomes == {}
    bench.record_outcome(0, "failed", server="b", code="pacs_unavailable", message="b is silent.")
    assert bench.batch.outcomes == {"a": {"deleted": 1}, "b": {"failed": 1}}
    assert bench.batch.of("apply").totals == {"failed": 1}


def test_a_pass_that_begins_again_forgets_the_further_servers_too(bench: CountBench) -> None:
    moved = {"server": "b", "result": {"servers": {"b": "verified", "a": "deleted"}}}
    bench.record_outcome(0, "copied", server="b")
    for _ in range(2):
        bench.record_outcome(0, "verified", "verify", **moved)
        assert bench.batch.outcomes == {"b": {"copied": 1, "verified": 1}, "a": {"deleted": 1}}
        bench.batches.forget_pass(bench.batch, "verify")
    assert bench.batch.outcomes == {"b": {"copied": 1}}


def test_a_batch_that_was_counted_by_an_older_version_is_read_and_opened_again(bench: CountBench) -> None:
    bench.record_outcome(0, "failed", server="b", result={"servers": {"a": "deleted"}})
    bench.client.hdel(f"{PREFIX}batch:B", "m:apply:a:deleted")  # it counted each item once
    assert bench.batch.outcomes == {"b": {"failed": 1}}
    bench.batches.reopen(bench.batch, "apply", ["failed"])
    assert bench.batch.outcomes == {}


def test_counts_are_added_up_by_server_and_status() -> None:
    assert added_up([{"a": {"x": 1}}, {"a": {"x": 2, "y": 1}, "b": {"x": 1}}, {}]) == {
        "a": {"x": 3, "y": 1},
        "b": {"x": 1},
    }


def test_each_row_of_a_report_names_all_servers_of_its_item() -> None:
    applied = ItemOutcome(
        LOOSE, "refused", "invalid_request", "a is protected.", {"servers": {"a": "refused", "b": "deleted"}}, "a"
    )
    verified = ItemOutcome(LOOSE, "verified", server="b", result={"servers": {"b": "verified", "c": "deleted"}})
    told = Row(LOOSE, {"apply": applied, "verify": verified}).as_json(TYPES)
    assert told["servers"] == [
        {"server_name": "a", "server_type": "orthanc", "status": "refused"},
        {"server_name": "b", "server_type": "dcm4chee", "status": "deleted"},
    ]
    assert [one["server_name"] for one in told["verify"]["servers"]] == ["b", "c"]
    out = io.StringIO()
    write_csv([told, Row(LISTED, {"apply": ItemOutcome(LISTED, "deleted")}).as_json(TYPES)], out)
    first, second = csv.DictReader(io.StringIO(out.getvalue()))
    assert (first["server_name"], first["status"]) == ("a", "refused")
    assert first["message"] == "a is protected.; b: deleted; b: verified; c: deleted"
    assert (second["server_name"], second["message"]) == ("a", "")
