"""Random numbers that depend on a name only: seed, client, purpose and number.

There is no state: the values are the same in any order, process, thread and version of Python or NumPy.
"""

import math
from hashlib import blake2b
from statistics import NormalDist
from typing import Final

_NORMAL: Final = NormalDist()
_STEPS: Final = 2**53


def draw_uniform(seed: int, client: str, purpose: str, number: int) -> float:
    """Return a number between 0 and 1, both exclusive."""
    name = f"{seed}\0{client}\0{purpose}\0{number}".encode()
    bits = int.from_bytes(blake2b(name, digest_size=8).digest()) >> 11
    return (bits + 0.5) / _STEPS


def normal_quantile(probability: float) -> float:
    """Return the quantile of the standard normal distribution."""
    return _NORMAL.inv_cdf(min(max(probability, 1e-16), 1 - 1e-16))


def exponential_quantile(probability: float) -> float:
    """Return the quantile of the exponential distribution with mean 1."""
    return -math.log1p(-min(probability, 1 - 1e-16))
