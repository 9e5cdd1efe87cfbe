"""Which GPU each worker uses."""

from collections.abc import Mapping, Sequence
from typing import Final

VISIBLE_DEVICES: Final = "CUDA_VISIBLE_DEVICES"


def place_workers(workers: int, gpus: Sequence[str]) -> list[Mapping[str, str]]:
    """Return the environment variables of each worker: the workers share *gpus* in turn.

    *gpus* are names as CUDA knows them: numbers or UUIDs. Without any, workers see no GPU. The variables must be set
    before CUDA is initialised in the process.
    """
    if not gpus:
        return [{VISIBLE_DEVICES: ""} for _ in range(workers)]
    return [{VISIBLE_DEVICES: gpus[number % len(gpus)]} for number in range(workers)]
