"""The spans of a simulated run: few for any number of clients, and the critical path passes through the calls."""

from collections.abc import Iterator

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fedbus.app.telemetry.tracer import sdk_provider
from fedbus.domain.critical_path import SpanTree, TracedSpan, round_waits
from fedbus.learning.library import ErrorCode, ReplyError
from fedbus.simulation import client_spans
from fedbus.simulation.client_spans import MAX_SAMPLED_CLIENTS, CallSpans, ClientSpans


class RecordedSpans:
    """The spans that the code under test has ended."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = sdk_provider({})
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = provider.get_tracer("test")

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    def of_clients(self) -> list[ReadableSpan]:
        return [span for span in self.named("train") if "fedbus.client" in (span.attributes or {})]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordedSpans]:
    """Record spans, which have no parent: other tests of this process may have left a current span."""
    spans = RecordedSpans()
    monkeypatch.setattr(client_spans, "tracer", spans.tracer)
    token = otel_context.attach(Context())
    yield spans
    otel_context.detach(token)


def answer(call: CallSpans, total: int, *, failing: bool = False) -> None:
    error = ReplyError(ErrorCode.CODE_RAISED, "it raised") if failing else None
    for position in range(total):
        call.add_reply(position, f"client-{position:04}", 0.01, error, worker=0)
    call.end()


@pytest.mark.parametrize(("total", "spans"), [(1, 1), (50, 50), (51, 26), (1000, 50), (10_001, 50)])
def test_a_call_has_few_spans_for_any_number_of_clients(
    recorded: RecordedSpans, total: int, spans: int
) -> None:
    answer(ClientSpans("sim").open_call(round_number=1, kind="train", total=total), total)
    (call,) = [span for span in recorded.named("train") if span.parent is None]

    assert len(recorded.of_clients()) == spans <= MAX_SAMPLED_CLIENTS
    assert (call.attributes or {})["fedbus.clients"] == total


def test_failures_have_spans_up_to_the_limit(recorded: RecordedSpans) -> None:
    answer(ClientSpans("sim").open_call(round_number=1, kind="train", total=1000), 1000, failing=True)
    (call,) = [span for span in recorded.named("train") if span.parent is None]

    assert len(recorded.of_clients()) == MAX_SAMPLED_CLIENTS
    assert (call.attributes or {})["fedbus.failed"] == 1000


def test_posted_messages_share_the_limit_of_their_round(recorded: RecordedSpans) -> None:
    spans = ClientSpans("sim")
    calls = [spans.open_post(round_number=number // 100, kind="train", total=1) for number in range(200)]
    for call in calls:
        if call is not None:
            answer(call, 1)

    assert len(recorded.of_clients()) == 2 * MAX_SAMPLED_CLIENTS
    assert len(recorded.named("train")) == 2 * MAX_SAMPLED_CLIENTS


@pytest.mark.parametrize("is_parent", [True, False], ids=["parent", "sibling"])
def test_a_round_waits_for_the_training(recorded: RecordedSpans, *, is_parent: bool) -> None:
    """A library may send inside of its aggregation span, or before it."""
    spans = ClientSpans("sim")

    def train() -> CallSpans:
        return spans.open_call(round_number=1, kind="train", total=2)

    with recorded.tracer.start_as_current_span("round", attributes={"fedbus.round": 1}, start_time=0) as span:
        call = None if is_parent else train()
        with recorded.tracer.start_as_current_span("aggregate"):
            call = call or train()
            answer(call, 2)
            call.link_current_span()
        assert span.is_recording()
    (waits,) = round_waits(SpanTree(stretch(recorded)))

    assert waits.waits[0].activity == "training"
    assert waits.waits[0].client == ""


def stretch(recorded: RecordedSpans) -> list[TracedSpan]:
    """The spans with whole seconds instead of microseconds: the training takes 8 s of a round of 10 s."""
    times = {"round": (0.0, 10.0), "aggregate": (1.0, 9.5), "train": (0.5, 9.0)}
    traced = []
    for name, (start, end) in times.items():
        for span in recorded.named(name):
            assert span.context is not None
            inner = "fedbus.client" in (span.attributes or {})
            traced.append(
                TracedSpan(
                    id=str(span.context.span_id),
                    name=name,
                    start=start + 0.6 * (name == "train") + inner,
                    end=end,
                    parent=str(span.parent.span_id) if span.parent else "",
                    links=tuple(str(link.context.span_id) for link in span.links),
                    attributes=dict(span.attributes or {}),  # type: ignore[arg-type]  # the values are of simple types
                )
            )
    return traced


def test_the_call_ends_once(recorded: RecordedSpans) -> None:
    call = ClientSpans("sim").open_call(round_number=1, kind="evaluate", total=1)
    call.end()
    call.end()

    assert len(recorded.named("evaluate")) == 1
    assert trace.get_current_span().is_recording() is False
