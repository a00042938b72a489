"""Spans for OpenTelemetry: a job and the message that woke it, its steps, and its calls to servers, as one trace.

Loaded only where traces are switched on; ``opentelemetry`` is the extra ``telemetry``. A span names tasks, steps,
servers and codes; it bears no URL, no UID and no text of an error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from opentelemetry import context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from courier.settings import TelemetrySettings
from courier.telemetry import CallEvent, Count, JobEvent, SendEvent, StepEvent, TelemetryEvent

PATH: Final = "/v1/traces"
_W3C: Final = TraceContextTextMapPropagator()


class Traces:
    """A `courier.telemetry.Observer` that sends spans to ``otlp_endpoint`` over HTTP, in batches, from its own thread.

    Time-outs, headers, certificates, sampling and further attributes of the resource are set by the SDK's own
    ``OTEL_*`` variables. What cannot be delivered is dropped; no job waits for it.
    """

    def __init__(self, settings: TelemetrySettings) -> None:
        logging.getLogger("opentelemetry").setLevel(logging.WARNING)
        base = (settings.otlp_endpoint or "").rstrip("/")
        exporter = OTLPSpanExporter(endpoint=base if base.endswith(PATH) else base + PATH)
        self._provider = TracerProvider(resource=Resource.create({"service.name": settings.service_name}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("pacs-courier")

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()

    @contextmanager
    def observe(self, seen: TelemetryEvent) -> Iterator[None]:
        name, kind, attributes = _described(seen)
        with self._tracer.start_as_current_span(
            name, kind=kind, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            failed = True
            try:
                yield
                failed = False
            finally:
                for key, value in _ended(seen).items():
                    span.set_attribute(key, value)
                if failed or (isinstance(seen, JobEvent) and seen.end in ("dead", "lost")):
                    span.set_status(Status(StatusCode.ERROR))

    def count(self, what: Count, number: int) -> None:
        """Numbers are the business of metrics."""

    def carrier(self) -> dict[str, str]:
        headers: dict[str, str] = {}
        _W3C.inject(headers)
        return headers

    @contextmanager
    def continued(self, carrier: Mapping[str, str]) -> Iterator[None]:
        token = context.attach(_W3C.extract(carrier))
        try:
            yield
        finally:
            context.detach(token)


def _described(seen: TelemetryEvent) -> tuple[str, SpanKind, dict[str, str | int]]:
    match seen:
        case SendEvent():
            return f"send {seen.task}", SpanKind.PRODUCER, {"pacs.task": seen.task, "pacs.job_id": seen.job_id}
        case JobEvent():
            about: dict[str, str | int] = {"pacs.task": seen.task, "pacs.job_id": seen.job_id}
            return seen.task, SpanKind.CONSUMER, {**about, "pacs.attempt": seen.attempt}
        case StepEvent():
            return seen.name, SpanKind.INTERNAL, {"pacs.task": seen.task}
        case CallEvent():
            server: dict[str, str | int] = {"pacs.server_name": seen.server_name, "pacs.server_type": seen.server_type}
            return f"{seen.method} {seen.server_name}", SpanKind.CLIENT, {**server, "http.request.method": seen.method}


def _ended(seen: TelemetryEvent) -> dict[str, str | int]:
    match seen:
        case JobEvent():
            return {"pacs.end": seen.end, "pacs.code": seen.code}
        case CallEvent():
            answered: dict[str, str | int] = {"http.response.status_code": seen.status} if seen.status else {}
            return {**answered, "error.type": seen.code} if seen.code else answered
        case _:
            return {}
