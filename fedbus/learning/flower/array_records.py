"""Conversion between weights and Flower's ArrayRecord and legacy Parameters.

An array that is not a NumPy array, such as the bytes of a booster, is a uint8 array named ``<name>.bytes`` in the
stored weights.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.common import Parameters, ndarray_to_bytes

from fedbus.learning import npy
from fedbus.learning.flower.private_api import NUMPY, array_view, serialized_buffer
from fedbus.learning.weights import Arrays, BadWeights

BYTES_SUFFIX: Final = ".bytes"
_NPY_MAGIC: Final = b"\x93NUMPY"


def from_record(record: ArrayRecord) -> Arrays:
    """Return the arrays of *record* as read-only views, without a copy.

    Raises:
        BadWeights: an array is not a valid NumPy array.

    """
    arrays = {}
    for name, array in record.items():
        if array.stype != NUMPY:
            arrays[name + BYTES_SUFFIX] = np.frombuffer(serialized_buffer(array), np.uint8)
            continue
        try:
            arrays[name] = array_view(array)
        except npy.BadArray as error:
            raise BadWeights(f"invalid array {name!r}: {error}") from None
    return arrays


def to_record(arrays: Mapping[str, np.ndarray[Any, Any]]) -> ArrayRecord:
    """Return *arrays* as an ArrayRecord. The dtype of bytes is "", their serialization type "bytes"."""
    record = ArrayRecord()
    for name, array in arrays.items():
        if name.endswith(BYTES_SUFFIX):
            record[name.removesuffix(BYTES_SUFFIX)] = Array("", (), "bytes", array.tobytes())
        else:
            record[name] = Array(np.asarray(array))
    return record


def with_types_of(record: ArrayRecord, types: ArrayRecord) -> ArrayRecord:
    """Return *record* with the serialization types of *types* where both have bytes of one name."""
    typed = ArrayRecord()
    for name, array in record.items():
        like = types.get(name, array)
        is_other = NUMPY not in {like.stype, array.stype}
        typed[name] = Array(like.dtype, like.shape, like.stype, array.data) if is_other else array
    return typed


def from_parameters(parameters: Parameters) -> Arrays:
    """Return the tensors of legacy *parameters*, named ``0``, ``1``, …; those that are no arrays as bytes."""
    return from_record(
        ArrayRecord(
            {str(number): _tensor_to_array(tensor) for number, tensor in enumerate(parameters.tensors)}
        )
    )


def to_parameters(names: Iterable[str], arrays: Arrays, *, tensor_type: str) -> Parameters:
    """Return the *arrays* with *names* as legacy parameters, in the order of *names*."""
    tensors = [
        arrays[name].tobytes() if name.endswith(BYTES_SUFFIX) else ndarray_to_bytes(arrays[name])
        for name in names
    ]
    return Parameters(tensors, tensor_type)


def array_records_of(content: RecordDict) -> dict[str, ArrayRecord]:
    """Return the ArrayRecords of *content*. Flower's own property copies them one by one into a checked dict."""
    return {name: record for name, record in content.items() if isinstance(record, ArrayRecord)}


def metric_records_of(content: RecordDict) -> dict[str, MetricRecord]:
    """Return the MetricRecords of *content*."""
    return {name: record for name, record in content.items() if isinstance(record, MetricRecord)}


def single_array_record(content: RecordDict) -> ArrayRecord | None:
    """Return the ArrayRecord of *content* if it has exactly one, else None."""
    records = list(array_records_of(content).values())
    return records[0] if len(records) == 1 else None


def _tensor_to_array(tensor: bytes) -> Array:
    stype = NUMPY if tensor.startswith(_NPY_MAGIC) else "bytes"
    return Array("", (), stype, tensor)
