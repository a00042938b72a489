"""Many cases for one target, from Hypothesis or from the mutator. Knows no target."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings

from tests.fuzz.meter import BrokenProperty, FuzzTally, FuzzTarget, run_case, warm_up
from tests.fuzz.mutator import mutated

_QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": False}
settings.register_profile("suite", derandomize=True, **_QUIET)
settings.register_profile("fuzz", derandomize=False, report_multiple_bugs=False, **_QUIET)
#: After so many a target is known to be broken; most will have one cause.
_ENOUGH = 5


@dataclass(frozen=True)
class FailingCase:
    """A case on which a property fails; Hypothesis' are the smallest it could make."""

    target: str
    case: bytes
    text: str


def _unwatched(_case: bytes) -> None:
    pass


def by_hypothesis(
    target: FuzzTarget, cases: int, tally: FuzzTally, *, profile: str, watch: Callable[[bytes], None] = _unwatched
) -> list[FailingCase]:
    warm_up(target)
    last = b""

    @settings(settings.get_profile(profile), max_examples=cases)
    @given(case=target.shaped)
    def hold(case: bytes) -> None:
        nonlocal last
        last = case
        watch(case)
        run_case(target, case, tally)

    try:
        hold()
    except BrokenProperty as finding:
        return [FailingCase(target.name, last, str(finding))]
    return []


def by_bytes(
    target: FuzzTarget, cases: int, tally: FuzzTally, *, seed: int, watch: Callable[[bytes], None] = _unwatched
) -> list[FailingCase]:
    """The seeds as they are, and then what the mutator makes of them; the same cases for the same ``seed``."""
    warm_up(target)
    rng, seeds, found = random.Random(f"{seed} {target.name}"), target.seeds(), []
    for number in range(cases):
        case = seeds[number] if number < len(seeds) else mutated(rng.choice(seeds), seeds, rng)
        watch(case)
        try:
            run_case(target, case, tally)
        except BrokenProperty as finding:
            found.append(FailingCase(target.name, case, str(finding)))
            if len(found) == _ENOUGH:
                break
    return found
