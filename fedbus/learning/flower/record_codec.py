"""Wire format of a Flower RecordDict: a msgpack header, then the bytes of the arrays.

    magic, version, header length           12 bytes, little-endian
    header                                  names and kinds of the records, metrics, configs, and of each
                                            array its dtype, shape, serialization type and size
    padding to 64 bytes, array, padding …   the .npy bytes of each array, so that its elements are aligned

Encoding copies no array: the result is a list of buffers to send. Decoding copies none either: the arrays of
the RecordDict are views of the received buffer, and make one copy when Flower's own code reads them. The
decoder never unpickles, and rejects the whole content if any part is invalid.
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgpack
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedbus.learning import npy
from fedbus.learning.flower.private_api import NUMPY, BorrowedArray, serialized_buffer

MAGIC: Final = b"FBRD"
VERSION: Final = 1
ALIGNMENT: Final = 64
MAX_HEADER_BYTES: Final = 256 * 1024**2
MAX_RECORDS: Final = 10_000
MAX_ARRAYS: Final = 1_000_000

_PREFIX = struct.Struct("<4sII")
_ZEROS = bytes(ALIGNMENT)
_ARRAYS, _METRICS, _CONFIGS = "a", "m", "c"


class RecordDecodeError(ValueError):
    """The received bytes are not a valid RecordDict."""


@dataclass(frozen=True)
class EncodedRecords:
    """An encoded RecordDict: consecutive buffers, with the bytes of the arrays as views."""

    buffers: list[memoryview]
    has_arrays: bool

    @property
    def size_bytes(self) -> int:
        return sum(len(buffer) for buffer in self.buffers)

    def sha256(self) -> str:
        """Return the SHA-256 digest over all buffers, in hex. This blocks: do not call it on the event loop."""
        digest = hashlib.sha256()
        for buffer in self.buffers:
            digest.update(buffer)
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        return b"".join(self.buffers)


def encode(records: RecordDict) -> EncodedRecords:
    """Encode *records* without copying arrays.

    Raises:
        ValueError: msgpack cannot represent a value, such as an integer of more than 64 bits.

    """
    arrays: list[memoryview] = []
    entries = [[name, *_encode_record(record, arrays)] for name, record in records.items()]
    try:
        header = msgpack.packb(entries)
    except (OverflowError, ValueError, TypeError) as error:
        raise ValueError(f"cannot encode the records: {error}") from error
    prefix = _PREFIX.pack(MAGIC, VERSION, len(header)) + header
    buffers = list(_pad_buffers([memoryview(prefix), *arrays])) if arrays else [memoryview(prefix)]
    return EncodedRecords(buffers, has_arrays=bool(arrays))


def decode(data: bytes | bytearray | memoryview) -> RecordDict:
    """Decode *data* to a RecordDict, whose arrays are views of *data*.

    Raises:
        RecordDecodeError: *data* is not what `encode` writes.

    """
    view = memoryview(data).cast("B")
    entries, end = _parse_header(view)
    reader = _ArrayReader(view, end)
    records = RecordDict()
    decoded: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = records.__dict__["_data"]
    for entry in entries:
        name, kind, payload = _parse_entry(entry)
        if name in decoded:
            raise RecordDecodeError(f"duplicate record {name!r}")
        decoded[name] = _decode_record(name, kind, payload, reader)
    reader.check_at_end()
    return records


def copy_records(records: RecordDict) -> RecordDict:
    """Return a copy of decoded *records*. Only the bytes of the arrays are shared, which cannot be written to."""
    result = RecordDict()
    copies: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = result.__dict__["_data"]
    for name, record in records.items():
        copied = record.copy()
        values = copied.__dict__["_data"]
        for key, value in values.items():
            if isinstance(value, BorrowedArray | list):
                values[key] = value.copy()
        copies[name] = copied
    return result


# --- encoding ---------------------------------------------------------------------------


def _encode_record(record: ArrayRecord | MetricRecord | ConfigRecord, arrays: list[memoryview]) -> list[Any]:
    if not isinstance(record, ArrayRecord):
        kind = _METRICS if isinstance(record, MetricRecord) else _CONFIGS
        return [kind, dict(record)]
    rows = []
    for key, array in record.items():
        data = serialized_buffer(array)
        rows.append([key, array.dtype, list(array.shape), array.stype, len(data)])
        arrays.append(data)
    return [_ARRAYS, rows]


def _pad_buffers(buffers: list[memoryview]) -> Iterator[memoryview]:
    """Yield *buffers* with padding between them, so that each starts at a multiple of `ALIGNMENT`."""
    for buffer in buffers[:-1]:
        yield buffer
        if padding := -len(buffer) % ALIGNMENT:
            yield memoryview(_ZEROS)[:padding]
    yield buffers[-1]


# --- decoding ---------------------------------------------------------------------------


def _parse_header(view: memoryview) -> tuple[list[Any], int]:
    if len(view) < _PREFIX.size:
        raise RecordDecodeError(f"{len(view)} bytes are too short for a header")
    magic, version, length = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise RecordDecodeError(f"magic is {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise RecordDecodeError(f"format version {version} is not supported (supported: {VERSION})")
    end = _PREFIX.size + length
    if end > len(view) or length > MAX_HEADER_BYTES:
        raise RecordDecodeError(
            f"header length {length} exceeds the data ({len(view)} bytes) or the limit ({MAX_HEADER_BYTES} bytes)"
        )
    try:
        entries = msgpack.unpackb(view[_PREFIX.size : end], strict_map_key=True)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise RecordDecodeError(f"the header is not valid msgpack: {error or type(error).__name__}") from None
    if not isinstance(entries, list) or len(entries) > MAX_RECORDS:
        raise RecordDecodeError(f"the header is not a list of at most {MAX_RECORDS} records")
    return entries, end


def _parse_entry(entry: Any) -> tuple[str, str, Any]:
    match entry:
        case [str() as name, str() as kind, payload]:
            return name, kind, payload
        case _:
            raise RecordDecodeError("a header entry is not a name, a kind and a payload")


def _decode_record(
    name: str, kind: str, payload: Any, reader: "_ArrayReader"
) -> ArrayRecord | MetricRecord | ConfigRecord:
    try:
        match kind, payload:
            case "a", list():
                return reader.record(payload)
            case "m", dict():
                return MetricRecord(payload)
            case "c", dict():
                return ConfigRecord(payload)
            case _:
                pass
    except (TypeError, ValueError) as error:
        raise RecordDecodeError(f"invalid record {name!r}: {' '.join(str(error).split())}") from None
    raise RecordDecodeError(f"record {name!r} has an unknown kind or payload")


class _ArrayReader:
    """Reads the arrays after the header in their order, as views."""

    def __init__(self, view: memoryview, offset: int) -> None:
        self._view = view
        self._offset = offset
        self._count = 0

    def record(self, rows: list[Any]) -> ArrayRecord:
        record = ArrayRecord()
        arrays: dict[str, BorrowedArray] = record.__dict__["_data"]  # the types are checked here
        for row in rows:
            key, array = self._array(row)
            if key in arrays:
                raise RecordDecodeError(f"duplicate array {key!r}")
            arrays[key] = array
        return record

    def check_at_end(self) -> None:
        if self._offset != len(self._view):
            raise RecordDecodeError(f"{len(self._view) - self._offset} bytes after the last array")

    def _array(self, row: Any) -> tuple[str, BorrowedArray]:
        match row:
            case [str() as key, str() as dtype, list() as sizes, str() as stype, int() as size]:
                shape = _parse_shape(sizes)
            case _:
                raise RecordDecodeError(
                    "an array entry is not a name, dtype, shape, serialization type and size"
                )
        self._count += 1
        if self._count > MAX_ARRAYS:
            raise RecordDecodeError(f"too many arrays (limit {MAX_ARRAYS})")
        array = BorrowedArray(dtype, shape, stype, self._slice(key, size))
        if stype == NUMPY and dtype:  # Flower's legacy parameters have no dtype and shape
            try:
                npy.check_outline(array.view, dtype=dtype, shape=shape)
            except npy.BadArray as error:
                raise RecordDecodeError(f"invalid array {key!r}: {error}") from None
        return key, array

    def _slice(self, key: str, size: int) -> memoryview:
        start = self._offset + -self._offset % ALIGNMENT
        if size < 0 or start + size > len(self._view):
            raise RecordDecodeError(f"array {key!r} exceeds the data")
        self._offset = start + size
        return self._view[start : self._offset]


def _parse_shape(sizes: list[Any]) -> tuple[int, ...]:
    if len(sizes) > npy.MAX_DIMENSIONS or any(type(size) is not int or size < 0 for size in sizes):
        raise RecordDecodeError(f"an array shape is not a list of at most {npy.MAX_DIMENSIONS} sizes")
    return tuple(sizes)
