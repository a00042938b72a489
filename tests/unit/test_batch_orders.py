"""What a program orders becomes a whole plan and one message, or nothing at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fakeredis
import pytest

from courier.batches.store import Batches, Item, ItemOutcome, Row
from courier.ledger.jobs import Ledger
from producer.batches import BatchClient, plan_lines
from producer.errors import InvalidRequest
from producer.orders import InputSource, Order
from producer.plans import PlanHeader, PlanLine, write

URLS = [f"https://images.example.org/{number}.dcm" for number in range(250)]


class OrderBench:
    """A desk on fakeredis whose messages are kept."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.ledger = Ledger(fakeredis.FakeRedis(decode_responses=True))
        self.batches = Batches(self.ledger)
        self.client = BatchClient(self.ledger, self.enqueue)

    def enqueue(self, task: str, kind: Any, job: Any, *, job_id: str | None = None, batch_id: str = "") -> Any:
        self.sent.append({"task": task, "job": dict(job), "job_id": job_id, "batch_id": batch_id})
        return self.sent[-1]


@pytest.fixture
def one() -> OrderBench:
    return OrderBench()


def planned(one: OrderBench) -> list[str]:
    (batch,) = one.batches.list()
    assert batch.frozen
    return [row.item.text for row in one.batches.rows(batch)]


def test_a_list_is_planned_whole_before_its_message_is_sent(one: OrderBench, tmp_path: Path) -> None:
    told: list[str] = []
    order = Order("upload", {"server": "msdicom", "name": "of Monday", "requests_per_s": 50.0})
    handle = one.client.order(order, InputSource(items=iter([*URLS, URLS[0]]), notify=told.append))
    assert planned(one) == URLS
    assert told == ["1 of them are there more than once, and are done once."]
    assert handle["task"] == "pacs.batch.upload"
    assert handle["job"] == {"server": "msdicom", "name": "of Monday", "requests_per_s": 50.0, "planned": True}
    (batch,) = one.batches.list()
    assert (batch.id, batch.id) == (handle["job_id"], handle["batch_id"])
    assert (batch.name, batch.order["server"], batch.state) == ("of Monday", "msdicom", "planning")


def test_files_lists_and_single_urls_are_told_apart(one: OrderBench, tmp_path: Path) -> None:
    path = tmp_path / "urls.txt"
    path.write_text("\n".join(URLS), encoding="utf-8")
    for items in (path, str(path), URLS, (url for url in URLS)):
        one = OrderBench()
        one.client.upload(items)
        assert planned(one) == URLS
    one = OrderBench()
    one.client.upload(URLS[0])
    assert planned(one) == URLS[:1]


@pytest.mark.parametrize("digests", ["sample", "none"])
def test_a_move_that_would_not_compare_all_is_refused_before_its_items_are_read(
    one: OrderBench, tmp_path: Path, digests: str
) -> None:
    unread = iter(URLS)
    with pytest.raises(InvalidRequest, match='delete_source needs digests "all"'):
        one.client.migrate(unread, source="a", target="b", delete_source=True, digests=digests)
    assert next(unread) == URLS[0]
    plan = tmp_path / "of-0.1.0.jsonl"
    order = {"from_server": "a", "to_server": "b", "delete_source": True, "digests": digests}
    with plan.open("w", encoding="utf-8") as file:
        write(PlanHeader(kind="migrate", order=order), [PlanLine(item="1.2.3")], file)
    with pytest.raises(InvalidRequest, match='delete_source needs digests "all"'):
        one.client.apply(plan)
    assert (one.sent, one.batches.list()) == ([], [])


def test_what_only_a_worker_reaches_goes_into_the_message(one: OrderBench) -> None:
    for source in ("s3://bucket/prefix/", "file:///data/", "https://host/all.zip?sig=1"):
        assert one.client.upload(source)["job"] == {"source": source}
    job = one.client.migrate(source="a", target="b", filters={"StudyDate": "20250101-20251231"})["job"]
    assert (job["from_server"], job["to_server"], job["filters"]) == ("a", "b", {"StudyDate": "20250101-20251231"})
    assert one.batches.list() == []
    with pytest.raises(InvalidRequest, match="stands alone"):
        one.client.order(Order("upload", {}), InputSource(("s3://bucket/prefix/", URLS[0])))


def test_nothing_is_begun_if_a_row_a_field_or_the_reading_is_wrong(one: OrderBench) -> None:
    with pytest.raises(InvalidRequest, match="1 row is bad"):
        one.client.upload([*URLS, "DOE^JANE"])
    with pytest.raises(InvalidRequest, match="width"):
        one.client.upload(URLS, width=0)
    with pytest.raises(InvalidRequest, match="destination"):
        one.client.download(["1.2.3"], destination="")
    with pytest.raises(InvalidRequest, match="nothing to do"):
        one.client.upload([])
    assert (one.batches.list(), one.sent) == ([], [])

    def breaks():
        yield URLS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.client.upload(breaks())
    assert one.batches.list() == []


