"""The Open Inference Protocol, version 2, as bytes: what Triton, KServe and their clients speak over HTTP.

    {"id": "7", "inputs": [{"name": "input", "shape": [2, 784], "datatype": "FP32", "data": […]}]}
    → {"model_name": "mnist", "model_version": "3", "id": "7",
       "outputs": [{"name": "output", "shape": [2], "datatype": "INT64", "data": [7, 2]},
                   {"name": "prediction_id", "shape": [2], "datatype": "INT64", "data": [41, 42]}]}

A task's model takes one tensor and gives one; ``prediction_id`` is what feedback is given to (-1
where a prediction was not captured). With the binary tensor extension the JSON comes first, as long as
``Inference-Header-Content-Length`` says, and the numbers after it, little-endian, in the order of the
tensors. No I/O here, and no model.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from fedbus.agents.inference.plain_json import (
    Array,
    HttpError,
    ModelInput,
    Shape,
    bad_request,
    check_count,
    check_finite,
    check_shape,
    parse_json_object,
    parse_numbers,
)

HEADER_LENGTH: Final = "Inference-Header-Content-Length"
INPUT: Final = "input"
OUTPUT: Final = "output"
PREDICTION_ID: Final = "prediction_id"
NOT_CAPTURED: Final = -1

DATATYPES: Final[dict[str, str]] = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}
_NAMES: Final = {np.dtype(dtype): name for name, dtype in DATATYPES.items()}


@dataclass(frozen=True)
class InferenceRequest:
    """What is asked: *inputs* (n, …), and how the answer is wanted."""

    inputs: Array
    id: str | None
    wanted: tuple[str, ...]
    """The outputs that are wanted, in their order."""
    binary: frozenset[str]
    """Those that are wanted as bytes."""


@dataclass(frozen=True)
class InferenceResponse:
    """The bytes of a response; *json_bytes* of them are JSON, where the rest is not."""

    content: bytes
    json_bytes: int | None


def parse_request(content: bytes, json_bytes: int | None, takes: ModelInput) -> InferenceRequest:
    """The request in *content*, of which the first *json_bytes* are JSON (None: all). Raises Refusal."""
    body = parse_json_object(content if json_bytes is None else content[:json_bytes])
    given = body.get("inputs")
    if not isinstance(given, list) or len(given) != 1 or not isinstance(given[0], dict):
        raise bad_request(f'the model takes one tensor: {{"inputs": [{{"name": "{INPUT}", "shape": …, …}}]}}')
    rest = b"" if json_bytes is None else content[json_bytes:]
    inputs = _parse_tensor(given[0], rest, takes)
    check_finite(inputs)
    identity = body.get("id")
    if identity is not None and not isinstance(identity, str):
        raise bad_request("id must be a string")
    wanted, binary = _parse_outputs(body)
    return InferenceRequest(inputs, identity, wanted, binary)


def build_response(
    asked: InferenceRequest, outputs: Array, ids: list[int | None], *, model: str, version: int
) -> InferenceResponse:
    """The response to *asked*: *outputs* (n, …) and the *ids* under which they were captured."""
    tensors = {
        OUTPUT: outputs,
        PREDICTION_ID: np.asarray([NOT_CAPTURED if one is None else one for one in ids], np.int64),
    }
    body: dict[str, Any] = {"model_name": model, "model_version": str(version)}
    if asked.id is not None:
        body["id"] = asked.id
    body["outputs"] = [
        _describe_tensor(name, tensors[name], binary=name in asked.binary) for name in asked.wanted
    ]
    header = json.dumps(body).encode()
    if not asked.binary:
        return InferenceResponse(header, None)
    blobs = [_to_little_endian(tensors[name]).tobytes() for name in asked.wanted if name in asked.binary]
    return InferenceResponse(b"".join([header, *blobs]), len(header))


def build_metadata(
    model: str, version: int, takes: ModelInput, platform: str, gives: Array | None
) -> dict[str, Any]:
    """What a client may want to know of the model before it asks; *gives* is one of its answers."""
    shape = [-1, *(takes.shape if takes.shape is not None else (-1,))]
    output = {"datatype": "FP32", "shape": [-1]}  # what most give, where this one has not answered yet
    if gives is not None:
        output = {"datatype": _datatype_of(gives), "shape": [-1, *gives.shape[1:]]}
    return {
        "name": model,
        "versions": [str(version)],
        "platform": platform,
        "inputs": [{"name": INPUT, "datatype": datatype_name(takes.dtype), "shape": shape}],
        "outputs": [{"name": OUTPUT, **output}, {"name": PREDICTION_ID, "datatype": "INT64", "shape": [-1]}],
    }


def datatype_name(dtype: "np.dtype[Any]") -> str:
    """The protocol's name of *dtype*: ``FP32``."""
    return _NAMES[np.dtype(dtype)]


