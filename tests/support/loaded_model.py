"""Loaded models of the inference engine without files, for the tests of its parts."""

from dataclasses import dataclass

import numpy as np

from fedbus.agents.inference.loaded_model import LoadedModel
from fedbus.contracts.model import ModelRef


@dataclass
class FailingSum:
    """Predicts the sum of a sample plus *offset*, and fails on *bad*."""

    offset: int = 0
    bad: float = 13
    input_shape: tuple[int, ...] | None = (1,)
    input_dtype = np.dtype(np.float32)
    classes: int | None = None

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        if (inputs == self.bad).any():
            raise RuntimeError(f"failed\non {self.bad}")
        return np.asarray(inputs.sum(1) + self.offset)


def loaded_model(version: int = 1, *, offset: int = 0, bad: float = 13) -> LoadedModel:
    """A loaded model of *version*; its predictor is a `FailingSum`."""
    ref = ModelRef(version=version, sha256=f"{version:064x}", size_bytes=1, architecture="0" * 64)
    return LoadedModel(ref, FailingSum(offset, bad))
