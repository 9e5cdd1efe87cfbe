"""The examples of the library `functions` are valid and learn."""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedbus.learning.installed_libraries import open_library
from fedbus.learning.predictor import TaskPredictor
from fedbus.learning.weights import save
from fedbus.stores.tasks.task_directory import read_task, validate_task

from .local_run import LocalRun

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
NAMES = ("mnist-functions", "mnist-sklearn")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder with MNIST, or "": then the example uses scikit-learn's digits."""
    shared = ROOT.parent / "shared" / "data"
    folder = os.environ.get("FEDBUS_DATA_DIR") or (str(shared) if shared.is_dir() else "")
    monkeypatch.setenv("FEDBUS_DATA_DIR", folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products of matrices are slower on all cores, which other tests use."""
    with importlib.import_module("threadpoolctl").threadpool_limits(1):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_valid(name: str) -> None:
    assert validate_task(EXAMPLES / name, open_library) == []


@pytest.mark.parametrize(("name", "accuracy"), [("mnist-functions", 0.87), ("mnist-sklearn", 0.8)])
def test_an_example_learns_and_predicts(name: str, accuracy: float, tmp_path: Path) -> None:
    task = read_task(EXAMPLES / name, open_library)
    run = LocalRun(task, rounds=2, config={"max-samples": 2000})
    assert run.final is not None
    assert run.metric("eval_accuracy")[-1] > accuracy
    save(run.final, tmp_path / "model.safetensors")
    predictor = TaskPredictor(task, tmp_path / "model.safetensors")
    predictions = predictor.predict(np.random.default_rng(1).random((5, 784), np.float32))
    assert predictions.shape == (5,)
    assert set(predictions.tolist()) <= set(range(10))


@pytest.mark.parametrize("strategy", ["fedprox", "fedadam", "fedmedian", "trimmed-mean", "krum"])
def test_mnist_in_numpy_learns_with_each_strategy(strategy: str) -> None:
    task = read_task(EXAMPLES / "mnist-functions", open_library)
    aggregation = task.table.aggregation.model_copy(update={"strategy": strategy, "eta": 0.01})
    task = task.model_copy(update={"table": task.table.model_copy(update={"aggregation": aggregation})})
    run = LocalRun(task, clients=3, rounds=3, config={"max-samples": 1000})
    assert run.metric("accuracy")[-1] > 0.6


def test_the_gradients_of_mnist_in_numpy_are_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of finite differences."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "mnist-functions"))
    network = importlib.import_module("mnist_functions.network")

    random = np.random.default_rng(1)
    weights = {name: array.astype(np.float64) for name, array in network.make_weights(1).items()}
    inputs, labels = random.random((8, 784)), random.integers(0, 10, 8)
    loss, gradients = network.compute_gradients(weights, inputs, labels)
    for name, array in weights.items():
        index = tuple(random.integers(0, size) for size in array.shape)
        moved = {**weights, name: array.copy()}
        moved[name][index] += 1e-5
        slope = (network.compute_gradients(moved, inputs, labels)[0] - loss) / 1e-5
        assert gradients[name][index] == pytest.approx(slope, abs=1e-6, rel=1e-3)
