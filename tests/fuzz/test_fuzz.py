"""Some of `make fuzz` in every run, always the same cases; and that the fuzzer finds what it is there to find."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st

from courier.errors import CourierError, NotDicom
from tests.fuzz import meter
from tests.fuzz.campaign import by_bytes, by_hypothesis
from tests.fuzz.meter import FuzzTally, FuzzTarget
from tests.fuzz.secrets import SECRET
from tests.fuzz.targets import TARGETS

CASES = 25


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_nothing_that_hypothesis_makes_up_breaks_a_reader(target: FuzzTarget) -> None:
    tally = FuzzTally()
    assert by_hypothesis(target, CASES, tally, profile="suite") == []
    assert tally.cases >= 1


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_no_damage_to_a_sample_breaks_a_reader(target: FuzzTarget) -> None:
    tally = FuzzTally()
    # All of pydicom's samples, and the file that inflates to 16 MiB, are for `make fuzz`.
    seeds = target.seeds()[-6:-1] if target.name == "identify" else target.seeds()[-5:]
    assert by_bytes(dataclasses.replace(target, seeds=lambda: seeds), CASES, tally, seed=1) == []
    assert tally.cases == CASES


def crash(case: bytes) -> None:
    if case:
        raise KeyError(case)


def hang_for_ever(_case: bytes) -> None:
    while True:
        pass


def hoard(case: bytes) -> bytes:
    return bytes(11 * len(case) + 256 * 1024)


def garble(_case: bytes) -> None:
    raise NotDicom("two\nlines")


def be_nobody(_case: bytes) -> None:
    raise CourierError("an error without a code")


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (crash, "crashes with KeyError in crash"),
        (hang_for_ever, "is not back after"),
        (hoard, "are allowed"),
        (garble, "cannot be logged"),
        (be_nobody, "without a code"),
    ],
)
def test_the_fuzzer_finds_each_kind_of_fault(
    act: Callable[[bytes], Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "INTERRUPT_S", 0.2)
    broken = FuzzTarget(
        "broken",
        seeds=lambda: [b"x" * 100_000],
        shaped=st.binary(),
        prepare=lambda case: case,
        acts=[act],
        check=lambda _prepared, _result: None,
    )
    found = by_bytes(broken, 1, FuzzTally(), seed=1)
    assert [words in finding.text for finding in found] == [True]


@pytest.mark.parametrize("name", ["stow", "qido", "jobs", "urls"])
def test_the_fuzzer_finds_a_secret_that_is_shown(name: str) -> None:
    target = next(target for target in TARGETS if target.name == name)
    case = f'"https://u:{SECRET}@h"'.encode() if name == "jobs" else f"https://u:{SECRET}@h".encode()
    error = NotDicom(f"It says {SECRET}.")
    shown = {"urls": ("", [error]), "qido": error}.get(name, [error])
    with pytest.raises(AssertionError, match=SECRET):
        target.check(target.prepare(case), shown)


def test_hypothesis_hands_back_the_smallest_case_on_which_a_property_fails() -> None:
    broken = dataclasses.replace(TARGETS[0], name="broken", seeds=lambda: [b""], shaped=st.binary(), acts=[crash])
    assert [len(finding.case) for finding in by_hypothesis(broken, 50, FuzzTally(), profile="suite")] == [1]
