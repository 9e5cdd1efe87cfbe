"""The weighted sum of the updates of several clients in one process, for strategies that only need the mean."""

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from fedbus.learning.functions.message_codec import Content, decode, encode
from fedbus.learning.functions.strategies import RunningMean
from fedbus.learning.functions.updates import Weights
from fedbus.learning.payload import Payload

SUM_REQUEST: Final = b"weighted by examples"


class FunctionsUpdateSum:
    """A sum of updates, each multiplied by its number of examples."""

    def __init__(self) -> None:
        self._mean = RunningMean()

    def add(self, weights: Weights, num_examples: int) -> None:
        """Add an update whose names and shapes are those of the first one."""
        if num_examples:
            self._mean.add(weights, num_examples)

    @property
    def dtypes(self) -> dict[str, "np.dtype[Any]"]:
        return self._mean.dtypes

    def take(self) -> Payload | None:
        """Return the sum, and begin a new one; None if nothing was added."""
        mean, self._mean = self._mean, RunningMean()
        if not mean.total_weight:
            return None
        return FunctionsPartialSum(mean.sums, mean.total_weight, mean.dtypes).pack()


@dataclass(frozen=True)
class FunctionsPartialSum:
    """The sum of several updates that another process has made."""

    sums: Weights
    """In float64 or complex128."""
    weight: float
    """The sum of the weights."""
    dtypes: dict[str, "np.dtype[Any]"] = field(default_factory=dict)
    """Those of the first update."""

    def pack(self) -> Payload:
        """Return the bytes. A safetensors file has no complex128, so complex sums are pairs of floats."""
        values = {"weight": self.weight, "dtypes": {name: str(dtype) for name, dtype in self.dtypes.items()}}
        sums = {name: _to_floats(array) for name, array in self.sums.items()}
        return Payload.pack(encode(Content(values, sums)), as_blob=True)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> "FunctionsPartialSum":
        content = decode(data)
        dtypes = {name: np.dtype(dtype) for name, dtype in content.values["dtypes"].items()}
        sums = {name: _from_floats(array, dtypes[name]) for name, array in content.weights.items()}
        return cls(sums, float(content.values["weight"]), dtypes)


def _to_floats(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.reshape(*array.shape, 1).view(np.float64) if array.dtype.kind == "c" else array


def _from_floats(array: np.ndarray[Any, Any], dtype: "np.dtype[Any]") -> np.ndarray[Any, Any]:
    return array.view(np.complex128)[..., 0] if dtype.kind == "c" else array
