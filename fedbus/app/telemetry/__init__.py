"""Telemetry of a process: log lines, spans and metrics.

    with configure_telemetry("fedbus-client-manager", client="c1"):
        ...

- **Log lines** go to standard error: readable ones to a terminal, JSON otherwise, each with the current trace and
  span and the message that it is about (`log_lines`).
- **Spans** go to FEDBUS_HOME/traces, where `fedbus trace` reads them (`span_files`).
- All three signals also go to an OTLP collector if the standard variables configure one:
  OTEL_EXPORTER_OTLP_ENDPOINT, or one variable for each signal (`collector`).

Exporting never blocks: bounded queues, background threads, one log line a minute about failures, shutdown
within FLUSH_S. OTEL_SDK_DISABLED=true disables spans and metrics.
"""

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import trace

from fedbus import __version__
from fedbus.app.settings import InvalidSetting, Settings
from fedbus.app.telemetry.log_lines import log_to_stderr
from fedbus.app.telemetry.span_files import SpanFileExporter, SpanFileProcessor
from fedbus.app.telemetry.tracer import ErrorTypeProvider, sdk_provider
from fedbus.app.telemetry_endpoints import is_any_configured

if TYPE_CHECKING:
    from fedbus.app.telemetry.collector import OtlpExport

DISABLED: Final = "OTEL_SDK_DISABLED"
FLUSH_S: Final = 2.0
"""How long the shutdown waits for the last signals to be written or sent."""

__all__ = ["configure_telemetry", "log_to_stderr"]


@contextmanager
def configure_telemetry(
    service: str, *, level: str = "INFO", log_format: str = "json", **about: str
) -> Iterator[None]:
    """Configure telemetry of this process as *service* until the block ends; *about* is added to every signal.

    *log_format* is the format of its log lines in a pipe: json or console.
    """
    log_to_stderr(level=level, log_format=log_format, agent=service.removeprefix("fedbus-"), **about)
    with nullcontext() if _is_disabled() else _sdk(_resource(service, about)):
        yield


def _is_disabled() -> bool:
    return os.environ.get(DISABLED, "").strip().lower() == "true"


@contextmanager
def _sdk(resource: dict[str, str | int]) -> Iterator[None]:
    """Set up OpenTelemetry's SDK. Spans have ids, which messages carry, even where no span is stored or sent."""
    spans = sdk_provider(resource)
    if files := _span_files(resource):
        spans.add_span_processor(
            SpanFileProcessor(files)
        )  # the first, so that its shutdown waits for no network
    export = None
    if is_any_configured():
        from fedbus.app.telemetry.collector import OtlpExport  # noqa: PLC0415  # HTTP and protobuf: 5 MB

        export = OtlpExport(spans)
    trace.set_tracer_provider(ErrorTypeProvider(spans))
    try:
        yield
    finally:
        _shut_down([spans.shutdown, *(export.shutdowns if export else ())], export)


def _span_files(resource: dict[str, str | int]) -> SpanFileExporter | None:
    try:
        settings = Settings.from_environment()
    except InvalidSetting:  # reported where the settings are used
        return None
    if not settings.traces_mb:
        return None
    return SpanFileExporter(settings.traces_dir, resource, max_bytes=settings.traces_mb * 2**20)


def _resource(service: str, about: dict[str, str]) -> dict[str, str | int]:
    return {
        "service.name": service,
        "service.namespace": "fedbus",
        "service.version": __version__,
        "service.instance.id": "-".join([*about.values(), platform.node(), str(os.getpid())]),
        "host.name": platform.node(),
        "process.pid": os.getpid(),
        **{f"fedbus.{name}": value for name, value in about.items()},
    }


def _shut_down(shutdowns: Sequence[Callable[[], Any]], export: "OtlpExport | None") -> None:
    """Flush all signals at the same time, within a limit; then close the exporters, which ends their retries."""
    deadline = time.monotonic() + (export.flush_s if export else FLUSH_S)
    threads = [
        threading.Thread(target=shutdown, name="flush telemetry", daemon=True) for shutdown in shutdowns
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if export and any(thread.is_alive() for thread in threads):
        export.close_exporters()
