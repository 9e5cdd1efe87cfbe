"""Samples that a task's code provides for a device: probe, holdout and reference samples.

The task names a function for each, ``(partition_id, num_partitions) -> (inputs (n, …), labels (n,))``.
The calls block, since the function may read a data set. They raise BadTask if the function does not exist
or returns anything else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from fedbus.contracts.task.task import Task
from fedbus.learning import task_code

MAX_PROBES: Final = 8
"""The number of samples that a new model must answer before it may serve."""

Array: TypeAlias = np.ndarray[Any, Any]
LabelledSamples: TypeAlias = tuple[Array, Array]


class DeviceData:
    """The samples of *task* for one device. *node_config* has partition-id and num-partitions."""

    def __init__(self, task: Task, node_config: Mapping[str, bool | int | float | str]) -> None:
        self._task = task
        self._partition_id = int(node_config.get("partition-id", 0))
        self._num_partitions = int(node_config.get("num-partitions", 1))

    def probe(self) -> Array | None:
        """Return at most `MAX_PROBES` inputs that a new model must answer; None if the task names no samples."""
        samples = self._load_samples(self._task.table.samples)
        return None if samples is None else samples[0][:MAX_PROBES]

    def holdout(self) -> LabelledSamples | None:
        """Return labelled samples that are not used for training; None if the task names none."""
        return self._load_samples(self._task.table.serving.holdout)

    def reference(self) -> LabelledSamples | None:
        """Return samples with the distribution of the training data; None if the task names none."""
        return self._load_samples(self._task.table.checks.reference or self._task.table.samples)

    def _load_samples(self, reference: str | None) -> LabelledSamples | None:
        if reference is None:
            return None
        load_partition = task_code.load_function(Path(self._task.path), reference)
        try:
            inputs, labels = load_partition(self._partition_id, self._num_partitions)
            inputs, labels = np.asarray(inputs), np.asarray(labels)
        except Exception as error:
            raise task_code.BadTask(
                f"{reference!r} did not return samples: {task_code.format_error(error)}"
            ) from error
        if len(inputs) != len(labels):
            raise task_code.BadTask(f"{reference!r} returned {len(inputs)} inputs and {len(labels)} labels")
        return inputs, labels


def build_training_data(
    task: Task, reference: str, inputs: Array, outputs: Array, labels: list[Any]
) -> LabelledSamples:
    """Build training data from captured rows with the function *reference* of the task (``capture.training-data``).

    Takes inputs (n, …), the model's outputs (n, …) and n labels, each None if unknown. Returns inputs (m, …)
    and labels (m,).

    Raises:
        BadTask: the function does not exist, raises, or returns arrays that do not fit.

    """
    build = task_code.load_function(Path(task.path), reference)
    try:
        train_inputs, train_labels = build(inputs, outputs, labels)
        train_inputs, train_labels = np.asarray(train_inputs), np.asarray(train_labels)
    except Exception as error:
        raise task_code.BadTask(
            f"{reference!r} did not return training data: {task_code.format_error(error)}"
        ) from error
    if len(train_inputs) != len(train_labels):
        raise task_code.BadTask(
            f"{reference!r} returned {len(train_inputs)} inputs and {len(train_labels)} labels. "
            "Return one label for each input"
        )
    if train_inputs.dtype.hasobject or train_labels.dtype.hasobject:
        raise task_code.BadTask(
            f"{reference!r} returned inputs of {train_inputs.dtype} and labels of {train_labels.dtype}. "
            "Return numbers"
        )
    return train_inputs, train_labels
