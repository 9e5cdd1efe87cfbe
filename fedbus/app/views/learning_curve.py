"""The learning curve of a task: the rounds of all its runs, with the metrics and times of each client.

The last transition of each run contains its rounds. Of the old rounds of a long run it contains only loss and accuracy.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from fedbus.app.bus_session import latest_transitions, transition_of
from fedbus.bus.bus import Bus
from fedbus.contracts.run import RUN, RoundResult, RunData
from fedbus.domain.client_scores import ClientStats, collect_client_stats

TIME_PARTS: Final = ("train_s", "transfer_s", "wait_s")


@dataclass(frozen=True)
class CurvePoint:
    """One round. *step* counts over all runs; round 0 of a run is the last step of the run before."""

    run: str
    step: int
    result: RoundResult

    def mean_s(self, part: str) -> float | None:
        """Return the mean of a time over the clients of the round."""
        by_client: dict[str, float] = getattr(self.result, part)
        return fmean(by_client.values()) if by_client else None

    @property
    def clients(self) -> dict[str, dict[str, float]]:
        """All metrics of each client that took part."""
        return {client: self.result.client_metrics(client) for client in sorted(self.result.participants)}


@dataclass(frozen=True)
class LearningCurve:
    """All rounds of a task that the lifecycle stream contains, oldest first."""

    task: str
    points: tuple[CurvePoint, ...]

    @property
    def rounds(self) -> list[CurvePoint]:
        """The points to draw. Round 0 repeats the end of the run before, so only that of the first run is drawn."""
        return [point for at, point in enumerate(self.points) if point.result.round > 0 or at == 0]

    @property
    def client_stats(self) -> dict[str, ClientStats]:
        return collect_client_stats(point.result for point in self.points)

    def times_of(self, client: str) -> dict[str, float] | None:
        """Return the mean time that *client* spent on each part of a round."""
        times = [
            found
            for point in self.points
            if set(TIME_PARTS) <= (found := point.result.client_metrics(client)).keys()
        ]
        return {part: fmean(one[part] for one in times) for part in TIME_PARTS} if times else None

    def series_of(self, client: str, name: str) -> list[float]:
        """Return the metric *name* that *client* reported in each round: ``loss`` or ``accuracy``.

        The values are those of its evaluation, or of its training if it does not evaluate.
        """
        reported = [point.result.figures.get(client, {}) for point in self.points]
        return next(
            (
                found
                for key in (f"eval_{name}", f"train_{name}")
                if (found := [figures[key] for figures in reported if key in figures])
            ),
            [],
        )


async def load_curve(bus: Bus, task: str, *, last: int | None = None) -> LearningCurve:
    """Load the curve of *task* over its *last* runs, by default over all."""
    transitions = [transition_of(one) for one in await latest_transitions(bus, RUN.kind)]
    runs = [one.facts for one in transitions if isinstance(one.facts, RunData) and one.task == task]
    return LearningCurve(task, tuple(join_runs(runs[-last:] if last else runs)))


def join_runs(runs: Iterable[RunData]) -> list[CurvePoint]:
    """Join the rounds of *runs*, oldest first, into one curve."""
    points: list[CurvePoint] = []
    first_step = 0
    for facts in runs:
        points.extend(CurvePoint(facts.run, first_step + one.round, one) for one in facts.rounds)
        first_step = points[-1].step if points else 0
    return points
