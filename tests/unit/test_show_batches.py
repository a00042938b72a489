"""What batches look like: a line with a bar that fits the terminal, counts that add up, and no signature of a URL."""

from __future__ import annotations

import io
import json
from typing import get_args

import click
import pytest
from rich.console import Console

from courier.batches.progress import Throughput, of_how_many
from courier.batches.store import Batch, ItemStatus, PassState
from producer.cli.batch_tables import (
    Look,
    PlanSummary,
    batches_table,
    counts_table,
    end_line,
    failures_table,
    has_ended,
    json_array,
    json_lines,
    known_statuses,
    order_line,
    plan_sentence,
    plan_table,
    undo_question,
    write_csv,
)
from producer.cli.quantities import Bandwidth, RateParam, WindowParam
from producer.errors import InvalidRequest
from producer.plans import PlanLine

BATCH_ID = "3255f323-b5fc-414a-9368-c5f96df9a771"
APPLIED = PassState(
    bytes=5_000_000,
    begun_ms=1_000,
    ended_ms=11_000,
    counts={"": {"skipped": 2, "refused": 1}, "msdicom": {"stored": 990_000}, "dcm4chee": {"already_there": 7}},
)


def batch(**changes) -> Batch:
    fields = {
        "id": BATCH_ID,
        "state": "running",
        "kind": "upload",
        "types": {"msdicom": "msdicom", "dcm4chee": "dcm4chee"},
        "items": 1_000_000,
        "frozen": True,
        "current": "apply",
        "passes": {"apply": APPLIED},
        "created_ms": 1_700_000_000_000,
    }
    return Batch(**{**fields, **changes})


