"""The demo from start to end: real processes, real predictions, two runs, and all spans."""

import asyncio
import io
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.federation import tiny_task
from support.otlp_collector import ExportedSpan, OtlpCollector, run_collector

from fedbus.app.demo.demo import DemoOptions, run_demo
from fedbus.app.demo.report import DemoReport
from fedbus.app.settings import Settings
from fedbus.contracts.lifecycle import span_name
from fedbus.stores.captured.reader import count_rows

CLIENTS = 2
CLIENT_NAMES = {f"c{number}" for number in range(1, CLIENTS + 1)}
ROUNDS = 2
RUNS = 2


@dataclass(frozen=True)
class DemoRecord:
    """The results of one demo."""

    report: DemoReport
    facts: dict[str, Any]
    collector: OtlpCollector
    output: str
    captured: list[Path]
    """Databases with the captured data of the devices."""

    def spans_of_run(self, number: int) -> list[ExportedSpan]:
        return self.collector.spans_of_trace(self.facts["runs"][number]["trace_id"])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoRecord:
    """One demo for all tests of this module, because it is slow."""
    return asyncio.run(_run_demo(tmp_path_factory.mktemp("demo")))


async def _run_demo(directory: Path) -> DemoRecord:
    task = tiny_task(directory)
    options = DemoOptions(
        Path(task.path),
        clients=CLIENTS,
        rounds=ROUNDS,
        runs=RUNS,
        json_file=directory / "facts.json",
        plot_file=directory / "loss.png",
        dashboard=True,
    )
    output = io.StringIO()
    async with run_collector() as collector:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
            patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
            settings = Settings.from_environment({"FEDBUS_HOME": str(directory / "home")})
            report = await run_demo(options, settings, asyncio.Event(), Console(file=output, width=200))
    facts = json.loads((directory / "facts.json").read_text())
    captured = list((directory / "home").rglob("captured.db"))
    return DemoRecord(report, facts, collector, output.getvalue(), captured)


# --- runs and predictions ---------------------------------------------------------------------


def test_each_scheduled_run_publishes_a_version(demo: DemoRecord) -> None:
    runs = demo.facts["runs"]
    assert [run["state"] for run in runs] == ["finished"] * RUNS
    assert [run["trigger"] for run in runs] == ["schedule"] * RUNS
    assert [run["model_version"] for run in runs] == [2, 3]
    assert len({run["sha256"] for run in runs}) == RUNS
    assert all([result["round"] for result in run["rounds"]] == [1, 2] for run in runs)


def test_each_run_starts_from_the_model_of_the_previous_run(demo: DemoRecord) -> None:
    (step,) = demo.facts["continuity"]
    assert step["from_loss"] == step["to_loss"] == pytest.approx(98.0)
    assert [result["loss"] for result in demo.facts["runs"][1]["rounds"]] == pytest.approx([97.0, 96.0])


def test_no_prediction_fails_during_model_swaps(demo: DemoRecord) -> None:
    predictions = demo.facts["predictions"]
    assert predictions["failed"] == 0, predictions
    assert set(predictions["by_model_version"]) >= {"1", "2"}
    assert predictions["answered"] == sum(predictions["by_model_version"].values()) > 50


def test_all_predictions_are_captured(demo: DemoRecord) -> None:
    answered = demo.facts["predictions"]["answered"]
    assert sum(count_rows(database) for database in demo.captured) == answered
    assert 0 < demo.facts["captured_samples"] <= answered  # counted before the last rows are written


def test_the_report_has_all_lifecycles_of_each_client(demo: DemoRecord) -> None:
    for client in demo.facts["clients"]:
        transitions = {(move["kind"], move["from"], move["to"]) for move in client["transitions"]}
        assert transitions >= {
            ("client", "serving", "learning"),
            ("client", "learning", "pending_application"),
            ("client", "pending_application", "serving"),
            ("fl_client", "pending", "training"),
            ("fl_client", "training", "finished"),
            ("inference", "serving", "updating"),
            ("inference", "updating", "serving"),
        }
    assert {client["client"] for client in demo.facts["clients"]} == CLIENT_NAMES


def test_without_a_terminal_rounds_are_printed_as_lines(demo: DemoRecord) -> None:
    assert "tiny-1 round 2: loss 98.0000, accuracy 2.00%" in demo.output
    assert "predictions:" in demo.output


# --- traces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(RUNS))
def test_a_run_is_one_trace_without_orphans(demo: DemoRecord, number: int) -> None:
    spans = demo.spans_of_run(number)
    known = {span.span_id for span in spans}
    roots = [span.name for span in spans if not span.parent_id]
    orphans = [(span.service, span.name) for span in spans if span.parent_id and span.parent_id not in known]
    assert roots == ["run by schedule"]
    assert orphans == []


@pytest.mark.parametrize("number", range(RUNS))
def test_a_trace_has_all_steps_from_the_trigger_to_the_swaps(demo: DemoRecord, number: int) -> None:
    spans, run = demo.spans_of_run(number), demo.facts["runs"][number]["run"]
    names = [span.name for span in spans]
    for kind, path in {
        "run": ["requested", "recruiting", "running", "finished"],
        "server": ["waiting", "recruiting", "training", "publishing", "waiting"],
    }.items():
        for source, target in itertools.pairwise(path):
            assert names.count(span_name(kind, source, target)) == 1, (kind, source, target)
    for kind, source, target in (
        ("client", "serving", "learning"),
        ("client", "learning", "pending_application"),
        ("client", "pending_application", "serving"),
        ("fl_client", "waiting", "pending"),
        ("fl_client", "pending", "training"),
        ("fl_client", "training", "finished"),
        ("fl_client", "finished", "waiting"),
        ("inference", "serving", "updating"),
        ("inference", "updating", "serving"),
    ):
        moved = {
            span.attributes["fedbus.thing"] for span in spans if span.name == span_name(kind, source, target)
        }
        assert moved == {f"{name}.tiny" for name in CLIENT_NAMES}, (kind, source, target)
    phases = [span for span in spans if span.attributes.get("fedbus.run") == run]
    for phase in ("download", "train", "upload"):
        clients = {span.attributes["fedbus.client"] for span in phases if span.name == phase}
        assert clients == CLIENT_NAMES, phase


def test_each_transition_of_a_run_is_a_span_of_its_trace(demo: DemoRecord) -> None:
    reported = [
        span_name("run", entry.transition.source or "•", entry.state)
        for entry in demo.report.view.history
        if entry.data.kind == "run"
    ]
    traced = [
        span.name
        for number in range(RUNS)
        for span in demo.spans_of_run(number)
        if span.name.startswith("run •") or (span.name.startswith("run ") and "→" in span.name)
    ]
    assert sorted(reported) == sorted(traced)