def test_a_plan_that_breaks_off_leaves_a_cancelled_batch_and_no_message(
    one: OrderBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Batches, "freeze", breaks)
    with pytest.raises(KeyboardInterrupt):
        one.client.upload(URLS)
    (batch,) = one.batches.list()
    assert (batch.state, batch.frozen, one.sent) == ("cancelled", False, [])


def test_a_plan_goes_through_a_file_and_says_no_more_than_it_has_to(one: OrderBench, tmp_path: Path) -> None:
    one.client.delete(["1.2.3", "1.2.4"], servers=["msdicom"], confirm="delete all studies", dry_run=True, name="n")
    (batch,) = one.batches.list()
    header, lines = one.client.plan(batch.id)
    assert not {"confirm", "dry_run", "filters", "everything", "source"} & set(header.order)
    path = tmp_path / "plan.jsonl"
    with path.open("w", encoding="utf-8") as out:
        write(header, lines, out)
    other = OrderBench()
    handle = other.client.apply(path)
    assert planned(other) == ["1.2.3", "1.2.4"]
    assert (handle["task"], handle["job"]["servers"], handle["job"]["name"]) == ("pacs.batch.delete", ["msdicom"], "n")
    assert handle["job"]["dry_run"] is False
    text = path.read_text(encoding="utf-8").replace('"kind": "delete"', '"kind": "other"', 1)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidRequest, match="a kind that is not known"):
        other.client.apply(path)


def test_what_a_plan_refuses_is_refused_from_its_file_too_and_what_it_skips_is_skipped(
    one: OrderBench, tmp_path: Path
) -> None:
    path = tmp_path / "plan.jsonl"
    lines = (
        PlanLine(item="zip+file:///a.zip!/1"),
        PlanLine(item="zip+file:///a.zip!/2", do="skip", why="source_not_allowed: it is encrypted: ask for the key"),
        PlanLine(item="zip+file:///a.zip!/README", do="skip", why="no image by its name"),
        PlanLine(item="zip+file:///a.zip!/3", do="skip", why="source_not_allowed"),
    )
    with path.open("w", encoding="utf-8") as out:
        write(PlanHeader(kind="upload", order={"source": "file:///a.zip"}), lines, out)
    one.client.apply(path)
    (batch,) = one.batches.list()
    found = [row.outcome for row in one.batches.rows(batch)]
    assert [(row.status, row.code, row.message) for row in found] == [
        ("open", "", ""),
        ("refused", "source_not_allowed", "it is encrypted: ask for the key"),
        ("skipped", "", "no image by its name"),
        ("skipped", "", "source_not_allowed"),
    ]
    assert batch.of("apply").totals == {"refused": 1, "skipped": 2}


def test_the_plan_of_a_batch_that_ran_leaves_nothing_out_that_was_refused_when_it_was_fetched() -> None:
    item = Item(0, "", "https://h/a.dcm")
    fetched_in_vain = ItemOutcome(item, "refused", "not_dicom", "It is text.", server="-")
    refused_by_plan = ItemOutcome(item, "refused", "source_not_allowed", "It is encrypted.")
    at_a_server = ItemOutcome(item, "refused", "pacs_rejected", "No.", server="msdicom")
    rows = [Row(item, {"apply": one}) for one in (fetched_in_vain, refused_by_plan, at_a_server)]
    assert [line.do for row in rows for line in plan_lines(row)] == ["apply", "skip", "apply"]


def test_a_plan_says_of_a_study_on_several_servers_that_it_is_deleted_on_each_of_them() -> None:
    def servers(row: Row) -> list[tuple[str | None, str]]:
        return [(line.server, line.do) for line in plan_lines(row)]

    unnamed, named = Item(0, "", "1.2.3"), Item(1, "a", "1.2.3")
    both = {"on": ["a", "b"]}
    assert servers(Row(unnamed, {"survey": ItemOutcome(unnamed, "planned", server="a", result=both)})) == [
        ("a", "apply"),
        ("b", "apply"),
    ]
    assert servers(Row(unnamed, {"survey": ItemOutcome(unnamed, "planned", server="a", result={"on": ["a"]})})) == [
        ("a", "apply")
    ]
    assert servers(Row(named, {"survey": ItemOutcome(named, "planned")})) == [("a", "apply")]
    assert servers(Row(unnamed, {"survey": ItemOutcome(unnamed, "not_there", "not_found")})) == [(None, "skip")]
    assert servers(Row(unnamed, {})) == [(None, "apply")]  # nobody has asked


def test_a_batch_is_not_over_between_its_preflight_and_its_first_item_but_is_when_nobody_is_at_it(
    one: OrderBench,
) -> None:
    one.client.upload(URLS)
    (batch,) = one.batches.list()
    taken = one.ledger.take("C", task="pacs.batch.upload", job={})
    one.batches.take(batch.id, "C")
    one.batches.steer(batch.id, "planned", out_of=["planning"])
    assert not one.client.is_over(one.client.get(batch.id))
    one.ledger.finish("C", taken.fence, outcome={"payload": {}}, code="done", task="pacs.batch.upload", job={})
    assert one.client.is_over(one.client.get(batch.id))
    assert [seen.state for seen in one.client.watch(batch.id)] == ["planned"]
    assert one.client.ending(one.client.get(batch.id))["state"] == "planned"