def drawn(thing, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(thing)
    return console.file.getvalue().rstrip("\n").split("\n")


@pytest.mark.parametrize("width", [80, 120])
def test_a_running_batch_is_three_lines_that_fit_the_terminal(width: int) -> None:
    look = Look(batch(), "apply", Throughput(1234.5, 20_500_000, 3700))
    lines = drawn(look.renderable(), width)
    assert len(lines) == 3
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("running ")
    assert lines[0].rstrip().endswith("990,010/1,000,000  99 %")
    assert lines[1].strip() == "1,234 items/s · 20.5 MB/s · 1:01:40 left"
    assert lines[2].strip() == "skipped 2 · refused 1 · stored 990,000 · already there 7"
    assert look.line() == (
        "running 990,010/1,000,000  99 %; 1,234 items/s, 20.5 MB/s, 1:01:40 left; "
        "skipped 2, refused 1, stored 990,000, already there 7"
    )


def test_before_there_is_a_plan_it_is_said_how_much_was_found() -> None:
    assert Look(None, "queued", Throughput()).line() == "queued"
    planning = Look(batch(state="planning", current=None, items=0, frozen=False, passes={}), "plan 12000", Throughput())
    assert planning.line() == "planning; 12000 items found"
    assert len(drawn(planning.renderable(), 80)) == 2


def test_a_batch_outside_of_its_window_says_when_it_goes_on() -> None:
    look = Look(batch(order={"window": "20:00-06:00"}), "apply", Throughput(3.0), opens_in_s=11_520)
    assert look.speed() == "waits for its window 20:00-06:00, which opens in 3:12:00"
    assert drawn(look.renderable(), 80)[1].strip() == look.speed()


def test_a_pass_over_what_was_done_ends_at_all_of_it_and_not_at_all_items() -> None:
    verified = PassState(counts={"msdicom": {"verified": 990_000}, "dcm4chee": {"verified": 7}})
    found = batch(state="verifying", current="verify", passes={"apply": APPLIED, "verify": verified})
    assert of_how_many(found, "verify") == 990_007
    assert Look(found, "verify", Throughput()).done() == "990,007/990,007 100 %"
    assert of_how_many(found, "survey") == 999_998
    assert of_how_many(found, "apply") == 1_000_000


def test_tables_of_batches_fit_eighty_columns_and_counts_are_in_order() -> None:
    rows = drawn(batches_table([batch(), batch(kind="migrate", state="cancelled")]), 80)
    assert len(rows) == 3
    assert all(BATCH_ID in row for row in rows[1:])
    counts = drawn(counts_table(batch()), 80)
    assert counts[0].split() == ["server", "stored", "already", "there", "skipped", "refused"]
    assert [row.split()[0] for row in counts[1:]] == ["–", "msdicom", "dcm4chee"]
    said = "990,007 of 1,000,000 items, 2 skipped, 1 refused, 5.0 MB, 0:00:10, 99,001 items/s"
    assert end_line(batch(state="done")) == f"upload done: {said}"


def test_no_signature_of_a_url_is_shown() -> None:
    url = "https://images.example.org/a.dcm?sig=secret"
    failures = [{"item": url, "server_name": None, "status": "failed", "code": "x", "message": "[b]y[/b]"}]
    told = "".join(drawn(failures_table(failures), 120)) + order_line(batch(order={"source": url, "verify": True}))
    assert "secret" not in told
    assert "[b]y[/b]" in told
    assert order_line(batch(order={"filters": {"PatientName": "DOE"}, "confirm": "x", "width": 4})) == "width 4"


def test_a_plan_is_summed_up_by_what_is_done_where_and_why_not() -> None:
    lines = [PlanLine(item=str(n), server="msdicom", size_bytes=1000) for n in range(3)]
    lines += [PlanLine(item="7", do="skip", why="not_found: no server has it", size_bytes=9)]
    summary = PlanSummary.of(lines)
    assert (summary.items, summary.to_do, summary.bytes) == (4, 3, 3000)
    assert plan_sentence(summary) == "3 of 4 items to do (3.0 kB), 1 are left out."
    assert "not_found: no server has it" in "".join(drawn(plan_table(summary), 100))
    summary.add(PlanLine(item="8"))
    assert "kB" not in plan_sentence(summary)  # of one nobody knows the size
    for number in range(1000):
        summary.add(PlanLine(item=f"x{number}", do="skip", why=f"because of {number}"))
    assert len(summary.groups) <= 102
    assert sum(group["items"] for group in summary.as_json()["groups"]) == 1005


def test_reports_are_csv_json_lines_and_one_json_document() -> None:
    rows = [
        {"number": 0, "item": "a,b", "status": "stored", "server_name": "msdicom", "result": {"sha256": "12"}},
        {"number": 1, "item": "c", "status": "failed", "code": "x", "verify": {"status": "missing"}},
    ]
    out = io.StringIO()
    write_csv(rows, out)
    headings, first, second = out.getvalue().splitlines()
    assert headings.startswith("number,item,server_name,status,code")
    assert first == '0,"a,b",msdicom,stored,,,,,,,12,,'
    assert second.endswith(",missing,")
    assert [json.loads(line) for line in json_lines(rows)] == rows
    assert json.loads("".join(json_array(rows))) == rows
    assert json.loads("".join(json_array([]))) == []


def test_a_report_is_narrowed_by_what_any_pass_has_seen_and_an_unknown_outcome_is_refused() -> None:
    row = {"status": "stored", "survey": {"status": "planned"}, "verify": {"status": "differs"}}
    row["undo"] = {"status": "open"}
    for words, holds in (
        (["stored"], True),
        (["differs"], True),
        (["missing", "differs"], True),
        (["missing"], False),
        (["open", "planned"], False),  # they say nothing of what has become of it
    ):
        assert has_ended(row, known_statuses(words)) is holds
    waiting = {"status": "open", "survey": {"status": "planned"}}
    assert has_ended(waiting, known_statuses(["open"]))
    assert has_ended(waiting, known_statuses(["planned"]))
    assert known_statuses(["already there"]) == {"already_there"}
    assert known_statuses(get_args(ItemStatus)) == set(get_args(ItemStatus))
    with pytest.raises(InvalidRequest, match="'filed'; the outcomes are open, planned, stored"):
        known_statuses(["failed", "filed"])


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (RateParam(), "50/s", 50.0),
        (RateParam(), "50", 50.0),
        (RateParam(), "600/min", 10.0),
        (RateParam(), "1.5/s", 1.5),
        (RateParam(), "0/s", None),
        (RateParam(), "-1/s", None),
        (RateParam(), "fast", None),
        (Bandwidth(), "20MB/s", 20e6),
        (Bandwidth(), "512 kB/s", 512e3),
        (Bandwidth(), "1GiB", 2.0**30),
        (Bandwidth(), "20", None),
        (Bandwidth(), "0MB/s", None),
        (Bandwidth(), "5iB/s", None),
        (WindowParam(), "20:00-06:00", "20:00-06:00"),
        (WindowParam(), "20:00-06:00 Europe/Berlin", "20:00-06:00 Europe/Berlin"),
        (WindowParam(), "20:00-20:00", None),
        (WindowParam(), "24:00-06:00", None),
        (WindowParam(), "20:00-06:00 Mars/Olympus", None),
        (WindowParam(), "20:00-06:00 ../../etc/passwd", None),
    ],
)
def test_quantities_are_read_as_people_write_them(kind: click.ParamType, text: str, value: object) -> None:
    if value is None:
        with pytest.raises(click.BadParameter):
            kind.convert(text, None, None)
    else:
        assert kind.convert(text, None, None) == value


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ({"msdicom": {"refused": 1}}, "undo of delete: 0 of 1 items, 1 refused"),
        ({"msdicom": {"undone": 1}}, "undo of delete: 1 of 1 items"),
        ({"": {"failed": 1}}, "undo of delete: 0 of 1 items, 1 failed"),
        ({"msdicom": {"kept": 1}}, "undo of delete: 0 of 1 items, 1 kept"),
    ],
)
def test_an_undo_counts_what_was_taken_back_and_names_what_was_not(counts, line: str) -> None:
    passes = {"apply": PassState(counts={"msdicom": {"deleted": 1}}), "undo": PassState(counts=counts)}
    assert end_line(batch(kind="delete", state="undone", items=1, passes=passes)) == line


def test_what_is_agreed_to_before_an_undo_is_what_it_will_delete_and_where() -> None:
    reach = {("msdicom", "stored"): 1_200, ("dcm4chee", "stored"): 100}
    assert undo_question(batch(), reach) == (
        "Undo the upload? 1,300 images will be deleted for good: 1,200 on msdicom, 100 on dcm4chee."
    )
    order = {"from_server": "a", "to_server": "b"}
    reach = {("b", "copied"): 2}
    copies = "Undo the migration? The copies of 2 studies will be deleted from b"
    assert undo_question(batch(kind="migrate", order=order), reach) == f"{copies}."
    moved = {**order, "delete_source": True}
    assert undo_question(batch(kind="migrate", order=moved), reach) == f"{copies}, once a has them all again."
    reach = {("a", "deleted"): 1, ("b", "hidden"): 2}
    said = "Undo the delete? 3 studies will be brought back to the servers that had them."
    assert undo_question(batch(kind="delete"), reach) == said
    assert undo_question(batch(), {}).endswith("0 images will be deleted for good: none.")
