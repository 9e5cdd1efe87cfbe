"""Spans of the messages of a simulated run: one for each call of the server side, and below it those of some clients.

    train  100 clients                 ▕━━━━━━━━━━━━━━▏  1.3 s
     train            client-0004      ▕━             ▏  24 ms
     …

A trace stays small with any number of clients: a call has the spans of at most MAX_SAMPLED_CLIENTS of them, evenly
distributed over its messages. They have the attribute `fedbus.sampled`: the critical path of a round (see
`fedbus.domain.critical_path`) passes them over, because it would name the sampled clients only.
"""

import time
from typing import Final

from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span

from fedbus.contracts.telemetry import get_tracer, mark_failed
from fedbus.learning.library import ReplyError

MAX_SAMPLED_CLIENTS: Final = 50
_NANO: Final = 1_000_000_000

tracer = get_tracer("fedbus.simulation")


class ClientSpans:
    """The spans of the run *run*. Call it in the thread whose current span is to be the parent."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._posted: dict[int, int] = {}
        """Posted messages by round, whose replies have a span."""

    def open_call(self, *, round_number: int, kind: str, total: int) -> "CallSpans":
        """Start the spans of a call that sends *total* messages and waits for the replies."""
        return CallSpans(self._run, round_number, kind, total=total)

    def open_post(self, *, round_number: int, kind: str, total: int) -> "CallSpans | None":
        """Start the spans of messages without a call that waits for them; None: the round has enough spans."""
        count = self._posted.get(round_number, 0)
        if count >= MAX_SAMPLED_CLIENTS:
            return None
        self._posted = {round_number: count + total}
        return CallSpans(self._run, round_number, kind, total=total, is_posted=True)


class CallSpans:
    """The spans of one call: its own, unless the messages are posted, and those of some of its replies."""

    def __init__(
        self, run: str, round_number: int, kind: str, *, total: int, is_posted: bool = False
    ) -> None:
        self._about: dict[str, str | int | bool] = {"fedbus.run": run, "fedbus.round": round_number}
        self._name = kind.partition(".")[0]
        self._step = -(-total // MAX_SAMPLED_CLIENTS)
        self._failed = 0
        self._context: Context = context.get_current()
        self._parent = trace.get_current_span()
        self._call: Span | None = None
        if not is_posted:
            self._call = tracer.start_span(self._name, attributes={**self._about, "fedbus.clients": total})
            self._context = trace.set_span_in_context(self._call)
            self._about["fedbus.sampled"] = True

    def add_reply(
        self, position: int, client: str, seconds: float, error: ReplyError | None, *, worker: int
    ) -> None:
        """Add the reply to the message at *position*, which took *seconds* on the worker and arrives now."""
        self._failed += error is not None
        if self._failed > MAX_SAMPLED_CLIENTS if error is not None else position % self._step:
            return
        now = time.time_ns()
        span = tracer.start_span(
            self._name,
            self._context,
            attributes={**self._about, "fedbus.client": client, "fedbus.worker": worker},
            start_time=now - int(seconds * _NANO),
        )
        if error is not None:
            mark_failed(span, error.kind or str(error.code), error.reason)
        span.end(now)

    def link_current_span(self) -> None:
        """Link the span of an aggregation to that of the call whose last reply it takes, if it is not its parent."""
        span = trace.get_current_span()
        if self._call is not None and span is not self._parent and span.is_recording():
            span.add_link(self._call.get_span_context())

    def end(self) -> None:
        """End the span of the call: there are no more replies. Later calls do nothing."""
        if self._call is not None and self._call.is_recording():
            if self._failed:
                self._call.set_attribute("fedbus.failed", self._failed)
            self._call.end()
