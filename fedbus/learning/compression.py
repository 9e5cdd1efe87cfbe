"""Lossy encodings of updates: what a client sends is smaller, and the server side decodes it before any aggregation.

An update is the difference between the trained and the global weights of one array. For each encoding:

    bf16     2 bytes a value: the upper half of a float32, rounded to nearest even
    int8     1 byte a value: ``scale · q`` with one scale for the array, ``max|x| / 127``, and q rounded to nearest
    top-k    8 bytes a sent value: index and value of the share of values with the largest magnitude

Error feedback: the client adds the error of an encoding to its next update, so that nothing is lost in the long run:
the sum of all decoded updates is the sum of all updates minus the last error. int8: Seide et al., "1-Bit Stochastic
Gradient Descent and its Application to Data-Parallel Distributed Training of Speech DNNs", Interspeech 2014;
Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML 2019, which shows that
deterministic rounding is enough. top-k: Aji and Heafield, "Sparse Communication for Distributed Gradient Descent",
EMNLP 2017; Stich et al., "Sparsified SGD with Memory", NeurIPS 2018.

Decoding expects hostile bytes: the size of its result is that of the array that the server sent, never one that the
bytes declare.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeAlias

import numpy as np

from fedbus.contracts.task.compression import CompressionTable

Array: TypeAlias = np.ndarray[Any, Any]
Float32: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
Buffer: TypeAlias = bytes | bytearray | memoryview

MAX_ELEMENTS: Final = 2**32
"""The limit of an array's elements: an index of top-k has four bytes."""
_SCALE: Final = np.dtype("<f4")
_INDEX: Final = np.dtype("<u4")
_VALUE: Final = np.dtype("<f4")
_HALF: Final = np.dtype("<u2")
_MAX_LEVEL: Final = 127
_MIN_SCALE: Final = np.finfo(np.float32).tiny
_MAX_SCALE: Final = np.finfo(np.float32).max / 128


class BadEncoding(ValueError):
    """An update cannot be encoded or decoded. The text is one line with the reason."""


class Encoding(ABC):
    """A lossy encoding of float32 values. It has no state, so many clients may share one."""

    name: ClassVar[str]
    error_feedback: bool
    """Whether the client adds the error to its next update."""

    @abstractmethod
    def encode(self, values: Float32) -> Buffer:
        """Encode finite *values*, a vector."""


@dataclass(frozen=True)
class Bf16(Encoding):
    """bfloat16, rounded to nearest even. The relative error of a value is at most 2⁻⁸."""

    name: ClassVar[str] = "bf16"
    error_feedback: bool = False

    def encode(self, values: Float32) -> Buffer:
        bits = values.view(np.uint32)
        halves: Array = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(_HALF)
        return halves.tobytes()


@dataclass(frozen=True)
class Int8(Encoding):
    """8-bit integers with one scale for the array. The error of a value is at most half the scale, ``max|x| / 254``."""

    name: ClassVar[str] = "int8"
    error_feedback: bool = True

    def encode(self, values: Float32) -> Buffer:
        scale = np.float32(np.max(np.abs(values), initial=np.float32(0)) / np.float32(_MAX_LEVEL))
        data = bytearray(_SCALE.itemsize + values.size)
        if scale < _MIN_SCALE:  # all values are smaller than 2⁻¹¹⁹: the scale would have few bits
            return data
        np.frombuffer(data, _SCALE, count=1)[0] = scale
        levels = np.frombuffer(data, np.int8, offset=_SCALE.itemsize)
        rounded = values / scale
        np.rint(rounded, out=rounded)
        np.clip(rounded, -_MAX_LEVEL, _MAX_LEVEL, out=rounded)
        levels[:] = rounded
        return data


@dataclass(frozen=True)
class TopK(Encoding):
    """The *share* of values with the largest magnitude, at least one; all others are 0. Values of 0 are not sent."""

    name: ClassVar[str] = "top-k"
    share: float = 0.01
    error_feedback: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.5:
            raise ValueError(
                f"share is {self.share}. Use more than 0 and at most 0.5, where top-k is as large as float32"
            )

    def encode(self, values: Float32) -> Buffer:
        count = min(values.size, max(1, round(self.share * values.size)))
        magnitudes = np.abs(values)
        largest = np.argpartition(magnitudes, values.size - count)[values.size - count :]
        indices = np.sort(largest[magnitudes[largest] > 0])
        return indices.astype(_INDEX).tobytes() + values[indices].astype(_VALUE).tobytes()


def make_encoding(table: CompressionTable) -> Encoding | None:
    """Return the encoding that ``[tool.fedbus.compression]`` names; None if it names none."""
    match table.method:
        case "none":
            return None
        case "bf16":
            return Bf16()
        case "int8":
            return Int8(error_feedback=table.error_feedback)
        case "top-k":
            return TopK(share=table.share, error_feedback=table.error_feedback)


