"""Forwards the rounds of a simulation to experiment trackers, as the training monitor does for a fleet."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from fedbus.agents.training_monitor.delivery import RoundTracking, TrackerEvent, TrackerThread
from fedbus.contracts.run import RoundResult, Scalar
from fedbus.stores.trackers.interface import RunEnded, TrackedRun, TrackerContext, open_trackers
from fedbus.stores.trackers.local import LocalTracker

TRIGGER = "simulation"


class SimulationTracking:
    """One simulation of *task* as one run of each tracker. The step of a round is its number."""

    def __init__(self, threads: Sequence[TrackerThread], task: str, simulation: str) -> None:
        self._threads = threads
        self._task = task
        self._simulation = simulation
        self._rounds = RoundTracking(task)
        self._last_step = 0

    def begin(self, config: Mapping[str, Scalar], *, code_version: str, trace_id: str) -> None:
        self._enqueue(
            TrackedRun(
                run=self._simulation,
                task=self._task,
                at=datetime.now(UTC),
                trigger=TRIGGER,
                code_version=code_version,
                config=config,
                trace_id=trace_id,
            )
        )

    def add_round(self, result: RoundResult) -> None:
        self._last_step = result.round
        self._enqueue(self._rounds.track(self._simulation, result, step=result.round, at=datetime.now(UTC)))

    def end(
        self, state: str, reason: str = "", *, model_version: int | None = None, promoted: bool = False
    ) -> None:
        self._enqueue(
            RunEnded(
                run=self._simulation,
                task=self._task,
                at=datetime.now(UTC),
                state=state,
                reason=reason,
                model_version=model_version,
                promoted=promoted,
                step=self._last_step,
            )
        )

    def _enqueue(self, event: TrackerEvent) -> None:
        for thread in self._threads:
            thread.enqueue(event)


@contextmanager
def open_tracking(
    names: Sequence[str], task: str, simulation: str, directory: Path
) -> Iterator[SimulationTracking]:
    """Open the built-in tracker and those with *names*, whose files are in *directory*, until the block ends.

    Raises UnknownTracker and TrackerMissing.
    """
    context = TrackerContext(task, directory)
    trackers = open_trackers(names, context)
    memory = LocalTracker(context)
    threads = [
        TrackerThread(name, tracker, memory) for name, tracker in {"local": memory, **trackers}.items()
    ]
    try:
        yield SimulationTracking(threads, task, simulation)
    finally:
        for thread in reversed(threads):  # the first is the built-in tracker, which the others need
            thread.close()
