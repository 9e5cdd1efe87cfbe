"""The same training as `lenet_flower`, as plain functions."""

# ruff: noqa: ARG001 - the signatures of the library; the benchmark is optional

import torch
from torch import nn
from torch.nn import functional

SAMPLES = 32
BANK = 2048


class PlainLeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images):
        hidden = functional.max_pool2d(functional.relu(self.conv1(images)), 2)
        hidden = functional.max_pool2d(functional.relu(self.conv2(hidden)), 2).flatten(1)
        return self.fc3(functional.relu(self.fc2(functional.relu(self.fc1(hidden)))))


GENERATOR = torch.Generator().manual_seed(1)
IMAGES = torch.randn(BANK, 3, 32, 32, generator=GENERATOR)
LABELS = torch.randint(0, 10, (BANK,), generator=GENERATOR)
MODEL = PlainLeNet()


def initial(config):
    return {name: tensor.numpy() for name, tensor in PlainLeNet().state_dict().items()}


def load(partition_id, num_partitions):
    start = partition_id * 7 % (BANK - SAMPLES)
    return IMAGES[start : start + SAMPLES], LABELS[start : start + SAMPLES]


def train(weights, data, config):
    MODEL.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    images, labels = data
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=config["lr"])
    optimizer.zero_grad()
    loss = functional.cross_entropy(MODEL(images), labels)
    loss.backward()
    optimizer.step()
    new_weights = {name: tensor.numpy() for name, tensor in MODEL.state_dict().items()}
    return new_weights, {"loss": loss.item()}, len(images)


def evaluate(weights, data, config):
    return {}, len(data[0])
