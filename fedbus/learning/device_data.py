"""Samples that a task's own code gives for a device: to try a model on, to judge it by, to compare data with.

Each is a function of the task, ``(partition_id, num_partitions) -> (inputs (n, …), labels (n,))``. To
call one blocks: it may read a data set. Raises BadTask where it is not there, or gives something else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from fedbus.contracts.task.task import Task
from fedbus.learning.flower import task_code

MAX_PROBES: Final = 8
"""How many samples a new model must answer before it may serve."""

Array: TypeAlias = np.ndarray[Any, Any]
LabelledSamples: TypeAlias = tuple[Array, Array]


class DeviceData:
    """What *task* gives for the device with this *node_config*, as Flower has it."""

    def __init__(self, task: Task, node_config: Mapping[str, bool | int | float | str]) -> None:
        self._task = task
        self._number = int(node_config.get("partition-id", 0))
        self._count = int(node_config.get("num-partitions", 1))

    def probe(self) -> Array | None:
        """A few samples that a new model must answer."""
        found = self._load_samples(self._task.table.samples)
        return None if found is None else found[0][:MAX_PROBES]

    def holdout(self) -> LabelledSamples | None:
        """Labelled samples that no training gets."""
        return self._load_samples(self._task.table.serving.holdout)

    def reference(self) -> LabelledSamples | None:
        """Samples that are distributed as what the model was trained on."""
        return self._load_samples(self._task.table.checks.reference or self._task.table.samples)

    def _load_samples(self, reference: str | None) -> LabelledSamples | None:
        if reference is None:
            return None
        of = task_code.load_function(Path(self._task.path), reference)
        try:
            inputs, labels = of(self._number, self._count)
            inputs, labels = np.asarray(inputs), np.asarray(labels)
        except Exception as error:
            raise task_code.BadTask(
                f"{reference!r} gives no samples: {task_code.format_error(error)}"
            ) from error
        if len(inputs) != len(labels):
            raise task_code.BadTask(f"{reference!r} gives {len(inputs)} inputs and {len(labels)} labels")
        return inputs, labels


def build_training_data(task: Task, inputs: Array, outputs: Array, labels: list[Any]) -> LabelledSamples:
    """What the task makes of its captured rows for training, by ``capture.training-data``. Raises BadTask."""
    reference = task.table.capture.training_data
    assert reference is not None, "without it the rows with a label are the training data"
    make = task_code.load_function(Path(task.path), reference)
    try:
        made, truth = make(inputs, outputs, labels)
        made, truth = np.asarray(made), np.asarray(truth)
    except Exception as error:
        raise task_code.BadTask(
            f"{reference!r} makes no training data: {task_code.format_error(error)}"
        ) from error
    if len(made) != len(truth) or made.dtype.hasobject or truth.dtype.hasobject:
        raise task_code.BadTask(
            f"{reference!r} must give as many labels as inputs, and numbers alone: "
            f"it gave {len(made)} inputs and {len(truth)} labels"
        )
    return made, truth
