"""SCAFFOLD (Karimireddy et al., 2020, option II): control variates correct the drift of the clients.

The global weights contain each parameter ``w`` and the server's control variate ``c.w``. A client adds ``c - c_i`` to
its gradients, and returns its parameters and the change of its own control variate ``c_i`` under the name ``c.w``.
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
    """Train with corrected gradients. *state* keeps the control variate of the client."""
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
    """Average the parameters by samples, and move the control variate by the mean change over all clients."""
    del config
    state["clients"] = state.get("clients", set()) | {update.client for update in updates}
    total = sum(update.weight for update in updates)
    result = {
        name: array if name.startswith(PREFIX) else np.zeros_like(array) for name, array in weights.items()
    }
    for update in updates:
        for name, array in update.weights.items():
            share = 1 / len(state["clients"]) if name.startswith(PREFIX) else update.weight / total
            result[name] = result[name] + array * np.float32(share)
    return result
