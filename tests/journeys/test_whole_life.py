"""The whole life of a model, as a user has it: real processes, real predictions, two runs, every span."""

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

CLIENTS = 3
ROUNDS = 2
RUNS = 2


@dataclass(frozen=True)
class DemoRecord:
    """What one demonstration left behind."""

    report: DemoReport
    facts: dict[str, Any]
    collector: OtlpCollector
    told: str
    captured: list[Path]
    """The devices' databases."""

    def spans_of_run(self, number: int) -> list[ExportedSpan]:
        return self.collector.spans_of_trace(self.facts["runs"][number]["trace_id"])


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> DemoRecord:
    """One demonstration for all tests of this file: it takes a while."""
    return asyncio.run(_run_demo(tmp_path_factory.mktemp("story")))


async def _run_demo(directory: Path) -> DemoRecord:
    task = tiny_task(directory)
    wishes = DemoOptions(
        Path(task.path),
        clients=CLIENTS,
        rounds=ROUNDS,
        runs=RUNS,
        json_file=directory / "facts.json",
        plot_file=directory / "loss.png",
        dashboard=True,
    )
    told = io.StringIO()
    async with run_collector() as collector:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
            patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
            settings = Settings.from_environment({"FEDBUS_HOME": str(directory / "home")})
            report = await run_demo(wishes, settings, asyncio.Event(), Console(file=told, width=200))
    facts = json.loads((directory / "facts.json").read_text())
    captured = list((directory / "home").rglob("captured.db"))
    return DemoRecord(report, facts, collector, told.getvalue(), captured)


# --- the life ---------------------------------------------------------------------------------


def test_every_run_of_the_schedule_finishes_and_makes_a_version(story: DemoRecord) -> None:
    runs = story.facts["runs"]
    assert [run["state"] for run in runs] == ["finished"] * RUNS
    assert [run["trigger"] for run in runs] == ["schedule"] * RUNS
    assert [run["model_version"] for run in runs] == [2, 3]
    assert len({run["sha256"] for run in runs}) == RUNS
    assert all([one["round"] for one in run["rounds"]] == [1, 2] for run in runs)


def test_each_run_begins_with_the_model_that_the_last_one_ended_with(story: DemoRecord) -> None:
    (step,) = story.facts["continuity"]
    assert step["from_loss"] == step["to_loss"] == pytest.approx(98.0)
    assert [one["loss"] for one in story.facts["runs"][1]["rounds"]] == pytest.approx([97.0, 96.0])


def test_no_prediction_fails_while_models_change(story: DemoRecord) -> None:
    predictions = story.facts["predictions"]
    assert predictions["failed"] == 0, predictions
    assert set(predictions["by_model_version"]) >= {"1", "2"}
    assert predictions["answered"] == sum(predictions["by_model_version"].values()) > 50


def test_what_devices_are_asked_is_captured(story: DemoRecord) -> None:
    answered = story.facts["predictions"]["answered"]
    assert sum(count_rows(database) for database in story.captured) == answered
    assert 0 < story.facts["captured_samples"] <= answered  # told while the last rows are still being written


def test_every_lifecycle_of_every_client_is_told(story: DemoRecord) -> None:
    for client in story.facts["clients"]:
        went = {(one["kind"], one["from"], one["to"]) for one in client["transitions"]}
        assert went >= {
            ("client", "serving", "learning"),
            ("client", "learning", "pending_application"),
            ("client", "pending_application", "serving"),
            ("fl_client", "pending", "training"),
            ("fl_client", "training", "finished"),
            ("inference", "serving", "updating"),
            ("inference", "updating", "serving"),
        }
    assert {client["client"] for client in story.facts["clients"]} == {"c1", "c2", "c3"}


def test_plain_lines_tell_the_rounds_where_there_is_no_terminal(story: DemoRecord) -> None:
    assert "tiny-1 round 2: loss 98.0000, accuracy 2.00%" in story.told
    assert "predictions:" in story.told


# --- its traces ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(RUNS))
def test_a_run_is_one_trace_in_which_every_parent_is_known(story: DemoRecord, number: int) -> None:
    spans = story.spans_of_run(number)
    known = {span.span_id for span in spans}
    roots = [span.name for span in spans if not span.parent_id]
    orphans = [(span.service, span.name) for span in spans if span.parent_id and span.parent_id not in known]
    assert roots == ["run by schedule"]
    assert orphans == []


@pytest.mark.parametrize("number", range(RUNS))
def test_the_trace_of_a_run_goes_from_the_trigger_to_every_clients_swap(
    story: DemoRecord, number: int
) -> None:
    spans, run = story.spans_of_run(number), story.facts["runs"][number]["run"]
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
        assert moved == {f"c{n}.tiny" for n in range(1, CLIENTS + 1)}, (kind, source, target)
    phases = [span for span in spans if span.attributes.get("fedbus.run") == run]
    for phase in ("download", "train", "upload"):
        clients = {span.attributes["fedbus.client"] for span in phases if span.name == phase}
        assert clients == {"c1", "c2", "c3"}, phase


def test_every_transition_that_was_told_of_a_run_is_a_span_of_its_trace(story: DemoRecord) -> None:
    told = [
        span_name("run", one.transition.source or "•", one.state)
        for one in story.report.view.history
        if one.data.kind == "run"
    ]
    traced = [
        span.name
        for number in range(RUNS)
        for span in story.spans_of_run(number)
        if span.name.startswith("run •") or (span.name.startswith("run ") and "→" in span.name)
    ]
    assert sorted(told) == sorted(traced)
