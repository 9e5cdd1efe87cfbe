"""Where a collector is, as OpenTelemetry's standard variables say it: one for all signals, or one for each."""

import os
from typing import Final

ENDPOINT: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES: Final = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
METRICS: Final = "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"
LOGS: Final = "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT"


def named(signal: str) -> bool:
    """Whether a collector is named for *signal*, one of the three above."""
    return bool(os.environ.get(signal) or os.environ.get(ENDPOINT))


def any_named() -> bool:
    return any(named(signal) for signal in (TRACES, METRICS, LOGS))
