"""A model that answers: the task's own, with the weights of one version, tried before it may serve.

What is refused, and why it is refused here: weights that are not those of the task's model (the
first tensor that differs is named), weights that are not numbers, and a model that does not
answer samples of the task, or answers them with NaN.
"""

from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from fedbus.contracts.task.task import Task
from fedbus.learning import weights
from fedbus.learning.flower import task_code

Array: TypeAlias = np.ndarray[Any, Any]


class ModelRefused(Exception):
    """This model may not serve; the text is one line that says why."""


class Predictor(Protocol):
    """Something that answers; called from one thread at a time."""

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """The shape of one sample, -1 where any length will do; None: whatever the model takes."""

    @property
    def input_dtype(self) -> "np.dtype[Any]":
        """What the numbers of a sample must be: pixels are ``float32``, token ids ``int64``."""

    @property
    def classes(self) -> int | None:
        """How many classes it tells apart; None where its answers are none, or it has not answered yet."""

    def predict(self, inputs: Array) -> Array:
        """One answer for each of *inputs* (n, …)."""


class TorchPredictor:
    """The model of *task* with the weights in the file *artifact*. Building it blocks; raises ModelRefused."""

    def __init__(self, task: Task, artifact: Path) -> None:
        declared = task.table.serving
        self.input_shape: tuple[int, ...] | None = declared.input_shape
        self.input_dtype: np.dtype[Any] = np.dtype(declared.input_dtype or np.float32)
        self.classes: int | None = None
        self._undeclared = [declared.input_shape is None, declared.input_dtype is None]
        path = Path(task.path)
        try:
            self._predict_function = (
                task_code.load_function(path, task.table.predict) if task.table.predict else None
            )
            self._model = _build_model(path, task.table.model, weights.load(artifact))
        except (task_code.BadTask, weights.BadWeights) as error:
            raise ModelRefused(str(error)) from error

    def predict(self, inputs: Array) -> Array:
        import torch  # noqa: PLC0415 - a device without torch may still import the agents

        with torch.inference_mode():
            if self._predict_function is not None:
                return np.asarray(self._predict_function(self._model, inputs))
            outputs = self._model(torch.from_numpy(inputs))
            self.classes = outputs.shape[1] if outputs.ndim == 2 and outputs.shape[1] > 1 else None
            return most_likely(outputs)

    def probe(self, inputs: Array) -> None:
        """Let the model answer *inputs*; raises ModelRefused where it cannot, or says NaN or infinity."""
        try:
            outputs = self.predict(inputs)
        except Exception as error:
            raise ModelRefused(
                f"the model does not answer samples of shape {inputs.shape}: {task_code.format_error(error)}"
            ) from error
        if len(outputs) != len(inputs):
            raise ModelRefused(f"the model gives {len(outputs)} answers to {len(inputs)} samples")
        if not _is_finite(outputs):
            raise ModelRefused("the model answers samples with NaN or infinity")
        shape, dtype = self._undeclared
        self.input_shape = inputs.shape[1:] if shape else self.input_shape
        self.input_dtype = inputs.dtype if dtype else self.input_dtype


class NonFiniteOutput(ValueError):
    """The model's output holds NaN or infinity, so it has no highest class."""


def most_likely(outputs: Any) -> Array:
    """The class with the highest of *outputs* (n, …, classes), for each sample."""
    import torch  # noqa: PLC0415

    if not bool(torch.isfinite(outputs).all()):  # argmax would call NaN a class
        raise NonFiniteOutput("its output holds NaN or infinity")
    classes: Array = outputs.argmax(dim=-1).numpy()
    return classes


def _build_model(path: Path, reference: str, arrays: weights.Arrays) -> Any:
    """The task's model with *arrays* in it, ready to answer."""
    make = task_code.load_function(path, reference)
    try:
        model = make()
        expected = weights.from_torch(model.state_dict())
    except weights.BadWeights:
        raise
    except Exception as error:
        raise ModelRefused(f"{reference!r} makes no model: {task_code.format_error(error)}") from error
    if difference := weights.first_difference(expected, arrays):
        raise ModelRefused(f"the weights are not those of {reference!r}: tensor {difference}")
    if bad := next((name for name, array in arrays.items() if not _is_finite(array)), None):
        raise ModelRefused(f"tensor {bad!r} holds NaN or infinity")
    model.load_state_dict(weights.to_torch(arrays), strict=True)
    model.eval()
    return model


def _is_finite(array: Array) -> bool:
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())
