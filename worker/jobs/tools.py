"""Everything a job may use, handed in as one value. Built in ``worker/app.py``; tests build their own."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from worker.destinations import Destinations
from worker.ledger import Ledger
from worker.pacs.fleet import Fleet
from worker.settings import DownloadSettings, Settings
from worker.sources import Sources


@dataclass(frozen=True)
class Tools:
    settings: Settings
    ledger: Ledger
    sources: Sources
    fleet: Fleet
    #: The same servers over short-tempered connections of their own: asking how they are never waits behind work.
    probes: Fleet | None = None
    destinations: Destinations = field(default_factory=lambda: Destinations(DownloadSettings()))
    clock: Callable[[], float] = time.perf_counter
    rng: random.Random = field(default_factory=random.SystemRandom)
