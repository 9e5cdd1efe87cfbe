"""What a round is made of, where the time is written, and whose turn it is: by the environment.

So that the model builder of fedbus, which sees no run configuration, agrees with the app.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

BYTES = int(os.environ.get("NOOP_BYTES", str(256 * 1024)))
CLIENTS = int(os.environ.get("NOOP_CLIENTS", "2"))
STAMPS = Path(os.environ.get("NOOP_STAMPS", os.devnull))
TURN_PIPE = os.environ.get("NOOP_TURNS", "")
"""A named pipe: where there is one, a byte from it is waited for before every *TURN* rounds."""
ROUNDS_PER_TURN = int(os.environ.get("NOOP_TURN", "1"))

PRODUCTS = int(os.environ.get("NOOP_PRODUCTS", "0"))
"""How many products of two matrices of 256 × 256 each client makes in a round, in the place of a training."""


def weights() -> np.ndarray:
    """Numbers that no compression makes smaller."""
    return np.random.default_rng(1).standard_normal(BYTES // 4, dtype=np.float32)


def Model() -> Any:  # noqa: N802  # it stands where a task has its torch module
    """A module of one parameter. Torch is imported by who builds it alone: the app does without."""
    import torch  # noqa: PLC0415

    return torch.nn.ParameterDict({"weights": torch.nn.Parameter(torch.from_numpy(weights()))})


def work() -> None:
    """A fixed amount, so that whoever is held up takes longer."""
    matrix = np.full((256, 256), 1 / 256, np.float32)
    for _ in range(PRODUCTS):
        matrix = matrix @ matrix
