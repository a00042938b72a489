"""What chaos tests share. ``make chaos`` runs all of them at full size and writes docs/guarantees.md.

``guarantee``  ``guarantee.row(area=…, fault=…, point=…, outcome=…, recovery_s=…)``: a line of docs/guarantees.md.
               Without ``make chaos`` it goes nowhere, so nothing else is needed.
``full``       whether this is ``make chaos``
``seed``       of whatever is random; printed with a test that fails
``crew``       starts workers that may be killed: ``crew.start(pool="prefork")``; their tracebacks fail the test
``stops``      lets jobs of a ``crew.start(stops=True)`` stop at a named point

A test marked ``full`` runs in ``make chaos`` alone.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox import processes as parts
from sandbox.processes import RedisPart, SandboxPart
from tests.chaos.crew import Crew, Stops, control_url
from tests.chaos.measured import BOOK, Book


def is_full() -> bool:
    return os.environ.get("CHAOS_FULL") == "1"


@pytest.fixture
def guarantee(pytestconfig: pytest.Config) -> Book:
    return pytestconfig.stash.setdefault(BOOK, Book())


@pytest.fixture
def full() -> bool:
    return is_full()


@pytest.fixture
def seed() -> int:
    chosen = int(os.environ.get("CHAOS_SEED") or secrets.randbits(32))
    print(f"CHAOS_SEED={chosen}")
    return chosen


@pytest.fixture
def crew(tmp_path: Path, redis: RedisPart, sandbox: SandboxPart) -> Iterator[Crew]:
    crew = Crew(
        tmp_path / "crew",
        queue=parts.queue_settings(redis),
        servers=sandbox.servers(),
        control=control_url(redis),
    )
    with crew.processes:
        yield crew
    faults = crew.faults()
    if faults:
        pytest.fail("\n\n".join(faults))


@pytest.fixture
def stops(redis: RedisPart) -> Iterator[Stops]:
    stops = Stops(control_url(redis))
    yield stops
    stops.close()
