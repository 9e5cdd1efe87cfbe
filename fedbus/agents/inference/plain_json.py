"""Parsing and validation of prediction requests in plain JSON.

    {"inputs": [[…], …], "labels": [… or null, …]?}   → samples in the dtype and shape of the model, with labels
    {"label": …}                                      → the label of an earlier prediction

The module is independent of the transport: requests over HTTP and NATS are the same bytes, and an `HttpError`
has an HTTP status on both.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from fedbus.domain.row_validation import is_class_label, is_shape_allowed
from fedbus.stores.captured.reader import Label

MAX_EXACT_INTEGER: Final = 2**53
"""Largest integer up to which a float64 represents each integer exactly."""
BAD_REQUEST: Final = 400
NOT_FOUND: Final = 404
REQUEST_TIMEOUT: Final = 408
CONFLICT: Final = 409
CONTENT_TOO_LARGE: Final = 413
UNSUPPORTED_MEDIA_TYPE: Final = 415
TOO_MANY_REQUESTS: Final = 429
INTERNAL_ERROR: Final = 500
SERVICE_UNAVAILABLE: Final = 503
NO_MODEL: Final = "no model is loaded yet. Retry when /ready answers with 200"

Array: TypeAlias = np.ndarray[Any, Any]
Shape: TypeAlias = tuple[int, ...]


class HttpError(Exception):
    """An error response: an HTTP status, the reason in one line, and the Retry-After time, if any."""

    def __init__(self, status: int, reason: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> bytes:
        return json.dumps({"error": self.reason}).encode()


@dataclass(frozen=True)
class ModelInput:
    """The input of a model: *shape* of one sample (-1: any length; None: any shape), and the batch limit."""

    dtype: "np.dtype[Any]"
    shape: Shape | None
    max_samples: int


@dataclass(frozen=True)
class PredictionSamples:
    """Samples to predict, with their labels where known."""

    inputs: Array
    labels: list[Label | None]


def parse_samples(content: bytes, model_input: ModelInput) -> PredictionSamples:
    """Parse the samples in a request.

    Raises:
        HttpError: the request is invalid.

    """
    body = parse_json_object(content)
    rows = body.get("inputs")
    if not isinstance(rows, list) or not rows:
        raise bad_request('inputs must be a list with at least one sample: {"inputs": [[…], …]}')
    check_count(len(rows), model_input)
    inputs = parse_numbers(rows, model_input.dtype)
    check_shape(inputs.shape[1:], model_input)
    return PredictionSamples(inputs, _parse_labels(body, len(inputs)))


def parse_label(content: bytes) -> Label:
    """Parse the label in a feedback request.

    Raises:
        HttpError: the request is invalid.

    """
    body = parse_json_object(content)
    if "label" not in body:
        raise bad_request('the label is missing. Send {"label": …}')
    return _parse_label_value(body["label"])


# --- shared with the Open Inference Protocol ---------------------------------------------------


def bad_request(reason: str) -> HttpError:
    return HttpError(BAD_REQUEST, reason)


def parse_json_object(content: bytes) -> dict[str, Any]:
    """Parse *content*, which must be a JSON object.

    Raises:
        HttpError: it is not.

    """
    try:
        body = json.loads(content, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not valid JSON: {to_one_line(error)}") from error
    if not isinstance(body, dict):
        raise bad_request("the body must be a JSON object")
    return body


def check_count(count: int, model_input: ModelInput) -> None:
    if count > model_input.max_samples:
        raise HttpError(CONTENT_TOO_LARGE, f"too many samples: {count} (limit {model_input.max_samples})")


def check_shape(shape: Shape, model_input: ModelInput) -> None:
    """Raise HttpError unless the model accepts samples of *shape*."""
    if model_input.shape is not None and not is_shape_allowed(shape, model_input.shape):
        raise bad_request(f"a sample must have the shape {list(model_input.shape)}, not {list(shape)}")


def check_labels(labels: Iterable[Label | None], classes: int | None) -> None:
    """Raise HttpError unless each label is one of the *classes*; None skips the check.

    An invalid label would fail all training on the row.
    """
    if classes is None:
        return
    for label in labels:
        if label is not None and not is_class_label(label, classes):
            raise bad_request(
                f"a label must be a class of the model, an integer from 0 to {classes - 1}, "
                f"not {to_one_line(label)[:40]}"
            )


def parse_numbers(rows: list[Any], dtype: "np.dtype[Any]") -> Array:
    """Convert JSON numbers to an array of *dtype*.

    Raises:
        HttpError: a value is not a number, or *dtype* cannot represent it.

    """
    try:
        array = np.asarray(rows)
    except (ValueError, OverflowError) as error:
        raise bad_request("inputs must be numbers, and all samples must have the same shape") from error
    return _as_booleans(array) if dtype.kind == "b" else _as_numbers(array, dtype)


def check_finite(inputs: Array) -> None:
    if inputs.dtype.kind == "f" and not np.isfinite(inputs).all():
        raise bad_request(f"inputs must be finite numbers in the range of {inputs.dtype}")


def to_one_line(value: object) -> str:
    return " ".join(str(value).split())[:300] or type(value).__name__


def _as_booleans(array: Array) -> Array:
    if array.dtype.kind != "b":
        raise bad_request("inputs must be true or false: the model has boolean inputs")
    return array


def _as_numbers(array: Array, dtype: "np.dtype[Any]") -> Array:
    if array.dtype.kind not in "iuf":
        raise bad_request(f"inputs must be numbers, {_describe_invalid(array)}")
    if dtype.kind in "iu":
        return _as_integers(array, dtype)
    with np.errstate(over="ignore"):
        inputs: Array = array.astype(dtype)
    check_finite(inputs)
    return inputs


def _describe_invalid(array: Array) -> str:
    """Describe why the values of *array* are not accepted as numbers."""
    match array.dtype.kind:
        case "b":
            return "not true or false"
        case "U":
            return "not text"
        case _ if all(isinstance(one, int | float) for one in array.flat):
            return "each in the range of 64 bits"
        case _:
            return "not null or objects"


def _as_integers(array: Array, dtype: "np.dtype[Any]") -> Array:
    if array.dtype.kind == "f":
        raise bad_request(f"inputs must be integers: the model has inputs of type {dtype}")
    bounds = np.iinfo(dtype)
    if array.size and (int(array.min()) < bounds.min or int(array.max()) > bounds.max):
        raise bad_request(
            f"inputs must be integers from {bounds.min} to {bounds.max}: the model has inputs of type {dtype}"
        )
    inputs: Array = array.astype(dtype)
    return inputs


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _parse_labels(body: dict[str, Any], count: int) -> list[Label | None]:
    labels = body.get("labels")
    if labels is None:
        return [None] * count
    if not isinstance(labels, list) or len(labels) != count:
        raise bad_request(
            f"labels must be a list of {count}, one for each sample, with null for an unknown label"
        )
    return [None if label is None else _parse_label_value(label) for label in labels]


def _parse_label_value(value: Any) -> Label:
    """Parse a label: a number, or a list of numbers."""
    if isinstance(value, list) and value and all(map(_is_number, value)):
        return [float(one) for one in value]
    if _is_number(value):
        number: int | float = value
        return number
    raise bad_request("a label must be a finite number, or a list of finite numbers")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= MAX_EXACT_INTEGER
