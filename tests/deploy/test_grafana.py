"""Grafana's files: every query asks for something that the code tells of, by the names it has there."""

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
TRACEQL_OWN = {
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
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def dashboards() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in FILES:
        yield path.stem, json.loads(path.read_text())


def targets(kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every query to one kind of data source, and where it stands."""
    for name, dashboard in dashboards():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                if target["datasource"]["type"] == kind:
                    yield f"{name}: {panel['title']}", target


def test_the_four_dashboards_are_as_the_catalogue_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    written = load_generator(monkeypatch).render_files()

    assert {path.name for path in FILES} == {"fleet.json", "run.json", "training.json", "bus.json"}
    stale = [path.name for path, text in written.items() if path.read_text() != text]
    assert stale == [], "run: python deploy/observability/make_dashboards.py"


def test_each_figure_that_is_asked_for_is_one_that_is_taken_with_labels_that_it_has() -> None:
    for where, target in targets("prometheus"):
        asked, labels = promql(target["expr"])
        assert asked, where
        for metric in asked:
            strange = labels - {label_name(one) for one in metric.attributes} - {"le"}
            assert not strange, f"{where}: {metric.name} is not split by {strange}"


def test_all_that_is_measured_is_shown_somewhere() -> None:
    shown = {metric.name for _, target in targets("prometheus") for metric in promql(target["expr"])[0]}
    assert set(METRICS) - shown == set()


def promql(expression: str) -> tuple[list[Metric], set[str]]:
    """The metrics and the labels of a query; whatever else there is must be PromQL's own."""
    bare = re.sub(r'"[^"]*"', "", expression)
    variables = set(re.findall(r"\$(\w+)", bare))
    assert variables <= VARIABLES, expression
    words = set(re.findall(r"(?<![\w$.])[a-z_][a-z0-9_]*", re.sub(r"\$\w+", "", bare)))
    asked = [SERIES[word] for word in words & SERIES.keys()]
    labels = words & {label_name(one) for one in ATTRIBUTES}
    assert words - PROMQL - SERIES.keys() - labels == set(), expression
    return asked, labels


def test_each_span_that_is_asked_for_is_one_that_is_made() -> None:
    names = {one.name for one in SPANS} | {"run • → requested"}  # of `{kind} {from} → {to}`
    found = list(targets("tempo"))
    assert found
    for where, target in found:
        query = target["query"]
        assert set(re.findall(r'\bname="([^"]+)"', query)) <= names, where
        own = set(re.findall(r"span\.([\w.]+\w)", query))
        assert own <= ATTRIBUTES, where
        of_these = [one for one in SPANS if f'name="{one.name}"' in query]
        for span in of_these:
            assert own <= set(span.attributes), (
                f"{where}: {span.name} does not have {own - set(span.attributes)}"
            )
        bare = re.sub(r'"[^"]*"|span\.[\w.]+|\d+\w*', "", query)
        assert set(re.findall(r"[a-z][a-z.]*", bare)) <= TRACEQL_OWN, where


def test_lines_are_asked_for_by_labels_that_they_have() -> None:
    for where, target in targets("loki"):
        bare = re.sub(r'"[^"]*"', "", target["expr"])
        assert set(re.findall(r"[a-z_]+", bare)) <= LOKI_LABELS, where


def test_panels_stand_beside_each_other_and_not_upon() -> None:
    for name, dashboard in dashboards():
        taken: set[tuple[int, int]] = set()
        for panel in dashboard["panels"]:
            at = panel["gridPos"]
            cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
            assert not cells & taken, f"{name}: {panel['title']}"
            assert at["x"] + at["w"] <= 24
            taken |= cells
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_data_sources_lead_from_figures_to_traces_to_lines_and_back() -> None:
    sources = (OBSERVABILITY / "provisioning/datasources/grafana-datasources.yaml").read_text()
    known = set(re.findall(r"^    uid: (\w+)$", sources, re.MULTILINE))
    assert known == {"prometheus", "tempo", "loki"}
    assert set(re.findall(r"datasourceUid: (\w+)", sources)) == known
    for part in ("exemplarTraceIdDestinations", "tracesToLogsV2", "tracesToMetrics", "derivedFields"):
        assert part in sources
    for expression in re.findall(r"query: (histogram_quantile.*)", sources):
        assert promql(expression.replace("$$__tags", ""))[0]


def test_dashboards_lead_to_each_other() -> None:
    uids = {dashboard["uid"] for _, dashboard in dashboards()}
    for _, dashboard in dashboards():
        assert {link["url"].removeprefix("/d/") for link in dashboard["links"]} == uids - {dashboard["uid"]}
