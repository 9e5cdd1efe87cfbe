"""How a task has learnt over all of its runs: rounds joined into one curve, and what each was to every client.

Loss, accuracy, who took part, what their apps said and where their time went are in the log: each run's facts have
its rounds. Of old rounds of a long run they keep only the first two.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from fedbus.app.bus_session import latest_transitions, transition_of
from fedbus.bus.bus import Bus
from fedbus.contracts.run import RoundResult, RunData
from fedbus.domain.client_scores import ClientStats, collect_client_stats

TIME_PARTS: Final = ("train_s", "transfer_s", "wait_s")


@dataclass(frozen=True)
class CurvePoint:
    """One round. *step* counts over all runs: each begins where the last one ended, with its round 0."""

    run: str
    step: int
    result: RoundResult

    def mean_s(self, part: str) -> float | None:
        """Over the clients of the round."""
        of: dict[str, float] = getattr(self.result, part)
        return fmean(of.values()) if of else None

    @property
    def clients(self) -> dict[str, dict[str, float]]:
        """All figures of each client that took part."""
        return {client: self.result.of_client(client) for client in sorted(self.result.participants)}


@dataclass(frozen=True)
class LearningCurve:
    """All rounds of a task that the log remembers, oldest first."""

    task: str
    points: tuple[CurvePoint, ...]

    @property
    def rounds(self) -> list[CurvePoint]:
        """To be drawn: round 0 is the end of the run before, but for the first."""
        return [point for at, point in enumerate(self.points) if point.result.round > 0 or at == 0]

    @property
    def standings(self) -> dict[str, ClientStats]:
        return collect_client_stats(point.result for point in self.points)

    def times_of(self, client: str) -> dict[str, float] | None:
        """Where the time of *client* went in a round, on average."""
        mine = [
            found
            for point in self.points
            if set(TIME_PARTS) <= (found := point.result.of_client(client)).keys()
        ]
        return {part: fmean(one[part] for one in mine) for part in TIME_PARTS} if mine else None

    def series_of(self, client: str, name: str) -> list[float]:
        """What *client*'s own app said of its *name*, round by round: ``loss`` or ``accuracy``.

        Of its evaluation where it has one, else of its training.
        """
        told = [point.result.figures.get(client, {}) for point in self.points]
        return next(
            (
                found
                for key in (f"eval_{name}", f"train_{name}")
                if (found := [figures[key] for figures in told if key in figures])
            ),
            [],
        )


async def load_curve(bus: Bus, task: str, *, last: int | None = None) -> LearningCurve:
    """The curve of *task*, over its *last* runs or all of them."""
    seen = [one for one in await latest_transitions(bus, "run") if one.message.task == task]
    runs = [facts for one in seen if isinstance(facts := transition_of(one).facts, RunData)][
        -(last or len(seen)) :
    ]
    return LearningCurve(task, tuple(join_runs(runs)))


def join_runs(runs: Iterable[RunData]) -> list[CurvePoint]:
    """The rounds of *runs*, oldest first, as one curve."""
    points: list[CurvePoint] = []
    begin = 0
    for facts in runs:
        points.extend(CurvePoint(facts.run, begin + one.round, one) for one in facts.rounds)
        begin = points[-1].step if points else 0
    return points
