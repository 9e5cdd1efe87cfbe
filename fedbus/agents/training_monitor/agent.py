"""The training monitor: follows a task's runs round by round, and forwards their metrics to experiment trackers.

It reads the log and publishes nothing, so that its failure does not affect any run. A tracker that blocks, blocks
only its own thread; one that fails repeatedly is disabled until the monitor restarts.
"""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime

import structlog

from fedbus.agents.common.asyncio_tools import wait_for_first
from fedbus.agents.common.debug_logging import log_method_calls
from fedbus.agents.training_monitor.delivery import RoundTracking, TrackerEvent, TrackerThread
from fedbus.bus.bus import Bus
from fedbus.bus.errors import FederationNotFound
from fedbus.bus.streams import lifecycle_stream
from fedbus.common.retry import retry
from fedbus.contracts import subjects
from fedbus.contracts.run import RUN, RoundResult, RunData, RunEvent
from fedbus.contracts.telemetry import CLIENT, CLIENT_CONTRIBUTION, CLIENT_RELIABILITY, TASK, set_gauge
from fedbus.contracts.transition import Transition
from fedbus.stores.trackers.interface import RunEnded, TrackedRun, Tracker
from fedbus.stores.trackers.local import LocalTracker

log = structlog.get_logger("fedbus.training_monitor")


@log_method_calls
class TrainingMonitor:
    """Forwards the runs of *task* to *trackers*, by name, and always to the built-in tracker *memory*."""

    def __init__(
        self, bus: Bus, task: str, memory: LocalTracker, trackers: Mapping[str, Tracker] | None = None
    ) -> None:
        self._bus = bus
        self._task = task
        self._memory = memory
        self._trackers = {"local": memory, **(trackers or {})}
        self._threads: Sequence[TrackerThread] = ()
        self._rounds = RoundTracking(task)
        self._steps: dict[str, int] = {}
        """The number of rounds before each run, over all runs."""
        self._next_step = 0
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Follow the runs until *stop* is set, from the beginning of the log: delivered events are skipped."""
        self._threads = [
            TrackerThread(name, tracker, self._memory) for name, tracker in self._trackers.items()
        ]
        try:
            await wait_for_first(stop.wait(), self._follow())
        finally:
            for thread in reversed(self._threads):  # the first is the built-in tracker, which the others need
                await asyncio.to_thread(thread.close)

    async def _follow(self) -> None:
        while True:
            await retry(self._follow_runs, on=FederationNotFound)  # the server side creates the streams

    async def _follow_runs(self) -> None:
        wanted = [subjects.lifecycle(self._bus.fed, "run", ">")]
        async with self._bus.read_stream(lifecycle_stream(self._bus.fed), wanted, whole=True) as moves:
            self.ready.set()
            async for stored in moves:
                move = stored.message
                if (
                    isinstance(move, Transition)
                    and isinstance(move.facts, RunData)
                    and move.task == self._task
                ):
                    self._on_run_transition(move, move.facts, stored.envelope.time)

    def _on_run_transition(self, move: Transition, facts: RunData, at: datetime) -> None:
        if facts.run not in self._steps:
            self._steps[facts.run] = self._next_step
        match move.event:
            case RunEvent.QUORUM_REACHED:
                self._enqueue(_tracked_run(facts, at))
            case RunEvent.ROUND_FINISHED if facts.rounds:
                self._on_round_finished(facts, facts.rounds[-1], at)
        if move.target in RUN.final:
            self._enqueue(_run_ended(move, facts, at, self._next_step))

    def _on_round_finished(self, facts: RunData, result: RoundResult, at: datetime) -> None:
        step = self._steps[facts.run] + result.round
        self._next_step = max(self._next_step, step)
        tracked = self._rounds.track(facts.run, result, step=step, at=at)
        self._enqueue(tracked)
        for client, metrics in tracked.clients.items():
            attributes = {TASK: self._task, CLIENT: client}
            set_gauge(CLIENT_RELIABILITY, metrics["reliability"], attributes)
            if (contribution := metrics.get("contribution")) is not None:
                set_gauge(CLIENT_CONTRIBUTION, contribution, attributes)

    def _enqueue(self, event: TrackerEvent) -> None:
        for thread in self._threads:
            thread.enqueue(event)


def _tracked_run(facts: RunData, at: datetime) -> TrackedRun:
    return TrackedRun(
        run=facts.run,
        task=facts.task,
        at=at,
        trigger=facts.trigger,
        code_version=facts.code_version,
        config=facts.plan.config,
        trace_id=facts.trace_id,
    )


def _run_ended(move: Transition, facts: RunData, at: datetime, step: int) -> RunEnded:
    return RunEnded(
        run=facts.run,
        task=facts.task,
        at=at,
        state=move.target,
        reason=move.reason,
        model_version=facts.model.version if facts.model else None,
        promoted=facts.promoted,
        step=step,
    )
