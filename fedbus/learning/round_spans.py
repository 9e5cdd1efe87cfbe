"""The spans of a round in the thread that trains, from its first message to its last metric.

A span is exported when it ends. No span here is longer than a round, so that a long run is visible while it
runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Token

from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span

from fedbus.contracts.telemetry import get_tracer
from fedbus.learning.aggregation_planner import AggregationReport

tracer = get_tracer("fedbus.learning")


class RoundTrace:
    """The span of the current round, in the thread that trains. It is the parent of all messages of the round."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._open: tuple[Span, Token[Context]] | None = None

    def begin_round(self, number: int) -> None:
        """Start the span of round *number*, and end the span of the previous round."""
        self.end_round()
        span = tracer.start_span("round", attributes=self._attributes(number))
        self._open = span, context.attach(trace.set_span_in_context(span))

    def end_round(self) -> None:
        """End the open span, if there is one."""
        if self._open is not None:
            span, token = self._open
            self._open = None
            context.detach(token)
            span.end()

    def describe_aggregation(self, report: AggregationReport) -> None:
        """Write the mode, and the counts and staleness of updates, to the span of the round."""
        if self._open is not None:
            self._open[0].set_attributes(
                {
                    "fedbus.aggregation.mode": report.mode.value,
                    "fedbus.aggregation.updates": report.updates,
                    "fedbus.aggregation.max_staleness": max(report.staleness.values(), default=0),
                    "fedbus.aggregation.late_merged": report.late_merged,
                    "fedbus.aggregation.late_dropped": report.late_dropped,
                }
            )

    @contextmanager
    def aggregate_span(self, number: int) -> Iterator[None]:
        """Open the span of an aggregation. The messenger links it to the spans of the replies that it takes."""
        with tracer.start_as_current_span("aggregate", attributes=self._attributes(number)):
            yield

    def _attributes(self, number: int) -> dict[str, str | int]:
        return {"fedbus.run": self._run, "fedbus.round": number}
