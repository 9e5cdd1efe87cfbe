"""A round as spans: what the ServerApp's thread does from the first message of a round to its last figure.

A span is sent when it ends, so nothing here lasts longer than a round: a run of hours shows as it goes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Token

from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span

from fedbus.contracts.telemetry import get_tracer

tracer = get_tracer("fedbus.learning")


class RoundTrace:
    """The span of the round that runs, in the thread that runs it. Whatever is sent meanwhile hangs on it."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._open: tuple[Span, Token[Context]] | None = None

    def begins(self, number: int) -> None:
        """The round before, if it is still open, ends."""
        self.ends()
        span = tracer.start_span("round", attributes=self._attributes(number))
        self._open = span, context.attach(trace.set_span_in_context(span))

    def ends(self) -> None:
        if self._open is not None:
            span, token = self._open
            self._open = None
            context.detach(token)
            span.end()

    @contextmanager
    def aggregate_span(self, number: int) -> Iterator[None]:
        """Whoever takes a reply inside links it to where it came from: see `BusGrid`."""
        with tracer.start_as_current_span("aggregate", attributes=self._attributes(number)):
            yield

    def _attributes(self, number: int) -> dict[str, str | int]:
        return {"fedbus.run": self._run, "fedbus.round": number}
