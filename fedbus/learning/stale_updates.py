"""Updates of older models in NumPy: what each contributes to an aggregation, and the check of untrusted arrays.

    current + w · (update - start)     `rebase`: the change of the update, applied to the current model (FedBuff)
    (1 - w) · current + w · update     `mix`: FedAsync

They are computed in float64, or complex128, one array at a time. A result has the dtype of the update, so the
strategy's own aggregation treats it as the reply of a client; integers are rounded.
"""

import cmath
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedbus.learning.aggregation_planner import Merge, MergeRule
from fedbus.learning.weights import Arrays

Array = np.ndarray[Any, Any]


class UpdateRefused(ValueError):
    """An update does not fit the model, or has invalid values. The text names the array, in one line."""


def merge_update(
    update: Mapping[str, Array], start: Mapping[str, Array], current: Mapping[str, Array], merge: Merge
) -> Arrays:
    """Return what *update*, of a client that began with *start*, contributes to the aggregation on *current*.

    If *start* has no arrays, the client began without a model: its update is mixed, since there is no change to apply.

    Raises:
        UpdateRefused: *update* has other names or shapes than *start*, or than *current* if the model has changed.

    """
    if start:
        check_same_shapes(update, start)
    if merge.keeps_update:
        return dict(update)
    check_same_shapes(update, current, of_model="the current model")
    if merge.rule is MergeRule.MIX or not start:
        return {name: mix(array, current[name], merge.weight) for name, array in update.items()}
    return {name: rebase(array, start[name], current[name], merge.weight) for name, array in update.items()}


def rebase(update: Array, start: Array, current: Array, weight: float) -> Array:
    """Return ``current + weight · (update - start)`` in the dtype of *update*."""
    wide = _wide_dtype(update)
    change = np.subtract(update, start, dtype=wide)
    change *= weight
    change += current
    return _narrow(change, update.dtype)


def mix(update: Array, current: Array, share: float) -> Array:
    """Return ``(1 - share) · current + share · update`` in the dtype of *update*."""
    wide = _wide_dtype(update)
    mixed = np.multiply(current, 1.0 - share, dtype=wide)
    mixed += np.multiply(update, share, dtype=wide)
    return _narrow(mixed, update.dtype)


def check_same_shapes(
    update: Mapping[str, Array], model: Mapping[str, Array], *, of_model: str = "its message"
) -> None:
    """Check that *update* has the names and shapes of *model*. Raises UpdateRefused."""
    for name, array in update.items():
        if name not in model:
            raise UpdateRefused(f"the update has an array {name!r}, which {of_model} does not have")
        if array.shape != model[name].shape:
            raise UpdateRefused(
                f"the array {name!r} has the shape {array.shape} instead of {model[name].shape}, as in {of_model}"
            )
    missing = next((name for name in model if name not in update), None)
    if missing is not None:
        raise UpdateRefused(f"the update lacks the array {missing!r}, which {of_model} has")


def check_finite(update: Mapping[str, Array]) -> None:
    """Check that no array has NaN or infinity. Raises UpdateRefused."""
    with np.errstate(over="ignore", invalid="ignore"):
        for name, array in update.items():
            if not is_finite(array):
                raise UpdateRefused(f"the array {name!r} has NaN or infinity")


def is_finite(array: Array) -> bool:
    """Return whether *array* has no NaN and no infinity. This allocates no memory, unless a sum of it is not finite."""
    if array.dtype.kind not in "fc":
        return True
    if array.dtype.kind == "f" and array.flags.c_contiguous:
        flat = array.reshape(-1)
        total = flat.dot(flat)  # faster than a sum
    else:
        total = array.sum()
    # the sum of finite numbers may overflow
    return cmath.isfinite(total) or bool(np.isfinite(array).all())


def _wide_dtype(array: Array) -> "np.dtype[Any]":
    return np.dtype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _narrow(array: Array, dtype: "np.dtype[Any]") -> Array:
    """Cast *array* to *dtype*. Integers are rounded and clipped; a boolean is true from 0.5."""
    if dtype.kind == "b":
        return np.asarray(array >= 0.5)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        largest = float(limits.max) if limits.bits <= 32 else float(np.nextafter(float(limits.max), 0.0))
        return np.asarray(np.clip(np.rint(array), float(limits.min), largest).astype(dtype))
    return np.asarray(array.astype(dtype, copy=False))
