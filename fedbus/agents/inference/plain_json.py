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

from fedbus.domain.row_validation import is_class, shape_fits
from fedbus.stores.captured.reader import Label

MAX_LABEL: Final = 2**53
"""Beyond it not every whole number is its own float."""
BAD_REQUEST: Final = 400
NOT_FOUND: Final = 404
TOO_SLOW: Final = 408
CONFLICT: Final = 409
TOO_LARGE: Final = 413
WRONG_TYPE: Final = 415
TOO_MANY: Final = 429
BROKEN: Final = 500
COME_AGAIN: Final = 503

Array: TypeAlias = np.ndarray[Any, Any]
Shape: TypeAlias = tuple[int, ...]


class Refusal(Exception):
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
class Takes:
    """What the model takes: *shape* of one sample (-1: any length; None: anything), and how many at once."""

    dtype: "np.dtype[Any]"
    shape: Shape | None
    most: int


@dataclass(frozen=True)
class Samples:
    """What is to be predicted, and what is known to be true of it."""

    inputs: Array
    labels: list[Label | None]


def samples(content: bytes, takes: Takes) -> Samples:
    """The samples in a plain request. Raises Refusal."""
    body = json_object(content)
    rows = body.get("inputs")
    if not isinstance(rows, list) or not rows:
        raise bad('give at least one sample: {"inputs": [[…], …]}')
    check_count(len(rows), takes)
    inputs = numbers(rows, takes.dtype)
    check_shape(inputs.shape[1:], takes)
    return Samples(inputs, _labels(body, len(inputs)))


def label_said(content: bytes) -> Label:
    """The label in a piece of feedback. Raises Refusal."""
    body = json_object(content)
    if "label" not in body:
        raise bad('say what is true: {"label": …}')
    return _label(body["label"])


# --- what both this and the Open Inference Protocol check ---------------------------------------


def bad(reason: str) -> Refusal:
    return Refusal(BAD_REQUEST, reason)


def json_object(content: bytes) -> dict[str, Any]:
    """The body, which must be a JSON object."""
    try:
        body = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise bad(f"the body is not JSON: {one_line(error)}") from error
    if not isinstance(body, dict):
        raise bad("the body must be a JSON object")
    return body


def check_count(count: int, takes: Takes) -> None:
    if count > takes.most:
        raise Refusal(TOO_LARGE, f"{count} samples are too many: send at most {takes.most} at once")


def check_shape(shape: Shape, takes: Takes) -> None:
    """Whether one sample is shaped as the model takes it."""
    if takes.shape is not None and not shape_fits(shape, takes.shape):
        raise bad(f"a sample must have the shape {list(takes.shape)}, and not {list(shape)}")


def check_labels(labels: Iterable[Label | None], classes: int | None) -> None:
    """Whether each is one of so many *classes*, where it is known how many there are.

    One that is not would fail every training that gets it.
    """
    if classes is None:
        return
    for label in labels:
        if label is not None and not is_class(label, classes):
            raise bad(
                f"a label must be a class of the model, a whole number from 0 to {classes - 1}, "
                f"and not {one_line(label)[:40]}"
            )


def numbers(rows: list[Any], dtype: "np.dtype[Any]") -> Array:
    """JSON numbers as an array of *dtype*: none of them may change by that."""
    try:
        given = np.asarray(rows)
    except (ValueError, OverflowError) as error:
        raise bad("inputs must be numbers, and all samples of one shape") from error
    return _as_booleans(given) if dtype.kind == "b" else _as_numbers(given, dtype)


def check_finite(inputs: Array) -> None:
    if inputs.dtype.kind == "f" and not np.isfinite(inputs).all():
        raise bad(f"inputs must be finite numbers that fit into {inputs.dtype.itemsize * 8} bits")


def one_line(said: object) -> str:
    return " ".join(str(said).split())[:300] or type(said).__name__


def _as_booleans(given: Array) -> Array:
    if given.dtype.kind != "b":
        raise bad("inputs must be true or false: that is what the model takes")
    return given


def _as_numbers(given: Array, dtype: "np.dtype[Any]") -> Array:
    if given.dtype.kind not in "iuf":
        raise bad(f"inputs must be numbers, and {_instead(given)}")
    if dtype.kind in "iu":
        return _as_whole_numbers(given, dtype)
    with np.errstate(over="ignore"):
        inputs: Array = given.astype(dtype)
    check_finite(inputs)
    return inputs


def _instead(given: Array) -> str:
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
        raise bad(f"inputs must be whole numbers: the model takes {dtype}")
    bounds = np.iinfo(dtype)
    if given.size and (int(given.min()) < bounds.min or int(given.max()) > bounds.max):
        raise bad(f"inputs must be whole numbers from {bounds.min} to {bounds.max}: the model takes {dtype}")
    inputs: Array = given.astype(dtype)
    return inputs


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _labels(body: dict[str, Any], count: int) -> list[Label | None]:
    labels = body.get("labels")
    if labels is None:
        return [None] * count
    if not isinstance(labels, list) or len(labels) != count:
        raise bad(f"labels must be a list with one for each of the {count} samples, or null where unknown")
    return [None if label is None else _label(label) for label in labels]


def _label(value: Any) -> Label:
    """A number, or a list of numbers."""
    if isinstance(value, list) and value and all(map(_is_number, value)):
        return [float(one) for one in value]
    if _is_number(value):
        number: int | float = value
        return number
    raise bad("a label must be a finite number, or a list of them")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= MAX_LABEL
