"""Conversion between weights and Flower's ArrayRecord."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

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
            raise BadWeights(f"invalid array {name!r}: {error}") from None
    return arrays


def to_record(arrays: Mapping[str, np.ndarray[Any, Any]]) -> ArrayRecord:
    """Return *arrays* as an ArrayRecord."""
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = Array(np.asarray(array))
    return record


def single_array_record(content: RecordDict) -> ArrayRecord | None:
    """Return the ArrayRecord of *content* if it has exactly one, else None."""
    records = list(content.array_records.values())
    return records[0] if len(records) == 1 else None
