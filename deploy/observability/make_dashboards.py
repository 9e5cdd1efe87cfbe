"""Generate the four Grafana dashboards from the catalogue of metrics and spans.

    python deploy/observability/make_dashboards.py

Names come from `fedbus.contracts.telemetry`, so a renamed metric is renamed here; a test fails when
the files are out of date.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedbus.contracts import telemetry
from fedbus.contracts.prometheus import label_name, series_names
from fedbus.contracts.telemetry import CLIENT, MESSAGE, TASK, Metric, MetricKind

DASHBOARD_DIRECTORY: Final = Path(__file__).parent / "dashboards"
WIDTH: Final = 24
NAMESPACE_FILTER: Final = 'resource.service.namespace="fedbus"'
DATASOURCES: Final = {"prometheus": "prometheus", "tempo": "tempo", "loki": "loki"}
GRAFANA_UNITS: Final = {"s": "s", "By": "bytes", "Cel": "celsius"}


@dataclass
class Panel:
    """One panel of a dashboard."""

    title: str
    description: str
    targets: list[dict[str, Any]]
    kind: str = "timeseries"
    unit: str = "short"
    width: int = 8
    height: int = 8
    datasource: str = "prometheus"
    links: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self, number: int, x: int, y: int) -> dict[str, Any]:
        source = {"type": self.datasource, "uid": DATASOURCES[self.datasource]}
        options: dict[str, Any] = {}
        if self.kind == "timeseries":
            options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
        elif self.kind == "stat":
            options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
        elif self.kind == "logs":
            options = {"showTime": True, "wrapLogMessage": True, "enableLogDetails": True}
        return {
            "id": number,
            "title": self.title,
            "description": self.description,
            "type": self.kind,
            "datasource": source,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "targets": [
                {"refId": chr(65 + index), "datasource": source, **target}
                for index, target in enumerate(self.targets)
            ],
            "fieldConfig": {"defaults": {"unit": self.unit, "links": self.links}, "overrides": []},
            "options": options,
        }


# --- queries ------------------------------------------------------------------------------------------


def query(expression: str, legend: str, *, exemplars: bool = False) -> dict[str, Any]:
    return {"expr": expression, "legendFormat": legend, "exemplar": exemplars, "range": True}


def variable_filter(metric: Metric) -> str:
    """The label filter for the variables of the dashboard, by the attributes of *metric*."""
    chosen = {TASK: '=~"$task"', CLIENT: '=~"$client"'}
    parts = [f"{label_name(name)}{how}" for name, how in chosen.items() if name in metric.attributes]
    return "{" + ", ".join(parts) + "}" if parts else ""


def label_list(*attributes: str) -> str:
    return ", ".join(label_name(one) for one in attributes)


def current_value(metric: Metric, *attributes: str, how: str = "avg") -> dict[str, Any]:
    """The current value of a gauge."""
    (name,) = series_names(metric)
    legend = " ".join(f"{{{{{label_name(one)}}}}}" for one in attributes) or metric.description
    grouping = f" by ({label_list(*attributes)})" if attributes else ""
    return query(f"{how}{grouping} ({name}{variable_filter(metric)})", legend)


def per_second(metric: Metric, *attributes: str) -> dict[str, Any]:
    (name,) = series_names(metric)
    legend = " ".join(f"{{{{{label_name(one)}}}}}" for one in attributes) or metric.description
    grouping = f" by ({label_list(*attributes)})" if attributes else ""
    return query(f"sum{grouping} (rate({name}{variable_filter(metric)}[$__rate_interval]))", legend)


def increase_in_range(metric: Metric, *attributes: str) -> dict[str, Any]:
    """The increase in the displayed time range."""
    (name,) = series_names(metric)
    legend = " ".join(f"{{{{{label_name(one)}}}}}" for one in attributes) or metric.description
    grouping = f" by ({label_list(*attributes)})" if attributes else ""
    return query(f"sum{grouping} (increase({name}{variable_filter(metric)}[$__range]))", legend)


def quantile(metric: Metric, share: float, *attributes: str) -> dict[str, Any]:
    bucket = series_names(metric)[0]
    legend = " ".join([f"{share * 100:g} %", *(f"{{{{{label_name(one)}}}}}" for one in attributes)])
    grouping = ", ".join(["le", *map(label_name, attributes)])
    inner = f"sum by ({grouping}) (rate({bucket}{variable_filter(metric)}[$__rate_interval]))"
    return query(f"histogram_quantile({share}, {inner})", legend, exemplars=True)


def trace_query(expression: str) -> dict[str, Any]:
    return {"queryType": "traceql", "query": expression, "limit": 50, "tableType": "spans"}


def log_query(expression: str) -> dict[str, Any]:
    return {"expr": expression, "queryType": "range"}


def gauge_panel(title: str, metric: Metric, *attributes: str, how: str = "avg", **more: Any) -> Panel:
    unit = (
        "percentunit"
        if metric.unit == "1" and metric.name.endswith("utilization")
        else GRAFANA_UNITS.get(metric.unit, "short")
    )
    return Panel(title, metric.description, [current_value(metric, *attributes, how=how)], unit=unit, **more)


def rate_panel(title: str, metric: Metric, *attributes: str, **more: Any) -> Panel:
    unit = "Bps" if metric.unit == "By" else "cps"
    return Panel(title, metric.description, [per_second(metric, *attributes)], unit=unit, **more)


def quantile_panel(
    title: str, metric: Metric, *attributes: str, shares: Iterable[float] = (0.5, 0.95), **more: Any
) -> Panel:
    assert metric.kind is MetricKind.HISTOGRAM
    targets = [quantile(metric, share, *attributes) for share in shares]
    return Panel(title, metric.description, targets, unit=GRAFANA_UNITS[metric.unit], **more)


# --- the dashboards ---------------------------------------------------------------------------------------

PROBLEM_LOGS: Final = '{service_namespace="fedbus"} | detected_level=~"warn|error|critical|fatal"'

ALIVE_SERIES: Final = series_names(telemetry.AGENTS_ALIVE)[0] + variable_filter(telemetry.AGENTS_ALIVE)
TRANSITION_SERIES: Final = (
    series_names(telemetry.TRANSITIONS)[0] + '{fedbus_kind=~"client|fl_client|inference"}'
)
RUN_ATTRIBUTES: Final = "select(span.fedbus.run, span.fedbus.round, span.fedbus.client)"

FLEET: Final = [
    Panel(
        "Running agents",
        "On all devices, by agent",
        [current_value(telemetry.AGENTS_ALIVE, "fedbus.agent", how="sum")],
        width=12,
    ),
    Panel(
        "Agents that ended",
        "Reported by their device monitor",
        [
            query(
                f"count by ({label_list(CLIENT, 'fedbus.agent')}) ({ALIVE_SERIES} == 0)",
                "{{fedbus_client}} {{fedbus_agent}}",
            )
        ],
        width=12,
    ),
    gauge_panel("Processors", telemetry.CPU, CLIENT),
    gauge_panel("Memory", telemetry.MEMORY, CLIENT),
    gauge_panel("Disk", telemetry.DISK, CLIENT),
    gauge_panel("Temperature", telemetry.TEMPERATURE, CLIENT, how="max"),
    gauge_panel("GPU", telemetry.GPU, CLIENT, "hw.id"),
    gauge_panel("GPU memory", telemetry.GPU_MEMORY, CLIENT, "hw.id"),
    gauge_panel("Served model version", telemetry.SERVED_VERSION, CLIENT, TASK, how="max"),
    quantile_panel("Predictions", telemetry.PREDICTION_DURATION, CLIENT, shares=(0.95,)),
    rate_panel("Warnings and errors", telemetry.LOG_LINES, "fedbus.level"),
    Panel(
        "State transitions of devices",
        telemetry.TRANSITIONS.description,
        [
            query(
                f"sum by ({label_list('fedbus.kind', 'fedbus.to')}) (increase({TRANSITION_SERIES}[$__rate_interval]))",
                "{{fedbus_kind}} → {{fedbus_to}}",
            )
        ],
    ),
    Panel(
        "Problems",
        "Warnings and errors of all agents; each line links to its trace",
        [log_query(PROBLEM_LOGS)],
        kind="logs",
        datasource="loki",
        width=24,
        height=10,
    ),
]

RUN: Final = [
    Panel(
        "Runs", telemetry.RUNS.description, [increase_in_range(telemetry.RUNS, "fedbus.outcome")], kind="stat"
    ),
    Panel("Rounds", telemetry.ROUNDS.description, [increase_in_range(telemetry.ROUNDS, TASK)], kind="stat"),
    gauge_panel("Clients in the last round", telemetry.ROUND_PARTICIPANTS, TASK, how="max", kind="stat"),
    quantile_panel("Round duration", telemetry.ROUND_DURATION, TASK, width=12),
    Panel(
        "Failed updates",
        telemetry.ROUND_FAILURES.description,
        [per_second(telemetry.ROUND_FAILURES, TASK)],
        width=12,
        unit="cps",
    ),
    Panel(
        "Started runs",
        "Each run is one trace, from its trigger to the new model of every client",
        [trace_query(f'{{{NAMESPACE_FILTER} && name="run • → requested"}}')],
        kind="table",
        datasource="tempo",
        width=12,
        height=10,
    ),
    Panel(
        "Slowest uploads",
        "Rounds wait for uploads",
        [
            trace_query(
                f'{{{NAMESPACE_FILTER} && (name="upload" || name="receive") && duration > 1s}} | {RUN_ATTRIBUTES}'
            )
        ],
        kind="table",
        datasource="tempo",
        width=12,
        height=10,
    ),
    Panel(
        "Slowest trainings",
        "Rounds wait for trainings",
        [trace_query(f'{{{NAMESPACE_FILTER} && name="train" && duration > 1s}} | {RUN_ATTRIBUTES}')],
        kind="table",
        datasource="tempo",
        width=12,
        height=10,
    ),
    Panel(
        "Failed spans",
        "Spans that ended with an exception",
        [
            trace_query(
                f"{{{NAMESPACE_FILTER} && status=error}} | select(span.fedbus.run, span.fedbus.client)"
            )
        ],
        kind="table",
        datasource="tempo",
        width=12,
        height=10,
    ),
]

TRAINING: Final = [
    Panel(
        "Metrics of a round",
        telemetry.ROUND_METRIC.description,
        [current_value(telemetry.ROUND_METRIC, TASK, "fedbus.metric", how="max")],
        width=12,
        height=10,
    ),
    gauge_panel("Loss on each client", telemetry.TRAIN_LOSS, CLIENT, width=12, height=10),
    gauge_panel("Contribution of each client", telemetry.CLIENT_CONTRIBUTION, CLIENT, width=12),
    gauge_panel("Reliability of each client", telemetry.CLIENT_RELIABILITY, CLIENT, width=12),
    quantile_panel(
        "Training duration", telemetry.TRAIN_DURATION, CLIENT, "fedbus.phase", shares=(0.5,), width=12
    ),
    rate_panel("Transfer of weights", telemetry.BLOB_IO, "network.io.direction", width=12),
    Panel(
        "Aggregations",
        "With a link to each upload in the aggregation",
        [
            trace_query(
                f'{{{NAMESPACE_FILTER} && name="aggregate"}} | select(span.fedbus.run, span.fedbus.round)'
            )
        ],
        kind="table",
        datasource="tempo",
        width=24,
        height=10,
    ),
    gauge_panel("Captured rows", telemetry.DATA_ROWS, CLIENT, "fedbus.use", how="max", width=6),
    gauge_panel("Checks of captured rows", telemetry.DATA_CHECK, CLIENT, "fedbus.check", how="max", width=6),
    gauge_panel("Drift of features", telemetry.DATA_PSI, CLIENT, "fedbus.feature", how="max", width=6),
    quantile_panel("Duration of a check", telemetry.DATA_CHECK_DURATION, CLIENT, shares=(0.95,), width=6),
]

BUS: Final = [
    rate_panel("Messages", telemetry.MESSAGES, MESSAGE, width=12),
    rate_panel("Bytes of messages", telemetry.MESSAGE_IO, "network.io.direction", width=12),
    quantile_panel("Delivery latency", telemetry.EVENT_AGE, shares=(0.5, 0.95, 0.99)),
    quantile_panel("Slowest message types", telemetry.EVENT_AGE, MESSAGE, shares=(0.95,)),
    Panel(
        "Redeliveries and dead letters",
        "Deliveries that were not acknowledged in time, and dead letters",
        [per_second(telemetry.REDELIVERIES, MESSAGE), per_second(telemetry.DEAD_LETTERS)],
        unit="cps",
    ),
    gauge_panel("Queue length", telemetry.QUEUE_DEPTH, "fedbus.queue", how="max"),
    quantile_panel("Event loop lag", telemetry.LOOP_LAG, shares=(0.5, 0.99)),
    gauge_panel("Connections", telemetry.NATS_CONNECTIONS, how="sum"),
    rate_panel("Messages through nats-server", telemetry.NATS_MESSAGES, "network.io.direction"),
    rate_panel("Bytes through nats-server", telemetry.NATS_IO, "network.io.direction"),
    gauge_panel("nats-server: cores", telemetry.NATS_CPU, how="sum"),
    gauge_panel("nats-server: memory", telemetry.NATS_MEMORY, how="sum"),
    Panel(
        "Disconnected slow consumers",
        telemetry.NATS_SLOW_CONSUMERS.description,
        [per_second(telemetry.NATS_SLOW_CONSUMERS)],
        unit="cps",
    ),
    gauge_panel("Streams: messages", telemetry.NATS_STREAM_MESSAGES, "fedbus.stream", how="max"),
    gauge_panel("Streams: on disk", telemetry.NATS_STREAM_SIZE, "fedbus.stream", how="max"),
    Panel(
        "Dead letters, unacknowledged publishes, failed reads",
        "Log lines of the bus",
        [
            log_query(
                '{service_namespace="fedbus"} |~ "Message dead-lettered|Publish not acknowledged|Stream read failed"'
            )
        ],
        kind="logs",
        datasource="loki",
        width=24,
    ),
]

DASHBOARDS: Final = {
    "fleet": ("Fleet", FLEET),
    "run": ("Run", RUN),
    "training": ("Training", TRAINING),
    "bus": ("Bus", BUS),
}


def template_variable(name: str, label: str, metric: Metric) -> dict[str, Any]:
    """A variable of the dashboard, with all values of *label*."""
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "prometheus"},
        "query": f"label_values({series_names(metric)[0]}, {label_name(label)})",
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
        "refresh": 2,
    }


def dashboard(uid: str, title: str, panels: list[Panel]) -> dict[str, Any]:
    others = [
        {"title": of, "type": "link", "url": f"/d/fedbus-{other}", "keepTime": True, "includeVars": True}
        for other, (of, _) in DASHBOARDS.items()
        if other != uid
    ]
    return {
        "uid": f"fedbus-{uid}",
        "title": f"fedbus: {title}",
        "tags": ["fedbus"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "links": others,
        "templating": {
            "list": [
                template_variable("task", TASK, telemetry.ROUNDS),
                template_variable("client", CLIENT, telemetry.CPU),
            ]
        },
        "panels": list(lay_out(panels)),
    }


def lay_out(panels: list[Panel]) -> Iterable[dict[str, Any]]:
    """Place the panels from left to right, in as many rows as needed."""
    x = y = tallest = 0
    for number, panel in enumerate(panels, start=1):
        if x + panel.width > WIDTH:
            x, y, tallest = 0, y + tallest, 0
        yield panel.as_json(number, x, y)
        x, tallest = x + panel.width, max(tallest, panel.height)


def render_files() -> dict[Path, str]:
    """The content of each file."""
    return {
        DASHBOARD_DIRECTORY / f"{uid}.json": json.dumps(
            dashboard(uid, title, panels), indent=1, ensure_ascii=False
        )
        + "\n"
        for uid, (title, panels) in DASHBOARDS.items()
    }


def main() -> None:
    DASHBOARD_DIRECTORY.mkdir(exist_ok=True)
    for path, text in render_files().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
