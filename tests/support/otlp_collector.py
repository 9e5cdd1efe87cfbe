"""An OTLP collector that records what every process of a test exports."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class ExportedSpan:
    """One span, as exported."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, str | int]
    links: tuple[str, ...] = ()


@dataclass
class ExportedMetric:
    """One metric, as exported: its unit, and the attributes of each of its series."""

    unit: str
    series: list[dict[str, str]] = field(default_factory=list)
    exemplars: list[str] = field(default_factory=list)
    """Trace ids."""


@dataclass(frozen=True)
class ExportedLogLine:
    """One log line, as exported."""

    service: str
    body: str
    trace_id: str
    attributes: dict[str, str | int]


@dataclass
class OtlpCollector:
    """Receives OTLP over HTTP."""

    url: str = ""
    spans: list[ExportedSpan] = field(default_factory=list)
    metrics: dict[str, ExportedMetric] = field(default_factory=dict)
    log_lines: list[ExportedLogLine] = field(default_factory=list)
    requests: int = 0

    def spans_of_trace(self, trace_id: str) -> list[ExportedSpan]:
        return [span for span in self.spans if span.trace_id == trace_id]

    async def add_spans(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = _values(resource.resource.attributes).get("service.name", "")
            for scope in resource.scope_spans:
                self.spans += [
                    ExportedSpan(
                        str(service),
                        span.name,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        _values(span.attributes),
                        tuple(link.span_id.hex() for link in span.links),
                    )
                    for span in scope.spans
                ]

    async def add_metrics(self, body: bytes) -> None:
        for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    figure = self.metrics.setdefault(metric.name, ExportedMetric(metric.unit))
                    points = getattr(metric, str(metric.WhichOneof("data"))).data_points
                    for point in points:
                        about = {name: str(value) for name, value in _values(point.attributes).items()}
                        if about not in figure.series:
                            figure.series.append(about)
                        figure.exemplars += [one.trace_id.hex() for one in point.exemplars]

    async def add_log_lines(self, body: bytes) -> None:
        for resource in ExportLogsServiceRequest.FromString(body).resource_logs:
            service = str(_values(resource.resource.attributes).get("service.name", ""))
            for scope in resource.scope_logs:
                self.log_lines += [
                    ExportedLogLine(
                        service, line.body.string_value, line.trace_id.hex(), _values(line.attributes)
                    )
                    for line in scope.log_records
                ]


def _values(attributes: Any) -> dict[str, str | int]:
    return {one.key: one.value.string_value or one.value.int_value for one in attributes}


@contextmanager
def unresponsive_collector() -> Iterator[str]:
    """The URL of a collector that accepts connections and never replies."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def closed_address() -> Iterator[str]:
    """A URL with a port on which nothing listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # so that no other process listens on it
        yield f"http://127.0.0.1:{closed.getsockname()[1]}"


@asynccontextmanager
async def run_collector(
    slow_s: float = 0.0, status: int = 200, port: int = 0
) -> AsyncIterator[OtlpCollector]:
    """Run a collector until the block ends; each reply takes *slow_s* and has *status*."""
    collector = OtlpCollector()

    def handler(take: Callable[[bytes], Awaitable[None]]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            collector.requests += 1
            await asyncio.sleep(slow_s)
            if status == 200:
                await take(await request.read())
            return web.Response(status=status, body=b"", content_type="application/x-protobuf")

        return handle

    application = web.Application(client_max_size=64 * 1024**2)
    application.router.add_post("/v1/traces", handler(collector.add_spans))
    application.router.add_post("/v1/metrics", handler(collector.add_metrics))
    application.router.add_post("/v1/logs", handler(collector.add_log_lines))
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    collector.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield collector
    finally:
        await runner.cleanup()
