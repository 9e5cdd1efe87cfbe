"""Conversion between weights and Flower's ArrayRecord."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord

from fedbus.learning import npy
from fedbus.learning.flower.private_api import array_view
from fedbus.learning.weights import Arrays, BadWeights


def from_record(record: ArrayRecord) -> Arrays:
    """Return the arrays of *record* as read-only views, without a copy.

    Raises:
        BadWeights: an array is not a valid NumPy array.

    """
    arrays = {}
    for name, array in record.items():
        try:
            arrays[name] = array_view(array)
        except npy.BadArray as error:
            raise BadWeights(f"the array {name!r} is wrong: {error}") from None
    return arrays


def to_record(arrays: Mapping[str, np.ndarray[Any, Any]]) -> ArrayRecord:
    """Return *arrays* as an ArrayRecord."""
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = Array(np.asarray(array))
    return record
