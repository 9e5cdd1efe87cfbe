"""What somebody who wants a prediction may say in plain JSON, and what is said where it makes no sense.

    {"inputs": [[…], …], "labels": [… or null, …]?}   → samples as the model takes them, and what is true of them
    {"label": …}                                      → what was true, later

Nothing here knows how a request came: by HTTP and by NATS it is the same bytes, and a `Refusal` is
an HTTP status wherever it goes.
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
"""Beyond it not every whole number is its own float."""
BAD_REQUEST: Final = 400
NOT_FOUND: Final = 404
REQUEST_TIMEOUT: Final = 408
CONFLICT: Final = 409
CONTENT_TOO_LARGE: Final = 413
UNSUPPORTED_MEDIA_TYPE: Final = 415
TOO_MANY_REQUESTS: Final = 429
INTERNAL_ERROR: Final = 500
SERVICE_UNAVAILABLE: Final = 503

Array: TypeAlias = np.ndarray[Any, Any]
Shape: TypeAlias = tuple[int, ...]


class HttpError(Exception):
    """A request that is not answered: an HTTP status, one line that says why, and when to come again, if at all."""

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
    """What the model takes: *shape* of one sample (-1: any length; None: anything), and how many at once."""

    dtype: "np.dtype[Any]"
    shape: Shape | None
    most: int


@dataclass(frozen=True)
class PredictionSamples:
    """What is to be predicted, and what is known to be true of it."""

    inputs: Array
    labels: list[Label | None]


def parse_samples(content: bytes, takes: ModelInput) -> PredictionSamples:
    """The samples in a plain request. Raises Refusal."""
    body = parse_json_object(content)
    rows = body.get("inputs")
    if not isinstance(rows, list) or not rows:
        raise bad_request('give at least one sample: {"inputs": [[…], …]}')
    check_count(len(rows), takes)
    inputs = parse_numbers(rows, takes.dtype)
    check_shape(inputs.shape[1:], takes)
    return PredictionSamples(inputs, _parse_labels(body, len(inputs)))


def parse_label(content: bytes) -> Label:
    """The label in a piece of feedback. Raises Refusal."""
    body = parse_json_object(content)
    if "label" not in body:
        raise bad_request('say what is true: {"label": …}')
    return _parse_label_value(body["label"])


# --- what both this and the Open Inference Protocol check ---------------------------------------


def bad_request(reason: str) -> HttpError:
    return HttpError(BAD_REQUEST, reason)


def parse_json_object(content: bytes) -> dict[str, Any]:
    """The body, which must be a JSON object."""
    try:
        body = json.loads(content, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON: {to_one_line(error)}") from error
    if not isinstance(body, dict):
        raise bad_request("the body must be a JSON object")
    return body


def check_count(count: int, takes: ModelInput) -> None:
    if count > takes.most:
        raise HttpError(CONTENT_TOO_LARGE, f"{count} samples are too many: send at most {takes.most} at once")


def check_shape(shape: Shape, takes: ModelInput) -> None:
    """Whether one sample is shaped as the model takes it."""
    if takes.shape is not None and not is_shape_allowed(shape, takes.shape):
        raise bad_request(f"a sample must have the shape {list(takes.shape)}, and not {list(shape)}")


def check_labels(labels: Iterable[Label | None], classes: int | None) -> None:
    """Whether each is one of so many *classes*, where it is known how many there are.

    One that is not would fail every training that gets it.
    """
    if classes is None:
        return
    for label in labels:
        if label is not None and not is_class_label(label, classes):
            raise bad_request(
                f"a label must be a class of the model, a whole number from 0 to {classes - 1}, "
                f"and not {to_one_line(label)[:40]}"
            )


def parse_numbers(rows: list[Any], dtype: "np.dtype[Any]") -> Array:
    """JSON numbers as an array of *dtype*: none of them may change by that."""
    try:
        given = np.asarray(rows)
    except (ValueError, OverflowError) as error:
        raise bad_request("inputs must be numbers, and all samples of one shape") from error
    return _as_booleans(given) if dtype.kind == "b" else _as_numbers(given, dtype)


def check_finite(inputs: Array) -> None:
    if inputs.dtype.kind == "f" and not np.isfinite(inputs).all():
        raise bad_request(f"inputs must be finite numbers that fit into {inputs.dtype.itemsize * 8} bits")


def to_one_line(said: object) -> str:
    return " ".join(str(said).split())[:300] or type(said).__name__


def _as_booleans(given: Array) -> Array:
    if given.dtype.kind != "b":
        raise bad_request("inputs must be true or false: that is what the model takes")
    return given


def _as_numbers(given: Array, dtype: "np.dtype[Any]") -> Array:
    if given.dtype.kind not in "iuf":
        raise bad_request(f"inputs must be numbers, and {_describe_content(given)}")
    if dtype.kind in "iu":
        return _as_whole_numbers(given, dtype)
    with np.errstate(over="ignore"):
        inputs: Array = given.astype(dtype)
    check_finite(inputs)
    return inputs


def _describe_content(given: Array) -> str:
    """What is there where numbers should be."""
    match given.dtype.kind:
        case "b":
            return "not true or false"
        case "U":
            return "not text"
        case _ if all(isinstance(one, int | float) for one in given.flat):
            return "numbers that fit into 64 bits"
        case _:
            return "neither null nor objects"


def _as_whole_numbers(given: Array, dtype: "np.dtype[Any]") -> Array:
    if given.dtype.kind == "f":
        raise bad_request(f"inputs must be whole numbers: the model takes {dtype}")
    bounds = np.iinfo(dtype)
    if given.size and (int(given.min()) < bounds.min or int(given.max()) > bounds.max):
        raise bad_request(
            f"inputs must be whole numbers from {bounds.min} to {bounds.max}: the model takes {dtype}"
        )
    inputs: Array = given.astype(dtype)
    return inputs


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _parse_labels(body: dict[str, Any], count: int) -> list[Label | None]:
    labels = body.get("labels")
    if labels is None:
        return [None] * count
    if not isinstance(labels, list) or len(labels) != count:
        raise bad_request(
            f"labels must be a list with one for each of the {count} samples, or null where unknown"
        )
    return [None if label is None else _parse_label_value(label) for label in labels]


def _parse_label_value(value: Any) -> Label:
    """A number, or a list of numbers."""
    if isinstance(value, list) and value and all(map(_is_number, value)):
        return [float(one) for one in value]
    if _is_number(value):
        number: int | float = value
        return number
    raise bad_request("a label must be a finite number, or a list of them")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= MAX_EXACT_INTEGER
