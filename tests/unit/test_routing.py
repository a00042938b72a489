"""Where an image goes, as a table of what servers answered."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from courier.settings import RoutingSettings, ServerSettings
from worker.jobs.routing import Decision, Exists, Follow, New, Open, Presence, choose, decide

YES, NO, SILENT = True, False, None


@pytest.mark.parametrize(
    ("msdicom", "dcm4chee", "decision"),
    [
        ((NO, NO), (NO, NO), New()),
        ((NO, YES), (NO, NO), Follow("msdicom", ("msdicom",))),
        ((NO, NO), (NO, YES), Follow("dcm4chee", ("dcm4chee",))),
        ((NO, YES), (NO, YES), Follow("msdicom", ("msdicom", "dcm4chee"))),
        ((YES, YES), (NO, NO), Exists("msdicom")),
        ((NO, YES), (YES, YES), Exists("dcm4chee")),
        ((YES, YES), (YES, YES), Exists("msdicom")),
        ((SILENT, SILENT), (YES, YES), Exists("dcm4chee")),
        ((YES, SILENT), (SILENT, SILENT), Exists("msdicom")),
        ((SILENT, SILENT), (NO, NO), Open(("msdicom",))),
        ((SILENT, SILENT), (NO, YES), Open(("msdicom",))),
        ((NO, YES), (SILENT, SILENT), Open(("dcm4chee",))),
        ((NO, SILENT), (NO, NO), Open(("msdicom",))),
        ((SILENT, NO), (SILENT, SILENT), Open(("msdicom", "dcm4chee"))),
    ],
)
def test_silence_is_never_read_as_not_there(
    msdicom: tuple[bool | None, bool | None], dcm4chee: tuple[bool | None, bool | None], decision: Decision
) -> None:
    assert decide([Presence("msdicom", *msdicom), Presence("dcm4chee", *dcm4chee)]) == decision


def servers(*weights: float) -> list[ServerSettings]:
    return [
        ServerSettings(name=f"s{n}", type="dicomweb", url=f"http://h{n}/rs", weight=weight)
        for n, weight in enumerate(weights)
    ]


def chosen(policy: str, candidates: list[ServerSettings], placed: dict[str, int] | None = None, seed: int = 1) -> str:
    routing = RoutingSettings.model_validate({"policy": policy})
    return choose(candidates, routing, placed=placed or {}, rng=random.Random(seed))


def test_preferred_takes_the_first_that_is_healthy() -> None:
    assert chosen("preferred", servers(1, 1)) == "s0"
    assert chosen("preferred", servers(1, 1)[1:]) == "s1"


def test_weighted_draws_by_weight() -> None:
    drawn = Counter(chosen("weighted", servers(3, 1), seed=seed) for seed in range(400))
    assert 2 < drawn["s0"] / drawn["s1"] < 4.5


def test_balanced_takes_the_one_with_the_fewest_studies_for_its_weight() -> None:
    assert chosen("balanced", servers(1, 1), {"s0": 5, "s1": 4}) == "s1"
    assert chosen("balanced", servers(2, 1), {"s0": 5, "s1": 4}) == "s0"
    assert chosen("balanced", servers(1, 1)) == "s0"


@pytest.mark.parametrize("policy", ["preferred", "weighted", "balanced"])
def test_a_weight_of_zero_takes_no_new_study_unless_nobody_else_is_left(policy: str) -> None:
    assert chosen(policy, servers(0, 1)) == "s1"
    assert chosen(policy, servers(0)) == "s0"
