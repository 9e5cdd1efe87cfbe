"""The data of one client, on a device of the fleet and in simulation."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final

from fedbus.learning.data.errors import DataError, InvalidPartitioning
from fedbus.learning.data.image_folders import ImageSize
from fedbus.learning.data.images import Array, ImageDataset, LabelledImages
from fedbus.learning.data.loading import load_dataset
from fedbus.learning.data.partitioning import Partitioning
from fedbus.learning.data.partitions import Partitions, partition_labels

PARTITION_ID: Final = "partition-id"
NUM_PARTITIONS: Final = "num-partitions"
PARTITION: Final = "partition"
PARTITION_SEED: Final = "partition-seed"
DATA_DIR: Final = "data-dir"

NodeConfig = Mapping[str, bool | int | float | str]


@dataclass(frozen=True, eq=False)
class ClientDataset:
    """The samples of one client, divided into training and test samples. The indices are those of `dataset.train`."""

    dataset: ImageDataset
    """The whole data set; its test set belongs to no client."""
    partition_id: int
    num_partitions: int
    partitioning: Partitioning
    train_indices: Array
    test_indices: Array

    @cached_property
    def train(self) -> LabelledImages:
        """The client's training samples, copied at the first use."""
        return self._select(self.train_indices)

    @cached_property
    def test(self) -> LabelledImages:
        """The client's test samples, with the label distribution of its training samples; copied at the first use."""
        return self._select(self.test_indices)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.dataset.class_names

    def _select(self, indices: Array) -> LabelledImages:
        return LabelledImages(self.dataset.train.images[indices], self.dataset.train.labels[indices])


def client_data(
    name: str | os.PathLike[str],
    node_config: NodeConfig,
    *,
    partition: str = "iid",
    seed: int = 0,
    data_dir: str | os.PathLike[str] | None = None,
    test_share: float = 0.2,
    class_names: Sequence[str] | None = None,
    image_size: ImageSize | None = None,
) -> ClientDataset:
    """Return the data of the client with *node_config*.

    ``partition-id`` and ``num-partitions`` of the node config choose the partition of the training set; without them,
    the client has all of it. ``partition``, ``partition-seed`` and ``data-dir`` of the node config, which
    ``fedbus simulate --partition`` sets, replace the arguments. The same arguments return the same samples on each
    machine. A call costs microseconds when the process has loaded the data set before.

    Args:
        name: The data set, as in `load_dataset`.
        node_config: The node config of the client, for example ``context.node_config`` of a Flower app.
        partition: How the training set is divided among the clients; see `Partitioning`.
        seed: Chooses the samples of each client.
        data_dir: The folder of the data sets; by default FEDBUS_DATA_DIR, else FEDBUS_HOME/data.
        test_share: Share of the client's samples that it does not train with: at least one, if it has two.
        class_names: As in `load_dataset`.
        image_size: As in `load_dataset`.

    Raises:
        DataError: the data set cannot be read or partitioned, or the node config is not valid.

    """
    if not 0 <= test_share < 1:
        raise DataError(f"test_share is {test_share}. Use a number from 0 to below 1")
    partition_id, number = _read_int(node_config, PARTITION_ID, 0), _read_int(node_config, NUM_PARTITIONS, 1)
    if not 0 <= partition_id < number:
        raise DataError(
            f"{PARTITION_ID}={partition_id} of the node config must be from 0 to below {NUM_PARTITIONS}={number}"
        )
    dataset = load_dataset(
        name, str(node_config.get(DATA_DIR, "")) or data_dir, class_names=class_names, image_size=image_size
    )
    partitioning = _parse(str(node_config.get(PARTITION, partition)))
    partitions = _partition(dataset, partitioning, number, _read_int(node_config, PARTITION_SEED, seed))
    indices = partitions[partition_id]
    held_out = min(len(indices) - 1, max(1, round(len(indices) * test_share))) if test_share else 0
    return ClientDataset(dataset, partition_id, number, partitioning, indices[held_out:], indices[:held_out])


@lru_cache(maxsize=64)
def _parse(text: str) -> Partitioning:
    return Partitioning.parse(text)


@lru_cache(maxsize=8)
def _partition(dataset: ImageDataset, partitioning: Partitioning, number: int, seed: int) -> Partitions:
    return partition_labels(dataset.train.labels, partitioning, number, seed=seed)


def _read_int(node_config: NodeConfig, key: str, default: int) -> int:
    value = node_config.get(key, default)
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,19}", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidPartitioning(f"{key}={value!r} of the node config must be a whole number")
    return value
