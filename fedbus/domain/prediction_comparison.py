"""Comparison of the predictions of two models: disagreements and distribution shift."""

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from fedbus.domain.drift import is_scipy_available, psi_of_counts

RELATIVE_TOLERANCE: Final = 0.05
"""Two numeric predictions agree if their relative difference is at most this."""
BINS: Final = 10

Array: TypeAlias = np.ndarray[Any, Any]


def to_scalars(outputs: Array) -> list[float]:
    """Convert each prediction to one number: its value, or the index of the highest of several values."""
    if outputs.ndim > 1 and outputs[0].size > 1:
        classes: list[float] = outputs.reshape(len(outputs), -1).argmax(axis=1).astype(float).tolist()
        return classes
    numbers: list[float] = outputs.reshape(len(outputs)).astype(float).tolist()
    return numbers


def count_disagreements(old: Array, new: Array) -> int:
    """Count the predictions that differ: another class, or a number outside `RELATIVE_TOLERANCE`."""
    if old.shape != new.shape:
        return len(old)
    a, b = np.asarray(to_scalars(old)), np.asarray(to_scalars(new))
    if old.dtype.kind == "f" and old.ndim == 1:
        return int(np.sum(~np.isclose(a, b, rtol=RELATIVE_TOLERANCE, atol=1e-6)))
    return int(np.sum(a != b))


def prediction_psi(old: Sequence[float], new: Sequence[float], *, at_least: int) -> float | None:
    """Compute the PSI between the predictions *old* and *new*.

    Returns:
        None if either has fewer than *at_least* predictions, or SciPy is not installed.

    """
    if not is_scipy_available() or min(len(old), len(new)) < at_least:
        return None
    before, now = np.asarray(old), np.asarray(new)
    known = np.unique(np.concatenate([before, now]))
    if len(known) > 2 * BINS:  # too many distinct values for classes: a regression
        inner = np.quantile(before, np.linspace(0, 1, BINS + 1)[1:-1])
        before, now, known = np.digitize(before, inner), np.digitize(now, inner), np.arange(BINS)
    return psi_of_counts(*(np.sum(one[:, None] == known, axis=0) for one in (before, now)))
