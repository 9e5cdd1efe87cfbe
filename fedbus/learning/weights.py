"""Weights at rest: safetensors files, named by their digest, and the fingerprint of an architecture.

A model here is a mapping from tensor names to NumPy arrays, in the order of its state dict
(legacy Flower parameters have no names, so order is all they have); the file keeps that order in
its metadata. Saving streams: one tensor at a time, hashed on its way, into a file that takes
its name only when it is whole.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from safetensors import SafetensorError, safe_open

from fedbus.contracts.model import Artifact

Arrays: TypeAlias = dict[str, np.ndarray[Any, Any]]

ORDER: Final = "fedbus.order"
"""The key of the file's metadata that holds the names in the order of the state dict."""

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
_WRITE_BYTES: Final = 16 * 1024**2


class BadWeights(ValueError):
    """These weights cannot be used; the text says which and what to do."""


class ArchitectureMismatch(BadWeights):
    """Two models that should be of one architecture are not; the text names the first tensor that differs."""


# --- telling models apart -------------------------------------------------------------------


def architecture_digest(arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """A digest over names, shapes and dtypes, whatever their order."""
    outline = sorted((name, list(array.shape), str(array.dtype)) for name, array in arrays.items())
    return hashlib.sha256(json.dumps(outline).encode()).hexdigest()


def first_difference(
    ours: Mapping[str, np.ndarray[Any, Any]], theirs: Mapping[str, np.ndarray[Any, Any]]
) -> str | None:
    """Where *theirs* first departs from the architecture of *ours*, in words; None where they are alike."""
    for name, array in ours.items():
        if name not in theirs:
            return f"{name!r} {_outline(array)} is missing"
        if _outline(theirs[name]) != _outline(array):
            return f"{name!r} is {_outline(theirs[name])} instead of {_outline(array)}"
    extra = next((name for name in theirs if name not in ours), None)
    return None if extra is None else f"{extra!r} {_outline(theirs[extra])} is one too many"


def _outline(array: np.ndarray[Any, Any]) -> str:
    return f"{array.dtype}{list(array.shape)}"


# --- files ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file that is not written yet: its bytes, one buffer after the other, tensors where they lie."""

    buffers: list[bytes | memoryview]
    architecture: str

    def artifact(self, sha256: str) -> Artifact:
        """What the file is, once somebody has taken its digest."""
        size_bytes = sum(len(buffer) for buffer in self.buffers)
        return Artifact(sha256=sha256, size_bytes=size_bytes, architecture=self.architecture)


def pack(arrays: Mapping[str, np.ndarray[Any, Any]]) -> SafetensorsFile:
    """*arrays* as a file without a copy; raises BadWeights. They must not change until it is written."""
    plain = {name: _to_native(name, array) for name, array in arrays.items()}
    return SafetensorsFile(list(_file_buffers(plain)), architecture_digest(plain))


def save(arrays: Mapping[str, np.ndarray[Any, Any]], path: Path) -> Artifact:
    """Write *arrays* to *path* and say what the file is; nothing half written ever stands at *path*."""
    file_to_be = pack(arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            digest = hashlib.sha256()
            for buffer in file_to_be.buffers:
                file.write(buffer)
                digest.update(buffer)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
    return file_to_be.artifact(digest.hexdigest())


def load(path: Path) -> Arrays:
    """The arrays in the safetensors file at *path*, in the order of the state dict; raises BadWeights."""
    try:
        with safe_open(path, framework="numpy") as file:
            stored = list(file.keys())
            names = _order_names(stored, (file.metadata() or {}).get(ORDER))
            return {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise BadWeights(f"there are no weights at {path}") from None
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise BadWeights(f"{path} is not a safetensors file that can be used: {error}") from error


def _file_buffers(arrays: Arrays) -> Iterator[bytes | memoryview]:
    """The file, piece by piece: length of the header, header, tensors."""
    by_alignment = sorted(arrays, key=lambda name: -arrays[name].itemsize)  # so that each tensor is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "np", ORDER: json.dumps(list(arrays))}}
    at = 0
    for name in by_alignment:
        array = arrays[name]
        offsets = [at, at + array.nbytes]
        header[name] = {"dtype": _TAGS[str(array.dtype)], "shape": list(array.shape), "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in by_alignment:
        yield from _byte_chunks(arrays[name])


def _byte_chunks(array: np.ndarray[Any, Any]) -> Iterator[memoryview]:
    numbers = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, numbers.nbytes, _WRITE_BYTES):
        yield numbers[start : start + _WRITE_BYTES].data


def _to_native(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """*array* in the machine's byte order, if a file can hold it."""
    if name == "__metadata__":
        raise BadWeights("no tensor can be called '__metadata__': safetensors keeps the name for itself")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if str(native.dtype) not in _TAGS:
        raise BadWeights(f"{name!r} is {native.dtype}, which cannot be saved: use one of {', '.join(_TAGS)}")
    return native


def _order_names(stored: list[str], order: str | None) -> list[str]:
    try:
        names = json.loads(order) if order else stored
    except ValueError:
        return stored
    return names if isinstance(names, list) and sorted(map(str, names)) == sorted(stored) else stored


# --- from and to torch -----------------------------------------------------------------------


def from_torch(state_dict: Mapping[str, Any]) -> Arrays:
    """A torch state dict as NumPy arrays, which share its memory where they can; raises BadWeights."""
    return {name: _from_tensor(name, tensor) for name, tensor in state_dict.items()}


def to_torch(arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """*arrays* as a torch state dict of its own memory."""
    import torch  # noqa: PLC0415 - only who asks for torch needs it

    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def _from_tensor(name: str, tensor: Any) -> np.ndarray[Any, Any]:
    try:
        array: np.ndarray[Any, Any] = tensor.detach().cpu().numpy()
    except TypeError:
        raise BadWeights(
            f"{name!r} is {tensor.dtype}, which NumPy, and so Flower, cannot hold: "
            "build the model in float32 (model.float()) and convert where it is used"
        ) from None
    return array
