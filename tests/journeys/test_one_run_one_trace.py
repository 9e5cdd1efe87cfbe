"""A run is one trace, from its trigger to the new model on each client.

A federation completes two runs; the test checks all spans, links and metrics against the lifecycle stream and
the telemetry catalogue.
"""

import re
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from opentelemetry import trace
from support import NatsServer, eventually
from support.all_agents import run_all_agents, start_run, wait_for_run_end
from support.federation import TASK, FederationHarness, open_federation, read_transitions
from support.otlp_collector import ExportedSpan
from support.recorded_telemetry import expected_transitions, record_telemetry

from fedbus.contracts.catalogue import MESSAGES
from fedbus.contracts.lifecycle import span_name
from fedbus.contracts.telemetry import MESSAGING_ATTRIBUTES, METRICS, SPANS, Metric
from fedbus.contracts.transition import Transition

CLIENTS = ("c1", "c2")
HARDWARE_METRICS = {"hw.temperature", "hw.gpu.utilization", "hw.gpu.memory.usage"}
"""Metrics of hardware that not all machines have; the tests of the device monitor cover them."""
OTHER_METRICS = {name for name in METRICS if name.startswith(("fedbus.nats.", "fedbus.data."))} | {
    "fedbus.event.redeliveries",
    "fedbus.event.dead_letters",
    "fedbus.round.failures",
    "fedbus.client.contribution",
    "fedbus.prediction.duration",
    "fedbus.loop.lag",
    "fedbus.log.lines",
}
"""Metrics of failures or of whole processes; tests/app/telemetry/test_collector.py covers them."""


@dataclass
class TracedRuns:
    """The telemetry and the transitions of two runs."""

    roots: list[str]
    spans: list[ExportedSpan]
    transitions: list[Transition]
    metrics: set[str]

    def spans_of_run(self, number: int) -> list[ExportedSpan]:
        return [span for span in self.spans if span.trace_id == self.roots[number - 1]]


