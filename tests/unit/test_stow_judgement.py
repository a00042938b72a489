"""What a STOW answer means, instance by instance: tables of documented answers, no server."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest

from worker.dicom.instances import Instance
from worker.pacs import dcm4chee, generic, msdicom
from worker.pacs.protocol import Fate, Part
from worker.pacs.stow import Codes, fate_of, read_outcomes, rejected_if_alone, unmentioned

CT = "1.2.840.10008.5.1.4.1.1.2"
NOT_DICOM_CLASS = "1.2.40.0.13.1.15.110.3.165.2"

MSDICOM_CODES = {
    272: Fate.TRY_AGAIN,
    43264: Fate.REJECTED,
    43265: Fate.REJECTED,
    45070: Fate.ALREADY_THERE,
    45071: Fate.PENDING,
}
DCM4CHEE_CODES = {
    272: Fate.TRY_AGAIN,
    292: Fate.REJECTED,
    42752: Fate.TRY_AGAIN,
    42864: Fate.CONFLICT,
    42865: Fate.REJECTED,
    42866: Fate.REJECTED,
    42867: Fate.REJECTED,
    42868: Fate.REJECTED,
    42869: Fate.REJECTED,
    42870: Fate.REJECTED,
    42871: Fate.REJECTED,
    42872: Fate.CONFLICT,
    42873: Fate.CONFLICT,
    42874: Fate.TRY_AGAIN,
    42875: Fate.CONFLICT,
    43264: Fate.REJECTED,
    43298: Fate.REJECTED,
    50185: Fate.CONFLICT,
    50329: Fate.REJECTED,
}
STANDARD = {
    0x0106: Fate.REJECTED,
    0x0110: Fate.TRY_AGAIN,
    0x0111: Fate.ALREADY_THERE,
    0x0117: Fate.REJECTED,
    0x0119: Fate.CONFLICT,
    0x0120: Fate.REJECTED,
    0x0121: Fate.REJECTED,
    0x0122: Fate.REJECTED,
    0x0124: Fate.REJECTED,
    0xA700: Fate.TRY_AGAIN,
    0xA7FF: Fate.TRY_AGAIN,
    0xA900: Fate.REJECTED,
    0xA9FF: Fate.REJECTED,
    0xC000: Fate.REJECTED,
    0xCFFF: Fate.REJECTED,
    0x1234: Fate.TRY_AGAIN,
}


def part(uid: str) -> Part:
    return Part(Instance("1.1", "1.2", uid, CT, "1.2.840.10008.1.2.1"), io.BytesIO, 0)


def stored(uid: str, **more: Any) -> dict[str, Any]:
    return {
        "00081150": {"vr": "UI", "Value": [CT]},
        "00081155": {"vr": "UI", "Value": [uid]},
        "00081190": {"vr": "UR", "Value": ["http://h/studies/1.1"]},
        **{f"0{tag}": value for tag, value in more.items()},
    }


def failed(uid: str | None, code: int | str | None = None) -> dict[str, Any]:
    item: dict[str, Any] = {}
    if uid is not None:
        item["00081155"] = {"vr": "UI", "Value": [uid]}
    if code is not None:
        item["00081197"] = {"vr": "US", "Value": [code]}
    return item


def answer(ok: Sequence[Any] = (), bad: Sequence[Any] = ()) -> dict[str, Any]:
    ds: dict[str, Any] = {}
    if bad:
        ds["00081198"] = {"vr": "SQ", "Value": list(bad)}
    if ok:
        ds["00081199"] = {"vr": "SQ", "Value": list(ok)}
    return ds


def fates(uids: Sequence[str], ds: dict[str, Any], codes: Codes = msdicom.CODES) -> list[Fate]:
    outcomes = read_outcomes([part(uid) for uid in uids], ds, codes=codes, warnings_of=lambda _: ())
    assert [outcome.sop_instance_uid for outcome in outcomes] == list(uids)
    return [outcome.fate for outcome in outcomes]


@pytest.mark.parametrize(("code", "fate"), MSDICOM_CODES.items())
def test_each_code_of_msdicom_leads_to_its_documented_fate(code: int, fate: Fate) -> None:
    assert fates(["9.1"], answer(bad=[failed("9.1", code)])) == [fate]


@pytest.mark.parametrize(("code", "fate"), DCM4CHEE_CODES.items())
def test_each_code_of_dcm4chee_leads_to_its_documented_fate(code: int, fate: Fate) -> None:
    assert fates(["9.1"], answer(bad=[failed("9.1", code)]), dcm4chee.CODES) == [fate]


def test_the_tables_of_codes_hold_what_is_documented_and_nothing_else() -> None:
    assert msdicom.CODES.keys() == MSDICOM_CODES.keys()
    assert dcm4chee.CODES.keys() == DCM4CHEE_CODES.keys()


@pytest.mark.parametrize(("code", "fate"), STANDARD.items())
def test_a_server_without_a_table_is_judged_by_the_standards_ranges(code: int, fate: Fate) -> None:
    assert fate_of(code, {})[0] is fate


def test_a_failure_without_a_reason_is_tried_again() -> None:
    assert fates(["9.1"], answer(bad=[failed("9.1")])) == [Fate.TRY_AGAIN]


def test_the_code_may_be_written_as_a_string() -> None:
    assert fates(["9.1"], answer(bad=[failed("9.1", "45070")])) == [Fate.ALREADY_THERE]


def test_an_outcome_bears_the_servers_own_code_and_a_sentence() -> None:
    outcome = read_outcomes(
        [part("9.1")], answer(bad=[failed("9.1", 45071)]), codes=msdicom.CODES, warnings_of=lambda _: ()
    )[0]
    assert (outcome.failure_reason, outcome.fate) == (45071, Fate.PENDING)
    assert outcome.message.endswith(".")


def test_outcomes_come_in_the_order_sent_whatever_the_order_of_the_answer() -> None:
    ds = answer(ok=[stored("9.3"), stored("9.1")], bad=[failed("9.2", 45070)])
    assert fates(["9.1", "9.2", "9.3"], ds) == [Fate.STORED, Fate.ALREADY_THERE, Fate.STORED]


def test_padding_of_a_uid_does_not_hide_the_item() -> None:
    assert fates(["9.1", "9.2"], answer(ok=[stored("9.1 "), stored("9.2\0")])) == [Fate.STORED] * 2


def test_the_same_image_twice_in_one_request_has_one_outcome_each() -> None:
    ds = answer(ok=[stored("9.1")], bad=[failed("9.1", 45070)])
    assert fates(["9.1", "9.1"], ds) == [Fate.STORED, Fate.ALREADY_THERE]


def test_the_same_image_twice_stored_twice_is_stored_twice() -> None:
    assert fates(["9.1", "9.1"], answer(ok=[stored("9.1"), stored("9.1")])) == [Fate.STORED] * 2


@pytest.mark.parametrize(
    "ds",
    [
        answer(ok=[stored("1.2")], bad=[failed("1.2", 0xA700)]),
        answer(ok=[stored("1.2"), stored("1.2")], bad=[failed("1.2", 0xA700)]),
        answer(ok=[stored("1.2") | {"00081197": {"vr": "US", "Value": [0xA700]}}]),
        answer(ok=[stored("1.2"), stored("1.2") | {"00081197": {"vr": "US", "Value": ["42752"]}}]),
    ],
)
def test_an_image_of_which_an_answer_says_both_is_not_stored(ds: dict[str, Any]) -> None:
    assert fates(["1.2"], ds) == [Fate.TRY_AGAIN]
    assert fates(["1.3", "1.2"], answer(ok=[stored("1.3")]) | ds)[1] is Fate.TRY_AGAIN


def test_a_reason_of_zero_is_no_failure() -> None:
    assert fates(["1.2"], answer(ok=[stored("1.2") | {"00081197": {"vr": "US", "Value": [0]}}])) == [Fate.STORED]


def test_a_failure_without_uid_belongs_to_the_part_left_over() -> None:
    ds = answer(ok=[stored("9.1"), stored("9.3")], bad=[failed(None, 43264)])
    assert fates(["9.1", "9.2", "9.3"], ds) == [Fate.STORED, Fate.REJECTED, Fate.STORED]


def test_several_failures_without_uid_are_matched_in_order() -> None:
    ds = answer(ok=[stored("9.2")], bad=[failed(None, 43264), failed(None, 272)])
    assert fates(["9.1", "9.2", "9.3"], ds) == [Fate.REJECTED, Fate.STORED, Fate.TRY_AGAIN]


def test_a_failure_under_a_random_uid_belongs_to_the_part_left_over() -> None:
    nameless = {**failed("2.25.99", 50329), "00081150": {"vr": "UI", "Value": [NOT_DICOM_CLASS]}}
    ds = answer(ok=[stored("9.1")], bad=[nameless])
    assert fates(["9.1", "9.2"], ds, dcm4chee.CODES) == [Fate.STORED, Fate.REJECTED]


def test_fewer_nameless_failures_than_parts_left_over_are_not_guessed_at() -> None:
    ds = answer(ok=[stored("9.1")], bad=[failed(None, 43264)])
    assert fates(["9.1", "9.2", "9.3"], ds) == [Fate.STORED, Fate.UNMENTIONED, Fate.UNMENTIONED]


def test_a_part_that_nothing_speaks_of_is_unmentioned() -> None:
    assert fates(["9.1", "9.2"], answer(ok=[stored("9.1")])) == [Fate.STORED, Fate.UNMENTIONED]


@pytest.mark.parametrize("ds", [{}, {"00081190": {"vr": "UR"}}, {"00081198": {"vr": "SQ"}, "00081199": {"vr": "SQ"}}])
def test_an_answer_without_items_stores_nothing(ds: dict[str, Any]) -> None:
    assert fates(["9.1", "9.2"], ds) == [Fate.UNMENTIONED] * 2
    assert [outcome.fate for outcome in unmentioned([part("9.1"), part("9.2")])] == [Fate.UNMENTIONED] * 2


def test_a_stored_item_that_was_never_sent_stores_nothing() -> None:
    assert fates(["9.1"], answer(ok=[stored("9.9")])) == [Fate.UNMENTIONED]


def test_bad_file_without_saying_which_is_the_only_part_left() -> None:
    outcomes = read_outcomes([part("9.1"), part("9.2")], answer(ok=[stored("9.1")]), codes={}, warnings_of=lambda _: ())
    assert [outcome.fate for outcome in rejected_if_alone(outcomes, "bad")] == [Fate.STORED, Fate.REJECTED]


def test_bad_file_without_saying_which_stays_open_among_several() -> None:
    outcomes = read_outcomes([part("9.1"), part("9.2")], {}, codes={}, warnings_of=lambda _: ())
    assert [outcome.fate for outcome in rejected_if_alone(outcomes, "bad")] == [Fate.UNMENTIONED] * 2


COMMENT = "DICOM100: (0010,0010) - value 'Hall^Peter' has an invalid character"


def commented(*comments: str, reason: int | None = 1) -> dict[str, Any]:
    entries = [{"00000902": {"vr": "LO", "Value": [comment]}} for comment in comments]
    item = {"00741048": {"vr": "SQ", "Value": entries} if entries else {"vr": "SQ"}}
    return item if reason is None else {**item, "00081196": {"vr": "US", "Value": [reason]}}


def test_a_warning_of_msdicom_names_the_attribute_and_never_its_value() -> None:
    (warning,) = msdicom.warnings_of(commented(COMMENT))
    assert warning.startswith("PatientName (0010,0010)")
    assert "Hall" not in warning


@pytest.mark.parametrize(
    ("item", "count"),
    [
        (commented(reason=None), 0),
        (commented(COMMENT, COMMENT, "DICOM100: (0008,0020) - not a date"), 2),
        (commented(reason=45063), 1),
        (commented(COMMENT, reason=45063), 2),
        (commented(reason=7), 1),
        (commented("Hall^Peter is no name"), 1),
        (commented("DICOM100: (0099,1001) - Hall^Peter"), 1),
    ],
)
def test_each_cause_is_warned_of_once_and_without_values(item: dict[str, Any], count: int) -> None:
    warnings = msdicom.warnings_of(item)
    assert len(warnings) == count
    assert not any("Hall" in warning for warning in warnings)


@pytest.mark.parametrize(("reason", "word"), [(0xB000, "changed"), (0xB006, "dropped"), (0xB007, "class"), (5, "5")])
def test_the_standards_warnings_are_put_in_words(reason: int, word: str) -> None:
    (warning,) = generic.warnings_of({"00081196": {"vr": "US", "Value": [reason]}})
    assert word in warning


def others(*codes: int | None) -> dict[str, Any]:
    """OtherFailuresSequence (0008,119A): reasons that name no image."""
    return {"0008119A": {"vr": "SQ", "Value": [failed(None, code) for code in codes]}}


def test_another_failure_is_that_of_the_one_image_that_nothing_else_speaks_of() -> None:
    ds = answer(ok=[stored("9.1")]) | others(0xC122)
    outcomes = read_outcomes([part("9.1"), part("9.2")], ds, codes={}, warnings_of=lambda _: ())
    assert [one.fate for one in outcomes] == [Fate.STORED, Fate.REJECTED]
    assert outcomes[1].failure_reason == 0xC122
    assert "transfer syntax" in outcomes[1].message


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((0xC122, 0xC122), [Fate.REJECTED] * 2),
        ((0xA700, 0xA700), [Fate.TRY_AGAIN] * 2),
        ((0xC122, 0xA700), [Fate.UNMENTIONED] * 2),
        ((0xC122,), [Fate.UNMENTIONED] * 2),
        ((0xC122, 0xC122, 0xC122), [Fate.UNMENTIONED] * 2),
        ((None,), [Fate.UNMENTIONED] * 2),
    ],
    ids=["one reason", "one that passes", "two reasons", "too few", "too many", "none"],
)
def test_several_other_failures_are_those_of_the_images_only_if_they_are_as_many_and_alike(
    codes: Sequence[int | None], expected: Sequence[Fate]
) -> None:
    assert fates(["9.1", "9.2"], others(*codes), {}) == expected


def test_other_failures_and_failed_items_without_a_uid_count_together() -> None:
    ds = answer(bad=[failed(None, 0xC122)]) | others(0xC122)
    assert fates(["9.1", "9.2"], ds, {}) == [Fate.REJECTED] * 2
    assert fates(["9.1", "9.2"], answer(bad=[failed(None, 0xA900)]) | others(0xC122), {}) == [Fate.UNMENTIONED] * 2


def test_another_failure_takes_nothing_from_an_image_that_is_stored() -> None:
    assert fates(["9.1"], answer(ok=[stored("9.1")]) | others(0xC122), {}) == [Fate.STORED]


def test_a_sequence_of_other_failures_that_is_none_says_nothing() -> None:
    assert fates(["9.1"], {"0008119A": {"vr": "SQ", "Value": ["C122"]}}, {}) == [Fate.UNMENTIONED]