# --- encoding -----------------------------------------------------------------------------------


def is_compressible(array: Array) -> bool:
    """Return whether updates of *array* are encoded. Integers, booleans and complex numbers are sent as they are."""
    return array.dtype.kind == "f" and array.dtype.itemsize <= 8 and 0 < array.size <= MAX_ELEMENTS


@dataclass(frozen=True)
class EncodedUpdate:
    """An encoded update, and its error in the shape of the array."""

    data: Buffer
    error: Array


def encode_update(
    encoding: Encoding, trained: Array, reference: Array, residual: Array | None = None
) -> EncodedUpdate:
    """Encode the difference of *trained* to *reference*, plus the *residual*, which is the error of the last update.

    Raises:
        BadEncoding: the update has a NaN, infinity, or a value that the encoding cannot represent.

    """
    dtype = np.result_type(trained.dtype, np.float32)
    update: Array = np.subtract(trained, reference, dtype=dtype)
    if residual is not None and residual.shape == update.shape:
        update += residual
    with np.errstate(over="ignore"):
        values: Float32 = update.astype(np.float32, copy=False).reshape(-1)
    if not np.isfinite(values).all():
        raise BadEncoding("the update has a NaN, infinity, or a value beyond float32")
    data = encoding.encode(values)
    decoded = decode(encoding.name, memoryview(data), values.size)
    return EncodedUpdate(data, update - decoded.reshape(update.shape))


# --- decoding -----------------------------------------------------------------------------------


def apply_update(name: str, data: Buffer, reference: Array) -> Array:
    """Return *reference* plus the update in *data*, a new array of the same dtype and shape, in C order.

    Raises:
        BadEncoding: *data* is not an update of *reference* in the encoding *name*.

    """
    if not is_compressible(reference):
        raise BadEncoding(f"an array of {reference.dtype} {reference.shape} is not compressed")
    decoded = decode(name, memoryview(data), reference.size).reshape(reference.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        sums: Array = np.add(reference, decoded, dtype=np.result_type(reference.dtype, np.float32), order="C")
        result: Array = sums.astype(reference.dtype.newbyteorder("="), copy=False)
    if not np.isfinite(result).all():
        raise BadEncoding("the weights with this update have a NaN or infinity")
    return result


def decode(name: str, data: memoryview, size: int) -> Float32:
    """Return the *size* values in *data*, a vector of finite numbers.

    Raises:
        BadEncoding: there is no encoding *name*, or *data* does not have *size* values.

    """
    decoder = _DECODERS.get(name)
    if decoder is None:
        raise BadEncoding(f"the encoding {name[:40]!r} is unknown (known: {', '.join(_DECODERS)})")
    return decoder(data, size)


def _decode_bf16(data: memoryview, size: int) -> Float32:
    _check_length(data, _HALF.itemsize * size)
    values: Float32 = (np.frombuffer(data, _HALF).astype(np.uint32) << 16).view(np.float32)
    return _check_finite(values)


def _decode_int8(data: memoryview, size: int) -> Float32:
    _check_length(data, _SCALE.itemsize + size)
    scale = np.float32(np.frombuffer(data, _SCALE, count=1)[0])
    if not 0 <= scale <= _MAX_SCALE:
        raise BadEncoding(f"the scale {scale} is not a number of 0 to {_MAX_SCALE:.3g}")
    levels = np.frombuffer(data, np.int8, offset=_SCALE.itemsize)
    return np.multiply(levels, scale, dtype=np.float32)


def _decode_top_k(data: memoryview, size: int) -> Float32:
    count, rest = divmod(len(data), _INDEX.itemsize + _VALUE.itemsize)
    if rest or count > size:
        raise BadEncoding(f"{len(data)} bytes are not at most {size} pairs of index and value")
    indices = np.frombuffer(data, _INDEX, count=count)
    values = np.frombuffer(data, _VALUE, offset=_INDEX.itemsize * count)
    if count and int(indices[-1]) >= size:
        raise BadEncoding(f"the index {indices[-1]} is out of range ({size} values)")
    if count > 1 and not (indices[1:] > indices[:-1]).all():
        raise BadEncoding("the indices are not in ascending order")
    decoded = np.zeros(size, np.float32)
    decoded[indices] = _check_finite(values)
    return decoded


_DECODERS: Final[dict[str, Callable[[memoryview, int], Float32]]] = {
    Bf16.name: _decode_bf16,
    Int8.name: _decode_int8,
    TopK.name: _decode_top_k,
}


def _check_length(data: memoryview, expected: int) -> None:
    if len(data) != expected:
        raise BadEncoding(f"{len(data)} bytes instead of {expected}")


def _check_finite(values: Array) -> Float32:
    if not np.isfinite(values).all():
        raise BadEncoding("the update has a NaN or infinity")
    return values
