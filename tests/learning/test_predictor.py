"""A model is probed before it may serve, and a rejection has a reason of one line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedbus.contracts.task.task import Task, TaskTable
from fedbus.learning import weights
from fedbus.learning.predictor import (
    ModelNotServed,
    ModelRefused,
    PredictionFailed,
    TaskPredictor,
    interpret,
)

CODE = """
import numpy as np
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.fc(x))

def scores(model, inputs):
    return model(torch.from_numpy(inputs)).numpy()

def too_few(model, inputs):
    return scores(model, inputs)[1:]

def not_a_number(model, inputs):
    return np.full(len(inputs), np.nan)

def broken():
    raise RuntimeError("no such\\nlayer")
"""
SAMPLES = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)


@pytest.fixture
def directory(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A task's code in a module with a unique name, since Python imports a module once."""
    (tmp_path / f"{module_of(request)}.py").write_text(CODE)
    return tmp_path


def module_of(request: pytest.FixtureRequest) -> str:
    return "code_" + "".join(c if c.isalnum() else "_" for c in request.node.name)


@pytest.fixture
def task(directory: Path, request: pytest.FixtureRequest) -> Task:
    return task_of(directory, module_of(request))


def task_of(directory: Path, module: str, *, model: str = "Net", predict: str | None = None) -> Task:
    table = TaskTable.model_validate(
        {"task": "t", "model": f"{module}:{model}", "predict": predict and f"{module}:{predict}"}
    )
    reference = f"{module}:app"
    return Task(
        table=table,
        app={"serverapp": reference, "clientapp": reference},
        code_version="sha256:0",
        path=str(directory),
    )


def train_model() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    with torch.no_grad():
        layers(torch.randn(50, 4))  # sets the running statistics of the batch norm
    names = {"0": "fc", "1": "norm"}
    return {names[name[0]] + name[1:]: tensor for name, tensor in layers.state_dict().items()}


def save_model(directory: Path, state: dict[str, torch.Tensor]) -> Path:
    weights.save(weights.from_torch(state), directory / "model.safetensors")
    return directory / "model.safetensors"


def expected_scores(state: dict[str, torch.Tensor]) -> np.ndarray:
    linear = SAMPLES @ state["fc.weight"].numpy().T + state["fc.bias"].numpy()
    centred = (linear - state["norm.running_mean"].numpy()) / np.sqrt(
        state["norm.running_var"].numpy() + 1e-5
    )
    return np.asarray(centred * state["norm.weight"].numpy() + state["norm.bias"].numpy())


def test_it_predicts_the_class_with_the_highest_score(task: Task, directory: Path) -> None:
    predictor = TaskPredictor(task, save_model(directory, train_model()))
    assert predictor.predict(SAMPLES).tolist() == expected_scores(train_model()).argmax(1).tolist()


def test_it_predicts_with_the_function_of_the_task(directory: Path, request: pytest.FixtureRequest) -> None:
    task = task_of(directory, module_of(request), predict="scores")
    predictor = TaskPredictor(task, save_model(directory, train_model()))
    np.testing.assert_allclose(
        predictor.predict(SAMPLES), expected_scores(train_model()), rtol=1e-4, atol=1e-5
    )


def test_a_prediction_does_not_depend_on_the_batch(task: Task, directory: Path) -> None:
    """The model is in evaluation mode: a batch norm uses its running statistics."""
    predictor = TaskPredictor(task, save_model(directory, train_model()))
    one_by_one = [predictor.predict(SAMPLES[n : n + 1])[0] for n in range(len(SAMPLES))]
    assert one_by_one == predictor.predict(SAMPLES).tolist()


def test_a_probe_sets_the_input_shape(task: Task, directory: Path) -> None:
    predictor = TaskPredictor(task, save_model(directory, train_model()))
    assert predictor.input_shape is None
    predictor.probe(SAMPLES)
    assert predictor.input_shape == (4,)


def test_the_number_of_classes_is_the_number_of_outputs(task: Task, directory: Path) -> None:
    predictor = TaskPredictor(task, save_model(directory, train_model()))
    predictor.predict(SAMPLES)
    assert predictor.classes == 3


