"""The training monitor: simulated runs on a real bus, recorded by fake trackers."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support import eventually
from support.federation import TASK, FederationHarness
from support.recorded_telemetry import enable_metrics, own_metrics

from fedbus.agents.training_monitor.agent import TrainingMonitor
from fedbus.agents.training_monitor.delivery import MAX_FAILURES
from fedbus.bus.lifecycles import LifecycleStore
from fedbus.contracts.run import RUN, RoundResult, RunData, RunEvent, RunPlan
from fedbus.stores.trackers.interface import RunEnded, TrackedRound, TrackedRun, Tracker, TrackerContext
from fedbus.stores.trackers.local import LocalTracker, read_rounds


@dataclass
class RecordingTracker:
    """A tracker that records its events; it can be set to fail or to block."""

    events: list[TrackedRun | TrackedRound | RunEnded] = field(default_factory=list)
    is_failing: bool = False
    calls: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    closed: bool = False

    def __post_init__(self) -> None:
        self.gate.set()

    def begin(self, run: TrackedRun) -> None:
        self._record(run)

    def round(self, seen: TrackedRound) -> None:
        self._record(seen)

    def end(self, run: RunEnded) -> None:
        self._record(run)

    def close(self) -> None:
        self.closed = True

    def _record(self, event: TrackedRun | TrackedRound | RunEnded) -> None:
        self.calls += 1
        self.gate.wait(20)
        if self.is_failing:
            raise ConnectionError("the tracking server is unavailable")
        self.events.append(event)

    @property
    def rounds(self) -> list[TrackedRound]:
        return [event for event in self.events if isinstance(event, TrackedRound)]


@pytest.fixture
def tracker_context(tmp_path: Path) -> TrackerContext:
    return TrackerContext(TASK, tmp_path / "training")


@asynccontextmanager
async def run_monitor(
    fed: FederationHarness, tracker_context: TrackerContext, **trackers: Tracker
) -> AsyncIterator[None]:
    async def monitor(stop: asyncio.Event) -> None:
        async with fed.config.connect_bus("training-monitor") as bus:
            watcher = TrainingMonitor(bus, TASK, LocalTracker(tracker_context), trackers)
            async with asyncio.TaskGroup() as group:
                group.create_task(watcher.run(stop))
                await watcher.ready.wait()
                ready.set()

    ready = asyncio.Event()
    async with fed.run_agent(monitor):
        await ready.wait()
        yield


def make_result(number: int, loss: float) -> RoundResult:
    return RoundResult(round=number, metrics={"loss": loss}, participants={"c1": 10}, seconds=1.0)


async def simulate_run(fed: FederationHarness, number: int, *rounds: float | RoundResult) -> None:
    """Publish the transitions of a run as the scheduler does; each round is a loss or a complete result."""
    scheduler = await fed.connect_as("workflow-scheduler")
    plan = RunPlan(rounds=len(rounds), config={"lr": 0.1})
    facts = RunData(task=TASK, run=f"{TASK}-{number}", plan=plan, requested_at=datetime.now(UTC))
    async with LifecycleStore.open(scheduler) as lifecycles:
        run = await lifecycles.load(RUN, facts)
        await run.create()
        await run.transition(RunEvent.RECRUITING_STARTED)
        await run.transition(RunEvent.QUORUM_REACHED, {"cohort": ("c1",)})
        results: tuple[RoundResult, ...] = ()
        for at, one in enumerate(rounds, 1):
            results += (one if isinstance(one, RoundResult) else make_result(at, one),)
            await run.transition(RunEvent.ROUND_FINISHED, {"rounds": results})
        await run.transition(RunEvent.RUN_FINISHED)


async def test_the_steps_continue_over_all_runs(
    fed: FederationHarness, tracker_context: TrackerContext
) -> None:
    async with run_monitor(fed, tracker_context):
        await simulate_run(fed, 1, 1.0, 0.5)
        await simulate_run(fed, 2, 0.4, 0.3)
        await eventually(lambda: len(read_rounds(tracker_context.directory, TASK)) == 4)
    rounds = read_rounds(tracker_context.directory, TASK)
    assert [one["step"] for one in rounds] == [1, 2, 3, 4]
    assert [one["loss"] for one in rounds] == [1.0, 0.5, 0.4, 0.3]
    assert rounds[0]["clients/c1/samples"] == 10


async def test_a_restarted_monitor_delivers_missed_events_once(
    fed: FederationHarness, tracker_context: TrackerContext
) -> None:
    recorded = RecordingTracker()
    async with run_monitor(fed, tracker_context, recorded=recorded):
        await simulate_run(fed, 1, 1.0)
        await eventually(lambda: len(recorded.events) == 3)
    await simulate_run(fed, 2, 0.5)
    again = RecordingTracker()
    async with run_monitor(fed, tracker_context, recorded=again):
        await eventually(lambda: len(again.events) == 3)
    assert [event.run for event in again.events] == [f"{TASK}-2"] * 3
    assert recorded.closed


async def test_a_tracker_gets_the_configuration_and_the_end_of_a_run(
    fed: FederationHarness, tracker_context: TrackerContext
) -> None:
    recorded = RecordingTracker()
    async with run_monitor(fed, tracker_context, recorded=recorded):
        await simulate_run(fed, 1, 1.0)
        await eventually(lambda: len(recorded.events) == 3)
    started, _, ended = recorded.events
    assert isinstance(started, TrackedRun)
    assert started.config == {"lr": 0.1}
    assert isinstance(ended, RunEnded)
    assert ended.state == "finished"


async def test_round_0_has_the_step_before_and_no_round_metrics(
    fed: FederationHarness, tracker_context: TrackerContext
) -> None:
    recorded = RecordingTracker()
    first = RoundResult(round=0, metrics={"loss": 0.5}, seconds=2.0)
    async with run_monitor(fed, tracker_context, recorded=recorded):
        await simulate_run(fed, 1, 1.0, 0.5)
        await simulate_run(fed, 2, first, make_result(1, 0.25))
        await eventually(lambda: len(recorded.events) == 8)
    assert [one.step for one in recorded.events if not isinstance(one, TrackedRun)] == [1, 2, 2, 2, 3, 3]
    assert [sorted(one.metrics) for one in recorded.rounds[2:]] == [
        ["loss"],
        ["clients", "failures", "loss", "samples", "seconds"],
    ]


async def test_a_tracker_that_fails_repeatedly_is_disabled(
    fed: FederationHarness, tracker_context: TrackerContext
) -> None:
    broken, good = RecordingTracker(is_failing=True), RecordingTracker()
    async with run_monitor(fed, tracker_context, broken=broken, good=good):
        await simulate_run(fed, 1, *[1.0] * 6)
        await eventually(lambda: len(good.events) == 8)
    assert broken.calls == MAX_FAILURES
    assert len(read_rounds(tracker_context.directory, TASK)) == 6


async def test_a_blocked_tracker_does_not_delay_the_others(
    fed: FederationHarness, tracker_context: TrackerContext
) -> None:
    slow, good = RecordingTracker(), RecordingTracker()
    slow.gate.clear()
    async with run_monitor(fed, tracker_context, slow=slow, good=good):
        await simulate_run(fed, 1, 1.0, 0.5)
        await eventually(lambda: len(good.events) == 4)
        assert slow.events == []
        slow.gate.set()
    assert len(slow.events) == 4


def gauge(name: str) -> dict[object, float]:
    """Return the current values of the metric, by client; it is shared by all tests of this process."""
    return {
        point.attributes["fedbus.client"]: getattr(point, "value", 0.0)
        for point in own_metrics()[name].data.data_points
        if point.attributes and point.attributes["fedbus.task"] == TASK
    }


async def test_a_tracker_gets_metrics_and_scores_of_each_client(
    fed: FederationHarness, tracker_context: TrackerContext
) -> None:
    recorded = RecordingTracker()
    first = RoundResult(
        round=1,
        participants={"c1": 10},
        failures={"c2": "killed"},
        train_s={"c1": 3.0},
        transfer_s={"c1": 0.5},
        wait_s={"c1": 1.5},
        contributions={"c1": 0.5},
        figures={"c1": {"train_loss": 0.75, "eval_accuracy": 0.5}},
    )
    second = RoundResult(round=2, participants={"c1": 12, "c2": 20}, contributions={"c1": 0.25})
    enable_metrics()
    async with run_monitor(fed, tracker_context, recorded=recorded):
        await simulate_run(fed, 1, first, second)
        await eventually(lambda: len(recorded.rounds) == 2)
    assert recorded.rounds[0].clients == {
        "c1": {
            "samples": 10.0,
            "train_s": 3.0,
            "transfer_s": 0.5,
            "wait_s": 1.5,
            "train_loss": 0.75,
            "eval_accuracy": 0.5,
            "reliability": pytest.approx(2 / 3),
            "contribution": 0.5,
        },
        "c2": {"reliability": pytest.approx(1 / 3)},
    }
    assert recorded.rounds[1].clients["c1"]["contribution"] == pytest.approx(0.375)
    assert recorded.rounds[1].clients["c2"] == {"samples": 20.0, "reliability": 0.5}
    assert read_rounds(tracker_context.directory, TASK)[0]["clients/c1/train_loss"] == 0.75
    assert gauge("fedbus.client.contribution")["c1"] == pytest.approx(0.375)
    reliable = gauge("fedbus.client.reliability")
    assert [reliable["c1"], reliable["c2"]] == pytest.approx([0.75, 0.5])
