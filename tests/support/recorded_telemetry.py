"""The spans and metrics of a test: its own from in-memory exporters, those of its child processes from a collector.

async with record_telemetry(monkeypatch) as telemetry:
    ...
    spans = telemetry.spans_of(trace_id)
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Metric
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fedbus.app.telemetry.tracer import sdk_provider
from support.otlp_collector import ExportedSpan, OtlpCollector, run_collector


def expected_transitions(*, rounds: int, clients: int) -> dict[str, int]:
    """The number of transitions of each kind in a successful run, by the name of the span."""
    evaluations = rounds + 1  # the first model is evaluated too
    return {
        "run • → requested": 1,
        "run requested → recruiting": 1,
        "run recruiting → running": 1,
        "run running → running": evaluations,
        "run running → finished": 1,
        "server waiting → recruiting": 1,
        "server recruiting → training": 1,
        "server training → training": evaluations,
        "server training → publishing": 1,
        "server publishing → waiting": 1,
        "client serving → learning": clients,
        "client learning → pending_application": clients,
        "client pending_application → serving": clients,
        "fl_client waiting → pending": clients,
        "fl_client pending → training": clients,
        "fl_client training → finished": clients,
        "fl_client finished → waiting": clients,
        "inference serving → updating": clients,
        "inference updating → serving": clients,
    }


@dataclass(frozen=True)
class RecordedTelemetry:
    """The telemetry so far."""

    memory: InMemorySpanExporter
    collector: OtlpCollector

    def spans_of(self, trace_id: str) -> list[ExportedSpan]:
        return [span for span in self.spans if span.trace_id == trace_id]

    @property
    def spans(self) -> list[ExportedSpan]:
        """All spans, in no order."""
        return [*self._own_spans(), *self.collector.spans]

    @property
    def metric_names(self) -> set[str]:
        """The names of all metrics of this process and its children."""
        return {*own_metrics(), *self.collector.metrics}

    def _own_spans(self) -> Iterator[ExportedSpan]:
        for span in self.memory.get_finished_spans():
            assert span.context
            yield ExportedSpan(
                service="",
                name=span.name,
                trace_id=f"{span.context.trace_id:032x}",
                span_id=f"{span.context.span_id:016x}",
                parent_id=f"{span.parent.span_id:016x}" if span.parent else "",
                attributes={key: str(value) for key, value in (span.attributes or {}).items()},
                links=tuple(f"{link.context.span_id:016x}" for link in span.links),
            )


_READER = InMemoryMetricReader()


def own_metrics() -> dict[str, Metric]:
    """The metrics of this process so far, by name."""
    data = _READER.get_metrics_data()
    resources = data.resource_metrics if data else []
    return {
        metric.name: metric for one in resources for scope in one.scope_metrics for metric in scope.metrics
    }


def enable_metrics() -> None:
    """Enable metrics in this process. OpenTelemetry accepts one provider for each process."""
    if not isinstance(metrics.get_meter_provider(), MeterProvider):
        metrics.set_meter_provider(MeterProvider([_READER], shutdown_on_exit=False))


@contextmanager
def record_spans() -> Iterator[InMemorySpanExporter]:
    """Record the spans of this process until the block ends. The provider stays; the exporter is removed."""
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = sdk_provider({})
        trace.set_tracer_provider(provider)
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    try:
        yield exporter
    finally:
        exporter.shutdown()


@asynccontextmanager
async def record_telemetry(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RecordedTelemetry]:
    """Record the telemetry of this process and its children until the block ends."""
    enable_metrics()
    with record_spans() as memory:
        async with run_collector() as collector:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
            monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
            monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "500")
            yield RecordedTelemetry(memory, collector)
