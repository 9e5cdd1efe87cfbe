"""Traces that pass over a pause: from a fact that was written down to the work that goes on from it."""

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import context, propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Link


def current_traceparent() -> str:
    """The current trace as a ``traceparent`` (W3C Trace Context), or nothing where there is none."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent", "")


@contextmanager
def use_trace(traceparent: str) -> Iterator[None]:
    """What is done inside belongs to the trace of *traceparent*; where it is empty, to the current one."""
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
    """The same, and the span that has led to it is linked to that trace, of which it is no part."""
    for link in links_to(traceparent):
        trace.get_current_span().add_link(link.context)
    with use_trace(traceparent):
        yield


@contextmanager
def detached_trace() -> Iterator[None]:
    """What is done inside belongs to no trace that there is."""
    token = context.attach(Context())
    try:
        yield
    finally:
        context.detach(token)


def links_to(traceparent: str) -> list[Link]:
    """A link to the span of *traceparent*, where it names one: for what joins a trace without descending from it."""
    span = trace.get_current_span(propagate.extract({"traceparent": traceparent}, Context()))
    return [Link(span.get_span_context())] if span.get_span_context().is_valid else []
