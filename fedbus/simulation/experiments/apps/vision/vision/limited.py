"""The functions of `vision.functions`, with the training of each client in a group of limited CPU time.

The configuration ``cpu-groups`` has the list of processes of each group's cgroup, separated by commas. Client k trains
in group k modulo their number. The configuration ``cpu-default`` is the list that the process returns to.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import functions
from .functions import ClientImages, Config, evaluate, evaluate_global, initial
from .network import Weights

__all__ = ["evaluate", "evaluate_global", "initial", "load", "train"]


class LimitedClient(ClientImages):
    """The training data of a client, and its number."""

    number: int = 0


def load(partition_id: int, num_partitions: int, node_config: Config, config: Config) -> LimitedClient:
    """Load the client's partition."""
    images = functions.load(partition_id, num_partitions, node_config, config)
    client = LimitedClient(images.images, images.labels)
    client.number = partition_id
    return client


def train(weights: Weights, client: LimitedClient, config: Config) -> tuple[Weights, dict[str, Any], int]:
    """Train within the CPU time of the client's group."""
    groups = str(config["cpu-groups"]).split(",")
    with limited(groups[client.number % len(groups)], str(config["cpu-default"])):
        return functions.train(weights, client, config)


@contextmanager
def limited(processes: str, default: str) -> Iterator[None]:
    """Run the block with this process in the group with the list *processes*, and then in the group *default*."""
    enter(processes)
    try:
        yield
    finally:
        enter(default)


def enter(processes: str) -> None:
    """Move this process into a group."""
    with open(processes, "w", encoding="ascii") as file:  # noqa: PTH123 - a file of the kernel
        file.write(str(os.getpid()))
