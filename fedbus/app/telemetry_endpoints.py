"""The address of the collector in OpenTelemetry's standard variables: one for all signals, or one for each."""

import os
from typing import Final

ENDPOINT: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES: Final = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
METRICS: Final = "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"
LOGS: Final = "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT"


def is_configured(signal: str) -> bool:
    """Return whether a collector is configured for *signal*, one of the three above."""
    return bool(os.environ.get(signal) or os.environ.get(ENDPOINT))


def is_any_configured() -> bool:
    return any(is_configured(signal) for signal in (TRACES, METRICS, LOGS))
