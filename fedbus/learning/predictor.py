"""The predictor of a task: its model with the weights of one version, probed before it may serve.

    builder of the task        `predict`     the model that predicts
    a torch module             optional      the module with the weights; without `predict`, its outputs (`interpret`)
    a dict or list of arrays   needed        the dict of arrays
    none                       needed        the dict of arrays

A version without tensors is never served: it is the first version of a task without a builder. A version that no code
of the task can serve raises `ModelNotServed`; a device takes it nevertheless, and trains. Weights with NaN or infinity
are rejected, and a model that fails on samples of the task or returns NaN or infinity for them.
"""

from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import numpy as np

from fedbus.contracts.task.task import Task
from fedbus.learning import task_code, weights
from fedbus.learning.task_code import describe_error
from fedbus.learning.task_model import build_model, is_module, model_arrays

Array: TypeAlias = np.ndarray[Any, Any]

EMPTY_MODEL: Final = "it is empty. The first run of the task makes a model"
NO_PREDICT: Final = (
    "the task names neither a `model` that is a torch module nor a function `predict` in [tool.fedbus]"
)


class ModelRefused(Exception):
    """This model may not serve. The text is the reason, in one line."""


class ModelNotServed(ModelRefused):
    """No code of the task can serve this model, or it has no tensors."""


class ModelUnavailable(ModelRefused):
    """The code that builds this model is not available now. A later attempt may succeed."""


class PredictionFailed(Exception):
    """The task's code raised, or returned no predictions. The text names the error and the line of the task."""


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


class TaskPredictor:
    """The model of *task* with the weights in the safetensors file *artifact*.

    The constructor blocks.

    Raises:
        ModelNotServed: no code of the task can serve the weights.
        ModelRefused: the weights are invalid.

    """

    def __init__(self, task: Task, artifact: Path) -> None:
        serving = task.table.serving
        self.input_shape: tuple[int, ...] | None = serving.input_shape
        self.input_dtype: np.dtype[Any] = np.dtype(serving.input_dtype or np.float32)
        self.classes: int | None = None
        self._infer_shape = serving.input_shape is None
        self._infer_dtype = serving.input_dtype is None
        self._root = Path(task.path)
        self._predict_reference = task.predict
        try:
            arrays = weights.load(artifact)
        except weights.BadWeights as error:
            raise ModelRefused(str(error)) from error
        try:
            self._model = _model_with(task, arrays)
            self._predict_function = (
                task_code.load_function(self._root, self._predict_reference)
                if self._predict_reference
                else None
            )
        except (task_code.BadTask, weights.BadWeights) as error:
            raise ModelNotServed(str(error)) from error

    def predict(self, inputs: Array) -> Array:
        """Return one prediction for each sample of *inputs* (n, …).

        Raises:
            PredictionFailed: the task's code raised, or returned no array of numbers.
            NonFiniteOutput: the module's output contains NaN or infinity, so that no class has the highest score.

        """
        try:
            if is_module(self._model):
                return self._predict_with_module(inputs)
            return self._call_predict_function(inputs)
        except (NonFiniteOutput, PredictionFailed):
            raise
        except (Exception, SystemExit) as error:
            raise PredictionFailed(
                f"{self._predict_reference or 'the model'} raised {describe_error(error, self._root)}"
            ) from error

    def _predict_with_module(self, inputs: Array) -> Array:
        import torch  # noqa: PLC0415 - the task's code has imported it

        with torch.inference_mode():
            if self._predict_function is not None:
                return self._call_predict_function(inputs)
            outputs = self._model(torch.from_numpy(inputs))
            if not isinstance(outputs, torch.Tensor) or outputs.ndim == 0:
                raise PredictionFailed(
                    f"the model returned {type(outputs).__name__}, not a tensor with one row for each sample. "
                    "Name a function `predict` in [tool.fedbus]"
                )
            self.classes = outputs.shape[1] if outputs.ndim == 2 and outputs.shape[1] > 1 else None
            return interpret(outputs)

    def _call_predict_function(self, inputs: Array) -> Array:
        assert self._predict_function is not None
        result = self._predict_function(self._model, inputs)
        outputs = np.asarray(result.cpu() if hasattr(result, "cpu") else result)
        if outputs.dtype.kind not in "biuf" or outputs.ndim == 0:
            raise PredictionFailed(
                f"{self._predict_reference} returned {type(result).__name__}, not an array with one row of numbers "
                "for each sample"
            )
        return outputs

    def probe(self, inputs: Array) -> None:
        """Predict *inputs* (n, …), and take the sample shape and dtype from them if the task declares none.

        Raises:
            ModelRefused: the model raises, returns a wrong number of predictions, or returns NaN or infinity.

        """
        try:
            outputs = self.predict(inputs)
        except Exception as error:
            raise ModelRefused(f"the model fails on samples of shape {inputs.shape}: {error}") from error
        if len(outputs) != len(inputs):
            raise ModelRefused(f"the model returned {len(outputs)} predictions for {len(inputs)} samples")
        if not _is_finite(outputs):
            raise ModelRefused("the model returned NaN or infinity for samples")
        self.input_shape = inputs.shape[1:] if self._infer_shape else self.input_shape
        self.input_dtype = inputs.dtype if self._infer_dtype else self.input_dtype


class NonFiniteOutput(ValueError):
    """The model's output contains NaN or infinity, so no class has the highest score."""


def interpret(outputs: Any) -> Array:
    """Convert the *outputs* of a torch module to predictions.

    Several outputs for a sample (n, …, classes) are scores: the prediction is the class with the highest one, as
    int64 (n, …). One output for a sample, (n, 1) or (n,), is the prediction itself: a regression, a probability or a
    logit.

    Raises:
        NonFiniteOutput: *outputs* contains NaN or infinity.

    """
    import torch  # noqa: PLC0415 - takes seconds

    if not bool(torch.isfinite(outputs).all()):  # argmax would return the index of a NaN
        raise NonFiniteOutput("the output contains NaN or infinity")
    outputs = outputs.detach().cpu()
    if outputs.ndim > 1 and outputs.shape[-1] > 1:
        classes: Array = outputs.argmax(dim=-1).numpy()
        return classes
    values = outputs.squeeze(-1) if outputs.ndim > 1 else outputs
    numbers: Array = (values.float() if values.dtype is torch.bfloat16 else values).numpy()
    return numbers


def _model_with(task: Task, arrays: weights.Arrays) -> Any:
    """Return the model that predicts with *arrays* as its weights: a torch module in evaluation mode, or the arrays.

    Raises:
        BadTask: the builder fails.
        ModelNotServed: no code of the task fits the arrays.
        ModelRefused: an array contains NaN or infinity.

    """
    if not arrays:
        raise ModelNotServed(EMPTY_MODEL)
    reference = task.table.model
    model: Any = build_model(task) if reference is not None else None
    is_fixed = is_module(model) or task.table.architecture == "fixed"
    if reference is not None and is_fixed:
        difference = weights.first_difference(model_arrays(model, reference), arrays)
        if difference:
            raise ModelNotServed(f"the weights do not fit the model of {reference!r}: tensor {difference}")
    if not is_module(model) and task.predict is None:
        raise ModelNotServed(NO_PREDICT)
    if non_finite := next((name for name, array in arrays.items() if not _is_finite(array)), None):
        raise ModelRefused(f"tensor {non_finite!r} contains NaN or infinity")
    if not is_module(model):
        return arrays
    model.load_state_dict(weights.to_torch(arrays), strict=True)
    model.eval()
    return model


def _is_finite(array: Array) -> bool:
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())
