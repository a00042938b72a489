"""Lets in who watches the work: traces and metrics, as the settings say. What is not switched on is not loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from courier import telemetry
from courier.settings import SettingsError, TelemetrySettings

if TYPE_CHECKING:
    from worker.observability.metrics import Outlook

log = logging.getLogger(__name__)


def measure(settings: TelemetrySettings, read_outlook: Callable[[], Outlook]) -> None:
    """Count what this process does and serve it at ``metrics_host:metrics_port``; nothing without a port.

    Raises
    ------
    SettingsError
        The address cannot be listened at.
    """
    if not settings.metrics_port:
        return
    from worker.observability.metrics import LedgerCollector, Metrics  # noqa: PLC0415 (only where metrics are on)

    metrics = Metrics()
    metrics.registry.register(LedgerCollector(read_outlook))
    try:
        metrics.serve(settings.metrics_host, settings.metrics_port)
    except OSError as error:
        where = f"{settings.metrics_host}:{settings.metrics_port}"
        raise SettingsError(f"telemetry.metrics_port: nobody can listen at {where} ({error.strerror})") from None
    telemetry.add_observer(metrics)


def forget(settings: TelemetrySettings, pid: int) -> None:
    """A child process that counted has ended."""
    if settings.metrics_port and "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        from prometheus_client.multiprocess import mark_process_dead  # noqa: PLC0415

        mark_process_dead(pid)  # type: ignore[no-untyped-call]
