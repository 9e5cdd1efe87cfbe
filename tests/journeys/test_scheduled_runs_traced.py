"""Traces of scheduled runs in separate processes, read from the span files of this machine."""

import os
from collections import Counter
from pathlib import Path

import pytest
from support.process_federation import TASK, run_process_federation
from support.recorded_telemetry import expected_transitions

from fedbus.app.telemetry import span_reader
from fedbus.domain.critical_path import TracedSpan

RUNS, ROUNDS, CLIENTS = 2, 2, 2
SCHEDULED = ("--rounds", str(ROUNDS), "--quorum", str(CLIENTS), "--every", "3s", "--at-most", str(RUNS))


@pytest.mark.slow
async def test_a_scheduled_run_is_one_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL")]:
        monkeypatch.delenv(name)
    async with run_process_federation(tmp_path, SCHEDULED, clients=CLIENTS) as site:
        names = [f"{TASK}-{number}" for number in range(1, RUNS + 1)]
        await site.wait_until(lambda: all(site.has_ended(run) for run in names))
        await site.wait_until(lambda: all(client.is_settled for client in site.view.clients.values()))
        traces_directory = site.stack.home / "traces"

    assert span_reader.list_runs(traces_directory) == names
    traces = [read_spans(traces_directory, run) for run in names]
    for run, spans in zip(names, traces, strict=True):
        assert_complete(spans, run)
        assert_connected(spans)
    ids = [span.id for spans in traces for span in spans]
    assert len(ids) == len(set(ids))


def read_spans(traces_directory: Path, run: str) -> list[TracedSpan]:
    trace_id = span_reader.find_trace_of_run(traces_directory, run)
    assert trace_id is not None
    return span_reader.read_trace(traces_directory, trace_id).spans()


def assert_complete(spans: list[TracedSpan], run: str) -> None:
    """Check that the trace has each transition of *run*, and no transition of another run."""
    transitions = [span for span in spans if "→" in span.name]
    scheduled = {"schedule watching → due": 1, "schedule due → watching": 1}
    assert (
        Counter(span.name for span in transitions)
        == expected_transitions(rounds=ROUNDS, clients=CLIENTS) | scheduled
    )
    assert {str(span.attributes["fedbus.run"]) for span in spans if "fedbus.run" in span.attributes} == {run}
    outside_the_run = {
        "schedule watching → due",
        "client pending_application → serving",
    }  # before its request and after its end
    of_the_run = [
        span
        for span in transitions
        if span.name not in outside_the_run and not span.name.startswith("inference ")
    ]
    assert [span.name for span in of_the_run if "fedbus.run" not in span.attributes] == []
    first = min(transitions, key=lambda span: span.start)
    assert first.name == "schedule watching → due"


def assert_connected(spans: list[TracedSpan]) -> None:
    """Check that the trace has one root, named by the trigger, and each other span has its parent."""
    known = {span.id for span in spans}
    assert [span.name for span in spans if not span.parent] == ["run by schedule"]
    assert [span.name for span in spans if span.parent and span.parent not in known] == []
