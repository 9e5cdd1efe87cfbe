"""The names of the metrics in Prometheus, as its OTLP receiver translates them.

    fedbus.round.duration, s, histogram  →  fedbus_round_duration_seconds_bucket, …_sum, …_count

The rules (``UnderscoreEscapingWithSuffixes``, the default) are in
https://prometheus.io/docs/guides/opentelemetry/ and the OpenTelemetry specification's page on compatibility.
"""

from typing import Final

from fedbus.contracts.telemetry import Metric, MetricKind

UNIT_SUFFIXES: Final = {"s": "seconds", "By": "bytes", "Cel": "celsius"}
TOTALS: Final = {MetricKind.COUNTER, MetricKind.OBSERVABLE_COUNTER}
GAUGES: Final = {MetricKind.GAUGE, MetricKind.OBSERVABLE_GAUGE}


def series_names(metric: Metric) -> list[str]:
    """Return the names of the time series of *metric*."""
    name = label_name(metric.name)
    unit = UNIT_SUFFIXES.get(metric.unit)
    if unit and not name.endswith(f"_{unit}"):
        name = f"{name}_{unit}"
    if metric.unit == "1" and metric.kind in GAUGES:
        name = f"{name}_ratio"
    if metric.kind in TOTALS:
        return [f"{name}_total"]
    if metric.kind is MetricKind.HISTOGRAM:
        return [f"{name}_{part}" for part in ("bucket", "sum", "count")]
    return [name]


def label_name(attribute: str) -> str:
    """Return the label of an *attribute*: ``fedbus.client`` → ``fedbus_client``."""
    return attribute.replace(".", "_")
