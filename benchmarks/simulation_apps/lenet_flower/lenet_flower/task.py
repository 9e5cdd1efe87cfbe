"""The model, the data, and one SGD step. All sides of the benchmark use the same."""

from functools import cache

import torch
from torch import nn
from torch.nn import functional

SAMPLES = 32
BANK = 2048
"""Samples that the clients share; each takes the 32 that begin at its own."""


class LeNet(nn.Module):
    """LeNet-5 for images of 3 × 32 × 32: 62,006 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = functional.max_pool2d(functional.relu(self.conv1(images)), 2)
        hidden = functional.max_pool2d(functional.relu(self.conv2(hidden)), 2).flatten(1)
        return self.fc3(functional.relu(self.fc2(functional.relu(self.fc1(hidden)))))


@cache
def bank() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the samples of all clients."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BANK, 3, 32, 32, generator=generator), torch.randint(
        0, 10, (BANK,), generator=generator
    )


def load_data(partition_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the samples of one client."""
    images, labels = bank()
    start = partition_id * 7 % (BANK - SAMPLES)
    return images[start : start + SAMPLES], labels[start : start + SAMPLES]


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, lr: float) -> float:
    """Train one epoch of one batch, and return the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.item()
