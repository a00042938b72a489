"""A plan file is what was written, or it is refused before anything is done."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from producer.errors import InvalidRequest
from producer.inputs import study_uid
from producer.plans import PlanFile, PlanHeader, PlanLine, write

LINES = [
    PlanLine(item="1.2.3", server="msdicom", size_bytes=7),
    PlanLine(item="1.2.4", do="skip", why="it is nowhere", size_bytes=5),
    PlanLine(item="1.2.5"),
]

plan_lines = st.lists(
    st.builds(
        PlanLine,
        item=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
        server=st.none() | st.sampled_from(["msdicom", "dcm4chee"]),
        size_bytes=st.none() | st.integers(0, 10**15),
        do=st.sampled_from(["apply", "skip"]),
        why=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    ),
    max_size=20,
)


def written(path: Path, lines: list[PlanLine] = LINES, **header: object) -> Path:
    with path.open("w", encoding="utf-8") as out:
        write(PlanHeader.model_validate({"kind": "delete", **header}), lines, out)
    return path


@settings(deadline=None)  # a busy machine is no finding
@given(plan_lines, st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3))
def test_what_was_written_is_what_is_read(tmp_path_factory, lines: list[PlanLine], order: dict) -> None:
    path = written(tmp_path_factory.getbasetemp() / "round.jsonl", lines, order=order, name="of Monday")
    plan = PlanFile(path)
    assert list(plan) == lines
    assert (plan.header.kind, plan.header.order, plan.header.name) == ("delete", order, "of Monday")
    assert plan.totals.items == len(lines)
    assert plan.totals.bytes == sum(line.size_bytes or 0 for line in lines if line.do == "apply")


@settings(deadline=None)  # a busy machine is no finding
@given(st.data())
def test_no_byte_can_be_changed_and_no_line_taken_out_moved_or_doubled(tmp_path_factory, data) -> None:
    path = tmp_path_factory.getbasetemp() / "edited.jsonl"
    whole = written(path).read_bytes()
    lines = whole.splitlines(keepends=True)
    how = data.draw(st.sampled_from(["byte", "cut", "take", "move", "double"]))
    at = data.draw(st.integers(0, len(lines) - 1))
    if how == "byte":
        place = data.draw(st.integers(0, len(whole) - 2))
        edited = whole[:place] + bytes([data.draw(st.integers(0, 255))]) + whole[place + 1 :]
    elif how == "cut":
        edited = whole[: data.draw(st.integers(0, len(whole) - 2))]
    elif how == "take":
        edited = b"".join(lines[:at] + lines[at + 1 :])
    elif how == "move":
        edited = b"".join([lines[at], *lines[:at], *lines[at + 1 :]])
    else:
        edited = b"".join([*lines[: at + 1], *lines[at:]])
    assume(edited != whole)
    path.write_bytes(edited)
    try:
        plan = PlanFile(path)
    except InvalidRequest:
        return
    assert how == "byte"  # of the last line, one that says nothing, such as a space
    assert list(plan) == LINES


def edit(path: Path, old: str, new: str) -> Path:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


def test_a_refusal_says_what_is_wrong_and_where_and_quotes_nothing(tmp_path: Path) -> None:
    def case(old: str, new: str, says: str) -> None:
        with pytest.raises(InvalidRequest) as caught:
            PlanFile(edit(written(tmp_path / "plan.jsonl"), old, new))
        assert says in caught.value.message, caught.value.message
        assert "JANE" not in caught.value.message

    case('"1.2.3"', '"1.2.9"', "a line was changed")
    case('"size_bytes": 7', '"size_bytes": 8', "a line was changed")
    case('"do": "skip"', '"do": "DOE^JANE"', "line 3: do:")
    case('{"item": "1.2.4"', 'DOE^JANE{"item": "1.2.4"', "line 3:")
    case('"server": "msdicom"', '"server": 7', "line 2: server:")
    case('"server": "msdicom"', '"ser\x7fver": "msdicom"', "line 2: ser\\x7fver:")
    case('"server": "msdicom"', '"https://u:JANE@h/?sig=JANE": 1', "line 2: https://h/:")
    case('"items": 3', '"items": 4', "line 5: the totals speak of 4 items and there are 3")
    case("pacs-courier/plan", "pacs-courier/repair", "a repair plan of pacs audit")
    case("pacs-courier/plan", "other", "no plan of a batch")
    case('"version": 1', '"version": 2', "version 2")
    case('"end": true', '"end": true, "x": "' + "x" * 70_000 + '"', "line 5: longer")
    whole = written(tmp_path / "plan.jsonl").read_text(encoding="utf-8")
    (tmp_path / "plan.jsonl").write_text(whole.rpartition('{"end"')[0], encoding="utf-8")
    with pytest.raises(InvalidRequest, match="after line 4 without its totals"):
        PlanFile(tmp_path / "plan.jsonl")
    (tmp_path / "plan.jsonl").write_text(whole * 2, encoding="utf-8")
    with pytest.raises(InvalidRequest, match="line 6: there is more"):
        PlanFile(tmp_path / "plan.jsonl")
    for content in ("", "\n", "1.2.3\n", "[]\n", "[" * 5000):
        (tmp_path / "other").write_text(content, encoding="utf-8")
        with pytest.raises(InvalidRequest, match="no plan of a batch"):
            PlanFile(tmp_path / "other")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        PlanFile(tmp_path / "missing")


def test_a_plan_whose_digest_fits_still_has_to_hold_items_of_its_kind(tmp_path: Path) -> None:
    PlanFile(written(tmp_path / "good.jsonl"), lambda _: study_uid)
    bad = written(tmp_path / "bad.jsonl", [LINES[0], PlanLine(item="*")])
    with pytest.raises(InvalidRequest, match="line 3: its item is no UID"):
        PlanFile(bad, lambda _: study_uid)


def test_a_plan_that_changes_between_the_check_and_its_use_is_not_used(tmp_path: Path) -> None:
    plan = PlanFile(written(tmp_path / "plan.jsonl"))
    edit(tmp_path / "plan.jsonl", '"1.2.3"', '"1.2.9"')
    with pytest.raises(InvalidRequest, match="has changed"):
        list(plan)
    (tmp_path / "plan.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(InvalidRequest, match="has changed"):
        list(plan)


def test_the_digest_is_that_of_the_bytes_before_the_last_line(tmp_path: Path) -> None:
    *before, last = written(tmp_path / "plan.jsonl").read_bytes().splitlines(keepends=True)
    assert json.loads(last)["sha256"] == hashlib.sha256(b"".join(before)).hexdigest()
    assert json.loads(last)["counts"] == {"apply": 2, "skip": 1}
