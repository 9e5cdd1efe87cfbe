"""Partitions of the samples of a data set, cached on disk."""

from collections.abc import Iterator, Sequence
from typing import Final, overload

import numpy as np

from fedbus.learning.data.array_cache import cached_arrays, content_key
from fedbus.learning.data.errors import InvalidPartitioning
from fedbus.learning.data.images import Array
from fedbus.learning.data.partitioners import compute_partitions, package_version
from fedbus.learning.data.partitioning import Partitioning

ALGORITHM: Final = 1
"""Changes with the results of this package, so that older entries of the cache are not used."""
MAX_SEED: Final = 2**63 - 1


class Partitions(Sequence[Array]):
    """The indices of the samples of each client: int64 arrays, read-only, in random order.

    *offsets* (n + 1,) has the start of each partition in *indices*.
    """

    def __init__(self, offsets: Array, indices: Array) -> None:
        self._offsets = offsets
        self._indices = indices

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> list[Array]: ...
    def __getitem__(self, index: int | slice) -> Array | list[Array]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        start = range(len(self))[index]
        return self._indices[self._offsets[start] : self._offsets[start + 1]]

    def __iter__(self) -> Iterator[Array]:
        return (self[index] for index in range(len(self)))

    @property
    def sizes(self) -> Array:
        """The number of samples of each client, int64 (n,)."""
        return np.diff(self._offsets)


def partition_labels(
    labels: Array, partitioning: Partitioning | str, num_partitions: int, *, seed: int = 0
) -> Partitions:
    """Divide samples by their *labels* (n,), which are integers or texts, among *num_partitions* clients.

    The same arguments return the same partitions, on each machine with the same version of flwr-datasets. They are
    computed once and cached in FEDBUS_HOME/cache/data for all processes of the machine. No sample is in two partitions,
    and no partition is empty. Each sample is in a partition, except those of classes that ``classes:K`` gives to no
    client: with 3 clients and ``classes:1``, those of three classes are used.

    Raises:
        InvalidPartitioning: the text is not valid, or the labels do not allow these partitions.
        DataPackageMissing: flwr-datasets is not installed, and the partitions are not IID.

    """
    if not isinstance(partitioning, Partitioning):
        partitioning = Partitioning.parse(partitioning)
    if not 0 <= seed <= MAX_SEED:
        raise InvalidPartitioning(f"the seed of partitions is {seed}. Use a number from 0 to {MAX_SEED}")
    _, numbers = np.unique(np.asarray(labels), return_inverse=True)
    numbers = numbers.astype(np.int64)
    source = "numpy" if partitioning == Partitioning() else package_version()
    key = content_key(
        "partitions",
        ALGORITHM,
        source,
        str(partitioning),
        num_partitions,
        seed,
        numbers.astype("<i8").tobytes(),
    )

    def build() -> dict[str, Array]:
        parts = compute_partitions(numbers, partitioning, num_partitions, seed)
        return {
            "offsets": np.cumsum([0, *map(len, parts)], dtype=np.int64),
            "indices": np.concatenate(parts).astype(np.int64),
        }

    arrays = cached_arrays(key, build)
    return Partitions(arrays["offsets"], arrays["indices"])
