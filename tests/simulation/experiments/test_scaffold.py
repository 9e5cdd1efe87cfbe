"""SCAFFOLD: the functions of the task `vision` and the Flower app in examples/scaffold against one reference."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import nn

from fedbus.learning.flower import private_api
from fedbus.learning.functions import Update
from fedbus.simulation.experiments.training import VISION

Weights = dict[str, np.ndarray[Any, Any]]

EXAMPLE: Final = Path(__file__).parents[3] / "examples/scaffold"
LEARNING_RATE: Final = 0.1
STEPS: Final = 3
PARTICIPANTS: Final = ((0, 1, 2), (0, 2), (1,), (0, 1, 2))
"""The clients of each round. All of them train in the first one, so both implementations know their number."""
SIZES: Final = (4, 6, 8)


@pytest.fixture
def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The images and labels of three clients; each has classes of its own."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 16, 16, generator=generator), torch.arange(size) % 3 + 3 * client)
        for client, size in enumerate(SIZES)
    ]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let tests import the packages of both apps."""
    monkeypatch.syspath_prepend(str(VISION))
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in {"vision", "scaffold_app"}]:
        del sys.modules[name]


def scaffold_reference(
    model: nn.Module,
    start: Mapping[str, np.ndarray[Any, Any]],
    data: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> Iterator[tuple[Weights, Weights]]:
    """Yield x and c after each round: algorithm 1 of Karimireddy et al., option II, with full-batch gradients.

    The mean of x is weighted by samples.
    """
    x = {name: array.astype(np.float64) for name, array in start.items()}
    c = {name: np.zeros_like(array) for name, array in x.items()}
    own = [{name: np.zeros_like(array) for name, array in x.items()} for _ in data]
    for chosen in PARTICIPANTS:
        trained, changes = [], []
        for client in chosen:
            y = {name: array.copy() for name, array in x.items()}
            for _ in range(STEPS):
                for name, gradient in gradients(model, y, *data[client]).items():
                    y[name] -= LEARNING_RATE * (gradient - own[client][name] + c[name])
            new = {
                name: own[client][name] - c[name] + (x[name] - y[name]) / (STEPS * LEARNING_RATE)
                for name in x
            }
            changes.append({name: new[name] - own[client][name] for name in x})
            trained.append(y)
            own[client] = new
        shares = np.array([SIZES[client] for client in chosen]) / sum(SIZES[client] for client in chosen)
        x = {name: sum(share * y[name] for share, y in zip(shares, trained, strict=True)) for name in x}
        c = {name: c[name] + sum(change[name] for change in changes) / len(data) for name in x}
        yield x, c


def gradients(model: nn.Module, weights: Weights, images: torch.Tensor, labels: torch.Tensor) -> Weights:
    """Return the gradients of the mean loss at *weights*."""
    tensors = {name: torch.from_numpy(array).float().requires_grad_() for name, array in weights.items()}
    loss = nn.functional.cross_entropy(torch.func.functional_call(model, tensors, (images,)), labels)
    values = torch.autograd.grad(loss, list(tensors.values()))
    return {name: value.double().numpy() for name, value in zip(tensors, values, strict=True)}


def assert_same(actual: Mapping[str, np.ndarray[Any, Any]], expected: Weights) -> None:
    assert set(actual) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(actual[name], array, rtol=1e-4, atol=1e-6, err_msg=name)


CONFIG: Final = {
    "model": "cnn",
    "dataset": "test",
    "data-dir": "",
    "local-epochs": STEPS,
    "batch-size": 100,  # all images: the gradient does not depend on their order
    "lr": LEARNING_RATE,
    "momentum": 0.0,
    "local-test-samples": 0,
    "local-test-round": 0,
    "delay-s": 0.0,
    "delay-probability": 0.0,
}


class VisionScaffold:
    """The functions of `vision.scaffold`, called as the library `functions` calls them."""

    def __init__(self, data: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.module = import_module("vision.scaffold")
        self.functions = import_module("vision.functions")
        self.clients = [self.module.ClientImages(*one) for one in data]
        self.states: list[dict[str, Any]] = [{} for _ in data]
        self.state: dict[str, Any] = {}
        self.model = import_module("vision.network").make_network("cnn", (1, 16, 16))
        start = {name: value.detach().numpy().copy() for name, value in self.model.named_parameters()}
        self.weights = start | {"c." + name: np.zeros_like(array) for name, array in start.items()}
        setattr(self.functions, "model_for", lambda _: self.model)  # noqa: B010 - for mypy, a module has no such attribute

    def run_round(self, chosen: Sequence[int]) -> None:
        updates = []
        for client in chosen:
            weights, metrics, size = self.module.train(
                {name: array.copy() for name, array in self.weights.items()},
                self.clients[client],
                CONFIG,
                self.states[client],
            )
            copies = {name: array.copy() for name, array in weights.items()}
            updates.append(Update(str(client), copies, size, metrics, float(size)))
        self.weights = self.module.aggregate(self.weights, updates, CONFIG, self.state)

    @property
    def x(self) -> Weights:
        return {name: array for name, array in self.weights.items() if not name.startswith("c.")}

    @property
    def c(self) -> Weights:
        return {name[2:]: array for name, array in self.weights.items() if name.startswith("c.")}


class ThreeNodes:
    """The part of Flower's Grid that a strategy uses to choose clients."""

    def get_node_ids(self) -> list[int]:
        return [1, 2, 3]


class ExampleScaffold:
    """The strategy and the client function of examples/scaffold, with Flower's messages between them."""

    def __init__(self, data: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        private_api.set_process_identity(1)
        self.data = data
        self.module = import_module("scaffold_app.scaffold")
        self.strategy = self.module.Scaffold(fraction_evaluate=0.0)
        self.contexts = [Context(1, node, {}, RecordDict(), {}) for node in (1, 2, 3)]
        self.model = import_module("scaffold_app.model").make_model(256)
        self.arrays = ArrayRecord(self.model.state_dict())
        self.number = 0

    def run_round(self, chosen: Sequence[int]) -> None:
        self.number += 1
        messages = self.strategy.configure_train(self.number, self.arrays, ConfigRecord(), ThreeNodes())
        by_client = {message.metadata.dst_node_id - 1: message for message in messages}
        replies = []
        for client in chosen:
            message = by_client[client]
            self.model.load_state_dict(message.content["arrays"].to_torch_state_dict())
            batches = [self.data[client]] * STEPS
            records = self.module.train(self.model, batches, LEARNING_RATE, message, self.contexts[client])
            metrics = MetricRecord({"num-examples": SIZES[client]})
            replies.append(Message(RecordDict({**records, "metrics": metrics}), reply_to=message))
        self.arrays, _ = self.strategy.aggregate_train(self.number, replies)

    @property
    def x(self) -> Weights:
        return {name: tensor.numpy() for name, tensor in self.arrays.to_torch_state_dict().items()}

    @property
    def c(self) -> Weights:
        return {name: tensor.numpy() for name, tensor in self.strategy.control.items()}


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("implementation", [VisionScaffold, ExampleScaffold])
def test_each_round_is_that_of_the_reference(
    implementation: type[VisionScaffold | ExampleScaffold], data: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    torch.manual_seed(1)
    scaffold = implementation(data)
    for chosen, (x, c) in zip(
        PARTICIPANTS, scaffold_reference(scaffold.model, scaffold.x, data), strict=True
    ):
        scaffold.run_round(chosen)
        assert_same(scaffold.x, x)
        assert_same(scaffold.c, c)


@pytest.mark.usefixtures("packages")
def test_new_clients_keep_c_the_mean_of_all_known_ones(data: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    scaffold = VisionScaffold(data)
    for chosen in ((0,), (0, 2), (1, 2)):
        scaffold.run_round(chosen)
        own = [state["c"] for state in scaffold.states if state]
        assert_same(scaffold.c, {name: np.mean([one[name] for one in own], axis=0) for name in scaffold.c})


@pytest.mark.usefixtures("packages")
def test_building_the_model_draws_no_random_numbers() -> None:
    functions = import_module("vision.functions")
    before = torch.random.get_rng_state()
    functions._build_model("mlp", (1, 16, 16))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.usefixtures("packages")
def test_momentum_is_refused(data: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    scaffold = VisionScaffold(data)
    with pytest.raises(ValueError, match=r"without momentum \(momentum 0\.9\)\. Set momentum=0\.0"):
        scaffold.module.train(scaffold.weights, scaffold.clients[0], CONFIG | {"momentum": 0.9}, {})
