"""What a tracker is told of training, and what it does with it.

A tracker is a plug-in: any package may bring one by an entry point of the group ``fedbus.trackers``, whose
value is called with a `Place`. It may block and it may fail; who calls it does so in a thread of its own and
goes on without it (see `fedbus.agents.training_monitor.agent`).

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
    """No tracker of this name is installed."""


class TrackerMissing(StoreError):
    """The tracker's own library is not installed here."""


@dataclass(frozen=True)
class TrackerContext:
    """What a tracker is made for: the task, and a directory for what it keeps on this machine."""

    task: str
    directory: Path


@dataclass(frozen=True)
class TrackedRun:
    """A run that begins, or goes on after we were away."""

    run: str
    task: str
    at: datetime
    trigger: str
    code_version: str
    config: Mapping[str, Scalar]
    trace_id: str = ""


@dataclass(frozen=True)
class TrackedRound:
    """What a round came to. *step* counts the rounds over all runs: each run goes on where the last one ended."""

    run: str
    task: str
    round: int
    step: int
    at: datetime
    metrics: Mapping[str, float]
    """``loss``, ``accuracy`` and what else the app reports; ``seconds``, ``clients``, ``failures``, ``samples``.
    Of round 0, which is the model that the run began with, only what the app reports."""
    clients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By client: ``samples``, ``train_s``, ``transfer_s``, ``wait_s``, what its ClientApp said (``train_loss``,
    ``eval_accuracy``, …), and over all rounds so far ``reliability`` and ``contribution``; each where it is known."""


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
    """That of its last round."""


class Tracker(Protocol):
    """Is told of every run in order; of what it was told before a restart it is told again only in part."""

    def begin(self, run: TrackedRun) -> None:
        """May come more than once for a run."""

    def round(self, seen: TrackedRound) -> None: ...

    def end(self, run: RunEnded) -> None: ...

    def close(self) -> None:
        """Nothing more will come from this process."""


def flatten_metrics(seen: TrackedRound) -> dict[str, float]:
    """All figures of a round under one name each: ``loss``, ``clients/c1/train_s``."""
    by_client = {
        f"clients/{client}/{name}": value
        for client, figures in seen.clients.items()
        for name, value in figures.items()
    }
    return {**seen.metrics, **by_client}


def open_trackers(names: Sequence[str], place: TrackerContext) -> dict[str, Tracker]:
    """The trackers that can be had now; one that is there and does not begin is left out, and the log says why.

    Raises UnknownTracker and TrackerMissing: what is not installed was asked for by mistake.
    """
    trackers = {}
    for name in names:
        try:
            trackers[name] = open_tracker(name, place)
        except (UnknownTracker, TrackerMissing):
            raise
        except Exception as error:  # noqa: BLE001 - somebody else's code: no run depends on it
            log.warning("a tracker does not begin, and is left out", tracker=name, reason=str(error)[:300])
    return trackers


def open_tracker(name: str, place: TrackerContext) -> Tracker:
    """The tracker *name*; raises UnknownTracker, TrackerMissing, and whatever it raises itself."""
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        raise UnknownTracker(
            f"there is no tracker {name!r}: installed are {', '.join(sorted(found)) or 'none'}"
        )
    try:
        make: Callable[[TrackerContext], Tracker] = found[name].load()
        return make(place)
    except ImportError as error:
        raise TrackerMissing(
            f"the tracker {name} needs {error.name}: pip install 'fedbus[{name}]'"
        ) from error
