"""The model of a task: what its builder returns, as arrays.

A builder is named by `model` in ``[tool.fedbus]``. It returns a torch module, a dict of arrays (a state dict), or a
list of arrays, whose names are then ``0``, ``1``, … A task without a builder has no first model: its first version is
empty, and its first run begins with the arrays that the app itself begins with.

This module imports torch only if the builder has.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedbus.contracts.task.task import Task
from fedbus.learning import task_code, weights
from fedbus.learning.installed_libraries import open_library
from fedbus.learning.library import BadTask
from fedbus.learning.task_code import describe_error

__all__ = ["build_model", "first_arrays", "is_module", "model_arrays"]


def build_model(task: Task) -> Any:
    """Call the builder of *task*, which must have one, and return what it returns.

    Raises:
        BadTask: the builder cannot be loaded, or raises.

    """
    assert task.table.model is not None, "the task names no builder"
    builder = task_code.load_function(Path(task.path), task.table.model)
    try:
        return builder()
    except (Exception, SystemExit) as error:
        raise BadTask(
            f"{task.table.model} did not build a model: {describe_error(error, Path(task.path))}"
        ) from error


def first_arrays(task: Task) -> weights.Arrays | None:
    """Return the arrays of the first model of *task*: its builder's, or its library's. None if the task has none.

    Raises:
        BadTask: the builder fails, or does not return a model.
        LibraryUnusable: the task names no builder, and its library is not installed.

    """
    if task.table.model is None:
        return open_library(task.table.library).initial_model(task)
    return model_arrays(build_model(task), task.table.model)


def model_arrays(model: Any, reference: str) -> weights.Arrays:
    """Return the arrays of *model*, which the builder *reference* has returned.

    Raises:
        BadTask: it is no model, or one of its arrays cannot be stored.

    """
    if is_module(model):
        model = model.state_dict()
    if isinstance(model, list | tuple):
        model = {str(index): one for index, one in enumerate(model)}
    if not isinstance(model, Mapping):
        raise BadTask(
            f"{reference} returned {_describe_type(model)}. Return a torch module, or a dict or a list of arrays"
        )
    return {str(name): _to_array(one, f"{name!r} of {reference}") for name, one in model.items()}


def is_module(model: Any) -> bool:
    """Return whether *model* is a torch module, without an import of torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def _to_array(value: Any, name: str) -> np.ndarray[Any, Any]:
    if hasattr(value, "detach"):
        try:
            return weights.from_torch({name: value})[name]
        except weights.BadWeights as error:
            raise BadTask(str(error)) from error
    array = np.asarray(value) if isinstance(value, np.ndarray | np.generic | int | float) else None
    if array is None or array.dtype.kind not in "biufc":
        raise BadTask(f"{name} is {_describe_type(value)}, not an array of numbers")
    return array


def _describe_type(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of dtype {value.dtype}"
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"an object of type {name}"
