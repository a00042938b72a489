"""Where an image goes: pure decisions over what the servers answered. No I/O, no clock, no ledger."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from courier.settings import RoutingSettings, ServerSettings


@dataclass(frozen=True)
class Presence:
    """What one server said about an image and its study; None where it did not answer."""

    server: str
    image: bool | None
    study: bool | None


@dataclass(frozen=True)
class Exists:
    """The image is already on ``server``."""

    server: str


@dataclass(frozen=True)
class Open:
    """Nobody who answered has the image, but these servers did not answer: nothing can be said."""

    unanswered: tuple[str, ...]


@dataclass(frozen=True)
class Follow:
    """The study is on ``server``; ``also_on`` are further servers that have it (a split study)."""

    server: str
    study_on: tuple[str, ...]


@dataclass(frozen=True)
class New:
    """The study is on no server: the claim decides."""


Decision = Exists | Open | Follow | New


def decide(answers: Sequence[Presence]) -> Decision:
    """What follows from ``answers``, given in order of preference.

    An image found anywhere settles the question even while a server is silent. Otherwise one silent server leaves
    it open, because that server may hold the image: silence is never read as "not there".
    """
    for answer in answers:
        if answer.image:
            return Exists(answer.server)
    unanswered = tuple(a.server for a in answers if a.image is None or a.study is None)
    if unanswered:
        return Open(unanswered)
    study_on = tuple(answer.server for answer in answers if answer.study)
    return Follow(study_on[0], study_on) if study_on else New()


def choose(
    candidates: Sequence[ServerSettings],
    routing: RoutingSettings,
    *,
    placed: Mapping[str, int],
    rng: random.Random,
) -> str:
    """The server for a new study among healthy ``candidates`` (at least one), in order of preference.

    ``preferred`` takes the first. ``weighted`` draws by weight. ``balanced`` takes the one that was given the fewest
    new studies in proportion to its weight. A weight of 0 means: never for a new study, unless nobody else is left.
    """
    weighted = [server for server in candidates if server.weight > 0] or list(candidates)
    if routing.policy == "weighted":
        weights = [server.weight or 1 for server in weighted]
        return rng.choices(weighted, weights)[0].name
    if routing.policy == "balanced":
        return min(weighted, key=lambda server: placed.get(server.name, 0) / (server.weight or 1)).name
    return weighted[0].name
