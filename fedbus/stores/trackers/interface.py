"""The interface of an experiment tracker, which records the metrics of training.

A tracker is a plug-in: an entry point of the group ``fedbus.trackers``, which is called with a `TrackerContext`. It
may block and it may fail: the training monitor calls each tracker in a separate thread and continues without one
that failed (see `fedbus.agents.training_monitor.agent`).

    [project.entry-points."fedbus.trackers"]
    mine = "my_package:MyTracker"
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final, Protocol, TypeAlias

import structlog

from fedbus.stores.errors import StoreError

log = structlog.get_logger("fedbus.trackers")
GROUP: Final = "fedbus.trackers"
Scalar: TypeAlias = bool | int | float | str


class UnknownTracker(StoreError):
    """No tracker with this name is installed."""


class TrackerMissing(StoreError):
    """The library that the tracker needs is not installed."""


@dataclass(frozen=True)
class TrackerContext:
    """The task of a tracker, and a directory for its files on this machine."""

    task: str
    directory: Path


@dataclass(frozen=True)
class TrackedRun:
    """A run that starts, or continues after a restart of the monitor."""

    run: str
    task: str
    at: datetime
    trigger: str
    code_version: str
    config: Mapping[str, Scalar]
    trace_id: str = ""


@dataclass(frozen=True)
class TrackedRound:
    """The metrics of a round. *step* counts the rounds over all runs of the task."""

    run: str
    task: str
    round: int
    step: int
    at: datetime
    metrics: Mapping[str, float]
    """``loss``, ``accuracy`` and other metrics of the app; ``seconds``, ``clients``, ``failures``, ``samples``.
    Round 0 is the model that the run started with; it has only the metrics of the app."""
    clients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By client: ``samples``, ``train_s``, ``transfer_s``, ``wait_s``, the metrics of its ClientApp (``train_loss``,
    ``eval_accuracy``, …), and over all rounds so far ``reliability`` and ``contribution``; each only if known."""


@dataclass(frozen=True)
class RunEnded:
    """The end of a run: *state* is finished, failed or cancelled."""

    run: str
    task: str
    at: datetime
    state: str
    reason: str = ""
    model_version: int | None = None
    promoted: bool = True
    step: int = 0
    """The step of its last round."""


class Tracker(Protocol):
    """Receives the events of all runs in order. After a restart of the monitor, some of them come again."""

    def begin(self, run: TrackedRun) -> None:
        """Start or continue a run; may be called more than once for a run."""

    def round(self, round: TrackedRound) -> None:
        """Record the metrics of a round."""

    def end(self, run: RunEnded) -> None:
        """Record the end of a run."""

    def close(self) -> None:
        """Close the tracker; no other call follows."""


def flatten_metrics(round: TrackedRound) -> dict[str, float]:
    """Return all metrics of a round under one name each: ``loss``, ``clients/c1/train_s``."""
    by_client = {
        f"clients/{client}/{name}": value
        for client, metrics in round.clients.items()
        for name, value in metrics.items()
    }
    return {**round.metrics, **by_client}


def open_trackers(names: Sequence[str], context: TrackerContext) -> dict[str, Tracker]:
    """Open the trackers *names*. A tracker that fails to start is left out, with a warning.

    Raises UnknownTracker and TrackerMissing: a tracker that is not installed is a mistake in the configuration.
    """
    trackers = {}
    for name in names:
        try:
            trackers[name] = open_tracker(name, context)
        except (UnknownTracker, TrackerMissing):
            raise
        except Exception as error:  # noqa: BLE001 - third-party code; no run depends on it
            log.warning(
                "Tracker failed to start; continuing without it", tracker=name, reason=str(error)[:300]
            )
    return trackers


def open_tracker(name: str, context: TrackerContext) -> Tracker:
    """Open the tracker *name*. Raises UnknownTracker, TrackerMissing and the errors of the tracker."""
    tracker_class = load_tracker(name)
    try:
        return tracker_class(context)
    except ImportError as error:
        raise _missing(name, error) from error


def load_tracker(name: str) -> Callable[[TrackerContext], Tracker]:
    """Import the class of the tracker *name*. Raises UnknownTracker and TrackerMissing."""
    installed = {point.name: point for point in entry_points(group=GROUP)}
    if name not in installed:
        raise UnknownTracker(f"unknown tracker {name!r}; installed: {', '.join(sorted(installed)) or 'none'}")
    try:
        tracker_class: Callable[[TrackerContext], Tracker] = installed[name].load()
    except ImportError as error:
        raise _missing(name, error) from error
    return tracker_class


def _missing(name: str, error: ImportError) -> TrackerMissing:
    return TrackerMissing(f"the tracker {name} needs {error.name}; pip install 'fedbus[{name}]'")
