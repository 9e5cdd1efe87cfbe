"""TensorBoard: one directory per task, one curve over all its runs.

tensorboard --logdir .fedbus/training/tensorboard
"""

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from fedbus.stores.trackers.interface import (
    RunEnded,
    TrackedRound,
    TrackedRun,
    TrackerContext,
    flatten_metrics,
)


class TensorBoardTracker:
    """Writes event files; the step counts the rounds over all runs."""

    def __init__(self, place: TrackerContext) -> None:
        self._writer = EventFileWriter(str(place.directory / "tensorboard" / place.task))

    def begin(self, run: TrackedRun) -> None:
        """Do nothing: TensorBoard has no runs, and the step joins them to one curve."""

    def round(self, seen: TrackedRound) -> None:
        values = [
            Summary.Value(tag=name, simple_value=value) for name, value in flatten_metrics(seen).items()
        ]
        event = Event(wall_time=seen.at.timestamp(), step=seen.step, summary=Summary(value=values))
        self._writer.add_event(event)
        self._writer.flush()

    def end(self, run: RunEnded) -> None:
        version = Summary.Value(tag="model_version", simple_value=float(run.model_version or 0))
        event = Event(wall_time=run.at.timestamp(), step=run.step, summary=Summary(value=[version]))
        self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
