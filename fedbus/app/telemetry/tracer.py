"""The SDK's tracers, with one addition: a span of a block that raises has the attribute `error.type`.

The SDK records the exception as an event, but OpenTelemetry's conventions also ask for the type as an attribute. And a
cancelled task is no error here. The API's own context manager is a generator, which takes as long as the span itself.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import Link, SpanKind
from opentelemetry.trace.propagation import _SPAN_KEY as SPAN_KEY
from opentelemetry.util import types

from fedbus.common import clock
from fedbus.contracts.telemetry import mark_failed

# A context stores its span under SPAN_KEY: the API's own functions for it look the current context up once more each.

LIMITS: Final = SpanLimits(max_links=SpanLimits.UNSET)
"""The SDK's, except for links: an aggregation links to the upload of every client."""


def sdk_provider(resource: Mapping[str, str | int]) -> TracerProvider:
    """Return the SDK's provider, which `OTEL_TRACES_SAMPLER` samples, without its exit handler: it waits for 30 s."""
    return TracerProvider(
        resource=Resource.create(dict(resource)),
        shutdown_on_exit=False,
        span_limits=LIMITS,
        id_generator=ClockIdGenerator(),
    )


class ClockIdGenerator(IdGenerator):
    """Makes ids from the random bits of the event loop: the operating system's, or under virtual time those of a seed.

    The SDK's own generator uses Python's global one: a run with a seed would repeat the ids of the last run with that
    seed, and the number of spans would change the random numbers of the app.
    """

    def generate_span_id(self) -> int:
        return clock.random_bits(64) or 1

    def generate_trace_id(self) -> int:
        return clock.random_bits(128) or 1

    def is_trace_id_random(self) -> bool:
        return True


class ErrorTypeProvider(trace.TracerProvider):
    """Wraps the tracers of *provider*."""

    def __init__(self, provider: trace.TracerProvider) -> None:
        self._provider = provider

    def get_tracer(self, *args: Any, **kwargs: Any) -> "ErrorTypeTracer":
        return ErrorTypeTracer(self._provider.get_tracer(*args, **kwargs))


class ErrorTypeTracer(trace.Tracer):
    """Adds `error.type` to the spans of *tracer*."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer

    def start_span(self, *args: Any, **kwargs: Any) -> trace.Span:
        return self._tracer.start_span(*args, **kwargs)

    def start_as_current_span(  # type: ignore[override]  # the API's is a decorator too, which fedbus does not use
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: types.Attributes = None,
        links: "Sequence[Link] | None" = None,
        start_time: int | None = None,
        record_exception: bool = True,  # noqa: ARG002, FBT001, FBT002  # the API's
        set_status_on_exception: bool = True,  # noqa: ARG002, FBT001, FBT002 - the API's
        end_on_exit: bool = True,  # noqa: ARG002, FBT001, FBT002 - the API's
    ) -> "SpanBlock":
        return SpanBlock(self._tracer, name, context, kind, attributes, links, start_time)


class SpanBlock(AbstractContextManager[trace.Span]):
    """A span that starts and ends with a block, and is the current span inside."""

    __slots__ = ("_about", "_context", "_name", "_span", "_token", "_tracer")

    def __init__(self, tracer: trace.Tracer, name: str, context: Context | None, *about: Any) -> None:
        self._tracer, self._name, self._context, self._about = tracer, name, context, about

    def __enter__(self) -> trace.Span:
        outer = otel_context.get_current()
        parent = outer if self._context is None else self._context
        self._span = span = self._tracer.start_span(self._name, parent, *self._about)
        self._token = otel_context.attach(Context({**outer, SPAN_KEY: span}))
        return span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self._span.record_exception(error)
            mark_failed(self._span, type(error).__name__, f"{type(error).__name__}: {error}")
        otel_context.detach(self._token)
        self._span.end()
