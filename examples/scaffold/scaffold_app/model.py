"""The model, and the images as tensors."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from fedbus.learning.data import LabelledImages

# layers of this size are slower on several threads than on one
torch.set_num_threads(1)


def make_model(pixels: int = 784) -> nn.Module:
    """Make a network for images of one channel: pixels → 64 → 10 classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 64), nn.ReLU(), nn.Linear(64, 10))


def to_tensors(samples: LabelledImages) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(np.array(samples.images, np.float32)) / 255
    return images, torch.from_numpy(np.array(samples.labels, np.int64))


def batches(inputs: Tensor, labels: Tensor, *, size: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches in a new random order for each epoch."""
    for _ in range(epochs):
        for indices in torch.randperm(len(labels)).split(size):
            yield inputs[indices], labels[indices]


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    outputs = model(inputs)
    accuracy = (outputs.argmax(1) == labels).float().mean()
    return float(nn.functional.cross_entropy(outputs, labels)), float(accuracy)
