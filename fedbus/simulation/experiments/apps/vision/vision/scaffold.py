"""SCAFFOLD (Karimireddy et al., 2020, option II): control variates correct the drift of the clients.

The global weights contain each parameter ``w`` and the server's control variate ``c.w``. A client adds ``c - c_i`` to
its gradients, and returns its parameters and the change of its own control variate ``c_i`` under the name ``c.w``.

    client    w ← w - lr · (g + c - c_i) for each batch;  c_i⁺ = c_i - c + (w_0 - w) / (steps · lr)
    server    w ← mean of w;  c ← mean of the c_i of all clients that have trained

As in FedAvg, the mean of w is weighted by samples; the paper's clients have equal weights. ``examples/scaffold`` is the
same algorithm as a Flower app. The tests compare both with one reference in NumPy.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from fedbus.learning.functions import Update

from . import functions
from .functions import ClientImages, Config, evaluate, evaluate_global, load
from .network import Weights, load_weights, read_weights
from .network import train as train_model

__all__ = ["aggregate", "evaluate", "evaluate_global", "initial", "load", "train"]

PREFIX = "c."


def initial(config: Config) -> Weights:
    """Make the first global weights, with control variates of 0."""
    weights = functions.initial(config)
    return weights | {PREFIX + name: np.zeros_like(array) for name, array in weights.items()}


def train(
    weights: Weights, client: ClientImages, config: Config, state: dict[str, Any]
) -> tuple[Weights, dict[str, float], int]:
    """Train with corrected gradients. *state* keeps the control variate of the client.

    Raises:
        ValueError: with momentum, ``(w_0 - w) / (steps · lr)`` is not the mean gradient.

    """
    if float(config["momentum"]):
        raise ValueError(
            f"SCAFFOLD needs SGD without momentum (momentum {config['momentum']}). Set momentum=0.0"
        )
    model = functions.model_for(config)
    load_weights(model, weights)
    start = {name: array.copy() for name, array in read_weights(model).items()}
    own = state.get("c") or {name: np.zeros_like(array) for name, array in start.items()}
    difference = {name: torch.from_numpy(weights[PREFIX + name] - own[name]) for name in start}

    def correct(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            parameter.grad.add_(difference[name])

    loss, steps = train_model(model, client.images, client.labels, config, correct=correct)
    scale = 1 / max(1, steps) / float(config["lr"])
    trained = read_weights(model)
    new = {name: own[name] - weights[PREFIX + name] + scale * (start[name] - trained[name]) for name in start}
    state["c"] = new
    change = {PREFIX + name: (new[name] - own[name]).astype(np.float32) for name in start}
    metrics = {"train_loss": loss, **functions.test_locally(model, config)}
    functions.delay(config)
    return trained | change, metrics, len(client.labels)


def aggregate(weights: Weights, updates: list[Update], config: Config, state: dict[str, Any]) -> Weights:
    """Average the parameters by samples, and the control variates over all clients that have trained.

    A client that has not trained yet has no part in ``c``, so a later one changes the share of the others.
    """
    del config
    known = state.setdefault("clients", set())
    before = len(known)
    known.update(update.client for update in updates)
    shares = np.array([update.weight for update in updates]) / sum(update.weight for update in updates)
    result = {}
    for name, array in weights.items():
        arrays = np.stack([update.weights[name] for update in updates])
        if name.startswith(PREFIX):
            mean = (array * before + arrays.sum(axis=0, dtype=np.float64)) / len(known)
        else:
            mean = np.tensordot(shares, arrays, axes=1)
        result[name] = np.asarray(mean, array.dtype)
    return result
