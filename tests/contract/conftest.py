"""What several contract tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sandbox.processes import RedisPart
from tests.batch_site import Site


@pytest.fixture
def batch_site(redis: RedisPart) -> Iterator[Callable[..., Site]]:
    """Opens places for batches that are driven by hand: ``batch_site(servers, downloads=…)``."""
    opened: list[Site] = []

    def build(servers: list[dict[str, Any]], **sections: Any) -> Site:
        opened.append(Site(redis.ledger_url, servers, **sections))
        return opened[-1]

    yield build
    for site in opened:
        site.close()
