"""Which captured rows may be trained on: those that are as the task's own tables say that they must be.

What the reference happens to be like is no law here, see `data_checks`: what lies beyond it is just what there
is to learn from. One wrong row, such as a label that is no class, would fail every training of its device.
"""

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np

from fedbus.contracts.task.serving import ChecksTable, ServingTable

Array: TypeAlias = np.ndarray[Any, Any]
Shape: TypeAlias = tuple[int, ...]


def valid_rows(inputs: Array, labels: Iterable[Any], serving: ServingTable, checks: ChecksTable) -> Array:
    """Of each of *inputs* (n, …) and its label, of which None is unknown, whether training may have it: (n,)."""
    fits = ~out_of_range(inputs, checks.minimum, checks.maximum)
    if checks.classes is not None:
        fits &= np.asarray([one is None or is_class_label(one, checks.classes) for one in labels], bool)
    if serving.input_shape is not None:
        fits &= is_shape_allowed(inputs.shape[1:], serving.input_shape)
    if serving.input_dtype is not None:
        fits &= inputs.dtype == np.dtype(serving.input_dtype)
    return fits


def out_of_range(inputs: Array, minimum: float | None, maximum: float | None) -> Array:
    """Of each of *inputs* (n, …), whether it holds a number beyond these; None: there is no such bound."""
    of_a_sample = tuple(range(1, inputs.ndim))
    found = np.zeros(len(inputs), bool)
    if minimum is not None:
        found |= (inputs < minimum).any(axis=of_a_sample)
    if maximum is not None:
        found |= (inputs > maximum).any(axis=of_a_sample)
    return found


def is_shape_allowed(shape: Shape, wanted: Shape) -> bool:
    """Whether *shape* is the *wanted* one, in which -1 is any length."""
    return len(shape) == len(wanted) and all(
        one in (-1, given) for one, given in zip(wanted, shape, strict=True)
    )


def is_class_label(label: Any, classes: int) -> bool:
    """Whether *label* is one of so many classes: a whole number from 0."""
    return bool(np.ndim(label) == 0 and 0 <= label < classes and label == int(label))
