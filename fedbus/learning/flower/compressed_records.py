"""Compressed updates in Flower's records: encoded on the client, decoded before a strategy sees the reply.

A compressed array keeps its name, dtype and shape. Its serialization type names the encoding, ``fedbus.int8``, and its
data is the encoded difference to the array that the server sent. So the codec of records, Flower's own transport and
the mods of an app carry it like any other array. `decode_updates` makes the array that the client trained, but for
the loss of the encoding.

The array that the server sent is that of the message's record with the name of the reply's record; else that of the
only record of the message.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, NoReturn, TypeAlias

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict

from fedbus.learning import npy
from fedbus.learning.compression import (
    BadEncoding,
    Encoding,
    apply_update,
    encode_update,
    is_compressible,
)
from fedbus.learning.flower.array_records import array_records_of
from fedbus.learning.flower.private_api import NUMPY, BorrowedArray, array_view, serialized_buffer

STYPE_PREFIX: Final = "fedbus."
"""The serialization type of a compressed array is this and the name of the encoding."""
RESIDUAL_PREFIX: Final = "fedbus.residual."
"""The record of a client's state with the errors of its last update is this and the name of the compressed record."""

SentArrays: TypeAlias = Mapping[str, ArrayRecord]
"""The ArrayRecords of a message of the server, by name."""

_server_decodes: ContextVar[bool] = ContextVar("fedbus_server_decodes_updates", default=False)


class CompressedArray(Array):
    """An array that only fedbus's server side can read: the encoded difference to the array that the server sent."""

    __qualname__ = Array.__qualname__  # Flower writes the class name into serialised data

    def numpy(self) -> NoReturn:
        raise TypeError(
            f"the array is compressed ({self.stype.removeprefix(STYPE_PREFIX)}). Put the mod that compresses first in "
            "`mods` of the ClientApp, so that it runs after the others"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_compressed, (self.dtype, self.shape, self.stype, self.data)


def _make_compressed(dtype: str, shape: tuple[int, ...], stype: str, data: bytes) -> CompressedArray:
    return CompressedArray(dtype, shape, stype, data)


@contextmanager
def server_decodes_updates() -> Iterator[None]:
    """Declare, until the block ends, that the receiver of replies is fedbus, which decodes compressed updates."""
    token = _server_decodes.set(True)
    try:
        yield
    finally:
        _server_decodes.reset(token)


def can_server_decode() -> bool:
    """Return whether the receiver of replies decodes compressed updates."""
    return _server_decodes.get()


# --- client ---------------------------------------------------------------------------------------


def compress_records(content: RecordDict, sent: SentArrays, state: RecordDict, encoding: Encoding) -> None:
    """Encode the arrays of *content*, a reply to *sent*, and keep the errors in *state*.

    Arrays without a counterpart in *sent*, and arrays of other types than float, stay as they are. A compressed array
    has the dtype of its counterpart. If the receiver does not decode updates, as in Flower's own simulation, the
    arrays are those that fedbus's server side would get.

    Raises:
        BadEncoding: an update has a NaN or infinity.

    """
    for name, record in list(content.array_records.items()):
        reference = find_reference(name, sent)
        if reference is None or any(is_compressed(array) for array in record.values()):
            continue
        key = RESIDUAL_PREFIX + name
        residuals = state.array_records.get(key, ArrayRecord())
        content[name], errors = _compress_record(record, reference, residuals, encoding)
        if encoding.error_feedback:
            state[key] = errors


def _compress_record(
    record: ArrayRecord, reference: ArrayRecord, residuals: ArrayRecord, encoding: Encoding
) -> tuple[ArrayRecord, ArrayRecord]:
    compressed, errors = ArrayRecord(), ArrayRecord()
    for key, array in record.items():
        compressed[key] = array
        base_array = reference.get(key)
        if base_array is None or not array.stype == base_array.stype == NUMPY:
            continue
        trained, base = array_view(array), array_view(base_array)
        if trained.shape != base.shape or not (is_compressible(trained) and is_compressible(base)):
            continue
        residual = array_view(residuals[key]) if key in residuals and encoding.error_feedback else None
        try:
            update = encode_update(encoding, trained, base, residual)
        except BadEncoding as error:
            raise BadEncoding(f"cannot compress {key!r}: {error}") from None
        if can_server_decode():
            stype = STYPE_PREFIX + encoding.name
            compressed[key] = CompressedArray(
                base_array.dtype, tuple(base_array.shape), stype, bytes(update.data)
            )
        else:
            decoded = apply_update(encoding.name, update.data, base)
            compressed[key] = Array(
                base_array.dtype, tuple(base_array.shape), NUMPY, _to_npy(decoded).tobytes()
            )
        errors[key] = Array(np.ascontiguousarray(update.error))
    return compressed, errors


# --- server ---------------------------------------------------------------------------------------


def decode_updates(content: RecordDict, sent: SentArrays) -> None:
    """Replace the compressed arrays of *content*, an untrusted reply to a message with the records *sent*.

    Raises:
        BadEncoding: an array does not fit to the one that was sent, or gives a NaN or infinity.

    """
    for name, record in list(content.array_records.items()):
        if not any(is_compressed(array) for array in record.values()):
            continue
        reference = find_reference(name, sent)
        if reference is None:
            raise BadEncoding(
                f"record {name!r} is compressed, but the message has no record that it belongs to"
            )
        content[name] = ArrayRecord(
            {
                key: _decode_array(key, array, reference) if is_compressed(array) else array
                for key, array in record.items()
            }
        )


def _decode_array(key: str, array: Array, reference: ArrayRecord) -> Array:
    base = reference.get(key)
    if base is None or base.stype != NUMPY:
        raise BadEncoding(f"array {key!r} is compressed, but the message has no such array")
    if (array.dtype, tuple(array.shape)) != (base.dtype, tuple(base.shape)):
        raise BadEncoding(
            f"array {key!r} is {array.dtype}{list(array.shape)} instead of {base.dtype}{list(base.shape)}"
        )
    try:
        decoded = apply_update(
            array.stype.removeprefix(STYPE_PREFIX), serialized_buffer(array), array_view(base)
        )
    except BadEncoding as error:
        raise BadEncoding(f"compressed array {key!r}: {error}") from None
    return BorrowedArray(base.dtype, tuple(base.shape), NUMPY, _to_npy(decoded))


def is_compressed(array: Array) -> bool:
    return array.stype.startswith(STYPE_PREFIX)


def has_compressed_arrays(content: RecordDict) -> bool:
    return any(
        is_compressed(array) for record in array_records_of(content).values() for array in record.values()
    )


def copy_array_records(content: RecordDict) -> SentArrays:
    """Return the ArrayRecords of *content*. Later changes of the records do not change the result."""
    return {name: ArrayRecord(dict(record)) for name, record in content.array_records.items()}


def find_reference(name: str, sent: SentArrays) -> ArrayRecord | None:
    """Return the record of *sent* to which the record *name* of a reply belongs; None if there is none."""
    if name in sent:
        return sent[name]
    return next(iter(sent.values())) if len(sent) == 1 else None


def _to_npy(array: np.ndarray[Any, Any]) -> memoryview:
    """Return the .npy bytes of *array*, which is in C order."""
    header = npy.make_header(array.dtype, array.shape)
    data = bytearray(len(header) + array.nbytes)
    data[: len(header)] = header
    data[len(header) :] = array.reshape(-1).view(np.uint8).data
    return memoryview(data)
