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

    def __init__(self, context: TrackerContext) -> None:
        self._writer = EventFileWriter(str(context.directory / "tensorboard" / context.task))

    def begin(self, run: TrackedRun) -> None:
        """Do nothing: TensorBoard has no runs, and the step joins them to one curve."""

    def round(self, round: TrackedRound) -> None:
        values = [
            Summary.Value(tag=name, simple_value=value) for name, value in flatten_metrics(round).items()
        ]
        event = Event(wall_time=round.at.timestamp(), step=round.step, summary=Summary(value=values))
        self._writer.add_event(event)
        self._writer.flush()

    def end(self, run: RunEnded) -> None:
        version = Summary.Value(tag="model_version", simple_value=float(run.model_version or 0))
        event = Event(wall_time=run.at.timestamp(), step=run.step, summary=Summary(value=[version]))
        self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
