"""The Grafana dashboards: each query uses metrics, spans and labels of the telemetry catalogue."""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedbus.contracts.prometheus import label_name, series_names
from fedbus.contracts.telemetry import ATTRIBUTES, METRICS, SPANS, Metric

OBSERVABILITY = Path(__file__).parents[2] / "deploy" / "observability"
FILES = sorted((OBSERVABILITY / "dashboards").glob("*.json"))
SERIES = {series: metric for metric in METRICS.values() for series in series_names(metric)}
PROMQL = {"sum", "avg", "max", "count", "by", "rate", "increase", "histogram_quantile", "le"}
VARIABLES = {"__rate_interval", "__range", "task", "client", "__all"}
TRACEQL = {
    "resource.service.namespace",
    "resource.service.name",
    "name",
    "status",
    "duration",
    "select",
    "error",
}
LOKI_LABELS = {"service_namespace", "detected_level", "trace_id"}


def load_generator(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_dashboards", OBSERVABILITY / "make_dashboards.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look up the module there
    spec.loader.exec_module(module)
    return module


def dashboards() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in FILES:
        yield path.stem, json.loads(path.read_text())


def targets(kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each query to one kind of data source, with its dashboard and panel."""
    for name, dashboard in dashboards():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                if target["datasource"]["type"] == kind:
                    yield f"{name}: {panel['title']}", target


def test_the_dashboards_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = load_generator(monkeypatch).render_files()

    assert {path.name for path in FILES} == {"fleet.json", "run.json", "training.json", "bus.json"}
    stale = [path.name for path, text in rendered.items() if path.read_text() != text]
    assert stale == [], "run: python deploy/observability/make_dashboards.py"


def test_each_metric_query_uses_existing_metrics_and_labels() -> None:
    for where, target in targets("prometheus"):
        metrics, labels = parse_promql(target["expr"])
        assert metrics, where
        for metric in metrics:
            unknown = labels - {label_name(attribute) for attribute in metric.attributes} - {"le"}
            assert not unknown, f"{where}: {metric.name} does not have the labels {unknown}"


def test_each_metric_is_shown_in_a_dashboard() -> None:
    shown = {metric.name for _, target in targets("prometheus") for metric in parse_promql(target["expr"])[0]}
    assert set(METRICS) - shown == set()


def parse_promql(expression: str) -> tuple[list[Metric], set[str]]:
    """Return the metrics and labels of a query, and check that the rest is PromQL."""
    bare = re.sub(r'"[^"]*"', "", expression)
    variables = set(re.findall(r"\$(\w+)", bare))
    assert variables <= VARIABLES, expression
    names = set(re.findall(r"(?<![\w$.])[a-z_][a-z0-9_]*", re.sub(r"\$\w+", "", bare)))
    metrics = [SERIES[name] for name in names & SERIES.keys()]
    labels = names & {label_name(attribute) for attribute in ATTRIBUTES}
    assert names - PROMQL - SERIES.keys() - labels == set(), expression
    return metrics, labels


def test_each_trace_query_uses_existing_spans_and_attributes() -> None:
    names = {span.name for span in SPANS} | {"run • → requested"}  # of `{kind} {from} → {to}`
    queries = list(targets("tempo"))
    assert queries
    for where, target in queries:
        query = target["query"]
        assert set(re.findall(r'\bname="([^"]+)"', query)) <= names, where
        attributes = set(re.findall(r"span\.([\w.]+\w)", query))
        assert attributes <= ATTRIBUTES, where
        for span in (span for span in SPANS if f'name="{span.name}"' in query):
            unknown = attributes - set(span.attributes)
            assert not unknown, f"{where}: {span.name} does not have {unknown}"
        bare = re.sub(r'"[^"]*"|span\.[\w.]+|\d+\w*', "", query)
        assert set(re.findall(r"[a-z][a-z.]*", bare)) <= TRACEQL, where


def test_each_log_query_uses_existing_labels() -> None:
    for where, target in targets("loki"):
        bare = re.sub(r'"[^"]*"', "", target["expr"])
        assert set(re.findall(r"[a-z_]+", bare)) <= LOKI_LABELS, where


def test_panels_do_not_overlap() -> None:
    for name, dashboard in dashboards():
        occupied: set[tuple[int, int]] = set()
        for panel in dashboard["panels"]:
            at = panel["gridPos"]
            cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
            assert not cells & occupied, f"{name}: {panel['title']}"
            assert at["x"] + at["w"] <= 24
            occupied |= cells
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_data_sources_link_metrics_traces_and_logs() -> None:
    sources = (OBSERVABILITY / "provisioning/datasources/grafana-datasources.yaml").read_text()
    uids = set(re.findall(r"^    uid: (\w+)$", sources, re.MULTILINE))
    assert uids == {"prometheus", "tempo", "loki"}
    assert set(re.findall(r"datasourceUid: (\w+)", sources)) == uids
    for part in ("exemplarTraceIdDestinations", "tracesToLogsV2", "tracesToMetrics", "derivedFields"):
        assert part in sources
    for expression in re.findall(r"query: (histogram_quantile.*)", sources):
        assert parse_promql(expression.replace("$$__tags", ""))[0]


def test_dashboards_link_to_each_other() -> None:
    uids = {dashboard["uid"] for _, dashboard in dashboards()}
    for _, dashboard in dashboards():
        assert {link["url"].removeprefix("/d/") for link in dashboard["links"]} == uids - {dashboard["uid"]}
