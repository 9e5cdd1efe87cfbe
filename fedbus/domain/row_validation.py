"""Validation of captured rows before training, by the limits that the task declares.

A row outside the range of the reference data is valid (see `data_checks`): the model should learn from it. One
invalid row, such as a label that is not a class, would fail every training on its device.
"""

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np

from fedbus.contracts.task.serving import ChecksTable, ServingTable

Array: TypeAlias = np.ndarray[Any, Any]
Shape: TypeAlias = tuple[int, ...]


def valid_rows(inputs: Array, labels: Iterable[Any], serving: ServingTable, checks: ChecksTable) -> Array:
    """Return a mask (n,) of the rows of *inputs* (n, …) that training may use. A label of None is unknown."""
    fits = ~out_of_range(inputs, checks.minimum, checks.maximum)
    if checks.classes is not None:
        fits &= np.asarray([one is None or is_class_label(one, checks.classes) for one in labels], bool)
    if serving.input_shape is not None:
        fits &= is_shape_allowed(inputs.shape[1:], serving.input_shape)
    if serving.input_dtype is not None:
        fits &= inputs.dtype == np.dtype(serving.input_dtype)
    return fits


def out_of_range(inputs: Array, minimum: float | None, maximum: float | None) -> Array:
    """Return a mask (n,) of the *inputs* (n, …) with a value outside the bounds; None means no bound."""
    of_a_sample = tuple(range(1, inputs.ndim))
    found = np.zeros(len(inputs), bool)
    if minimum is not None:
        found |= (inputs < minimum).any(axis=of_a_sample)
    if maximum is not None:
        found |= (inputs > maximum).any(axis=of_a_sample)
    return found


def is_shape_allowed(shape: Shape, wanted: Shape) -> bool:
    """Return whether *shape* matches *wanted*, where -1 matches any length."""
    return len(shape) == len(wanted) and all(
        expected in (-1, actual) for expected, actual in zip(wanted, shape, strict=True)
    )


def is_class_label(label: Any, classes: int) -> bool:
    """Return whether *label* is an integer from 0 to *classes* - 1."""
    return bool(np.ndim(label) == 0 and 0 <= label < classes and label == int(label))