def test_a_function_of_the_task_leaves_the_classes_unknown(
    directory: Path, request: pytest.FixtureRequest
) -> None:
    task = task_of(directory, module_of(request), predict="scores")
    predictor = TaskPredictor(task, save_model(directory, train_model()))
    predictor.predict(SAMPLES)
    assert predictor.classes is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fc.weight": torch.zeros(3, 5)}, r"'fc.weight' is float32\[3, 5\] instead of float32\[3, 4\]"),
        ({"fc.bias": torch.zeros(3, dtype=torch.float64)}, r"'fc.bias' is float64\[3\] instead of"),
        ({"fc.bias": None}, "'fc.bias' .* is missing"),
        ({"more": torch.zeros(1)}, "'more' .* is not expected"),
    ],
)
def test_weights_of_another_model_are_rejected(
    task: Task, directory: Path, change: dict[str, torch.Tensor | None], reason: str
) -> None:
    state = {name: tensor for name, tensor in {**train_model(), **change}.items() if tensor is not None}
    with pytest.raises(ModelRefused, match=reason):
        TaskPredictor(task, save_model(directory, state))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_with_nan_or_infinity_are_rejected(task: Task, directory: Path, value: float) -> None:
    state = train_model()
    state["fc.weight"][1, 2] = value
    with pytest.raises(ModelRefused, match=r"'fc\.weight' contains NaN or infinity"):
        TaskPredictor(task, save_model(directory, state))


def test_an_invalid_file_is_rejected(task: Task, directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"\x80\x04 a pickle, perhaps")
    with pytest.raises(ModelRefused, match="not a valid safetensors file"):
        TaskPredictor(task, directory / "model.safetensors")
    with pytest.raises(ModelRefused, match="no weights at"):
        TaskPredictor(task, directory / "nowhere.safetensors")


def test_a_model_whose_output_overflows_is_rejected(task: Task, directory: Path) -> None:
    """All weights are finite, so that only the probe finds the overflow."""
    state = train_model()
    state["fc.weight"].fill_(3e38)
    predictor = TaskPredictor(task, save_model(directory, state))
    with pytest.raises(ModelRefused, match="NaN or infinity"):
        predictor.probe(SAMPLES)


@pytest.mark.parametrize(
    ("predict", "reason"),
    [("not_a_number", "returned NaN or infinity"), ("too_few", "returned 7 predictions for 8 samples")],
)
def test_a_model_with_wrong_output_is_rejected(
    directory: Path, request: pytest.FixtureRequest, predict: str, reason: str
) -> None:
    predictor = TaskPredictor(
        task_of(directory, module_of(request), predict=predict), save_model(directory, train_model())
    )
    with pytest.raises(ModelRefused, match=reason):
        predictor.probe(SAMPLES)


def test_a_model_that_fails_on_the_samples_is_rejected(task: Task, directory: Path) -> None:
    predictor = TaskPredictor(task, save_model(directory, train_model()))
    with pytest.raises(ModelRefused, match=r"fails on samples of shape \(8, 3\)"):
        predictor.probe(SAMPLES[:, :3])


def test_a_task_with_an_unknown_function_is_rejected(directory: Path, request: pytest.FixtureRequest) -> None:
    module = module_of(request)
    artifact = save_model(directory, train_model())
    for task in (task_of(directory, module, model="Nett"), task_of(directory, module, predict="scorse")):
        with pytest.raises(ModelRefused, match="has no"):
            TaskPredictor(task, artifact)


def test_a_model_that_cannot_be_built_is_rejected_in_one_line(
    directory: Path, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ModelRefused, match="did not build a model: RuntimeError: no such layer"):
        TaskPredictor(
            task_of(directory, module_of(request), model="broken"), save_model(directory, train_model())
        )


# --- other models ----------------------------------------------------------------------------


def test_one_output_is_the_prediction_itself() -> None:
    assert interpret(torch.tensor([[0.25], [1.0]])).tolist() == [0.25, 1.0]
    assert interpret(torch.tensor([2.5, -1.0])).tolist() == [2.5, -1.0]
    assert interpret(torch.tensor([[0.2, 0.8], [0.9, 0.1]])).tolist() == [1, 0]


ARRAYS_CODE = """
import numpy as np

def weights():
    return [np.zeros(3, np.float32)]

def predict(model, inputs):
    return inputs @ model["0"]

def broken(model, inputs):
    return model["coefficients"]

def words(model, inputs):
    return ["spam"] * len(inputs)
"""


