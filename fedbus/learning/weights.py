"""Weights as safetensors files, named by their digest, and the digest of an architecture.

In this module a model is a mapping from tensor names to NumPy arrays, in the order of its state dict. The
order matters because legacy Flower parameters have no names; the file keeps it in its metadata. `save` streams
one tensor at a time and hashes it, into a file that gets its name only when it is complete.

The file format is https://huggingface.co/docs/safetensors/index#format.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from safetensors import SafetensorError, safe_open

from fedbus.common.filesystem import atomic_open
from fedbus.contracts.model import Artifact

Arrays: TypeAlias = dict[str, np.ndarray[Any, Any]]

ORDER: Final = "fedbus.order"
"""The metadata key with the tensor names in the order of the state dict, as a JSON list."""

_TAGS: Final = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}
_DTYPES: Final = {tag: name for name, tag in _TAGS.items()}
_MAX_HEADER_BYTES: Final = 16 * 1024**2
"""The limit for bytes that a client sent: JSON takes many times its size in memory."""
_MAX_DIMENSIONS: Final = 32
SUPPORTED_DTYPES: Final = tuple(_TAGS)
"""The names of the dtypes that a weights file can have."""
_WRITE_BYTES: Final = 16 * 1024**2


class BadWeights(ValueError):
    """The weights are invalid. The text names the tensor or file, and what to do."""


class ArchitectureMismatch(BadWeights):
    """Two models differ in their architecture. The text names the first tensor that differs."""


# --- architecture -----------------------------------------------------------------------------


def architecture_digest(arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """Return the SHA-256 digest over tensor names, shapes and dtypes. It does not depend on their order."""
    outline = sorted((name, list(array.shape), str(array.dtype)) for name, array in arrays.items())
    return hashlib.sha256(json.dumps(outline).encode()).hexdigest()


def first_difference(
    expected: Mapping[str, np.ndarray[Any, Any]], actual: Mapping[str, np.ndarray[Any, Any]]
) -> str | None:
    """Describe the first tensor of *actual* that differs in name, dtype or shape from *expected*; None if none does."""
    for name, array in expected.items():
        if name not in actual:
            return f"{name!r} {_outline(array)} is missing"
        if _outline(actual[name]) != _outline(array):
            return f"{name!r} is {_outline(actual[name])} instead of {_outline(array)}"
    extra = next((name for name in actual if name not in expected), None)
    return None if extra is None else f"{extra!r} {_outline(actual[extra])} is not expected"


def _outline(array: np.ndarray[Any, Any]) -> str:
    return f"{array.dtype}{list(array.shape)}"


def cast(array: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Cast *array* to *dtype*, and round floats for an integer dtype: a mean of ones may be 0.9999999."""
    if dtype.kind in "iu" and array.dtype.kind == "f":
        array = np.rint(array)
    return np.asarray(array).astype(dtype, copy=False)


# --- files ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SafetensorsFile:
    """The bytes of a safetensors file that is not written yet: consecutive buffers, with the tensors as views."""

    buffers: list[bytes | memoryview]
    architecture: str

    def artifact(self, sha256: str) -> Artifact:
        """Describe the file, given the digest over its buffers."""
        size_bytes = sum(len(buffer) for buffer in self.buffers)
        return Artifact(sha256=sha256, size_bytes=size_bytes, architecture=self.architecture)


def pack(arrays: Mapping[str, np.ndarray[Any, Any]]) -> SafetensorsFile:
    """Lay out *arrays* as a file, without copies. They must not change until the file is written.

    Raises:
        BadWeights: a tensor has a name or dtype that a safetensors file cannot have.

    """
    plain = {name: _to_native(name, array) for name, array in arrays.items()}
    return SafetensorsFile(list(_file_buffers(plain)), architecture_digest(plain))


