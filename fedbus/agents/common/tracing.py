"""Continue a trace from stored data, for example after a restart."""

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import context, propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Link


def current_traceparent() -> str:
    """Return the current span as a ``traceparent`` (W3C Trace Context); empty outside of a trace."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent", "")


@contextmanager
def use_trace(traceparent: str) -> Iterator[None]:
    """Run the block in the trace of *traceparent*; if it is empty, in the current one."""
    if not traceparent:
        yield
        return
    token = context.attach(propagate.extract({"traceparent": traceparent}))
    try:
        yield
    finally:
        context.detach(token)


@contextmanager
def link_and_use_trace(traceparent: str) -> Iterator[None]:
    """Run the block in the trace of *traceparent*, and link the current span, of another trace, to it."""
    for link in links_to(traceparent):
        trace.get_current_span().add_link(link.context)
    with use_trace(traceparent):
        yield


@contextmanager
def detached_trace() -> Iterator[None]:
    """Run the block outside of any trace."""
    token = context.attach(Context())
    try:
        yield
    finally:
        context.detach(token)


def links_to(traceparent: str) -> list[Link]:
    """Return a link to the span of *traceparent*, for a span that is not its descendant; empty if it is invalid."""
    span = trace.get_current_span(propagate.extract({"traceparent": traceparent}, Context()))
    return [Link(span.get_span_context())] if span.get_span_context().is_valid else []