# --- reading --------------------------------------------------------------------------------


def _parse_tensor(given: dict[str, Any], rest: bytes, takes: ModelInput) -> Array:
    shape = _parse_shape(given.get("shape"))
    check_count(shape[0], takes)
    check_shape(shape[1:], takes)
    wanted = datatype_name(takes.dtype)
    if given.get("datatype") != wanted:
        raise bad_request(f"the model takes {wanted}, and not {given.get('datatype')!r}")
    size = _parse_parameters(given).get("binary_data_size")
    if size is None:
        if rest:
            raise bad_request("there are bytes after the JSON, and no tensor has a binary_data_size")
        return _tensor_from_json(given.get("data"), shape, takes)
    return _tensor_from_bytes(size, rest, shape, takes)


def _parse_shape(given: Any) -> Shape:
    whole = isinstance(given, list) and all(type(one) is int and 0 < one < 2**31 for one in given)
    if not whole or not given:
        raise bad_request(
            "shape must be a list of whole numbers above 0, of which the first is how many samples there are"
        )
    return tuple(given)


def _tensor_from_json(data: Any, shape: Shape, takes: ModelInput) -> Array:
    if not isinstance(data, list):
        raise bad_request("data must be a list of numbers")
    inputs = parse_numbers(data, takes.dtype)
    if inputs.size != math.prod(shape):
        raise bad_request(
            f"data has {inputs.size} numbers, and the shape {list(shape)} asks for {math.prod(shape)}"
        )
    return inputs.reshape(shape)


def _tensor_from_bytes(size: Any, rest: bytes, shape: Shape, takes: ModelInput) -> Array:
    needed = math.prod(shape) * takes.dtype.itemsize
    if type(size) is not int or size != len(rest) or size != needed:
        raise bad_request(
            f"the shape {list(shape)} of {datatype_name(takes.dtype)} takes {needed} bytes: "
            f"binary_data_size is {size!r}, and {len(rest)} bytes came"
        )
    little = takes.dtype.newbyteorder("<")
    array: Array = np.frombuffer(rest, little).reshape(shape).astype(takes.dtype, copy=True)
    return array


def _parse_outputs(body: dict[str, Any]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Which outputs, and which of them as bytes; all as JSON where nothing is said."""
    everything_binary = _parse_parameters(body).get("binary_data_output") is True
    asked = body.get("outputs")
    if asked is None:
        both = (OUTPUT, PREDICTION_ID)
        return both, frozenset(both if everything_binary else ())
    named = dict(_iter_outputs(asked, binary=everything_binary))
    return tuple(named), frozenset(name for name, binary in named.items() if binary)


def _iter_outputs(asked: Any, *, binary: bool) -> Iterator[tuple[str, bool]]:
    if not isinstance(asked, list) or not asked:
        raise bad_request("outputs must be a list of the outputs that are wanted")
    for one in asked:
        name = one.get("name") if isinstance(one, dict) else None
        if name not in (OUTPUT, PREDICTION_ID):
            raise bad_request(
                f"there is no output {name!r}: the model gives {OUTPUT!r} and {PREDICTION_ID!r}"
            )
        yield name, _parse_parameters(one).get("binary_data", binary) is True


def _parse_parameters(given: dict[str, Any]) -> dict[str, Any]:
    parameters = given.get("parameters", {})
    if not isinstance(parameters, dict):
        raise bad_request("parameters must be an object")
    return parameters


# --- answering ------------------------------------------------------------------------------


def _describe_tensor(name: str, tensor: Array, *, binary: bool) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": name,
        "shape": list(tensor.shape),
        "datatype": _datatype_of(tensor),
    }
    if binary:
        return {**described, "parameters": {"binary_data_size": tensor.nbytes}}
    return {**described, "data": tensor.ravel().tolist()}


def _datatype_of(tensor: Array) -> str:
    name = _NAMES.get(tensor.dtype.newbyteorder("="))
    if name is None:
        raise HttpError(500, f"the model answers with {tensor.dtype}, which the protocol has no name for")
    return name


def _to_little_endian(tensor: Array) -> Array:
    return tensor.astype(tensor.dtype.newbyteorder("<"), copy=False)
