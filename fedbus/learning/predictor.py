"""The predictor of a task: its model with the weights of one version, probed before it may serve.

It rejects weights of another architecture (the error names the first tensor that differs), weights with NaN
or infinity, and a model that fails on samples of the task or returns NaN or infinity for them.
"""

from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from fedbus.contracts.task.task import Task
from fedbus.learning import weights
from fedbus.learning.flower import task_code

Array: TypeAlias = np.ndarray[Any, Any]


class ModelRefused(Exception):
    """This model may not serve. The text is the reason, in one line."""


class Predictor(Protocol):
    """A model that predicts. Callers use it from one thread at a time."""

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """The shape of one sample, -1 for a dimension of any length; None if it is not known."""

    @property
    def input_dtype(self) -> "np.dtype[Any]":
        """The dtype of a sample, for example ``float32`` for pixels or ``int64`` for token ids."""

    @property
    def classes(self) -> int | None:
        """The number of classes; None if the model does not classify, or has not predicted yet."""

    def predict(self, inputs: Array) -> Array:
        """Return one prediction for each sample of *inputs* (n, …)."""


class TorchPredictor:
    """The model of *task* with the weights in the safetensors file *artifact*.

    The constructor blocks.

    Raises:
        ModelRefused: the model cannot be built, or the weights do not fit it.

    """

    def __init__(self, task: Task, artifact: Path) -> None:
        serving = task.table.serving
        self.input_shape: tuple[int, ...] | None = serving.input_shape
        self.input_dtype: np.dtype[Any] = np.dtype(serving.input_dtype or np.float32)
        self.classes: int | None = None
        self._infer_shape = serving.input_shape is None
        self._infer_dtype = serving.input_dtype is None
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
        """Predict *inputs* (n, …), and take the sample shape and dtype from them if the task declares none.

        Raises:
            ModelRefused: the model raises, returns a wrong number of predictions, or returns NaN or infinity.

        """
        try:
            outputs = self.predict(inputs)
        except Exception as error:
            raise ModelRefused(
                f"the model fails on samples of shape {inputs.shape}: {task_code.format_error(error)}"
            ) from error
        if len(outputs) != len(inputs):
            raise ModelRefused(f"the model returned {len(outputs)} predictions for {len(inputs)} samples")
        if not _is_finite(outputs):
            raise ModelRefused("the model returned NaN or infinity for samples")
        self.input_shape = inputs.shape[1:] if self._infer_shape else self.input_shape
        self.input_dtype = inputs.dtype if self._infer_dtype else self.input_dtype


class NonFiniteOutput(ValueError):
    """The model's output contains NaN or infinity, so no class has the highest score."""


def most_likely(outputs: Any) -> Array:
    """Return the class with the highest score of *outputs* (n, …, classes), as an int64 array (n, …).

    Raises:
        NonFiniteOutput: *outputs* contains NaN or infinity.

    """
    import torch  # noqa: PLC0415 - takes seconds

    if not bool(torch.isfinite(outputs).all()):  # argmax would return the index of a NaN
        raise NonFiniteOutput("the output contains NaN or infinity")
    classes: Array = outputs.argmax(dim=-1).numpy()
    return classes


def _build_model(path: Path, reference: str, arrays: weights.Arrays) -> Any:
    """Build the task's model with *arrays* as its weights, in evaluation mode."""
    builder = task_code.load_function(path, reference)
    try:
        model = builder()
        expected = weights.from_torch(model.state_dict())
    except weights.BadWeights:
        raise
    except Exception as error:
        raise ModelRefused(f"{reference!r} did not build a model: {task_code.format_error(error)}") from error
    if difference := weights.first_difference(expected, arrays):
        raise ModelRefused(f"the weights do not fit the model of {reference!r}: tensor {difference}")
    if non_finite := next((name for name, array in arrays.items() if not _is_finite(array)), None):
        raise ModelRefused(f"tensor {non_finite!r} contains NaN or infinity")
    model.load_state_dict(weights.to_torch(arrays), strict=True)
    model.eval()
    return model


def _is_finite(array: Array) -> bool:
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())
