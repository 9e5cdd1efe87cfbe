"""A run is one trace: from the trigger over the server and each client's training to each client's new model.

One federation lives through two runs, and everything it tells is looked at: each test says one thing of it.
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
OF_HARDWARE = {"hw.temperature", "hw.gpu.utilization", "hw.gpu.memory.usage"}
"""What only some machines have; tests of the device monitor show that it is told where it is there."""
ELSEWHERE = {name for name in METRICS if name.startswith(("fedbus.nats.", "fedbus.data."))} | {
    "fedbus.event.redeliveries",
    "fedbus.event.dead_letters",
    "fedbus.round.failures",
    "fedbus.client.contribution",
    "fedbus.prediction.duration",
    "fedbus.loop.lag",
    "fedbus.log.lines",
}
"""What an undisturbed run has none of, or whole processes have: see tests/app/telemetry/test_collector.py."""


@dataclass
class TracedRuns:
    """What a federation told of two runs."""

    roots: list[str]
    spans: list[ExportedSpan]
    moves: list[Transition]
    figures: set[str]

    def of_run(self, number: int) -> list[ExportedSpan]:
        return [span for span in self.spans if span.trace_id == self.roots[number - 1]]


@pytest.fixture
async def traced_runs(
    nats: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[TracedRuns]:
    async with (
        record_telemetry(monkeypatch) as heard,
        open_federation(nats.url, tmp_path) as fed,
    ):
        async with run_all_agents(fed, clients=len(CLIENTS)):
            roots = [await run_traced(fed) for _ in range(2)]
            assert roots == [fed.run_facts(number).trace_id for number in (1, 2)]
            while_they_ran = heard.metric_names
        await eventually(lambda: all(not orphans(heard.spans_of(root)) for root in roots))
        yield TracedRuns(
            roots, heard.spans, await read_transitions(fed.bus), heard.metric_names | while_they_ran
        )


async def run_traced(fed: FederationHarness) -> str:
    """A run that a person starts and sees to its end; the trace that begins with it."""
    with trace.get_tracer("test").start_as_current_span("a person starts a run") as root:
        run = await start_run(fed, quorum=len(CLIENTS))
    await wait_for_run_end(fed, run)
    return f"{root.get_span_context().trace_id:032x}"


def orphans(spans: list[ExportedSpan]) -> list[str]:
    """Spans whose parent nobody has sent."""
    known = {span.span_id for span in spans}
    return [span.name for span in spans if span.parent_id and span.parent_id not in known]


async def test_two_runs_are_two_traces_and_each_tells_all_that_happened_in_it(
    traced_runs: TracedRuns,
) -> None:
    assert len(set(traced_runs.roots)) == 2
    for number in (1, 2):
        spans = traced_runs.of_run(number)
        assert_complete(spans, f"{TASK}-{number}")
        assert_connected(spans)
        assert_links(spans)
    assert_nothing_missing(traced_runs)
    assert_in_catalogue(traced_runs)


def assert_complete(spans: list[ExportedSpan], run: str) -> None:
    assert [span.name for span in spans if not span.parent_id] == ["a person starts a run"]

    moves = Counter(span.name for span in spans if "→" in span.name)
    each = len(CLIENTS)
    assert moves == expected_transitions(rounds=2, clients=each)
    assert {span.attributes["fedbus.run"] for span in spans if span.name.startswith("run ")} >= {run}

    names = Counter(span.name for span in spans)
    assert names["run the ServerApp"] == 1
    assert (names["round"], names["aggregate"]) == (2, 2)
    assert names["store"] == 5, (
        "a checkpoint for each round and the first model, the last one, and the version"
    )
    assert names["swap model"] == each
    for phase in ("download", "train", "upload"):
        assert names[phase] >= 2 * each, f"each client's {phase} in each round"


def assert_connected(spans: list[ExportedSpan]) -> None:
    """Each client's training hangs on the message that asked for it, and all of it on who began it."""
    by_id = {span.span_id: span for span in spans}
    for training in (span for span in spans if span.name == "train"):
        above = ancestry(training, by_id)
        assert above[:4] == [
            "process round_message",
            "publish round_message",
            "round",
            "run the ServerApp",
        ]
        assert above[-1] == "a person starts a run"
    for swap in (span for span in spans if span.name == "swap model"):
        assert ancestry(swap, by_id)[:2] == ["process infer_update", "publish infer_update"]


def assert_links(spans: list[ExportedSpan]) -> None:
    """An aggregation to each client's upload, a swap to the publishing."""
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
    """Whatever the log holds has its span, with the same ids, and no span is an orphan, of a run or not."""
    assert orphans(traced_runs.spans) == []
    logged = Counter(
        (span_name(one.kind, one.source or "•", one.target), one.thing, one.event)
        for one in traced_runs.moves
    )
    traced = Counter(
        (span.name, span.attributes["fedbus.thing"], span.attributes["fedbus.event"])
        for span in traced_runs.spans
        if "→" in span.name
    )
    assert traced == logged


def assert_in_catalogue(traced_runs: TracedRuns) -> None:
    """Every span has a name of the catalogue and no attribute that it does not know; each kind was seen."""
    seen = set()
    for span in traced_runs.spans:
        if span.name == "a person starts a run":
            continue
        (trail,) = [one for one in SPANS if re.fullmatch(pattern(one.name), span.name)]
        assert set(span.attributes) <= set(trail.attributes), span.name
        seen.add(trail.name)
        if trail.attributes[: len(MESSAGING_ATTRIBUTES)] == MESSAGING_ATTRIBUTES:
            assert_conventions(span)
    assert {one.name for one in SPANS} - seen == {"predict"}

    assert traced_runs.figures <= set(METRICS)
    assert set(METRICS) - traced_runs.figures - OF_HARDWARE - ELSEWHERE == set()


WORDS = "|".join(kind.word for kind in MESSAGES)


def pattern(name: str) -> str:
    """What a span of the catalogue may be called."""
    exact = {"word": f"({WORDS})", "kind": "[a-z_]+", "from": "[a-z0-9_]+|•", "to": "[a-z0-9_]+"}
    return re.sub(r"\\{(\w+)\\}", lambda found: f"({exact.get(found[1], '.+')})", re.escape(name))


def assert_conventions(span: ExportedSpan) -> None:
    """OpenTelemetry's for messaging: https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans."""
    about = span.attributes
    operation, _, word = span.name.partition(" ")
    assert about["messaging.system"] == "nats"
    assert about["messaging.operation.name"] == operation
    assert about["messaging.operation.type"] == ("send" if operation in ("publish", "request") else "process")
    assert str(about["messaging.destination.name"]).startswith("fedbus.")
    template = str(about["messaging.destination.template"])
    assert template.startswith("fedbus.{federation}.")
    assert re.fullmatch(re.sub(r"\{\w+\}", "[^.]+", template), str(about["messaging.destination.name"]))
    assert about["fedbus.word"] == word
    assert len(str(about["messaging.message.id"])) >= 32
    assert about["messaging.client.id"]
    assert ("messaging.consumer.group.name" in about) == (operation == "process")


def test_every_metric_has_a_unit_that_ucum_knows() -> None:
    units = re.compile(r"1|s|By|Cel|\{[a-z_]+\}")
    wrong = [metric.name for metric in METRICS.values() if not units.fullmatch(metric.unit)]

    assert wrong == []
    assert all(isinstance(metric, Metric) and metric.says for metric in METRICS.values())
