"""SCAFFOLD, option II of Karimireddy et al., "Stochastic Controlled Averaging for Federated Learning", ICML 2020.

client    w ← w - lr · (g + c - cᵢ) for each batch;  cᵢ⁺ = cᵢ - c + (w₀ - w) / (steps · lr)
server    w ← mean of w;  c ← c + (sum of the changes cᵢ⁺ - cᵢ) / number of all clients
"""

from collections.abc import Iterable

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

CONTROL = "control"
"""The record with a control variate: in the messages, in the replies (its change), and in the client's state."""


class Scaffold(FedAvg):
    """FedAvg that also sends the server's control variate c, and adds the changes of the clients' to it."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        zeros = {name: torch.zeros_like(w) for name, w in arrays.to_torch_state_dict().items()}
        self.control = getattr(self, "control", zeros)  # a run that is recovered begins in a later round
        self.num_clients = len(list(grid.get_node_ids()))
        messages = list(super().configure_train(server_round, arrays, config, grid))
        control = to_record(self.control)
        for message in messages:
            message.content[CONTROL] = control
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        changes = [reply.content.pop(CONTROL) for reply in replies if not reply.has_error()]
        for change in changes:
            for name, values in change.to_torch_state_dict().items():
                self.control[name] += values / self.num_clients
        return super().aggregate_train(server_round, replies)


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    lr: float,
    message: Message,
    context: Context,
) -> dict[str, ArrayRecord]:
    """Train *model* in place, and return the records of the reply. Without a control variate, this is plain SGD."""
    start = {name: w.detach().clone() for name, w in model.named_parameters()}
    zeros = {name: torch.zeros_like(w) for name, w in start.items()}
    is_scaffold = CONTROL in message.content
    control = message.content[CONTROL].to_torch_state_dict() if is_scaffold else zeros
    own = context.state[CONTROL].to_torch_state_dict() if CONTROL in context.state else zeros
    steps = 0
    for inputs, labels in batches:
        gradients = torch.autograd.grad(cross_entropy(model(inputs), labels), list(model.parameters()))
        with torch.no_grad():
            for (name, w), gradient in zip(model.named_parameters(), gradients, strict=True):
                w.sub_(lr * (gradient + control[name] - own[name]))
        steps += 1
    records = {"arrays": ArrayRecord(model.state_dict())}
    if is_scaffold:
        drift = {name: (start[name] - w.detach()) / (steps * lr) for name, w in model.named_parameters()}
        new = {name: own[name] - control[name] + drift[name] for name in own}
        context.state[CONTROL] = to_record(new)  # fedbus keeps it until this client trains again
        records[CONTROL] = to_record({name: new[name] - own[name] for name in own})
    return records


def to_record(tensors: dict[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in tensors.items()})
