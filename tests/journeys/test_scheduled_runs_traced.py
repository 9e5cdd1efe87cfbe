"""Runs that a schedule starts, each part a process of its own: their traces, as this machine keeps them."""

import os
from collections import Counter
from pathlib import Path

import pytest
from support.plugs import TASK, site_up
from support.traces import moves_of_a_run

from fedbus.app.telemetry import span_reader
from fedbus.domain.critical_path import Traced

RUNS, ROUNDS, CLIENTS = 3, 2, 3
SCHEDULED = ("--rounds", str(ROUNDS), "--quorum", str(CLIENTS), "--every", "3s", "--at-most", str(RUNS))


async def test_a_scheduled_run_is_one_trace_from_its_trigger_to_each_clients_new_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL")]:
        monkeypatch.delenv(name)
    async with site_up(tmp_path, SCHEDULED) as site:
        names = [f"{TASK}-{number}" for number in range(1, RUNS + 1)]
        await site.until(lambda: all(site.ended(run) for run in names))
        await site.until(lambda: all(client.settled for client in site.fleet.clients.values()))
        kept = site.running.home / "traces"

    assert span_reader.runs_in(kept) == names
    traces = [spans_of(kept, run) for run in names]
    for run, spans in zip(names, traces, strict=True):
        tells_all(spans, run)
        hangs_together(spans)
    ids = [span.id for spans in traces for span in spans]
    assert len(ids) == len(set(ids))


def spans_of(kept: Path, run: str) -> list[Traced]:
    trace_id = span_reader.trace_of_run(kept, run)
    assert trace_id is not None
    return span_reader.read_trace(kept, trace_id).spans()


def tells_all(spans: list[Traced], run: str) -> None:
    """Every transition from the trigger on, and none of another run."""
    moves = [span for span in spans if "→" in span.name]
    scheduled = {"schedule watching → due": 1, "schedule due → watching": 1}
    assert Counter(span.name for span in moves) == moves_of_a_run(rounds=ROUNDS, clients=CLIENTS) | scheduled
    assert {str(span.attributes["fedbus.run"]) for span in spans if "fedbus.run" in span.attributes} == {run}
    begun_and_ended = {
        "schedule watching → due",
        "client pending_application → serving",
    }  # before and after it
    of_the_run = [
        span for span in moves if span.name not in begun_and_ended and not span.name.startswith("inference ")
    ]
    assert [span.name for span in of_the_run if "fedbus.run" not in span.attributes] == []
    first = min(moves, key=lambda span: span.start)
    assert first.name == "schedule watching → due"


def hangs_together(spans: list[Traced]) -> None:
    """One root, whose name says what set it off, and no span without its parent."""
    known = {span.id for span in spans}
    assert [span.name for span in spans if not span.parent] == ["run by schedule"]
    assert [span.name for span in spans if span.parent and span.parent not in known] == []
