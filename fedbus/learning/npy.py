"""Read and write .npy bytes without copies. Flower serialises each array as one .npy byte string.

The format is a short text header and then the elements, so a view of the bytes is the array. See
https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html. This module never unpickles: it
rejects arrays of Python objects by their header.
"""

import math
import re
import tokenize
from functools import lru_cache
from io import BytesIO
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.lib import format as npy

MAX_HEADER_BYTES: Final = 16 * 1024
MAX_DIMENSIONS: Final = 32

_Header: TypeAlias = tuple[int, np.dtype[Any], tuple[int, ...], bool]
_PLAIN: Final = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<>|=][biufc]\d{1,2})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,18}, ?)*\d{0,18})\), \} *\n",
    re.DOTALL,
)


class BadArray(ValueError):
    """The bytes are not a valid .npy array."""


def array_from_npy(data: memoryview) -> np.ndarray[Any, Any]:
    """Return the array in the .npy bytes *data* as a view.

    Raises:
        BadArray: the header is invalid, or the length does not match dtype and shape.

    """
    start, dtype, shape, fortran = parse_header(_read_header(data))
    count = math.prod(shape)
    if count * dtype.itemsize != len(data) - start:
        raise BadArray(f"{len(data) - start} bytes do not match dtype {dtype} and shape {shape}")
    try:
        flat = np.frombuffer(data, dtype=dtype, count=count, offset=start)
        return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    except ValueError as error:
        raise BadArray(f"NumPy does not support shape {shape}: {error}") from None


@lru_cache(maxsize=4096)
def make_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the .npy 1.0 header of an array in C order, padded so that the elements after it are aligned."""
    fields = repr({"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    padding = -(len(npy.MAGIC_PREFIX) + 4 + len(fields) + 1) % npy.ARRAY_ALIGN
    text = (fields + " " * padding + "\n").encode("latin1")
    return npy.magic(1, 0) + len(text).to_bytes(2, "little") + text


def serialize(array: np.ndarray[Any, Any]) -> memoryview:
    """Return the .npy bytes of *array*, in C order."""
    header = make_header(array.dtype, array.shape)
    data = bytearray(len(header) + array.nbytes)
    data[: len(header)] = header
    np.frombuffer(data, array.dtype, offset=len(header)).reshape(array.shape)[...] = array
    return memoryview(data)


def check_outline(array: np.ndarray[Any, Any], *, dtype: str, shape: tuple[int, ...]) -> None:
    """Raise BadArray unless *array* is of *dtype* and *shape*."""
    if str(array.dtype) != dtype or array.shape != shape:
        raise BadArray(f"declared as {dtype} {shape}, but it is {array.dtype} {array.shape}")


def _read_header(data: memoryview) -> bytes:
    """Return the header at the start of *data*, with the magic string."""
    prefix = bytes(data[:12])
    if prefix[:6] != npy.MAGIC_PREFIX or len(prefix) < 12 or prefix[6] not in {1, 2}:
        raise BadArray("no .npy header at the start")
    length_bytes = 2 if prefix[6] == 1 else 4
    end = 8 + length_bytes + int.from_bytes(prefix[8 : 8 + length_bytes], "little")
    if end > min(len(data), MAX_HEADER_BYTES):
        raise BadArray(f"the .npy header is truncated or too long (limit {MAX_HEADER_BYTES} bytes)")
    return bytes(data[:end])


@lru_cache(maxsize=4096)  # the same few headers come from every client in every round
def parse_header(header: bytes) -> _Header:
    """Return the offset of the elements in bytes, the dtype, the shape, and whether the order is Fortran's.

    Raises:
        BadArray: the header is invalid, or declares Python objects or an unsupported shape.

    """
    start, dtype, shape, fortran = _parse_plain_header(header) or _parse_with_numpy(header)
    if dtype.hasobject:
        raise BadArray("it contains Python objects, which fedbus does not unpickle")
    if len(shape) > MAX_DIMENSIONS or any(dimension < 0 for dimension in shape):
        raise BadArray(f"shape {shape} is invalid (limit {MAX_DIMENSIONS} dimensions, each at least 0)")
    return start, dtype, shape, fortran


def _parse_plain_header(header: bytes) -> _Header | None:
    """Parse a header as NumPy writes it for numbers; None for any other.

    NumPy parses headers with `ast`, which takes longer than reading a small array.
    """
    if (match := _PLAIN.fullmatch(header)) is None:
        return None
    descr, fortran, sizes = (group.decode() for group in match.groups())
    shape = tuple(int(size) for size in sizes.split(",") if size.strip())
    try:
        return len(header), np.dtype(descr), shape, fortran == "True"
    except TypeError:
        return None


def _parse_with_numpy(header: bytes) -> _Header:
    stream = BytesIO(header)
    read = npy.read_array_header_1_0 if npy.read_magic(stream) == (1, 0) else npy.read_array_header_2_0
    try:
        shape, fortran, dtype = read(stream, max_header_size=MAX_HEADER_BYTES)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError) as error:
        raise BadArray(f"invalid .npy header: {' '.join(str(error).split())[:200]}") from None
    return stream.tell(), dtype, shape, fortran
