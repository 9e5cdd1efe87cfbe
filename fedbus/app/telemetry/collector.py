"""The OpenTelemetry SDK, set up: spans, figures and lines on their way to a collector, where one is named.

Each signal has a thread and a bounded queue of its own, and a try ends after TRY_S. Without a collector no
figure is kept and no line is sent; spans still have their ids, so that traces run on through the bus.
"""

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import structlog
from opentelemetry import _logs, metrics, trace
from opentelemetry._logs import LogRecord
from opentelemetry.context import Context, get_current
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs._internal import std_to_otel
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider

from fedbus.app.telemetry import exceptions
from fedbus.app.telemetry.lite_tracer import BlockTracer, ids_of
from fedbus.app.telemetry.span_files import Keeper, Record
from fedbus.app.telemetry_endpoints import LOGS, METRICS, TRACES, named
from fedbus.app.telemetry_settings import INTERVAL, TIMEOUT
from fedbus.contracts.telemetry import SERIES

TRY_S: Final = 5.0
"""How long one try to send may take, with all its repeats; OTEL_EXPORTER_OTLP_TIMEOUT overrules it."""
METRICS_EVERY_S: Final = 15.0
FLUSH_S: Final = 2.0
SILENT_FLUSH_S: Final = 0.3


class Collector:
    """Where all that this process tells goes, from `begin` until each of *closes* was called."""

    def __init__(self, resource: Resource) -> None:
        self.resource = resource
        self._spans = TracerProvider(resource=resource, shutdown_on_exit=False)  # its own exit waits 30 s
        self.closes: list[Callable[[], Any]] = [self._spans.shutdown]
        """Each sends what waits of one signal, and ends it."""
        self._exporters: list[Any] = []
        self._failing: set[str] = set()
        """The signals whose last try came to nothing."""
        if named(TRACES):
            self._send_spans()
        if named(METRICS):
            self._send_metrics()
        if named(LOGS):
            self._send_lines()

    def keep(self, keeper: Keeper) -> None:
        """Let *keeper* have every span as well."""
        self._spans.add_span_processor(SpansToKeeper(keeper))
        self.closes.append(keeper.close)  # by itself: it never has to wait for the network

    def begin(self) -> None:
        trace.set_tracer_provider(ProviderOfSdk(self._spans))

    @property
    def flush_s(self) -> float:
        """How long to wait for the last to be sent: several processes end after each other, so not long for nothing."""
        return SILENT_FLUSH_S if self._failing else FLUSH_S

    def _noting(self, signal: str, exporter: Any) -> Any:
        """*exporter*, each of whose tries is noted: whether it came to anything."""
        send = exporter.export

        def export(*args: Any, **more: Any) -> Any:
            result = send(*args, **more)
            (self._failing.discard if result.name == "SUCCESS" else self._failing.add)(signal)
            return result

        exporter.export = export
        self._exporters.append(exporter)
        return exporter

    def give_up(self) -> None:
        """Try no more."""
        for exporter in self._exporters:
            exporter.shutdown()

    def _send_spans(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        exporter = self._noting(TRACES, OTLPSpanExporter(timeout=_timeout()))
        self._spans.add_span_processor(BatchSpanProcessor(exporter))

    def _send_metrics(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import (  # noqa: PLC0415
            OTLPMetricExporter,
        )
        from opentelemetry.sdk.metrics import MeterProvider  # noqa: PLC0415
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader  # noqa: PLC0415

        exporter = self._noting(METRICS, OTLPMetricExporter(timeout=_timeout()))
        every_s = float(os.environ[INTERVAL]) / 1000 if os.environ.get(INTERVAL) else METRICS_EVERY_S
        reader = PeriodicExportingMetricReader(exporter, every_s * 1000, cardinality_limits=limits())
        provider = MeterProvider([reader], self.resource, shutdown_on_exit=False)
        metrics.set_meter_provider(provider)
        self.closes.append(provider.shutdown)

    def _send_lines(self) -> None:
        from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter  # noqa: PLC0415
        from opentelemetry.sdk._logs.export import BatchLogRecordProcessor  # noqa: PLC0415

        exporter = self._noting(LOGS, OTLPLogExporter(timeout=_timeout()))
        provider = LoggerProvider(self.resource, shutdown_on_exit=False)
        provider.add_log_record_processor(BatchLogRecordProcessor(exporter))
        _logs.set_logger_provider(provider)
        logging.getLogger().addHandler(LinesToCollector(provider))
        self.closes.append(provider.shutdown)


class ProviderOfSdk(trace.TracerProvider):
    """The SDK's tracers, which leave it to others to name the type of an error."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider

    def get_tracer(self, *about: Any, **more: Any) -> "TracerOfSdk":
        return TracerOfSdk(self._provider.get_tracer(*about, **more))


class TracerOfSdk(BlockTracer):
    """One of them."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer

    def start_span(self, *about: Any, **more: Any) -> trace.Span:
        return self._tracer.start_span(*about, **more)


class SpansToKeeper(SpanProcessor):
    """The SDK's spans, kept on this machine as well."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002  # the API's
        if span.context.trace_flags.sampled:
            self._keeper.began(BegunBySdk(span, record_of(span)))

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is not None and span.context.trace_flags.sampled:
            self._keeper.take(partial(record_of, span))

    def shutdown(self) -> None:
        self._keeper.close()


@dataclass(frozen=True, slots=True)
class BegunBySdk:
    """A span of the SDK's, as it began: its attributes may not be read while another thread adds to them."""

    span: Span
    at_first: Record

    def is_recording(self) -> bool:
        return self.span.is_recording()

    def record(self) -> Record:
        return self.at_first


def record_of(span: ReadableSpan) -> Record:
    """What is kept of *span*."""
    assert span.context is not None
    trace_id, span_id = ids_of(span.context)
    return Record(
        trace_id,
        span_id,
        ids_of(span.parent)[1] if span.parent else b"",
        span.name,
        span.kind.value + 1,
        span.start_time or 0,
        span.end_time or 0,
        dict(span.attributes or {}),
        tuple(ids_of(link.context) for link in span.links),
        tuple((event.name, event.timestamp, dict(event.attributes or {})) for event in span.events),
        span.status.status_code.value,
        span.status.description or "",
        span.instrumentation_scope.name if span.instrumentation_scope else "",
    )


def limits() -> dict[Any, int]:
    """SERIES for each kind of instrument: what is more is counted under ``otel.metric.overflow``."""
    from opentelemetry.sdk import metrics as sdk  # noqa: PLC0415

    kinds = (
        sdk.Counter,
        sdk.UpDownCounter,
        sdk.Histogram,
        sdk._Gauge,  # noqa: SLF001  # as the SDK itself has to call it
        sdk.ObservableCounter,
        sdk.ObservableUpDownCounter,
        sdk.ObservableGauge,
    )
    return dict.fromkeys(kinds, SERIES)


class LinesToCollector(logging.Handler):
    """Hands every line on as it is, its facts as attributes; OpenTelemetry's own stay here, or they would breed."""

    def __init__(self, provider: LoggerProvider) -> None:
        super().__init__()
        self._provider = provider

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(("opentelemetry", "urllib3")):
            return
        said = dict(record.msg) if isinstance(record.msg, dict) else {"event": record.getMessage()}
        said = structlog.contextvars.get_contextvars() | said
        body = str(said.pop("event", ""))
        given = said.pop("exc_info", None) or record.exc_info
        error = sys.exc_info()[1] if given is True else given[1] if isinstance(given, tuple) else given
        facts = {name: _plain(value) for name, value in said.items() if value is not None}
        if isinstance(error, BaseException):
            facts |= exceptions.as_attributes(error)
        self._provider.get_logger(record.name).emit(
            LogRecord(
                timestamp=int(record.created * 1e9),
                observed_timestamp=time.time_ns(),
                context=get_current(),
                severity_text=record.levelname,
                severity_number=std_to_otel(record.levelno),
                body=body,
                attributes=facts,
            )
        )


def _plain(value: object) -> str | bool | int | float:
    return value if isinstance(value, str | bool | int | float) else str(value)


def _timeout() -> float:
    try:
        return float(os.environ.get(TIMEOUT, "")) or TRY_S
    except ValueError:
        return TRY_S
