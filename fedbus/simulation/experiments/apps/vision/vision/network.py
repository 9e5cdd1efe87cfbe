"""The networks, their training and their evaluation."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Weights = dict[str, np.ndarray[Any, Any]]
Correct = Callable[[nn.Module], None]
"""Changes the gradients of a model before a step."""

EVALUATION_BATCH = 500
torch.set_num_threads(1)  # networks of this size are slower on several threads


class TutorialCnn(nn.Module):
    """The network of the CIFAR-10 tutorials of PyTorch and Flower, for images of any size from 16×16 on.

    Two convolutions with 5×5 kernels, 6 and 16 channels, each with ReLU and 2×2 max pooling; then 120, 84 and 10
    units. With 3×32×32 pixels it has the tutorials' 62,006 parameters.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = shape
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        features = 16 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2)
        self.fc1 = nn.Linear(features, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.pool(functional.relu(self.conv1(images)))
        hidden = self.pool(functional.relu(self.conv2(hidden))).flatten(1)
        hidden = functional.relu(self.fc2(functional.relu(self.fc1(hidden))))
        outputs: Tensor = self.fc3(hidden)
        return outputs


class FullyConnected(nn.Module):
    """Three fully connected layers: pixels → 128 → 64 → 10."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = shape
        self.fc1 = nn.Linear(channels * height * width, 128)
        self.fc2 = nn.Linear(128, 64)
        self.fc3 = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.relu(self.fc2(functional.relu(self.fc1(images.flatten(1)))))
        outputs: Tensor = self.fc3(hidden)
        return outputs


NETWORKS: dict[str, Callable[[tuple[int, int, int]], nn.Module]] = {
    "cnn": TutorialCnn,
    "mlp": FullyConnected,
}


def make_network(name: str, shape: tuple[int, int, int]) -> nn.Module:
    """Build the network *name* for images of *shape* (channels, height, width)."""
    if name not in NETWORKS:
        raise ValueError(f"unknown model {name!r}. Choose one of {', '.join(NETWORKS)}")
    return NETWORKS[name](shape)


def load_weights(model: nn.Module, weights: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Copy *weights* into *model*; arrays of other names are ignored."""
    for name, array in read_weights(model).items():
        np.copyto(array, weights[name])


def read_weights(model: nn.Module) -> Weights:
    """Return the parameters of *model*, without a copy."""
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: Mapping[str, Any],
    *,
    correct: Correct | None = None,
) -> tuple[float, int]:
    """Train *model* in place by stochastic gradient descent; return the mean loss of the last epoch and the steps."""
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=float(config["lr"]), momentum=float(config["momentum"]), foreach=True
    )
    mean_loss, steps = 0.0, 0
    for _ in range(int(config["local-epochs"])):
        total = torch.zeros(())
        for batch, truth in batches(images, labels, int(config["batch-size"])):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(batch), truth)
            torch.autograd.backward(loss)
            if correct is not None:
                correct(model)
            optimizer.step()
            total += loss.detach() * len(truth)
            steps += 1
        mean_loss = float(total) / len(labels)
    return mean_loss, steps


def batches(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all samples once in batches, in random order."""
    order = torch.randperm(len(labels))
    for start in range(0, len(labels), size):
        indices = order[start : start + size]
        yield images[indices], labels[indices]


@torch.inference_mode()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    model.eval()
    loss, correct = 0.0, 0
    for start in range(0, len(labels), EVALUATION_BATCH):
        truth = labels[start : start + EVALUATION_BATCH]
        outputs = model(images[start : start + EVALUATION_BATCH])
        loss += float(functional.cross_entropy(outputs, truth, reduction="sum"))
        correct += int((outputs.argmax(1) == truth).sum())
    return loss / len(labels), correct / len(labels)
