"""The .npy format without copies: Flower serialises each array as one .npy blob.

A blob is a short header in text and then the numbers, so an array can be read where its blob
lies. Nothing here can be made to unpickle: arrays of Python objects are refused by their header.
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
    """The bytes of an array are not what they should be; the text says how."""


def array_from_npy(data: memoryview) -> np.ndarray[Any, Any]:
    """The array in the .npy bytes *data*, without a copy; raises BadArray."""
    start, dtype, shape, fortran = parse_header(_read_header(data))
    count = math.prod(shape)
    if count * dtype.itemsize != len(data) - start:
        raise BadArray(f"{len(data) - start} bytes cannot be an array of {dtype} and shape {shape}")
    try:
        flat = np.frombuffer(data, dtype=dtype, count=count, offset=start)
        return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    except ValueError as error:
        raise BadArray(f"NumPy cannot hold shape {shape}: {error}") from None


def make_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header of an array in C order, padded so that the numbers after it are aligned."""
    fields = repr({"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    padding = -(len(npy.MAGIC_PREFIX) + 4 + len(fields) + 1) % npy.ARRAY_ALIGN
    text = (fields + " " * padding + "\n").encode("latin1")
    return npy.magic(1, 0) + len(text).to_bytes(2, "little") + text


def check_array(data: memoryview, *, dtype: str, shape: tuple[int, ...]) -> None:
    """Raise BadArray unless *data* is what its record says it is."""
    array = array_from_npy(data)
    if str(array.dtype) != dtype or array.shape != shape:
        raise BadArray(f"it says {dtype} {shape} and holds {array.dtype} {array.shape}")


def _read_header(data: memoryview) -> bytes:
    """The header at the beginning of *data*, magic included."""
    prefix = bytes(data[:12])
    if prefix[:6] != npy.MAGIC_PREFIX or len(prefix) < 12 or prefix[6] not in {1, 2}:
        raise BadArray("it does not begin with a .npy header")
    length_bytes = 2 if prefix[6] == 1 else 4
    end = 8 + length_bytes + int.from_bytes(prefix[8 : 8 + length_bytes], "little")
    if end > min(len(data), MAX_HEADER_BYTES):
        raise BadArray("its .npy header does not end")
    return bytes(data[:end])


@lru_cache(maxsize=4096)  # the same few headers come from every client in every round
def parse_header(header: bytes) -> _Header:
    """Where the numbers begin, their dtype, the shape, and whether it is in Fortran order; raises BadArray."""
    start, dtype, shape, fortran = _parse_plain_header(header) or _parse_with_numpy(header)
    if dtype.hasobject:
        raise BadArray("it holds Python objects, which are never taken off the wire")
    if len(shape) > MAX_DIMENSIONS or any(dimension < 0 for dimension in shape):
        raise BadArray(f"its shape is {shape}")
    return start, dtype, shape, fortran


def _parse_plain_header(header: bytes) -> _Header | None:
    """The header as NumPy writes it for numbers, or None. In CPython 3.11 `ast`, which NumPy reads it with,
    may raise SystemError when two threads use it at once.
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
        raise BadArray(f"its .npy header cannot be read: {' '.join(str(error).split())[:200]}") from None
    return stream.tell(), dtype, shape, fortran
