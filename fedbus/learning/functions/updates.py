"""The update of one client, and the check of weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np

from fedbus.learning.stale_updates import is_finite
from fedbus.learning.weights import SUPPORTED_DTYPES

MAX_METRICS: Final = 1000
MAX_METRIC_NAME_CHARS: Final = 100
MAX_EXAMPLES: Final = 2**53
"""Larger integers are not exact as weights of a mean."""

Weights: TypeAlias = dict[str, np.ndarray[Any, Any]]


class BadUpdate(ValueError):
    """Weights, metrics or a number of examples are invalid. The text names what is wrong, in one line."""


@dataclass(frozen=True)
class Update:
    """The result of one client's training."""

    client: str
    weights: Weights
    num_examples: int
    metrics: dict[str, float] = field(default_factory=dict)
    weight: float = 1.0
    """The weight in a weighted mean: `num_examples`, times the client's score if the task weighs by score."""


def check_weights(weights: object) -> Weights:
    """Return *weights* if they are a dict of finite NumPy arrays that can be stored, with names as strings.

    A NumPy scalar is converted to an array without dimensions.

    Raises:
        BadUpdate: they are anything else.

    """
    if not isinstance(weights, Mapping):
        raise BadUpdate(f"the weights are a {type(weights).__name__}. Return a dict of NumPy arrays")
    with np.errstate(over="ignore", invalid="ignore"):
        return {_check_name(name): _check_array(name, array) for name, array in weights.items()}


def check_same_arrays(
    weights: Mapping[str, np.ndarray[Any, Any]], expected: Mapping[str, np.ndarray[Any, Any]]
) -> None:
    """Check that *weights* have the names and shapes of *expected*.

    Raises:
        BadUpdate: they differ; the text names the first array that does.

    """
    for name, array in expected.items():
        if name not in weights:
            raise BadUpdate(f"the weights lack {name!r}, which the global weights have")
        if weights[name].shape != array.shape:
            raise BadUpdate(f"{name!r} has shape {weights[name].shape} instead of {array.shape}")
    extra = next((name for name in weights if name not in expected), None)
    if extra is not None:
        raise BadUpdate(f"the weights have {extra!r}, which the global weights do not have")


def _check_name(name: object) -> str:
    if not isinstance(name, str) or not name or name == "__metadata__":
        raise BadUpdate(f"{name!r} is not a name of an array. Use a string that is not empty")
    return name


def _check_array(name: str, array: object) -> np.ndarray[Any, Any]:
    if isinstance(array, np.generic):
        array = np.asarray(array)
    if not isinstance(array, np.ndarray):
        raise BadUpdate(
            f"{name!r} is a {type(array).__name__} instead of a NumPy array. Convert it with numpy.asarray"
        )
    if array.dtype.name not in SUPPORTED_DTYPES:
        raise BadUpdate(f"{name!r} has dtype {array.dtype}. Use one of {', '.join(SUPPORTED_DTYPES)}")
    if not is_finite(array):
        raise BadUpdate(f"{name!r} contains NaN or infinity")
    return np.asarray(array)
