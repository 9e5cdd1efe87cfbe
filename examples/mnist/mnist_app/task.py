"""The model, its training and its evaluation."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

# layers of this size are slower on several threads than on one
torch.set_num_threads(1)


class Net(nn.Module):
    """Three fully connected layers: 784 pixels → 128 → 64 → 10 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 128)
        self.fc2 = nn.Linear(128, 64)
        self.fc3 = nn.Linear(64, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = torch.relu(self.fc1(pixels.flatten(1)))
        return self.fc3(torch.relu(self.fc2(hidden)))


def train(
    model: nn.Module,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    proximal_mu: float = 0.0,
) -> float:
    """Train *model* in place, and return the mean loss of the last epoch."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, foreach=True)
    anchor = [parameter.detach().clone() for parameter in model.parameters()] if proximal_mu else []
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
    for _ in range(epochs):
        total = torch.zeros(())
        for batch, truth in batches(x, y, batch_size):
            optimizer.zero_grad()
            loss = cross_entropy(model(batch), truth)
            total += loss.detach() * len(truth)
            (loss + proximal_term(model, anchor, proximal_mu)).backward()
            optimizer.step()
    return float(total) / len(y)


def batches(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all samples once in batches, in random order."""
    for indices in torch.randperm(len(y)).split(size):
        yield x[indices], y[indices]


def proximal_term(model: nn.Module, anchor: list[Tensor], mu: float) -> Tensor | float:
    """Return FedProx's proximal term (Li et al., 2020): mu / 2 times the squared distance from the global model."""
    if not anchor:
        return 0.0
    return mu / 2 * sum((w - a).square().sum() for w, a in zip(model.parameters(), anchor, strict=True))


@torch.inference_mode()
def evaluate(model: nn.Module, inputs: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    model.eval()
    outputs, truth = model(torch.from_numpy(inputs)), torch.from_numpy(labels)
    return float(cross_entropy(outputs, truth)), float((outputs.argmax(1) == truth).double().mean())
