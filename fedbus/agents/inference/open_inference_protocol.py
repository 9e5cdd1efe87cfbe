"""The Open Inference Protocol, version 2, as Triton, KServe and their clients use it over HTTP.

    {"id": "7", "inputs": [{"name": "input", "shape": [2, 784], "datatype": "FP32", "data": […]}]}
    → {"model_name": "mnist", "model_version": "3", "id": "7",
       "outputs": [{"name": "output", "shape": [2], "datatype": "INT64", "data": [7, 2]},
                   {"name": "prediction_id", "shape": [2], "datatype": "INT64", "data": [41, 42]}]}

The model of a task has one input tensor and one output tensor. ``prediction_id`` is the id for feedback, or -1 if
the prediction was not captured. With the binary tensor extension, the body starts with JSON of
``Inference-Header-Content-Length`` bytes; the tensor data follow, little-endian, in the order of the tensors.
This module converts bytes only: it does no I/O and calls no model.

Source: https://github.com/kserve/open-inference-protocol and Triton's binary tensor data extension.
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
    """A parsed request: *inputs* (n, …), and the requested outputs."""

    inputs: Array
    id: str | None
    output_names: tuple[str, ...]
    """The requested outputs, in the requested order."""
    binary_outputs: frozenset[str]
    """The requested outputs in binary form."""


@dataclass(frozen=True)
class InferenceResponse:
    """The body of a response; the first *json_bytes* are JSON (None: all)."""

    content: bytes
    json_bytes: int | None


def parse_request(content: bytes, json_bytes: int | None, model_input: ModelInput) -> InferenceRequest:
    """Parse a request; the first *json_bytes* of *content* are JSON (None: all).

    Raises:
        HttpError: the request is invalid.

    """
    body = parse_json_object(content if json_bytes is None else content[:json_bytes])
    tensors = body.get("inputs")
    if not isinstance(tensors, list) or len(tensors) != 1 or not isinstance(tensors[0], dict):
        raise bad_request(
            f'inputs must be a list with one tensor: {{"inputs": [{{"name": "{INPUT}", "shape": …, …}}]}}'
        )
    binary_data = b"" if json_bytes is None else content[json_bytes:]
    inputs = _parse_tensor(tensors[0], binary_data, model_input)
    check_finite(inputs)
    request_id = body.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise bad_request("id must be a string")
    output_names, binary_outputs = _parse_outputs(body)
    return InferenceRequest(inputs, request_id, output_names, binary_outputs)


def build_response(
    request: InferenceRequest, outputs: Array, ids: list[int | None], *, model: str, version: int
) -> InferenceResponse:
    """Build the response to *request* from *outputs* (n, …) and the prediction *ids*."""
    tensors = {
        OUTPUT: outputs,
        PREDICTION_ID: np.asarray([NOT_CAPTURED if row is None else row for row in ids], np.int64),
    }
    body: dict[str, Any] = {"model_name": model, "model_version": str(version)}
    if request.id is not None:
        body["id"] = request.id
    body["outputs"] = [
        _describe_tensor(name, tensors[name], binary=name in request.binary_outputs)
        for name in request.output_names
    ]
    header = json.dumps(body).encode()
    if not request.binary_outputs:
        return InferenceResponse(header, None)
    binary_data = [
        _to_little_endian(tensors[name]).tobytes()
        for name in request.output_names
        if name in request.binary_outputs
    ]
    return InferenceResponse(b"".join([header, *binary_data]), len(header))


def build_metadata(
    model: str, version: int, model_input: ModelInput, platform: str, output: Array | None
) -> dict[str, Any]:
    """Build the model metadata; *output* is one prediction of the model, for its datatype and shape."""
    shape = [-1, *(model_input.shape if model_input.shape is not None else (-1,))]
    output_metadata = {"datatype": "FP32", "shape": [-1]}  # the common case, until there is a prediction
    if output is not None:
        output_metadata = {"datatype": _datatype_of(output), "shape": [-1, *output.shape[1:]]}
    return {
        "name": model,
        "versions": [str(version)],
        "platform": platform,
        "inputs": [{"name": INPUT, "datatype": datatype_name(model_input.dtype), "shape": shape}],
        "outputs": [
            {"name": OUTPUT, **output_metadata},
            {"name": PREDICTION_ID, "datatype": "INT64", "shape": [-1]},
        ],
    }


def datatype_name(dtype: "np.dtype[Any]") -> str:
    """Return the name of *dtype* in the protocol, for example ``FP32``."""
    return _NAMES[np.dtype(dtype)]


# --- parsing --------------------------------------------------------------------------------


def _parse_tensor(tensor: dict[str, Any], binary_data: bytes, model_input: ModelInput) -> Array:
    shape = _parse_shape(tensor.get("shape"))
    check_count(shape[0], model_input)
    check_shape(shape[1:], model_input)
    datatype = datatype_name(model_input.dtype)
    if tensor.get("datatype") != datatype:
        raise bad_request(f"the datatype must be {datatype}, not {tensor.get('datatype')!r}")
    size = _parse_parameters(tensor).get("binary_data_size")
    if size is None:
        if binary_data:
            raise bad_request("the body has binary data, but no tensor has a binary_data_size")
        return _tensor_from_json(tensor.get("data"), shape, model_input)
    return _tensor_from_bytes(size, binary_data, shape, model_input)


def _parse_shape(shape: Any) -> Shape:
    is_valid = isinstance(shape, list) and all(type(size) is int and 0 < size < 2**31 for size in shape)
    if not is_valid or not shape:
        raise bad_request("shape must be a list of integers above 0; the first is the number of samples")
    return tuple(shape)


def _tensor_from_json(data: Any, shape: Shape, model_input: ModelInput) -> Array:
    if not isinstance(data, list):
        raise bad_request("data must be a list of numbers")
    inputs = parse_numbers(data, model_input.dtype)
    if inputs.size != math.prod(shape):
        raise bad_request(
            f"data has {inputs.size} numbers, but the shape {list(shape)} needs {math.prod(shape)}"
        )
    return inputs.reshape(shape)


def _tensor_from_bytes(size: Any, binary_data: bytes, shape: Shape, model_input: ModelInput) -> Array:
    needed = math.prod(shape) * model_input.dtype.itemsize
    if type(size) is not int or size != len(binary_data) or size != needed:
        raise bad_request(
            f"the shape {list(shape)} of {datatype_name(model_input.dtype)} needs {needed} bytes, "
            f"but binary_data_size is {size!r} and the body has {len(binary_data)} bytes of binary data"
        )
    little_endian = model_input.dtype.newbyteorder("<")
    tensor: Array = np.frombuffer(binary_data, little_endian).reshape(shape)
    return tensor.astype(model_input.dtype, copy=True)


def _parse_outputs(body: dict[str, Any]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the requested outputs and those of them in binary form; by default all outputs, as JSON."""
    binary_by_default = _parse_parameters(body).get("binary_data_output") is True
    outputs = body.get("outputs")
    if outputs is None:
        names = (OUTPUT, PREDICTION_ID)
        return names, frozenset(names if binary_by_default else ())
    requested = dict(_iter_outputs(outputs, binary_by_default=binary_by_default))
    return tuple(requested), frozenset(name for name, is_binary in requested.items() if is_binary)


