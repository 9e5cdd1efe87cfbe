"""Compute partitions with the partitioners of flwr-datasets, which get the labels and never the images."""

import math
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fedbus.learning.data.errors import SIMULATION_EXTRA, DataPackageMissing, InvalidPartitioning
from fedbus.learning.data.images import Array
from fedbus.learning.data.partitioning import Partitioning, SizeLaw

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

PACKAGE: Final = "flwr-datasets"
_LABEL: Final = "label"


def package_version() -> str:
    """Return the version of flwr-datasets, without importing it.

    Raises:
        DataPackageMissing: it is not installed.

    """
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        raise DataPackageMissing(
            f"partitions other than iid need {PACKAGE}. Install it: {SIMULATION_EXTRA}"
        ) from None


def compute_partitions(labels: Array, partitioning: Partitioning, number: int, seed: int) -> list[Array]:
    """Return the indices of the samples of each of *number* partitions, in random order.

    The samples are shuffled first, since some partitioners take them as they come. No sample is in two partitions, and
    no partition is empty. Each sample is in a partition, except those of classes that ``classes:K`` gives to no client.

    Raises:
        InvalidPartitioning: a partition would be empty, or the labels have too few classes or samples.

    """
    if number < 1:
        raise InvalidPartitioning(f"{number} partitions: use at least 1 client")
    if number > len(labels):
        raise InvalidPartitioning(
            f"{len(labels)} samples cannot be divided among {number} clients. Use at most {len(labels)} clients"
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = labels[order]
    if partitioning.classes is not None:
        parts = _split_by_classes(shuffled, partitioning, partitioning.classes, number, seed)
    elif partitioning.alpha is not None:
        parts = _split_by_dirichlet(shuffled, partitioning.alpha, number, seed)
    elif partitioning.sizes is not None:
        parts = _split_by_sizes(shuffled, partitioning, partitioning.sizes, number, seed)
    else:
        # as IidPartitioner, whose import takes seconds
        parts = np.array_split(np.arange(len(labels)), number)
    return [order[part] for part in parts]


def _split_by_dirichlet(labels: Array, alpha: float, number: int, seed: int) -> list[Array]:
    from flwr_datasets.partitioner import DirichletPartitioner  # noqa: PLC0415 - takes seconds

    parts = _run(
        DirichletPartitioner(number, _LABEL, alpha=float(alpha), min_partition_size=0, seed=seed), labels
    )
    return _fill_empty(parts)


def _split_by_classes(
    labels: Array, partitioning: Partitioning, classes: int, number: int, seed: int
) -> list[Array]:
    from flwr_datasets.partitioner import PathologicalPartitioner  # noqa: PLC0415 - takes seconds

    class BalancedClassesPartitioner(PathologicalPartitioner):  # type: ignore[misc]
        """Gives each class to equally many clients; the assignments of the base leave classes to no client."""

        def _determine_partition_id_to_unique_labels(self) -> None:
            self._unique_labels = present.tolist()
            self._partition_id_to_unique_labels = {
                client: present[chosen].tolist()
                for client, chosen in enumerate(assign_classes(number, classes, len(present)))
            }

    present, counts = np.unique(labels, return_counts=True)
    if classes > len(present):
        raise InvalidPartitioning(
            f"classes:{classes} asks for more classes than there are ({len(present)}). "
            f"Use at most classes:{len(present)}"
        )
    partitioner = BalancedClassesPartitioner(number, _LABEL, num_classes_per_partition=classes, seed=seed)
    try:
        parts = _run(partitioner, labels)
    except ValueError:
        raise InvalidPartitioning(
            f"classes:{classes} with {number} clients needs more samples of a class than there are "
            f"({counts.min()} in the smallest class). Use fewer clients or fewer classes a client"
        ) from None
    if partitioning.sizes is None:
        return parts
    return _resize_within_classes(labels, parts, _size_weights(partitioning, number, seed), seed)


def assign_classes(clients: int, classes_per_client: int, classes: int) -> list[list[int]]:
    """Return consecutive classes for each client, so that each class has equally many clients, or one more.

    After each cycle through all classes, the first class moves by one, so that classes meet different neighbours.
    """
    cycle = math.lcm(classes_per_client, classes) // classes_per_client
    return [
        [
            (client * classes_per_client + client // cycle + place) % classes
            for place in range(classes_per_client)
        ]
        for client in range(clients)
    ]


def _split_by_sizes(
    labels: Array, partitioning: Partitioning, law: SizeLaw, number: int, seed: int
) -> list[Array]:
    from flwr_datasets import partitioner  # noqa: PLC0415 - takes seconds

    match law:
        case SizeLaw.LINEAR:
            chosen: Partitioner = partitioner.LinearPartitioner(number)
        case SizeLaw.SQUARE:
            chosen = partitioner.SquarePartitioner(number)
        case SizeLaw.EXPONENTIAL:
            chosen = partitioner.ExponentialPartitioner(number)
        case SizeLaw.LOGNORMAL:
            sizes = apportion(len(labels), _size_weights(partitioning, number, seed))
            chosen = partitioner.SizePartitioner(sizes.tolist())
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return _run(chosen, labels)
    except ValueError:
        raise InvalidPartitioning(
            f"{partitioning} leaves a client without samples: there are {len(labels)} samples for {number} clients. "
            "Use fewer clients, or sizes:lognormal:1"
        ) from None


def _size_weights(partitioning: Partitioning, number: int, seed: int) -> Array:
    """Return the relative sizes of the partitions; the largest exponential size is 1."""
    ranks = np.arange(1, number + 1, dtype=float)
    match partitioning.sizes:
        case SizeLaw.SQUARE:
            return ranks**2
        case SizeLaw.EXPONENTIAL:
            return np.asarray(np.exp(ranks - number))
        case SizeLaw.LOGNORMAL:
            return np.random.default_rng((seed, 1)).lognormal(0.0, partitioning.sigma or 1.0, number)
        case SizeLaw.LINEAR | None:
            return ranks


def apportion(total: int, weights: Array) -> Array:
    """Divide *total* by *weights* into whole numbers (n,), each at least 1; *total* is at least n.

    The fractions are rounded by the method of the largest remainder.
    """
    spare = total - len(weights)
    shares = weights / weights.sum() * spare
    sizes = np.floor(shares).astype(np.int64)
    left = spare - int(sizes.sum())
    sizes[np.argsort(sizes - shares, kind="stable")[:left]] += 1
    return np.asarray(sizes + 1)


def _resize_within_classes(labels: Array, parts: list[Array], weights: Array, seed: int) -> list[Array]:
    """Divide the samples of each class again among the partitions that have the class, in proportion to *weights*."""
    by_class: dict[int, list[int]] = {}
    for number, part in enumerate(parts):
        for label in np.unique(labels[part]).tolist():
            by_class.setdefault(label, []).append(number)
    resized: list[list[Array]] = [[] for _ in parts]
    for label, owners in by_class.items():
        samples = np.flatnonzero(labels == label)
        ends = np.cumsum(apportion(len(samples), weights[owners]))[:-1]
        for owner, share in zip(owners, np.split(samples, ends), strict=True):
            resized[owner].append(share)
    random = np.random.default_rng((seed, 2))
    return [random.permutation(np.concatenate(shares)) for shares in resized]


def _fill_empty(parts: list[Array]) -> list[Array]:
    """Move one sample from the largest partition to each empty one."""
    sizes = np.array([len(part) for part in parts])
    for empty in np.flatnonzero(sizes == 0):
        largest = int(sizes.argmax())
        parts[empty], parts[largest] = parts[largest][-1:], parts[largest][:-1]
        sizes[empty], sizes[largest] = 1, sizes[largest] - 1
    return parts


def _run(partitioner: "Partitioner", labels: Array) -> list[Array]:
    """Return the indices that *partitioner* selects for each partition."""
    import datasets  # noqa: PLC0415 - takes seconds

    class LabelColumn(datasets.Dataset):  # type: ignore[misc]
        """The labels; a selection returns its indices, since building a data set of each would take milliseconds."""

        def select(self, indices: Any, **_: Any) -> Any:
            return np.asarray(indices, np.int64)

    partitioner.dataset = LabelColumn.from_dict({_LABEL: labels})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes that no partition has
        number = partitioner.num_partitions
        return [np.asarray(partitioner.load_partition(part)) for part in range(number)]