def arrays_task(directory: Path, request: pytest.FixtureRequest, **table: str) -> Task:
    module = module_of(request)
    (directory / f"{module}.py").write_text(ARRAYS_CODE)
    references = {
        key: f"{module}:{name}" if key in ("model", "predict") else name for key, name in table.items()
    }
    app = f"{module}:app"
    return Task(
        table=TaskTable.model_validate({"task": "t", **references}),
        serverapp=app,
        clientapp=app,
        code_version="sha256:0",
        path=str(directory),
    )


def save_arrays(directory: Path, **arrays: np.ndarray) -> Path:
    weights.save(arrays, directory / "arrays.safetensors")
    return directory / "arrays.safetensors"


def test_arrays_without_a_builder_are_given_to_predict(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    task = arrays_task(tmp_path, request, predict="predict")
    predictor = TaskPredictor(task, save_arrays(tmp_path, **{"0": np.array([1, 2], np.float32)}))
    assert predictor.predict(np.array([[1, 1], [0, 2]], np.float32)).tolist() == [3, 4]


@pytest.mark.parametrize(
    ("table", "arrays", "reason"),
    [
        ({"predict": "predict"}, {}, "it is empty"),
        ({}, {"0": np.ones(3)}, "the task names neither a `model` that is a torch module nor"),
        (
            {"model": "weights"},
            {"0": np.ones(3)},
            "the task names neither a `model` that is a torch module nor",
        ),
        (
            {"model": "weights", "predict": "predict", "architecture": "fixed"},
            {"0": np.ones(4, np.float32)},
            r"'0' is float32\[4\] instead of float32\[3\]",
        ),
    ],
    ids=["an empty model", "no predict", "arrays without predict", "a fixed architecture"],
)
def test_arrays_that_no_code_serves(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    table: dict[str, str],
    arrays: dict[str, np.ndarray],
    reason: str,
) -> None:
    with pytest.raises(ModelNotServed, match=reason):
        TaskPredictor(arrays_task(tmp_path, request, **table), save_arrays(tmp_path, **arrays))


def test_arrays_of_a_free_architecture_are_served(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    task = arrays_task(tmp_path, request, model="weights", predict="predict")
    predictor = TaskPredictor(task, save_arrays(tmp_path, **{"0": np.ones(5, np.float32)}))
    assert predictor.predict(np.ones((1, 5), np.float32)).tolist() == [5]


def test_an_error_of_predict_names_its_line(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    task = arrays_task(tmp_path, request, predict="broken")
    predictor = TaskPredictor(task, save_arrays(tmp_path, **{"0": np.ones(1)}))
    module = module_of(request)
    line = ARRAYS_CODE.splitlines().index('    return model["coefficients"]') + 1
    with pytest.raises(
        PredictionFailed, match=rf"{module}:broken raised KeyError: 'coefficients' \({module}\.py:{line}\)"
    ):
        predictor.predict(SAMPLES)


def test_predictions_that_are_no_numbers_are_an_error(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    task = arrays_task(tmp_path, request, predict="words")
    predictor = TaskPredictor(task, save_arrays(tmp_path, **{"0": np.ones(1)}))
    with pytest.raises(PredictionFailed, match="words returned list, not an array with one row of numbers"):
        predictor.predict(SAMPLES)


def test_arrays_are_served_without_torch(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    arrays_task(tmp_path, request)
    path, module = save_arrays(tmp_path, **{"0": np.ones(2, np.float32)}), module_of(request)
    script = f"""
import sys
from pathlib import Path
import numpy as np
from fedbus.contracts.task.task import Task, TaskTable
from fedbus.learning.predictor import TaskPredictor

table = TaskTable.model_validate({{"task": "t", "model": "{module}:weights", "predict": "{module}:predict"}})
task = Task(table=table, serverapp="{module}:app", clientapp="{module}:app", code_version="", path={str(tmp_path)!r})
print(TaskPredictor(task, Path({str(path)!r})).predict(np.ones((1, 2), np.float32)).tolist())
assert not [name for name in ("torch", "flwr") if name in sys.modules], "a training library is imported"
"""
    result = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[2.0]\n", "")
