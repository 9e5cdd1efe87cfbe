"""Images as tensors: the partition of a client, and the test set."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedbus.learning.data import client_data, load_dataset

Config = Mapping[str, Any]


def image_shape(config: Config) -> tuple[int, int, int]:
    """Return the shape of an image: channels, height, width."""
    return _shape(str(config["dataset"]), str(config["data-dir"]))


def load_partition(
    partition_id: int, num_partitions: int, node_config: Config, config: Config
) -> tuple[Tensor, Tensor]:
    """Return the training images and labels of a client."""
    node = {**node_config, "partition-id": partition_id % num_partitions, "num-partitions": num_partitions}
    client = client_data(
        str(config["dataset"]),
        node,
        seed=int(config["seed"]),
        data_dir=str(config["data-dir"]),
        test_share=0.0,
    )
    kept = max(1, round(float(config["sample-share"]) * len(client.train_indices)))
    chosen = client.train_indices[: min(kept, int(config["max-samples"]) or kept)]
    images, labels = client.dataset.train
    return to_tensor(images[chosen]), torch.from_numpy(labels[chosen])


def load_test_set(config: Config, count: int) -> tuple[Tensor, Tensor]:
    """Return the first *count* images of the test set, in a fixed random order; 0: all."""
    return _test_set(str(config["dataset"]), str(config["data-dir"]), count)


@cache
def _test_set(name: str, data_dir: str, count: int) -> tuple[Tensor, Tensor]:
    images, labels = load_dataset(name, data_dir).test
    chosen = np.random.default_rng(0).permutation(len(labels))[: count or len(labels)]
    return to_tensor(images[chosen]), torch.from_numpy(labels[chosen])


@cache
def _shape(name: str, data_dir: str) -> tuple[int, int, int]:
    images = load_dataset(name, data_dir).train.images
    channels, height, width = images.shape[1:] if images.ndim == 4 else (1, *images.shape[1:])
    return int(channels), int(height), int(width)


def to_tensor(images: np.ndarray[Any, Any]) -> Tensor:
    """Convert uint8 pixels to float32 from -1 to 1, with shape (n, channels, height, width)."""
    pixels = torch.from_numpy(images.astype(np.float32)).div_(127.5).sub_(1)
    return pixels if pixels.ndim == 4 else pixels.unsqueeze(1)
