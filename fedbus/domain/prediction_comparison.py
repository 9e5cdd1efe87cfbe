"""What models answer, compared: one number for each answer, how many differ, how far they are distributed otherwise."""

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from fedbus.domain.drift import is_scipy_available, psi_of_counts

RELATIVE_TOLERANCE: Final = 0.05
"""Two numbers that differ by no more than this share of themselves are the same answer."""
BINS: Final = 10

Array: TypeAlias = np.ndarray[Any, Any]


def to_scalars(outputs: Array) -> list[float]:
    """For each answer the class it stands for, or the number it is: of several numbers, which is highest."""
    if outputs.ndim > 1 and outputs[0].size > 1:
        chosen: list[float] = outputs.reshape(len(outputs), -1).argmax(axis=1).astype(float).tolist()
        return chosen
    numbers: list[float] = outputs.reshape(len(outputs)).astype(float).tolist()
    return numbers


def count_disagreements(old: Array, new: Array) -> int:
    """How many of the answers are different: another class, or a number that is not close."""
    if old.shape != new.shape:
        return len(old)
    a, b = np.asarray(to_scalars(old)), np.asarray(to_scalars(new))
    if old.dtype.kind == "f" and old.ndim == 1:
        return int(np.sum(~np.isclose(a, b, rtol=RELATIVE_TOLERANCE, atol=1e-6)))
    return int(np.sum(a != b))


def prediction_psi(old: Sequence[float], new: Sequence[float], *, at_least: int) -> float | None:
    """How far *new* answers are distributed otherwise than *old* (PSI); None where there are too few (or no SciPy)."""
    if not is_scipy_available() or min(len(old), len(new)) < at_least:
        return None
    before, now = np.asarray(old), np.asarray(new)
    known = np.unique(np.concatenate([before, now]))
    if len(known) > 2 * BINS:  # numbers, and not classes
        inner = np.quantile(before, np.linspace(0, 1, BINS + 1)[1:-1])
        before, now, known = np.digitize(before, inner), np.digitize(now, inner), np.arange(BINS)
    return psi_of_counts(*(np.sum(one[:, None] == known, axis=0) for one in (before, now)))
