"""The content of a message between server and client: a few values and weights.

    length of the values (8 bytes, little-endian) · values as JSON, padded to 8 bytes · a safetensors file

The weights of a decoded message are views of its bytes, which cannot be written to.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from fedbus.learning import weights
from fedbus.learning.functions.updates import MAX_METRIC_NAME_CHARS, MAX_METRICS, Weights

MAX_VALUES_BYTES: Final = 4 * 1024**2
ALIGNMENT: Final = 8


class BadContent(ValueError):
    """The bytes are not a valid message."""


@dataclass(frozen=True)
class Content:
    """The content of one message."""

    values: Mapping[str, Any]
    """JSON values: ``config`` of a request; ``metrics`` and ``num-examples`` of a reply."""
    weights: Weights = field(default_factory=dict)


def encode(content: Content) -> list[bytes | memoryview]:
    """Return the buffers of *content*. The weights are not copied and must not change until they are sent.

    Raises:
        BadWeights: an array has a dtype that cannot be stored.

    """
    values = json.dumps(content.values).encode()
    values += b" " * (-len(values) % ALIGNMENT)
    file = weights.pack(content.weights).buffers if content.weights else _empty_file()
    return [len(values).to_bytes(8, "little"), values, *file]


@cache
def _empty_file() -> list[bytes | memoryview]:
    return weights.pack({}).buffers


def decode(data: bytes | memoryview) -> Content:
    """Parse the bytes of a message.

    Raises:
        BadContent: they are not valid.

    """
    view = memoryview(data).cast("B")
    length = int.from_bytes(view[:8], "little")
    if len(view) < 8 or length > min(MAX_VALUES_BYTES, len(view) - 8):
        raise BadContent("the message is truncated, or its values are too long")
    try:
        values = json.loads(bytes(view[8 : 8 + length]))
    except (ValueError, RecursionError) as error:
        raise BadContent(f"the values of the message are not JSON: {error}") from None
    if not isinstance(values, dict):
        raise BadContent("the values of the message are not a JSON object")
    try:
        return Content(values, weights.unpack(view[8 + length :]))
    except weights.BadWeights as error:
        raise BadContent(str(error)) from None


def to_metrics(value: object) -> dict[str, float]:
    """Return the metrics of a reply. A metric that is no finite number is left out.

    Raises:
        BadContent: *value* is not an object, has too many metrics, or a name is too long.

    """
    if not isinstance(value, dict):
        raise BadContent("the metrics of the reply are not an object")
    if len(value) > MAX_METRICS:
        raise BadContent(f"{len(value)} metrics (limit {MAX_METRICS})")
    if any(len(name) > MAX_METRIC_NAME_CHARS for name in value):
        raise BadContent(f"a metric has a name of more than {MAX_METRIC_NAME_CHARS} characters")
    return {name: float(number) for name, number in value.items() if _is_finite(number)}


def _is_finite(number: object) -> bool:
    """Return whether *number* is a number that fits into a float: an integer of JSON may have thousands of digits."""
    return isinstance(number, int | float) and abs(number) <= sys.float_info.max
