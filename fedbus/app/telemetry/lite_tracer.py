"""Spans without OpenTelemetry's SDK: its API, and as little behind it as keeping them takes.

What the SDK does for a span (locks, limits, cleaned attributes, processors) costs 30 µs, as much as many a
step that it tells of; this costs 5, and 3 to write it. So where no collector is named spans are made here,
and where one is, by the SDK: the code that makes them knows neither. docs/decisions tells of the choice.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from random import getrandbits
from types import TracebackType
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation import _SPAN_KEY as SPAN_KEY
from opentelemetry.util import types

from fedbus.app.telemetry.span_files import Begun, Made, Record
from fedbus.contracts.telemetry import failed

# SPAN_KEY is where a context has its span: the API's own functions for it look the current context up once more each.
SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
Take = Callable[[Made], None]
Began = Callable[[Begun], None]


class LightProvider(trace.TracerProvider):
    """Gives out tracers whose spans go to *began* when they begin, and to *take* when they end."""

    def __init__(self, take: Take, began: Began = lambda _: None) -> None:
        self._take, self._began = take, began

    def get_tracer(
        self,
        instrumenting_module_name: str,
        instrumenting_library_version: str | None = None,  # noqa: ARG002  # the API's
        schema_url: str | None = None,  # noqa: ARG002
        attributes: types.Attributes | None = None,  # noqa: ARG002
    ) -> "LightTracer":
        return LightTracer(self._take, self._began, instrumenting_module_name)


class BlockTracer(trace.Tracer):
    """A tracer whose spans of a block say of what type the exception was that ended it."""

    def start_as_current_span(  # type: ignore[override]  # the API's may decorate too, which nobody here does
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: types.Attributes = None,
        links: "Sequence[Link] | None" = None,
        start_time: int | None = None,
        record_exception: bool = True,  # noqa: ARG002, FBT001, FBT002
        set_status_on_exception: bool = True,  # noqa: ARG002, FBT001, FBT002
        end_on_exit: bool = True,  # noqa: ARG002, FBT001, FBT002
    ) -> "CurrentSpan":
        return CurrentSpan(self, name, context, kind, attributes, links, start_time)


class LightTracer(BlockTracer):
    """Makes spans of one module."""

    def __init__(self, take: Take, began: Began, scope: str) -> None:
        self._take, self._began = take, began
        self._scope = scope

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: types.Attributes = None,
        links: "Sequence[Link] | None" = None,
        start_time: int | None = None,
        record_exception: bool = True,  # noqa: ARG002, FBT001, FBT002  # the API's
        set_status_on_exception: bool = True,  # noqa: ARG002, FBT001, FBT002
    ) -> "LightSpan":
        within = otel_context.get_current() if context is None else context
        span = LightSpan(self._take, self._scope, name, within, kind, attributes, links, start_time)
        self._began(span)
        return span


class CurrentSpan(AbstractContextManager[trace.Span]):
    """A span that begins and ends with a block. No generator: they cost as much again as the span."""

    __slots__ = ("_about", "_context", "_name", "_span", "_token", "_tracer")

    def __init__(self, tracer: BlockTracer, name: str, context: Context | None, *about: Any) -> None:
        self._tracer, self._name, self._context, self._about = tracer, name, context, about

    def __enter__(self) -> trace.Span:
        around = otel_context.get_current()
        within = around if self._context is None else self._context
        self._span = span = self._tracer.start_span(self._name, within, *self._about)
        self._token = otel_context.attach(Context({**around, SPAN_KEY: span}))
        return span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self._span.record_exception(error)
            failed(self._span, type(error).__name__, f"{type(error).__name__}: {error}")
        otel_context.detach(self._token)
        self._span.end()


class LightSpan(trace.Span):
    """A span that is told of once, when it ends. Made and ended in one thread, as ours are."""

    __slots__ = (
        "_attributes",
        "_context",
        "_end",
        "_events",
        "_kind",
        "_links",
        "_message",
        "_name",
        "_parent",
        "_scope",
        "_start",
        "_status",
        "_take",
    )

    def __init__(
        self,
        take: Take,
        scope: str,
        name: str,
        within: Context,
        kind: SpanKind,
        attributes: types.Attributes,
        links: "Sequence[Link] | None",
        start: int | None,
    ) -> None:
        above: trace.Span = within.get(SPAN_KEY, INVALID_SPAN)  # type: ignore[assignment]  # nobody puts else there
        trace_id, above_id, _, _, state, is_child = above.get_span_context()
        self._parent = above_id if is_child else 0
        self._context = SpanContext(
            trace_id if is_child else getrandbits(128) or 1,
            getrandbits(64) or 1,
            is_remote=False,
            trace_flags=SAMPLED,
            trace_state=state,
        )
        self._take, self._scope, self._name, self._kind = take, scope, name, kind
        self._attributes: dict[str, Any] = dict(attributes) if attributes else {}
        self._links = list(links) if links else []
        self._events: list[tuple[str, int, Mapping[str, Any]]] = []
        self._status, self._message = 0, ""
        self._end = 0
        self._start = start or time.time_ns()

    def end(self, end_time: int | None = None) -> None:
        if self._end:
            return
        self._end = end_time or time.time_ns()
        self._take(self.record)

    def record(self) -> Record:
        """What is kept of it: made by whoever writes it, maybe before it ends; so what may grow yet is copied."""
        return Record(
            self._context.trace_id.to_bytes(16, "big"),
            self._context.span_id.to_bytes(8, "big"),
            self._parent.to_bytes(8, "big") if self._parent else b"",
            self._name,
            self._kind.value + 1,
            self._start,
            self._end,
            dict(self._attributes),
            tuple(ids_of(link.context) for link in self._links),
            tuple(self._events),
            self._status,
            self._message,
            self._scope,
        )

    def get_span_context(self) -> SpanContext:
        return self._context

    def is_recording(self) -> bool:
        return not self._end

    def set_attribute(self, key: str, value: types.AttributeValue) -> None:
        self._attributes[key] = value

    def set_attributes(self, attributes: Mapping[str, types.AttributeValue]) -> None:
        self._attributes.update(attributes)

    def add_event(self, name: str, attributes: types.Attributes = None, timestamp: int | None = None) -> None:
        self._events.append((name, timestamp or time.time_ns(), dict(attributes or {})))

    def add_link(self, context: SpanContext, attributes: types.Attributes = None) -> None:
        self._links.append(Link(context, attributes))

    def update_name(self, name: str) -> None:
        self._name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        code = status.status_code if isinstance(status, Status) else status
        self._status = code.value
        self._message = (status.description if isinstance(status, Status) else description) or ""

    def record_exception(
        self,
        exception: BaseException,
        attributes: types.Attributes = None,
        timestamp: int | None = None,
        escaped: bool = False,  # noqa: ARG002, FBT001, FBT002  # the API's
    ) -> None:
        facts = {"exception.type": type(exception).__name__, "exception.message": str(exception)[:1000]}
        self.add_event("exception", facts | dict(attributes or {}), timestamp)


def ids_of(context: SpanContext) -> tuple[bytes, bytes]:
    """Trace and span, raw."""
    return context.trace_id.to_bytes(16, "big"), context.span_id.to_bytes(8, "big")
