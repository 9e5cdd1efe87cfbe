"""What a model builder may return, and what its errors name."""

from typing import Any

import numpy as np
import pytest
import torch

from fedbus.learning.library import BadTask
from fedbus.learning.task_model import model_arrays


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (torch.nn.Linear(2, 1), ["weight", "bias"]),
        (torch.nn.Linear(2, 1).state_dict(), ["weight", "bias"]),
        ({"coef": np.zeros((3, 2)), "intercept": np.zeros(3)}, ["coef", "intercept"]),
        ([np.zeros(3), torch.zeros(2)], ["0", "1"]),
        ((np.zeros(3),), ["0"]),
        ([], []),
    ],
    ids=["a module", "a state dict", "a dict of arrays", "a list", "a tuple", "an empty list"],
)
def test_a_model_has_named_arrays(model: Any, names: list[str]) -> None:
    arrays = model_arrays(model, "app:model")
    assert list(arrays) == names
    assert all(isinstance(one, np.ndarray) for one in arrays.values())


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (
            "weights.npz",
            "app:model returned an object of type str. Return a torch module, or a dict or a list",
        ),
        (np.zeros(3), "app:model returned an array of dtype float64"),
        ({"coef": np.array(["a"])}, "'coef' of app:model is an array of dtype <U1, not an array of numbers"),
        ([None], "'0' of app:model is an object of type NoneType, not an array of numbers"),
        ([torch.zeros(2, dtype=torch.bfloat16)], "which NumPy, and so Flower, does not support"),
    ],
    ids=["text", "one array", "an array of text", "None", "bfloat16"],
)
def test_what_is_no_model_is_named(model: Any, what: str) -> None:
    with pytest.raises(BadTask) as error:
        model_arrays(model, "app:model")
    assert what in str(error.value)
