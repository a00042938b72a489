"""Who watches sees everything, nobody costs nothing, and every metric stands in the documentation."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from courier import telemetry
from courier.settings import Settings, SettingsError, TelemetrySettings
from courier.telemetry import CallEvent, JobEvent, StepEvent
from worker.observability import instrumentation
from worker.observability.metrics import FRESH_S, LedgerCollector, Metrics, Outlook

DOCS = (Path(__file__).parents[2] / "docs" / "observability.md").read_text(encoding="utf-8")
OUTLOOK = Outlook(
    queues={"pacs": 3},
    open=4,
    overdue=1,
    dead=2,
    parked={"orthanc": 5},
    batches={"a": 1},
    breakers={"n": "open"},
    suspended={"n": ""},
    oldest_message_s=7.5,
    settled={"b1": 3},
)


@pytest.fixture(autouse=True)
def unwatched() -> Iterator[None]:
    yield
    telemetry.remove_observers()


class Witness:
    def __init__(self) -> None:
        self.saw: list[Any] = []

    @contextmanager
    def observe(self, seen: Any) -> Iterator[None]:
        self.saw.append(("begins", type(seen).__name__))
        try:
            yield
        finally:
            self.saw.append(("ends", seen))

    def count(self, what: str, number: int) -> None:
        self.saw.append((what, number))

    def carrier(self) -> dict[str, str]:
        return {"traceparent": "00-1"}

    def continued(self, carrier: Mapping[str, str]) -> AbstractContextManager[object]:
        self.saw.append(dict(carrier))
        return nullcontext()


def test_nobody_watches_unless_let_in() -> None:
    with telemetry.observe(StepEvent("pacs.upload", "push")), telemetry.continued({"traceparent": "00-1"}):
        telemetry.count("sweep")
    assert telemetry.carrier() == {}


def test_who_watches_sees_how_it_begins_and_how_it_ends_also_with_an_error() -> None:
    witness = Witness()
    telemetry.add_observer(witness)
    seen = JobEvent("pacs.upload", "j1", 2)
    seen.end = "dead"
    with pytest.raises(RuntimeError), telemetry.observe(seen):
        raise RuntimeError
    assert witness.saw == [("begins", "JobEvent"), ("ends", seen)]
    with telemetry.continued({"traceparent": "00-2"}):
        telemetry.count("woken", 3)
    assert witness.saw[2:] == [{"traceparent": "00-2"}, ("woken", 3)]
    assert telemetry.carrier() == {"traceparent": "00-1"}


def names(metrics: Metrics) -> set[str]:
    return {sample.name for family in metrics.registry.collect() for sample in family.samples}


def test_every_metric_and_its_labels_stand_in_the_documentation_and_no_other() -> None:
    metrics = Metrics()
    metrics.registry.register(LedgerCollector(lambda: OUTLOOK))
    telemetry.add_observer(metrics)
    for seen in (JobEvent("t", "j", 1), StepEvent("t", "s"), CallEvent("n", "t", "GET", 500, "pacs_unavailable")):
        with telemetry.observe(seen):
            pass
    own = {name for name in names(metrics) if not name.endswith("_created")}
    counted = {re.sub(r"_(bucket|sum|count)$", "", name) for name in own}
    documented = set(re.findall(r"`(pacs_[a-z_]+)`", DOCS))
    assert counted == documented
    rows = {line.split("|")[1]: line for line in DOCS.splitlines() if line.startswith("| `pacs_")}
    for family in metrics.registry.collect():
        for sample in family.samples:
            label_names = sample.labels.keys() - {"le"}
            row = next(row for row in rows.values() if f"`{family.name}" in row)
            assert [label for label in label_names if f"`{label}`" not in row] == []


def test_a_scrape_without_the_ledger_still_says_what_the_worker_did() -> None:
    def away() -> Outlook:
        raise OSError

    metrics = Metrics()
    metrics.registry.register(LedgerCollector(away))
    assert {"pacs_ledger_up", "pacs_sweeps_total"} <= names(metrics)
    assert "pacs_dead_letters" not in names(metrics)
    assert metrics.registry.get_sample_value("pacs_ledger_up") == 0


def test_scrapes_in_quick_succession_ask_the_ledger_once() -> None:
    asked = []

    def look() -> Outlook:
        asked.append(1)
        return OUTLOOK

    collector = LedgerCollector(look)
    for _ in range(5):
        list(collector.collect())
    assert len(asked) == 1
    assert FRESH_S > 0


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = TelemetrySettings(metrics_port=taken.getsockname()[1])
        with pytest.raises(SettingsError, match=r"telemetry\.metrics_port"):
            instrumentation.measure(settings, lambda: OUTLOOK)


@pytest.mark.parametrize("variable", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
def test_the_variables_of_opentelemetry_are_short_names(variable: str) -> None:
    settings = Settings.load({variable: "http://collector:4318", "OTEL_SERVICE_NAME": "ours"})
    assert settings.telemetry.otlp_endpoint == "http://collector:4318"
    assert settings.telemetry.service_name == "ours"


@pytest.mark.parametrize("wrong", ["collector:4318", "http://user:secret@collector"])
def test_an_endpoint_that_is_no_address_is_refused_without_being_quoted(wrong: str) -> None:
    with pytest.raises(SettingsError, match=r"telemetry\.otlp_endpoint") as refused:
        Settings.load({"PACS__TELEMETRY__OTLP_ENDPOINT": wrong})
    assert "secret" not in str(refused.value)
