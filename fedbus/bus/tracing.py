"""Telemetry of the bus: a span for each durable message published or consumed, and metrics of the traffic.

Span names and attributes follow OpenTelemetry's semantic conventions for messaging, with fedbus attributes added;
the trace context is propagated in W3C format. A message that is not durable, such as a heartbeat, is counted and
carries the trace context, but has no span.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Final

import structlog
from nats.aio.msg import Msg
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from fedbus.common import clock
from fedbus.contracts.causation import cause_scope
from fedbus.contracts.envelope import Envelope
from fedbus.contracts.message import Message, Request
from fedbus.contracts.subjects import template
from fedbus.contracts.telemetry import (
    EVENT_AGE,
    MESSAGE_IO,
    MESSAGES,
    REDELIVERIES,
    get_tracer,
    increment,
    record,
)

OPERATION_TYPES: Final = {"publish": "send", "request": "send", "process": "process", "answer": "process"}
"""The operation types of OpenTelemetry's semantic conventions for messaging."""
SPAN_KINDS: Final = {"publish": SpanKind.PRODUCER, "request": SpanKind.CLIENT}
W3C_PROPAGATOR: Final = TraceContextTextMapPropagator()
"""Only the trace context: the global propagator also parses baggage, which fedbus does not use."""
TRACEPARENT: Final = re.compile("00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
"""A traceparent of version 00 (W3C Trace Context)."""

tracer = get_tracer("fedbus.bus")


def current_trace_headers() -> dict[str, str]:
    """Return the current trace context as headers; empty outside of a trace."""
    trace_id, span_id, _, flags, state, is_valid = trace.get_current_span().get_span_context()
    if not is_valid:
        return {}
    parent = {"traceparent": f"00-{trace_id:032x}-{span_id:016x}-{flags:02x}"}
    return parent | {"tracestate": state.to_header()} if state else parent


def span_context_from(headers: Mapping[str, str]) -> SpanContext | None:
    """Return the span context in *headers*; None if they have none."""
    span = trace.get_current_span(_extract_context(headers, Context())).get_span_context()
    return span if span.is_valid else None


def _extract_context(headers: Mapping[str, str], context: Context | None = None) -> Context | None:
    """Return *context*, or the current one, with the span in *headers*.

    The common format is parsed here, which is faster; OpenTelemetry parses the rest.
    """
    match = TRACEPARENT.fullmatch(headers.get("traceparent", ""))
    if not match or "tracestate" in headers:
        return W3C_PROPAGATOR.extract(headers, context)
    trace_id, span_id, flags = match.groups()
    span = SpanContext(
        int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16))
    )
    return trace.set_span_in_context(NonRecordingSpan(span), context) if span.is_valid else context


def publish_span(
    message: Message, subject: str, operation: str, id: str, source: str
) -> AbstractContextManager[Span]:
    """Start the span of a publish or a request."""
    return tracer.start_as_current_span(
        f"{operation} {message.name}",
        kind=SPAN_KINDS[operation],
        attributes=_span_attributes(message, subject, operation, id, source),
    )


@contextmanager
def consumer_span(
    envelope: Envelope, operation: str, message: Message, subject: str, source: str
) -> Iterator[None]:
    """Continue the sender's trace in a span for the block; log lines in it have the `event_id`."""
    attributes = _span_attributes(message, subject, operation, envelope.id, source)
    if operation == "process":
        attributes["messaging.consumer.group.name"] = source
    tokens = structlog.contextvars.bind_contextvars(event_id=envelope.id)
    try:
        with (
            tracer.start_as_current_span(
                f"{operation} {message.name}",
                _extract_context(envelope.trace),
                kind=SpanKind.SERVER if isinstance(message, Request) else SpanKind.CONSUMER,
                attributes=attributes,
            ),
            cause_scope(cause_for_effects(message, envelope)),
        ):
            yield
    finally:
        structlog.contextvars.reset_contextvars(**tokens)


def cause_for_effects(message: Message, envelope: Envelope) -> str:
    """Return the cause id for the effects of *message*: its own id, or its cause's if it is not stored."""
    return envelope.id if message.durable else envelope.cause


def count_message(message: Message, direction: str, size_bytes: int) -> None:
    """Count a message that was sent (``transmit``) or received (``receive``)."""
    attributes = {"fedbus.word": message.name, "network.io.direction": direction}
    increment(MESSAGES, attributes)
    increment(MESSAGE_IO, attributes, size_bytes)


def record_receive(message: Message, envelope: Envelope, raw: Msg) -> None:
    """Record the age of a received message and whether it is a redelivery. Clock skew may not make the age negative."""
    attributes = {"fedbus.word": message.name}
    record(EVENT_AGE, max(0.0, clock.time_s() - envelope.time.timestamp()), attributes)
    if raw.metadata.num_delivered > 1:
        increment(REDELIVERIES, attributes)
    count_message(message, "receive", len(raw.data))


def _span_attributes(
    message: Message, subject: str, operation: str, id: str, source: str
) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "messaging.system": "nats",
        "messaging.operation.name": operation,
        "messaging.operation.type": OPERATION_TYPES[operation],
        "messaging.destination.name": subject,
        "messaging.destination.template": template(type(message)),
        "messaging.message.id": id,
        "messaging.client.id": source,
        "fedbus.word": message.name,
        "fedbus.task": message.task,
        "fedbus.about": message.subject_ref,
    }
    fields = vars(message)  # getattr of a missing field is slow in pydantic: slower than all the rest here
    for name in ("run", "round", "client"):
        if (value := fields.get(name)) is not None:
            attributes[f"fedbus.{name}"] = value
    return attributes
