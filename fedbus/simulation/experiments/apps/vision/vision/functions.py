"""The functions that fedbus calls: `initial` and `evaluate_global` on the server, the others on a client."""

import random
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from . import data
from .network import Correct, Weights, load_weights, make_network, read_weights
from .network import evaluate as evaluate_model
from .network import train as train_model

Config = dict[str, Any]


@dataclass
class ClientImages:
    """The training data of one client."""

    images: Tensor
    labels: Tensor


def initial(config: Config) -> Weights:
    """Make the first global weights."""
    torch.manual_seed(int(config["seed"]))
    return read_weights(make_network(str(config["model"]), data.image_shape(config)))


def load(partition_id: int, num_partitions: int, node_config: Config, config: Config) -> ClientImages:
    """Load the client's partition."""
    return ClientImages(*data.load_partition(partition_id, num_partitions, node_config, config))


def train(weights: Weights, client: ClientImages, config: Config) -> tuple[Weights, dict[str, float], int]:
    """Train on the client's images; with the strategy fedprox, near the global weights."""
    model = model_for(config)
    load_weights(model, weights)
    mu = float(config.get("proximal-mu", 0.0))
    correct = add_proximal_gradient(model, mu) if mu else None
    start = time.process_time()
    loss, _ = train_model(model, client.images, client.labels, config, correct=correct)
    metrics = {"train_loss": loss, "cpu_s": time.process_time() - start, **test_locally(model, config)}
    delay(config)
    return read_weights(model), metrics, len(client.labels)


def evaluate(weights: Weights, client: ClientImages, config: Config) -> tuple[dict[str, float], int]:
    """Evaluate on the client's training images."""
    model = model_for(config)
    load_weights(model, weights)
    loss, accuracy = evaluate_model(model, client.images, client.labels)
    return {"eval_loss": loss, "eval_accuracy": accuracy}, len(client.labels)


def evaluate_global(weights: Weights, config: Config) -> dict[str, float]:
    """Evaluate the global weights on the test set."""
    model = model_for(config)
    load_weights(model, weights)
    loss, accuracy = evaluate_model(model, *data.load_test_set(config, int(config["test-samples"])))
    return {"loss": loss, "accuracy": accuracy}


def model_for(config: Config) -> nn.Module:
    """Return this process's model, which all clients and rounds share: their weights replace each other."""
    return _build_model(str(config["model"]), data.image_shape(config))


@cache
def _build_model(name: str, shape: tuple[int, int, int]) -> nn.Module:
    # else the first client of a process shuffles its data differently
    with torch.random.fork_rng(devices=[]):
        return make_network(name, shape)


def add_proximal_gradient(model: nn.Module, mu: float) -> Correct:
    """Return FedProx's correction (Li et al., 2020): add ``mu · (w - w_global)`` to each gradient."""
    anchor = [parameter.detach().clone() for parameter in model.parameters()]

    def correct(model: nn.Module) -> None:
        for parameter, center in zip(model.parameters(), anchor, strict=True):
            assert parameter.grad is not None
            parameter.grad.add_(parameter.detach() - center, alpha=mu)

    return correct


def test_locally(model: nn.Module, config: Config) -> dict[str, float]:
    """Return the accuracy of the client's own model on a part of the test set, if the configuration asks for it."""
    count, only = int(config["local-test-samples"]), int(config["local-test-round"])
    if not count or (only and config.get("server-round") != only):
        return {}
    _, accuracy = evaluate_model(model, *data.load_test_set(config, count))
    return {"train_accuracy": accuracy}


def delay(config: Config) -> None:
    """Sleep with the configured probability, as the clients of Choi et al. do after each training."""
    if config["delay-s"] and random.random() < float(config["delay-probability"]):  # noqa: S311 - no secret
        time.sleep(float(config["delay-s"]))
