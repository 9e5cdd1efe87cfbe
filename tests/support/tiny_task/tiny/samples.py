"""Samples for predictions."""

from typing import Any

import numpy as np


def samples(partition_id: int, num_partitions: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    inputs = np.random.default_rng(partition_id).random((16, 3), dtype=np.float32)
    return inputs, np.full(16, partition_id % 4)
