"""What the bus tells of itself: a span for each durable message said and each one heard, and how much goes by.

Names and attributes are those of OpenTelemetry's semantic conventions for messaging, and our own; the trace
travels as W3C writes it. What is not kept, such as a heartbeat, is counted and carries the trace, and is no span.
"""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Final

import structlog
from nats.aio.msg import Msg
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

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
"""What each is called in OpenTelemetry's semantic conventions for messaging."""
SPAN_KINDS: Final = {"publish": SpanKind.PRODUCER, "request": SpanKind.CLIENT}
W3C_PROPAGATOR: Final = TraceContextTextMapPropagator()
"""By itself: the global one looks for baggage too, which nobody here carries."""
TRACEPARENT: Final = re.compile("00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
"""A traceparent as everybody writes it."""

tracer = get_tracer("fedbus.bus")


def current_trace_headers() -> dict[str, str]:
    """The current trace, as headers."""
    trace_id, span_id, _, flags, state, is_valid = trace.get_current_span().get_span_context()
    if not is_valid:
        return {}
    parent = {"traceparent": f"00-{trace_id:032x}-{span_id:016x}-{flags:02x}"}
    return parent | {"tracestate": state.to_header()} if state else parent


def span_context_from(headers: Mapping[str, str]) -> SpanContext | None:
    """The span in *headers*, where they name one."""
    span = trace.get_current_span(_extract_context(headers, Context())).get_span_context()
    return span if span.is_valid else None


def _extract_context(headers: Mapping[str, str], context: Context | None = None) -> Context | None:
    """*context*, or the current one, with the span in *headers*. What is usual at once, the rest by OpenTelemetry."""
    usual = TRACEPARENT.fullmatch(headers.get("traceparent", ""))
    if not usual or "tracestate" in headers:
        return W3C_PROPAGATOR.extract(headers, context)
    trace_id, span_id, flags = usual.groups()
    span = SpanContext(
        int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16))
    )
    return trace.set_span_in_context(NonRecordingSpan(span), context) if span.is_valid else context


def publish_span(
    message: Message, subject: str, operation: str, id: str, who: str
) -> AbstractContextManager[Span]:
    """The span of saying or asking something."""
    return tracer.start_as_current_span(
        f"{operation} {message.word}",
        kind=SPAN_KINDS[operation],
        attributes=_span_attributes(message, subject, operation, id, who),
    )


@contextmanager
def consumer_span(
    envelope: Envelope, operation: str, message: Message, subject: str, who: str
) -> Iterator[None]:
    """The trace of the sender goes on; log lines in it name the event."""
    attributes = _span_attributes(message, subject, operation, envelope.id, who)
    if operation == "process":
        attributes["messaging.consumer.group.name"] = who
    named = structlog.contextvars.bind_contextvars(event_id=envelope.id)
    try:
        with (
            tracer.start_as_current_span(
                f"{operation} {message.word}",
                _extract_context(envelope.trace),
                kind=SpanKind.SERVER if isinstance(message, Request) else SpanKind.CONSUMER,
                attributes=attributes,
            ),
            cause_scope(cause_for_effects(message, envelope)),
        ):
            yield
    finally:
        structlog.contextvars.reset_contextvars(**named)


def cause_for_effects(message: Message, envelope: Envelope) -> str:
    """Which message whatever is done about this one is due to: what nobody keeps, nobody could find again."""
    return envelope.id if message.durable else envelope.cause


def count_message(message: Message, direction: str, size_bytes: int) -> None:
    """So much was sent (``transmit``) or came (``receive``)."""
    about = {"fedbus.word": message.word, "network.io.direction": direction}
    increment(MESSAGES, about)
    increment(MESSAGE_IO, about, size_bytes)


def record_receive(message: Message, envelope: Envelope, raw: Msg) -> None:
    """How old it is and whether it came before; two clocks may disagree, but no event is from the future."""
    about = {"fedbus.word": message.word}
    record(EVENT_AGE, max(0.0, time.time() - envelope.time.timestamp()), about)
    if raw.metadata.num_delivered > 1:
        increment(REDELIVERIES, about)
    count_message(message, "receive", len(raw.data))


def _span_attributes(
    message: Message, subject: str, operation: str, id: str, who: str
) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "messaging.system": "nats",
        "messaging.operation.name": operation,
        "messaging.operation.type": OPERATION_TYPES[operation],
        "messaging.destination.name": subject,
        "messaging.destination.template": template(type(message)),
        "messaging.message.id": id,
        "messaging.client.id": who,
        "fedbus.word": message.word,
        "fedbus.task": message.task,
        "fedbus.about": message.about,
    }
    told = vars(message)  # pydantic takes longer to say that a field is not there than all the rest does
    for name in ("run", "round", "client"):
        if (value := told.get(name)) is not None:
            attributes[f"fedbus.{name}"] = value
    return attributes
