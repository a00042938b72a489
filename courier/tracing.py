"""Switches traces on for a worker or a producer, as the settings say. What is not switched on is not loaded."""

from __future__ import annotations

import importlib.util
import logging
import threading

from courier import telemetry
from courier.settings import TelemetrySettings

log = logging.getLogger(__name__)

_lock = threading.Lock()
_tracing: set[str] = set()


def can_trace() -> bool:
    """Whether the extra ``telemetry`` is installed."""
    return bool(importlib.util.find_spec("opentelemetry") and importlib.util.find_spec("opentelemetry.exporter"))


def trace(settings: TelemetrySettings) -> None:
    """Let traces of this process go to ``otlp_endpoint``, once; nothing without one."""
    if settings.otlp_endpoint is None:
        return
    with _lock:
        if settings.otlp_endpoint in _tracing:
            return
        _tracing.add(settings.otlp_endpoint)
        try:
            from courier.otlp import Traces  # noqa: PLC0415 (an extra)
        except ImportError:
            log.warning("No traces: telemetry.otlp_endpoint is set, but not installed is pacs-courier[telemetry]")
            return
        telemetry.add_observer(Traces(settings))
