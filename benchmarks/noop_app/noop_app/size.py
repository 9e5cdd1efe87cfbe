"""The size of a round, the file for time stamps, and the turns, from environment variables.

The model builder of fedbus gets no run configuration, so environment variables configure it and the app alike.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

BYTES = int(os.environ.get("NOOP_BYTES", str(256 * 1024)))
CLIENTS = int(os.environ.get("NOOP_CLIENTS", "2"))
STAMPS = Path(os.environ.get("NOOP_STAMPS", os.devnull))
TURN_PIPE = os.environ.get("NOOP_TURNS", "")
"""A named pipe. If set, the app reads it after every `ROUNDS_PER_TURN` rounds, which blocks until its next turn."""
ROUNDS_PER_TURN = int(os.environ.get("NOOP_TURN", "1"))

PRODUCTS = int(os.environ.get("NOOP_PRODUCTS", "0"))
"""The number of products of two 256 × 256 matrices that each client computes in a round, instead of training."""


def weights() -> np.ndarray:
    """Return random float32 numbers, which cannot be compressed."""
    return np.random.default_rng(1).standard_normal(BYTES // 4, dtype=np.float32)


def Model() -> Any:  # noqa: N802  # a task names its torch module here
    """Build a module with one parameter. Only this function imports torch: the app does not need it."""
    import torch  # noqa: PLC0415

    return torch.nn.ParameterDict({"weights": torch.nn.Parameter(torch.from_numpy(weights()))})


def work() -> None:
    """Do a fixed amount of work."""
    matrix = np.full((256, 256), 1 / 256, np.float32)
    for _ in range(PRODUCTS):
        matrix = matrix @ matrix
