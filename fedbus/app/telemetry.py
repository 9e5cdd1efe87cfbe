"""What is seen from outside: log lines and traces.

    with configured("fedbus-client-manager", federation="dev", client="c1"):
        ...

Lines go to standard error: readable ones to a terminal, JSON otherwise, each with the trace
and span it was written in. Spans go to an OTLP collector where the standard variables
(OTEL_EXPORTER_OTLP_ENDPOINT, or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) name one, and otherwise
nowhere: they still have their ids, so that traces run on through the bus and the logs.

Nobody listening there slows nothing down: spans wait in a bounded queue for a thread, the
complaints of the exporter are single lines and few, and leaving takes FLUSH_S at the most.
"""

import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import structlog
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, Processor, WrappedLogger

from fedbus import __version__

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
LEVEL: Final = "FEDBUS_LOG_LEVEL"
FLUSH_S: Final = 2.0
SAID_AGAIN_AFTER_S: Final = 60.0
CHATTY: Final = ("urllib3", "asyncio", "aiohttp.access", "nats")
"""Libraries whose lines are worth having from WARNING on."""


@contextmanager
def configured(service: str, *, level: str = "INFO", **about: str) -> Iterator[None]:
    """Log lines and traces of this process as *service*, until the block ends; *about* goes with all of them."""
    log_to_stderr(level=level, agent=service.removeprefix("fedbus-"), **about)
    provider, exporter = _provider(service, about)
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        _leave(provider, exporter)


def log_to_stderr(*, level: str = "INFO", **about: str) -> None:
    """Log lines of fedbus and of all libraries on standard error. FEDBUS_LOG_LEVEL overrules *level*."""
    level = os.environ.get(LEVEL, level).upper()
    readable = sys.stderr.isatty()
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if readable else "iso", utc=not readable),
        _Constant(about),
        _in_its_trace,
    ]
    structlog.configure(
        processors=[*before, ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level)),
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = logging.StreamHandler()
    handler.addFilter(_OneLineOfOpenTelemetry())
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=before,
            processors=[ProcessorFormatter.remove_processors_meta, *_rendered(readable=readable)],
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


def _rendered(*, readable: bool) -> list[Processor]:
    if readable:
        return [structlog.dev.ConsoleRenderer(pad_event_to=0)]
    return [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]


class _Constant:
    """Puts the same facts into every line."""

    def __init__(self, facts: dict[str, str]) -> None:
        self._facts = facts

    def __call__(self, _logger: WrappedLogger, _name: str, line: EventDict) -> EventDict:
        return {**self._facts, **line}


def _in_its_trace(_logger: WrappedLogger, _name: str, line: EventDict) -> EventDict:
    here = trace.get_current_span().get_span_context()
    if here.is_valid:
        line["trace_id"] = format(here.trace_id, "032x")
        line["span_id"] = format(here.span_id, "016x")
    return line


class _OneLineOfOpenTelemetry(logging.Filter):
    """Its exporter tells of an absent collector with a stack trace, over and over: one line a minute is enough."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith("opentelemetry"):
            return True
        record.exc_info = record.exc_text = record.stack_info = None
        now = time.monotonic()
        if now - self._said.get(record.name, -SAID_AGAIN_AFTER_S) < SAID_AGAIN_AFTER_S:
            return False
        self._said[record.name] = now
        return True


# --- traces --------------------------------------------------------------------------------


def _provider(service: str, about: dict[str, str]) -> tuple[TracerProvider, SpanExporter | None]:
    resource = Resource.create(
        {
            "service.name": service,
            "service.namespace": "fedbus",
            "service.version": __version__,
            "service.instance.id": f"{platform.node()}-{os.getpid()}",
            "host.name": platform.node(),
            "process.pid": os.getpid(),
            **{f"fedbus.{name}": value for name, value in about.items()},
        }
    )
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # its own exit waits 30 s
    exporter = _exporter()
    if exporter is not None:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider, exporter


def _exporter() -> SpanExporter | None:
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415  # 0.2 s to import
        OTLPSpanExporter,
    )

    return OTLPSpanExporter()


def _leave(provider: TracerProvider, exporter: SpanExporter | None) -> None:
    """Send what waits, for FLUSH_S; then stop trying, which ends the exporter's retries."""
    leaving = threading.Thread(target=provider.shutdown, name="send the last spans", daemon=True)
    leaving.start()
    leaving.join(FLUSH_S)
    if leaving.is_alive() and exporter is not None:
        exporter.shutdown()
