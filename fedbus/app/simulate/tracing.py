"""The trace of a simulation: the transitions of its run, as `fedbus trace` reads them from a fleet's.

The spans of rounds come from the training library, those of clients from the simulation's messenger.
"""

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from fedbus.contracts.run import RunState
from fedbus.contracts.telemetry import get_tracer

tracer = get_tracer("fedbus.simulation")


class SimulationTrace:
    """The trace of the simulation *name* of *task*; *trace_parent* continues that of an interrupted one."""

    def __init__(self, name: str, task: str, trace_parent: str = "") -> None:
        self._about = {"fedbus.run": name, "fedbus.task": task}
        self._state = ""
        root = _parse(trace_parent)
        if root is None:
            with tracer.start_as_current_span("run • → requested", attributes=self._about) as span:
                root = span.get_span_context()
            self._state = RunState.REQUESTED
        else:
            self._state = RunState.CANCELLED
        self._root = root
        self._context = trace.set_span_in_context(NonRecordingSpan(root))
        otel_context.attach(self._context)

    @property
    def trace_id(self) -> str:
        return f"{self._root.trace_id:032x}"

    @property
    def trace_parent(self) -> str:
        """The root of the trace, as in a W3C traceparent."""
        return f"00-{self._root.trace_id:032x}-{self._root.span_id:016x}-01"

    def move_to(self, state: RunState, reason: str = "") -> None:
        """Add the span of a transition."""
        about = self._about | ({"fedbus.reason": reason} if reason else {})
        tracer.start_span(f"run {self._state} → {state}", self._context, attributes=about).end()
        self._state = state


def _parse(trace_parent: str) -> SpanContext | None:
    parts = trace_parent.split("-")
    if len(parts) != 4:
        return None
    return SpanContext(int(parts[1], 16), int(parts[2], 16), is_remote=True, trace_flags=TraceFlags(1))
