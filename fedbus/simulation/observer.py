"""What a simulation reports while it runs, for progress bars and trackers."""

from dataclasses import dataclass
from typing import Protocol

from fedbus.contracts.run import RoundResult, RunPlan
from fedbus.learning.weights import Arrays


@dataclass(frozen=True, kw_only=True)
class SimulationStart:
    """A simulation whose app is imported."""

    run: str
    plan: RunPlan
    clients: int
    workers: int
    first_round: int


@dataclass(frozen=True, kw_only=True)
class SimulationProgress:
    """The messages of the current call of the server side."""

    round: int
    kind: str
    """``train``, ``evaluate`` or ``query``, with a suffix if the app uses one."""
    done: int
    """Messages with a reply."""
    failed: int
    """Those of them that failed."""
    total: int


class SimulationObserver(Protocol):
    """Is called in the thread of the simulation. An exception ends the simulation."""

    def on_start(self, start: SimulationStart) -> None: ...

    def on_progress(self, progress: SimulationProgress) -> None:
        """Called at most ten times a second, and at the end of a call."""

    def on_round(self, result: RoundResult, model: Arrays) -> None:
        """Called after each round with its result and the global model, which must not be changed."""

    def on_warning(self, text: str) -> None:
        """Called with one line, for example that a worker died and was replaced."""


class SilentObserver:
    """Ignores everything. Subclass it to observe a part."""

    def on_start(self, start: SimulationStart) -> None:
        """Do nothing."""

    def on_progress(self, progress: SimulationProgress) -> None:
        """Do nothing."""

    def on_round(self, result: RoundResult, model: Arrays) -> None:
        """Do nothing."""

    def on_warning(self, text: str) -> None:
        """Do nothing."""
