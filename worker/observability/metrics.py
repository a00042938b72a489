"""Measures for Prometheus: what this process counts as it works, and what the ledger and the broker say when asked.

Loaded only where ``telemetry.metrics_port`` is set. Every name and label stands in ``docs/observability.md``.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from courier.telemetry import CallEvent, Count, JobEvent, StepEvent, TelemetryEvent

log = logging.getLogger(__name__)

#: From a look into an index to a push of gigabytes.
BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900)
BREAKER_STATES: Final = ("closed", "half-open", "open")
SUSPENDED_STATES: Final = ("paused", "maintenance")
#: Scrapes in quick succession, by several servers, ask the ledger once.
FRESH_S: Final = 2.0


class Metrics:
    """A `telemetry.Observer` that counts. With ``PROMETHEUS_MULTIPROC_DIR`` the counts of all children add up."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        several = bool(os.environ.get("PROMETHEUS_MULTIPROC_DIR"))
        if several:
            MultiProcessCollector(self.registry)  # type: ignore[no-untyped-call]
        mine = None if several else self.registry
        self._jobs = Counter("pacs_jobs", "Attempts at jobs, by how they ended", ["task", "end", "code"], registry=mine)
        self._running = Gauge("pacs_jobs_in_flight", "Jobs at work", registry=mine, multiprocess_mode="livesum")
        self._steps = Histogram(
            "pacs_step_seconds", "How long a step of a job took", ["task", "step"], registry=mine, buckets=BUCKETS_S
        )
        server = ["server_name", "server_type"]
        self._calls = Counter("pacs_server_requests", "Requests to a server", [*server, "method"], registry=mine)
        self._errors = Counter("pacs_server_errors", "Requests that became an error", [*server, "code"], registry=mine)
        self._latency = Histogram(
            "pacs_server_seconds", "From a request to the end of its answer", server, registry=mine, buckets=BUCKETS_S
        )
        self._counts = {
            "lease_lost": Counter("pacs_leases_lost", "Attempts that were overtaken", registry=mine),
            "sweep": Counter("pacs_sweeps", "Looks for jobs that are due", registry=mine),
            "sweep_failed": Counter("pacs_sweeps_failed", "Looks that the ledger did not answer", registry=mine),
            "old_queue_stopped": Counter(
                "pacs_old_queues_stopped", "Old queues given up because of another application's message", registry=mine
            ),
            "woken": Counter("pacs_jobs_woken", "Messages sent for jobs that were due", registry=mine),
        }

    @contextmanager
    def observe(self, seen: TelemetryEvent) -> Iterator[None]:
        begun_s = time.perf_counter()
        if isinstance(seen, JobEvent):
            self._running.inc()
        try:
            yield
        finally:
            self._ended(seen, time.perf_counter() - begun_s)

    def _ended(self, seen: TelemetryEvent, took_s: float) -> None:
        match seen:
            case JobEvent():
                self._running.dec()
                self._jobs.labels(seen.task, seen.end, seen.code).inc()
            case StepEvent():
                self._steps.labels(seen.task, seen.name).observe(took_s)
            case CallEvent():
                server = (seen.server_name, seen.server_type)
                self._calls.labels(*server, seen.method).inc()
                self._latency.labels(*server).observe(took_s)
                if seen.code:
                    self._errors.labels(*server, seen.code).inc()

    def count(self, what: Count, number: int) -> None:
        self._counts[what].inc(number)

    def carrier(self) -> dict[str, str]:
        return {}

    def continued(self, carrier: Mapping[str, str]) -> nullcontext[None]:  # noqa: ARG002 - the Protocol's
        return nullcontext()

    def serve(self, host: str, port: int) -> None:
        """Answer scrapes at ``host:port``.

        Raises
        ------
        OSError
            The address cannot be listened at.
        """
        _, thread = start_http_server(port, host, registry=self.registry)
        thread.name = "metrics"


@dataclass(frozen=True)
class Outlook:
    """What is asked at a scrape, of all workers alike."""

    queues: Mapping[str, int]
    open: int
    overdue: int
    dead: int
    parked: Mapping[str, int]
    batches: Mapping[str, int]
    breakers: Mapping[str, str]
    servers_digests: int = 0
    suspended: Mapping[str, str] = field(default_factory=dict)
    oldest_message_s: float = 0.0
    #: By batch at work: its items that are settled in the pass that it is in.
    settled: Mapping[str, int] = field(default_factory=dict)


@dataclass(eq=False)  # the registry keeps it by its identity
class LedgerCollector(Collector):
    """Asks ``read_outlook`` at each scrape. Without an answer ``pacs_ledger_up`` is 0 and the rest is left out."""

    read_outlook: Callable[[], Outlook]
    _last: tuple[float, Outlook | None] = (-FRESH_S, None)
    _lock: Any = field(default_factory=threading.Lock)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        outlook = self._fresh()
        yield GaugeMetricFamily("pacs_ledger_up", "Whether ledger and broker answered", value=float(bool(outlook)))
        if outlook is None:
            return
        yield GaugeMetricFamily("pacs_jobs_open", "Jobs that have not ended", value=outlook.open)
        yield GaugeMetricFamily(
            "pacs_jobs_overdue", "Jobs that nobody looked at when it was time", value=outlook.overdue
        )
        yield GaugeMetricFamily("pacs_dead_letters", "Jobs that wait for a person", value=outlook.dead)
        yield GaugeMetricFamily(
            "pacs_servers_digests",
            "Different lists of servers among the workers that run",
            value=outlook.servers_digests,
        )
        yield _by("pacs_queue_messages", "Messages that wait", "queue", outlook.queues)
        yield GaugeMetricFamily(
            "pacs_queue_oldest_seconds",
            "How long ago the oldest message was sent that no worker has taken",
            value=outlook.oldest_message_s,
        )
        yield _by("pacs_batch_settled_items", "Settled items of a batch at work", "batch_id", outlook.settled)
        yield _by("pacs_jobs_parked", "Jobs put aside until later", "server_name", outlook.parked)
        yield _by("pacs_batches", "Batches", "state", outlook.batches)
        breakers = GaugeMetricFamily("pacs_breaker_state", "1 for the state", labels=["server_name", "state"])
        for server, now in outlook.breakers.items():
            for state in BREAKER_STATES:
                breakers.add_metric([server, state], float(state == now))
        yield breakers
        suspended = GaugeMetricFamily(
            "pacs_server_suspended",
            "1 while an operator has taken the server out of service",
            labels=["server_name", "state"],
        )
        for server, now in outlook.suspended.items():
            for state in SUSPENDED_STATES:
                suspended.add_metric([server, state], float(state == now))
        yield suspended

    def _fresh(self) -> Outlook | None:
        with self._lock:
            asked_s, outlook = self._last
            if time.monotonic() - asked_s >= FRESH_S:
                try:
                    outlook = self.read_outlook()
                except Exception as error:  # noqa: BLE001 - a scrape without the ledger still says the rest
                    log.warning("Ledger or broker could not be asked for metrics: %s", type(error).__name__)
                    outlook = None
                self._last = (time.monotonic(), outlook)
            return outlook


def _by(name: str, text: str, label: str, values: Mapping[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