def save(arrays: Mapping[str, np.ndarray[Any, Any]], path: Path) -> Artifact:
    """Write *arrays* to *path* atomically, and return the artifact.

    Raises:
        BadWeights: a tensor has a name or dtype that a safetensors file cannot have.

    """
    packed = pack(arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with atomic_open(path, durable=False) as file:
        for buffer in packed.buffers:
            file.write(buffer)
            digest.update(buffer)
    return packed.artifact(digest.hexdigest())


def load(path: Path) -> Arrays:
    """Read the arrays of the safetensors file at *path*, in the order of the state dict.

    Raises:
        BadWeights: the file does not exist, or is not a valid safetensors file.

    """
    try:
        with safe_open(path, framework="numpy") as file:
            stored = list(file.keys())
            names = _order_names(stored, (file.metadata() or {}).get(ORDER))
            return {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise BadWeights(f"there are no weights at {path}") from None
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise BadWeights(f"{path} is not a valid safetensors file: {error}") from error


def unpack(data: memoryview) -> Arrays:
    """Return the arrays in the bytes of a safetensors file, as views that cannot be written to.

    The bytes are not trusted. As the format demands, each byte belongs to one array, so that arrays that are copied
    (booleans) need no more memory than the bytes.

    Raises:
        BadWeights: the bytes are not a valid safetensors file.

    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise BadWeights("the weights are truncated, or their header is too long")
    body = data[8 + length :].toreadonly()
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        metadata = header.pop("__metadata__", {})
        _check_offsets([entry["data_offsets"] for entry in header.values()], len(body))
        arrays = {name: _unpack_array(body, entry) for name, entry in header.items()}
        return {name: arrays[name] for name in _order_names(list(arrays), metadata.get(ORDER))}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise BadWeights(f"the weights are not a valid safetensors file: {error}") from None


def _check_offsets(offsets: list[tuple[int, int]], size_bytes: int) -> None:
    """Check that the arrays follow each other without gaps from the first byte to the last. Raises ValueError."""
    position = 0
    for start, end in sorted(offsets):
        if start != position or end < start:
            raise ValueError(f"the array at byte {start} does not begin at byte {position}")
        position = end
    if position != size_bytes:
        raise ValueError(f"the arrays have {position} bytes of {size_bytes}")


def _unpack_array(body: memoryview, entry: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    shape = tuple(map(int, entry["shape"]))
    start, end = map(int, entry["data_offsets"])
    if len(shape) > _MAX_DIMENSIONS or min(shape, default=0) < 0:
        raise ValueError(f"a shape of {len(shape)} dimensions is invalid")
    if math.prod(shape) * dtype.itemsize != end - start:
        raise ValueError(f"bytes {start}:{end} do not match {dtype} {shape}")
    if dtype.kind == "b":
        return np.not_equal(np.frombuffer(body[start:end], np.uint8), 0).reshape(shape)
    return np.frombuffer(body[start:end], dtype).reshape(shape)


def _file_buffers(arrays: Arrays) -> Iterator[bytes | memoryview]:
    """Yield the parts of the file: header length, header, tensors."""
    by_item_size = sorted(arrays, key=lambda name: -arrays[name].itemsize)  # so that each tensor is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "np", ORDER: json.dumps(list(arrays))}}
    offset = 0
    for name in by_item_size:
        array = arrays[name]
        offsets = [offset, offset + array.nbytes]
        header[name] = {"dtype": _TAGS[str(array.dtype)], "shape": list(array.shape), "data_offsets": offsets}
        offset = offsets[1]
    header_bytes = json.dumps(header).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)
    yield len(header_bytes).to_bytes(8, "little")
    yield header_bytes
    for name in by_item_size:
        yield from _byte_chunks(arrays[name])


def _byte_chunks(array: np.ndarray[Any, Any]) -> Iterator[memoryview]:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, flat.nbytes, _WRITE_BYTES):
        yield flat[start : start + _WRITE_BYTES].data


def _to_native(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return *array* in native byte order. Raises BadWeights if safetensors does not support it."""
    if name == "__metadata__":
        raise BadWeights("a tensor is named '__metadata__', which safetensors reserves. Rename it")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if str(native.dtype) not in _TAGS:
        raise BadWeights(f"{name!r} is {native.dtype}, which cannot be saved. Use one of {', '.join(_TAGS)}")
    return native


def _order_names(stored: list[str], order: str | None) -> list[str]:
    try:
        names = json.loads(order) if order else stored
    except ValueError:
        return stored
    return names if isinstance(names, list) and sorted(map(str, names)) == sorted(stored) else stored


# --- torch --------------------------------------------------------------------------------------


def from_torch(state_dict: Mapping[str, Any]) -> Arrays:
    """Convert a torch state dict to NumPy arrays, which share the memory of CPU tensors.

    Raises:
        BadWeights: a tensor has a dtype that NumPy does not support, such as bfloat16.

    """
    return {name: _from_tensor(name, tensor) for name, tensor in state_dict.items()}


def to_torch(arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Convert *arrays* to a torch state dict with memory of its own."""
    import torch  # noqa: PLC0415 - only callers that use torch need it

    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def _from_tensor(name: str, tensor: Any) -> np.ndarray[Any, Any]:
    try:
        array: np.ndarray[Any, Any] = tensor.detach().cpu().numpy()
    except TypeError:
        raise BadWeights(
            f"{name!r} is {tensor.dtype}, which NumPy, and so Flower, does not support. "
            "Build the model in float32 (model.float()) and convert it where it is used"
        ) from None
    return array
