"""How an app's arrays and the stored model correspond."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedbus.learning.flower.model_binding import ModelBinding, bind
from fedbus.learning.weights import ArchitectureMismatch, Arrays


def make(**shapes: Any) -> Arrays:
    """Return arrays of ones; in the names, __ is a point."""
    return {
        name.replace("__", "."): np.ones(shape, np.float32 if isinstance(shape, tuple) else shape)
        for name, shape in shapes.items()
    }


MODEL = make(body__weight=(2, 3), body__bias=(2,), head__weight=(1, 2), head__bias=(1,))
yes: Callable[[], bool] = lambda: True  # noqa: E731
no: Callable[[], bool] = lambda: False  # noqa: E731


def train(binding: ModelBinding, add: float = 1.0) -> Arrays:
    """Return the model after an app added *add* to each of the arrays that it began with."""
    return binding.to_model({name: array + np.float32(add) for name, array in binding.initial.items()})


def changed_names(model: Arrays) -> list[str]:
    return [name for name, array in model.items() if (array != MODEL[name]).all()]


def test_the_app_gets_the_model_in_its_own_order() -> None:
    app = dict(reversed(MODEL.items()))
    binding = bind(MODEL, app, is_built=yes)
    assert list(binding.initial) == list(app)
    assert binding.is_stored
    assert list(train(binding)) == list(MODEL)


def test_numbered_arrays_are_the_tensors_of_their_positions() -> None:
    app = {str(number): array for number, array in enumerate(MODEL.values())}
    assert list(train(bind(MODEL, app, is_built=yes))) == list(MODEL)


@pytest.mark.parametrize(
    "app",
    [
        make(body__weight=(2, 3), body__bias=(2,)),  # FedBN, LoRA: names of the state dict
        make(weight=(2, 3), bias=(2,)),  # FedPer: the state dict of one submodule
    ],
    ids=["names", "submodule"],
)
def test_a_part_is_merged_into_the_model(app: Arrays) -> None:
    binding = bind(MODEL, app, is_built=yes)
    assert list(binding.initial) == list(app)
    merged = train(binding)
    assert list(merged) == list(MODEL)
    assert changed_names(merged) == ["body.weight", "body.bias"]


def test_a_submodule_that_two_prefixes_fit_is_not_a_part() -> None:
    model = make(a__weight=(2,), b__weight=(2,))
    assert bind(model, make(weight=(2,)), is_built=yes).is_stored is False


def test_without_a_stored_model_the_app_begins_with_its_own() -> None:
    binding = bind({}, make(w=(3,)), is_built=no)
    assert not binding.is_stored
    assert list(train(binding)) == ["w"]


def test_an_app_without_arrays_begins_with_the_model() -> None:
    assert bind(MODEL, {}, is_built=yes).initial is MODEL


def test_arrays_that_grew_in_an_earlier_run_begin_the_next_one() -> None:
    grown, app = make(**{"0": (8,)}), make(**{"0": (3,)})
    binding = bind(grown, app, is_built=no)
    assert binding.is_stored
    assert binding.initial["0"].shape == (8,)
    assert binding.to_model(make(**{"0": (12,)}))["0"].shape == (12,)


def test_a_result_with_other_names_replaces_the_model() -> None:
    binding = bind(MODEL, dict(MODEL), is_built=yes)
    assert list(binding.to_model(make(tree_1=(4,)))) == ["tree_1"]


def test_dtypes_are_those_of_the_model() -> None:
    model = {"n": np.ones((), np.int64)}
    result = bind(model, dict(model), is_built=yes).to_model({"n": np.asarray(1.9999999)})
    assert (result["n"].dtype, int(result["n"])) == (np.dtype(np.int64), 2)


def test_an_app_with_other_arrays_than_the_builder_begins_with_its_own() -> None:
    binding = bind(MODEL, make(lora_a=(2,)), is_built=yes)
    assert not binding.is_stored
    assert list(train(binding)) == ["lora_a"]


def test_changed_code_does_not_continue_the_model_of_a_builder() -> None:
    with pytest.raises(
        ArchitectureMismatch, match=r"'body.weight' is float32\[2, 3\] instead of float32\[5, 3\]"
    ):
        bind(MODEL, make(body__weight=(5, 3)), is_built=yes)


def test_the_builder_is_not_called_for_a_model_that_fits() -> None:
    def fail() -> bool:
        raise AssertionError

    bind(MODEL, dict(MODEL), is_built=fail)


@pytest.mark.parametrize("app", [make(w=(4,)), make(w=(3,), b=(1,))], ids=["shape", "name"])
def test_a_fixed_architecture_refuses_other_arrays(app: Arrays) -> None:
    with pytest.raises(ArchitectureMismatch, match="the app's architecture"):
        bind(make(w=(3,)), app, is_built=no, is_fixed=True)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (make(w=(4,)), r"'w' is float32\[4\] instead of float32\[3\]"),
        (make(w=(3,), b=(1,)), r"'b' float32\[1\] is not expected"),
    ],
    ids=["shape", "name"],
)
def test_a_fixed_architecture_refuses_a_result_that_differs(result: Arrays, reason: str) -> None:
    binding = bind({}, make(w=(3,)), is_built=no, is_fixed=True)
    with pytest.raises(ArchitectureMismatch, match=reason + r'\. The task declares architecture = "fixed"'):
        binding.to_model(result)
