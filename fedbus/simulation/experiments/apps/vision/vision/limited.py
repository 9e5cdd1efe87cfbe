"""The functions of `vision.functions`, with the training of each client in a group of limited CPU time.

The configuration ``cpu-groups`` has the list of processes of each group's cgroup, separated by commas. Client k trains
in group k modulo their number. The configuration ``cpu-default`` is the list that the process returns to. With
``cpu-cores``, a core for each group, the client trains only on the core of its group.
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
    groups, cores = str(config["cpu-groups"]).split(","), str(config["cpu-cores"])
    group = client.number % len(groups)
    with limited(groups[group], str(config["cpu-default"])), pinned(cores.split(",")[group] if cores else ""):
        return functions.train(weights, client, config)


@contextmanager
def limited(processes: str, default: str) -> Iterator[None]:
    """Run the block with this process in the group with the list *processes*, and then in the group *default*."""
    enter(processes)
    try:
        yield
    finally:
        enter(default)


@contextmanager
def pinned(core: str) -> Iterator[None]:
    """Run the block on one *core*; if it is empty, on any."""
    before = os.sched_getaffinity(0)
    if core:
        os.sched_setaffinity(0, {int(core)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def enter(processes: str) -> None:
    """Move this process into a group."""
    with open(processes, "w", encoding="ascii") as file:  # noqa: PTH123 - a file of the kernel
        file.write(str(os.getpid()))
