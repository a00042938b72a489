"""Everything a job may use, handed in as one value. Built in ``worker/app.py``; tests build their own."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from courier.ledger.breakers import Breakers
from courier.ledger.jobs import DueJob, Ledger
from courier.ledger.suspensions import Suspensions
from courier.settings import DownloadSettings, ServerSettings, Settings
from worker.jobs.batch_slots import BatchSlots
from worker.pacs.fleet import Fleet
from worker.pacs.server_rates import ServerRates
from worker.storage.destinations import Destinations
from worker.storage.sources import Sources


def _leave_it_to_the_sweeper(jobs: Sequence[DueJob]) -> None:
    """What is due is sent in any case."""


def _unknown(servers: Sequence[str]) -> bool:  # noqa: ARG001 - without a guard nothing is known
    return False


def _later(servers: Iterable[ServerSettings], each: int) -> None:
    """Each call leases a slot of its own."""


@dataclass(frozen=True)
class Services:
    settings: Settings
    ledger: Ledger
    sources: Sources
    fleet: Fleet
    #: Of all servers, for all workers; without them every circuit is closed.
    breakers: Breakers | None = None
    #: Whether nothing was known against these servers a moment ago, so that `breakers` and `rates` need not be asked.
    seem_well: Callable[[Sequence[str]], bool] = _unknown
    #: Has slots ready for so many calls to each of these servers, which come at once, all together.
    reserve: Callable[[Iterable[ServerSettings], int], None] = _later
    #: Which servers an operator has taken out of service; without them none.
    suspensions: Suspensions | None = None
    #: How fast those servers may be asked that have asked for fewer requests.
    rates: ServerRates | None = None
    #: The same servers over short-tempered connections of their own: asking how they are never waits behind work.
    probes: Fleet | None = None
    destinations: Destinations = field(default_factory=lambda: Destinations(DownloadSettings()))
    clock: Callable[[], float] = time.perf_counter
    rng: random.Random = field(default_factory=random.SystemRandom)
    #: Sends the messages of jobs that the ledger knows, now. May fail to: they are due later in any case.
    wake: Callable[[Sequence[DueJob]], None] = _leave_it_to_the_sweeper
    #: The same servers once more, with threads of their own: what batches ask is never before what single jobs ask.
    bulk: Fleet | None = None
    #: How many chunks of batches this process does at a time, so that single jobs always find it ready.
    batch_slots: BatchSlots = field(default_factory=lambda: BatchSlots(64))
    #: Seconds since the epoch; and waiting for less than a beat of the pulse: for windows and rates of batches.
    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
