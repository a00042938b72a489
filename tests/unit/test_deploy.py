"""The dashboard and the alert rules in ``deploy/`` ask for nothing but what a worker and Flower really export."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from flower.events import get_prometheus_metrics
from prometheus_client import REGISTRY

from courier import telemetry
from courier.telemetry import CallEvent, JobEvent, StepEvent
from tests.unit.test_telemetry import OUTLOOK
from worker.observability.metrics import LedgerCollector, Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus-rules.yml").read_text(encoding="utf-8"))
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))
ALERTS: list[dict[str, Any]] = [rule for group in RULES["groups"] for rule in group["rules"]]
EXPRESSIONS = [rule["expr"] for rule in ALERTS] + [
    target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]
]
#: What Prometheus adds to each sample itself, and the bound of a histogram's bucket.
ITS_OWN = {"instance", "job", "le"}
WORDS = {"by", "without", "and", "or", "unless", "on", "ignoring"}


@pytest.fixture(scope="module")
def exported() -> Iterator[dict[str, set[str]]]:
    """The labels of each sample that a worker or Flower exports, by its name."""
    metrics = Metrics()
    metrics.registry.register(LedgerCollector(lambda: OUTLOOK))
    telemetry.add_observer(metrics)
    for seen in (JobEvent("t", "j", 1), StepEvent("t", "s"), CallEvent("n", "t", "GET", 500, "pacs_unavailable")):
        with telemetry.observe(seen):
            pass
    get_prometheus_metrics().worker_online.labels("w@h").set(1)
    families = [*metrics.registry.collect(), *REGISTRY.collect()]
    yield {sample.name: set(sample.labels) for family in families for sample in family.samples}
    telemetry.remove_observers()


def metrics_in(expression: str) -> set[str]:
    """The names of metrics in PromQL: words that are no function, label, number or keyword."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|\b(?:by|without)\s*\([^)]*\)', " ", expression)
    return {name for name in re.findall(r"[A-Za-z_:][\w:]*(?!\w|\s*\()", bare) if name not in WORDS}


def labels_in(expression: str) -> set[str]:
    grouped = re.findall(r"\b(?:by|without)\s*\(([^)]*)\)", expression)
    matched = re.findall(r"[{,]\s*(\w+)\s*(?:=|!=|=~|!~)", expression)
    return {name.strip() for names in grouped for name in names.split(",")} | set(matched)


def test_names_and_labels_are_found_in_an_expression() -> None:
    text = 'sum by (a, b) (rate(x_total{c="y_total",d!~"e"}[5m])) / max(z:rate) > 0.2 and absent(w)'
    assert metrics_in(text) == {"x_total", "z:rate", "w"}
    assert labels_in(text) == {"a", "b", "c", "d"}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_each_metric_and_label_that_is_asked_for_is_exported(expression: str, exported: dict[str, set[str]]) -> None:
    found = metrics_in(expression)
    assert found
    assert found - exported.keys() == set()
    assert labels_in(expression) - ITS_OWN - set.union(*(exported[name] for name in found)) == set()
    assert all(expression.count(begin) == expression.count(end) for begin, end in ("()", "[]", "{}"))


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_how_grave_it_is_what_happened_and_what_to_do(rule: dict[str, Any]) -> None:
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))
    assert set(rule["annotations"]) == {"summary", "description"}
    used = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
    assert used <= labels_in(rule["expr"]), "a label that the expression does not keep would be empty"


def test_there_is_an_alert_for_each_thing_that_an_operator_has_to_know() -> None:
    names = {rule["alert"] for rule in ALERTS}
    assert len(names) == len(ALERTS)
    wanted = (
        "NoWorker",
        "QueueOld",
        "JobsWaitForServer",
        "CircuitOpen",
        "DeadLetters",
        "BatchStalled",
        "TwoServerLists",
    )
    assert {f"Pacs{name}" for name in wanted} <= names


def test_the_panels_of_the_dashboard_cover_no_other_and_take_the_chosen_source() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 10
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert [one["name"] for one in DASHBOARD["templating"]["list"]] == ["datasource"]