@pytest.fixture
async def traced_runs(
    nats: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[TracedRuns]:
    async with (
        record_telemetry(monkeypatch) as telemetry,
        open_federation(nats.url, tmp_path) as fed,
    ):
        async with run_all_agents(fed, clients=len(CLIENTS)):
            roots = [await run_traced(fed) for _ in range(2)]
            assert roots == [fed.run_facts(number).trace_id for number in (1, 2)]
            metrics_during_runs = telemetry.metric_names
        await eventually(lambda: all(not orphans(telemetry.spans_of(root)) for root in roots))
        yield TracedRuns(
            roots,
            telemetry.spans,
            await read_transitions(fed.bus),
            telemetry.metric_names | metrics_during_runs,
        )


async def run_traced(fed: FederationHarness) -> str:
    """Start a run in a span, wait for its end, and return the trace id."""
    with trace.get_tracer("test").start_as_current_span("test starts a run") as root:
        run = await start_run(fed, quorum=len(CLIENTS))
    await wait_for_run_end(fed, run)
    return f"{root.get_span_context().trace_id:032x}"


def orphans(spans: list[ExportedSpan]) -> list[str]:
    """Return the names of spans whose parent is missing."""
    known = {span.span_id for span in spans}
    return [span.name for span in spans if span.parent_id and span.parent_id not in known]


async def test_each_run_is_one_complete_trace(
    traced_runs: TracedRuns,
) -> None:
    assert len(set(traced_runs.roots)) == 2
    for number in (1, 2):
        spans = traced_runs.spans_of_run(number)
        assert_complete(spans, f"{TASK}-{number}")
        assert_connected(spans)
        assert_links(spans)
    assert_nothing_missing(traced_runs)
    assert_in_catalogue(traced_runs)


def assert_complete(spans: list[ExportedSpan], run: str) -> None:
    assert [span.name for span in spans if not span.parent_id] == ["test starts a run"]

    transitions = Counter(span.name for span in spans if "→" in span.name)
    clients = len(CLIENTS)
    assert transitions == expected_transitions(rounds=2, clients=clients)
    assert {span.attributes["fedbus.run"] for span in spans if span.name.startswith("run ")} >= {run}

    names = Counter(span.name for span in spans)
    assert names["run the ServerApp"] == 1
    assert (names["round"], names["aggregate"]) == (2, 2)
    assert names["store"] == 5, (
        "a checkpoint of each round and of the first and the last model, and the version"
    )
    assert names["swap model"] == clients
    for phase in ("download", "train", "upload"):
        assert names[phase] >= 2 * clients, f"{phase} of each client in each round"


def assert_connected(spans: list[ExportedSpan]) -> None:
    """Check that each training descends from its request, and all spans from the root."""
    by_id = {span.span_id: span for span in spans}
    for training in (span for span in spans if span.name == "train"):
        above = ancestry(training, by_id)
        assert above[:4] == [
            "process round_message",
            "publish round_message",
            "round",
            "run the ServerApp",
        ]
        assert above[-1] == "test starts a run"
    for swap in (span for span in spans if span.name == "swap model"):
        assert ancestry(swap, by_id)[:2] == ["process infer_update", "publish infer_update"]


def assert_links(spans: list[ExportedSpan]) -> None:
    """Check the links from an aggregation to the uploads, and from a swap to the publication."""
    by_id = {span.span_id: span for span in spans}
    for aggregation in (span for span in spans if span.name == "aggregate"):
        uploads = [by_id[by_id[link].parent_id] for link in aggregation.links]
        assert [span.name for span in uploads] == ["upload"] * len(CLIENTS)
        assert {span.attributes["fedbus.client"] for span in uploads} == set(CLIENTS)
        assert {int(span.attributes["fedbus.round"]) for span in uploads} == {
            int(aggregation.attributes["fedbus.round"])
        }
    for swap in (span for span in spans if span.name == "swap model"):
        assert [by_id[link].name for link in swap.links] == ["process model_published"]


def ancestry(span: ExportedSpan, spans: dict[str, ExportedSpan]) -> list[str]:
    above = []
    while span.parent_id:
        span = spans[span.parent_id]
        above.append(span.name)
    return above


def assert_nothing_missing(traced_runs: TracedRuns) -> None:
    """Check that each transition in the stream has its span, and that no span is an orphan."""
    assert orphans(traced_runs.spans) == []
    logged = Counter(
        (span_name(move.kind, move.source or "•", move.target), move.key, move.event)
        for move in traced_runs.transitions
    )
    traced = Counter(
        (span.name, span.attributes["fedbus.thing"], span.attributes["fedbus.event"])
        for span in traced_runs.spans
        if "→" in span.name
    )
    assert traced == logged


def assert_in_catalogue(traced_runs: TracedRuns) -> None:
    """Check that each span and its attributes are in the catalogue, and that each span of it occurs."""
    found = set()
    for span in traced_runs.spans:
        if span.name == "test starts a run":
            continue
        (definition,) = [known for known in SPANS if re.fullmatch(pattern(known.name), span.name)]
        assert set(span.attributes) <= set(definition.attributes), span.name
        found.add(definition.name)
        if definition.attributes[: len(MESSAGING_ATTRIBUTES)] == MESSAGING_ATTRIBUTES:
            assert_conventions(span)
    assert {definition.name for definition in SPANS} - found == {"predict"}

    assert traced_runs.metrics <= set(METRICS)
    assert set(METRICS) - traced_runs.metrics - HARDWARE_METRICS - OTHER_METRICS == set()


MESSAGE_NAMES = "|".join(kind.name for kind in MESSAGES)


def pattern(name: str) -> str:
    """Return a regular expression for the names of a span of the catalogue."""
    exact = {"word": f"({MESSAGE_NAMES})", "kind": "[a-z_]+", "from": "[a-z0-9_]+|•", "to": "[a-z0-9_]+"}
    return re.sub(r"\\{(\w+)\\}", lambda match: f"({exact.get(match[1], '.+')})", re.escape(name))


def assert_conventions(span: ExportedSpan) -> None:
    """Check the OpenTelemetry conventions for messaging: https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans."""
    attributes = span.attributes
    operation, _, message_name = span.name.partition(" ")
    assert attributes["messaging.system"] == "nats"
    assert attributes["messaging.operation.name"] == operation
    assert attributes["messaging.operation.type"] == (
        "send" if operation in ("publish", "request") else "process"
    )
    assert str(attributes["messaging.destination.name"]).startswith("fedbus.")
    template = str(attributes["messaging.destination.template"])
    assert template.startswith("fedbus.{federation}.")
    assert re.fullmatch(re.sub(r"\{\w+\}", "[^.]+", template), str(attributes["messaging.destination.name"]))
    assert attributes["fedbus.word"] == message_name
    assert len(str(attributes["messaging.message.id"])) >= 32
    assert attributes["messaging.client.id"]
    assert ("messaging.consumer.group.name" in attributes) == (operation == "process")


def test_each_metric_has_a_ucum_unit() -> None:
    units = re.compile(r"1|s|By|Cel|\{[a-z_]+\}")
    invalid = [metric.name for metric in METRICS.values() if not units.fullmatch(metric.unit)]

    assert invalid == []
    assert all(isinstance(metric, Metric) and metric.description for metric in METRICS.values())