def _iter_outputs(outputs: Any, *, binary_by_default: bool) -> Iterator[tuple[str, bool]]:
    if not isinstance(outputs, list) or not outputs:
        raise bad_request("outputs must be a list of the requested outputs")
    for output in outputs:
        name = output.get("name") if isinstance(output, dict) else None
        if name not in (OUTPUT, PREDICTION_ID):
            raise bad_request(f"unknown output {name!r}. The outputs are {OUTPUT!r} and {PREDICTION_ID!r}")
        yield name, _parse_parameters(output).get("binary_data", binary_by_default) is True


def _parse_parameters(body: dict[str, Any]) -> dict[str, Any]:
    parameters = body.get("parameters", {})
    if not isinstance(parameters, dict):
        raise bad_request("parameters must be an object")
    return parameters


# --- responses ------------------------------------------------------------------------------


def _describe_tensor(name: str, tensor: Array, *, binary: bool) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "name": name,
        "shape": list(tensor.shape),
        "datatype": _datatype_of(tensor),
    }
    if binary:
        return {**metadata, "parameters": {"binary_data_size": tensor.nbytes}}
    return {**metadata, "data": tensor.ravel().tolist()}


def _datatype_of(tensor: Array) -> str:
    name = _NAMES.get(tensor.dtype.newbyteorder("="))
    if name is None:
        raise HttpError(500, f"the protocol has no datatype for the model's output type {tensor.dtype}")
    return name


def _to_little_endian(tensor: Array) -> Array:
    return tensor.astype(tensor.dtype.newbyteorder("<"), copy=False)
