"""A Flower RecordDict on the wire: a small msgpack head, then the arrays' bytes as they are.

    magic, version, length of the head      12 bytes
    head                                    names and kinds of the records, metrics, configs, and of each
                                            array its dtype, shape, serialization and size
    padding to 64 bytes, array, padding …   each array's own .npy bytes, so that its numbers are aligned

Encoding copies no array: it gives back the list of buffers to send. Decoding copies none
either: the arrays of the RecordDict lend their bytes from the buffer that came in, and copy
once when stock Flower code asks for them. Nothing is ever unpickled, and whatever does not
add up is refused as a whole.
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
MAX_HEAD_BYTES: Final = 256 * 1024**2
MAX_RECORDS: Final = 10_000
MAX_ARRAYS: Final = 1_000_000

_PREFIX = struct.Struct("<4sII")
_ZEROS = bytes(ALIGNMENT)
_ARRAYS, _METRICS, _CONFIGS = "a", "m", "c"


class RecordDecodeError(ValueError):
    """What came in is not a RecordDict as this module writes it; the text says what is wrong."""


@dataclass(frozen=True)
class EncodedRecords:
    """A RecordDict ready to send: buffers that together are its bytes, the arrays' own among them."""

    buffers: list[memoryview]
    has_arrays: bool

    @property
    def size_bytes(self) -> int:
        return sum(len(buffer) for buffer in self.buffers)

    def sha256(self) -> str:
        """The digest over all buffers. It takes a while for large ones: not for the loop."""
        digest = hashlib.sha256()
        for buffer in self.buffers:
            digest.update(buffer)
        return digest.hexdigest()

    def joined(self) -> bytes:
        return b"".join(self.buffers)


def encode(records: RecordDict) -> EncodedRecords:
    """*records* as buffers, without a copy of any array; raises ValueError for what msgpack cannot say."""
    arrays: list[memoryview] = []
    entries = [[name, *_encode_record(record, arrays)] for name, record in records.items()]
    try:
        head = msgpack.packb(entries)
    except (OverflowError, ValueError, TypeError) as error:
        raise ValueError(f"these records cannot be sent: {error}") from error
    prefix = _PREFIX.pack(MAGIC, VERSION, len(head)) + head
    buffers = list(_pad_buffers([memoryview(prefix), *arrays])) if arrays else [memoryview(prefix)]
    return EncodedRecords(buffers, has_arrays=bool(arrays))


def decode(data: bytes | bytearray | memoryview) -> RecordDict:
    """The RecordDict in *data*, whose arrays lend their bytes from it; raises UnreadableRecords."""
    view = memoryview(data).cast("B")
    entries, end = _parse_head(view)
    reader = _ArrayReader(view, end)
    records = RecordDict()
    for entry in entries:
        name, kind, payload = _parse_entry(entry)
        if name in records:
            raise RecordDecodeError(f"the record {name!r} is there twice")
        records[name] = _decode_record(name, kind, payload, reader)
    reader.must_be_at_the_end()
    return records


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
    """*buffers*, each but the last followed by what brings the next to an aligned place."""
    for buffer in buffers[:-1]:
        yield buffer
        if padding := -len(buffer) % ALIGNMENT:
            yield memoryview(_ZEROS)[:padding]
    yield buffers[-1]


# --- decoding ---------------------------------------------------------------------------


def _parse_head(view: memoryview) -> tuple[list[Any], int]:
    if len(view) < _PREFIX.size:
        raise RecordDecodeError(f"{len(view)} bytes are too few to be records")
    magic, version, length = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise RecordDecodeError(f"they begin with {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise RecordDecodeError(f"they are of version {version}, and only {VERSION} is understood")
    end = _PREFIX.size + length
    if end > len(view) or length > MAX_HEAD_BYTES:
        raise RecordDecodeError(f"their head of {length} bytes goes beyond their end")
    try:
        entries = msgpack.unpackb(view[_PREFIX.size : end], strict_map_key=True)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise RecordDecodeError(f"their head is not msgpack: {error or type(error).__name__}") from None
    if not isinstance(entries, list) or len(entries) > MAX_RECORDS:
        raise RecordDecodeError("their head is not a list of records")
    return entries, end


def _parse_entry(entry: Any) -> tuple[str, str, Any]:
    match entry:
        case [str() as name, str() as kind, payload]:
            return name, kind, payload
    raise RecordDecodeError("an entry of their head is not a name, a kind and what belongs to it")


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
    except (TypeError, ValueError) as error:
        raise RecordDecodeError(f"the record {name!r} is wrong: {' '.join(str(error).split())}") from None
    raise RecordDecodeError(f"the record {name!r} is of no kind that is known")


class _ArrayReader:
    """Hands out the arrays that follow the head, in order, each where it lies."""

    def __init__(self, view: memoryview, at: int) -> None:
        self._view = view
        self._at = at
        self._count = 0

    def record(self, rows: list[Any]) -> ArrayRecord:
        record = ArrayRecord()
        for row in rows:
            key, array = self._array(row)
            if key in record:
                raise RecordDecodeError(f"the array {key!r} is there twice")
            record[key] = array
        return record

    def must_be_at_the_end(self) -> None:
        if self._at != len(self._view):
            raise RecordDecodeError(f"{len(self._view) - self._at} bytes belong to nothing")

    def _array(self, row: Any) -> tuple[str, BorrowedArray]:
        match row:
            case [str() as key, str() as dtype, list() as sizes, str() as stype, int() as size]:
                shape = _parse_shape(sizes)
            case _:
                raise RecordDecodeError(
                    "an array's row is not its name, dtype, shape, serialization and size"
                )
        self._count += 1
        if self._count > MAX_ARRAYS:
            raise RecordDecodeError(f"there are more than {MAX_ARRAYS} arrays")
        array = BorrowedArray(dtype, shape, stype, self._take(key, size))
        if stype == NUMPY and dtype:  # Flower's legacy parameters leave dtype and shape out
            try:
                npy.check_array(array.buffer, dtype=dtype, shape=shape)
            except npy.BadArray as error:
                raise RecordDecodeError(f"the array {key!r} is wrong: {error}") from None
        return key, array

    def _take(self, key: str, size: int) -> memoryview:
        start = self._at + -self._at % ALIGNMENT
        if size < 0 or start + size > len(self._view):
            raise RecordDecodeError(f"the array {key!r} goes beyond their end")
        self._at = start + size
        return self._view[start : self._at]


def _parse_shape(sizes: list[Any]) -> tuple[int, ...]:
    if len(sizes) > npy.MAX_DIMENSIONS or any(type(size) is not int or size < 0 for size in sizes):
        raise RecordDecodeError("an array's shape is not a short list of sizes")
    return tuple(sizes)
