"""Export to an OTLP collector, if one is configured: spans, metrics and log lines.

Each signal has its own thread and bounded queue, and one attempt takes EXPORT_S at most. Without a collector, no
metric is aggregated and no log line is sent.
"""

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import structlog
from opentelemetry import _logs, metrics
from opentelemetry._logs import LogRecord
from opentelemetry.context import get_current
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk import metrics as sdk
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs._internal import std_to_otel
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from fedbus.app.telemetry import FLUSH_S, exceptions
from fedbus.app.telemetry_endpoints import LOGS, METRICS, TRACES, is_configured
from fedbus.app.telemetry_settings import INTERVAL, TIMEOUT
from fedbus.contracts.telemetry import MAX_SERIES

EXPORT_S: Final = 5.0
"""Limit of one export with all its retries; OTEL_EXPORTER_OTLP_TIMEOUT overrides it."""
METRICS_INTERVAL_S: Final = 15.0
FAILING_FLUSH_S: Final = 0.3


class OtlpExport:
    """The exporters of this process. The spans are those of *spans*, whose owner shuts it down."""

    def __init__(self, spans: TracerProvider) -> None:
        self._spans = spans
        self.shutdowns: list[Callable[[], Any]] = []
        """One for metrics and one for log lines: each flushes its signal and ends it."""
        self._exporters: list[Any] = []
        self._failing: set[str] = set()
        """The signals whose last export failed."""
        if is_configured(TRACES):
            self._export_spans()
        if is_configured(METRICS):
            self._export_metrics()
        if is_configured(LOGS):
            self._export_lines()

    @property
    def flush_s(self) -> float:
        """Limit of the last flush. Short for a collector that fails: several processes end one after the other."""
        return FAILING_FLUSH_S if self._failing else FLUSH_S

    def close_exporters(self) -> None:
        """End all attempts to export."""
        for exporter in self._exporters:
            exporter.shutdown()

    def _watch(self, signal: str, exporter: Any) -> Any:
        """Record for each export of *exporter* whether it failed."""
        send = exporter.export

        def export(*args: Any, **kwargs: Any) -> Any:
            result = send(*args, **kwargs)
            (self._failing.discard if result.name == "SUCCESS" else self._failing.add)(signal)
            return result

        exporter.export = export
        self._exporters.append(exporter)
        return exporter

    def _export_spans(self) -> None:
        exporter = self._watch(TRACES, OTLPSpanExporter(timeout=_timeout_s()))
        self._spans.add_span_processor(BatchSpanProcessor(exporter))

    def _export_metrics(self) -> None:
        exporter = self._watch(METRICS, OTLPMetricExporter(timeout=_timeout_s()))
        every_s = float(os.environ[INTERVAL]) / 1000 if os.environ.get(INTERVAL) else METRICS_INTERVAL_S
        reader = PeriodicExportingMetricReader(exporter, every_s * 1000, cardinality_limits=series_limits())
        provider = MeterProvider([reader], self._spans.resource, shutdown_on_exit=False)
        metrics.set_meter_provider(provider)
        self.shutdowns.append(provider.shutdown)

    def _export_lines(self) -> None:
        exporter = self._watch(LOGS, OTLPLogExporter(timeout=_timeout_s()))
        provider = LoggerProvider(self._spans.resource, shutdown_on_exit=False)
        provider.add_log_record_processor(BatchLogRecordProcessor(exporter))
        _logs.set_logger_provider(provider)
        logging.getLogger().addHandler(OtlpLogHandler(provider))
        self.shutdowns.append(provider.shutdown)


def series_limits() -> dict[Any, int]:
    """Limit each kind of instrument to MAX_SERIES; the SDK adds further series to ``otel.metric.overflow``."""
    kinds = (
        sdk.Counter,
        sdk.UpDownCounter,
        sdk.Histogram,
        sdk._Gauge,  # noqa: SLF001  # the SDK has no public name for it
        sdk.ObservableCounter,
        sdk.ObservableUpDownCounter,
        sdk.ObservableGauge,
    )
    return dict.fromkeys(kinds, MAX_SERIES)


class OtlpLogHandler(logging.Handler):
    """Exports each log line with its keys as attributes, except OpenTelemetry's own, which would cause further ones."""

    def __init__(self, provider: LoggerProvider) -> None:
        super().__init__()
        self._provider = provider

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(("opentelemetry", "urllib3")):
            return
        keys = dict(record.msg) if isinstance(record.msg, dict) else {"event": record.getMessage()}
        keys = structlog.contextvars.get_contextvars() | keys
        body = str(keys.pop("event", ""))
        exc_info = keys.pop("exc_info", None) or record.exc_info
        error = (
            sys.exc_info()[1]
            if exc_info is True
            else exc_info[1]
            if isinstance(exc_info, tuple)
            else exc_info
        )
        attributes = {name: _primitive(value) for name, value in keys.items() if value is not None}
        if isinstance(error, BaseException):
            attributes |= exceptions.as_attributes(error)
        self._provider.get_logger(record.name).emit(
            LogRecord(
                timestamp=int(record.created * 1e9),
                observed_timestamp=time.time_ns(),
                context=get_current(),
                severity_text=record.levelname,
                severity_number=std_to_otel(record.levelno),
                body=body,
                attributes=attributes,
            )
        )


def _primitive(value: object) -> str | bool | int | float:
    return value if isinstance(value, str | bool | int | float) else str(value)


def _timeout_s() -> float:
    try:
        return float(os.environ.get(TIMEOUT, "")) or EXPORT_S
    except ValueError:
        return EXPORT_S
