"""Handwritten digits, partitioned over the clients. Only NumPy: reading samples needs no torch.

MNIST, if its four files are in ``mnist/`` of the folder *data* or ``$FEDBUS_DATA_DIR``; else
scikit-learn's digits, enlarged to the same 28×28 pixels. The same arguments always return the same data.

    training set ─┬─ live samples   one in ten: devices predict them; they are not in the partitions
                  └─ partitions     IID, or with label skew
    test set                        for evaluation only
"""

import gzip
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

SPLIT_SEED = 20_240_229
LIVE_SHARE = 0.1
FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


@dataclass(frozen=True)
class Dataset:
    """A data set; *source* is its name."""

    source: str
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def partition(
    number: int, of: int, *, data: str = "", alpha: float = 0.0, max_samples: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the training data of client *number*: inputs (n, 784) float32 in 0…1 and labels (n,) int64."""
    images, labels = load(data).train
    indices = _partition_indices(data, of, alpha)[number % of]
    indices = indices[:max_samples] if max_samples else indices
    return pixels(images[indices]), labels[indices]


def samples(partition_id: int, num_partitions: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples that client *partition_id* predicts, with labels. No partition contains them."""
    images, labels = load().train
    live, _ = _split(len(labels))
    indices = np.array_split(live, num_partitions)[partition_id % num_partitions]
    return pixels(images[indices]), labels[indices]


def evaluation_set(data: str = "", *, part: int = 0, of: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return the test set, or one part of it."""
    images, labels = load(data).test
    return pixels(images[part % of :: of]), labels[part % of :: of]


def pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 255


def load(data: str = "") -> Dataset:
    """Load MNIST from the folder *data* or ``$FEDBUS_DATA_DIR``; without it, scikit-learn's digits."""
    return _load(data or os.environ.get("FEDBUS_DATA_DIR", ""))


def dataset_name() -> str:
    """Return the name of the data set that `load` finds."""
    return load().source


@cache
def _load(folder: str) -> Dataset:
    files = _files(Path(folder) / "mnist") if folder else None
    if files is None:
        return _load_digits()
    train_x, train_y, test_x, test_y = (_read_idx(file) for file in files)
    return Dataset("MNIST", (train_x, train_y.astype(np.int64)), (test_x, test_y.astype(np.int64)))


def _files(folder: Path) -> list[Path] | None:
    """Return the four files, or None if one is missing."""
    files = [folder / f"{name}-ubyte.gz" for name in FILES]
    return files if all(file.is_file() for file in files) else None


def _read_idx(file: Path) -> np.ndarray:
    """Read an array in the format of http://yann.lecun.com/exdb/mnist: magic number, shape, bytes."""
    content = gzip.decompress(file.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{file} is not a valid idx file of bytes. Download it again")
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", count=dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _load_digits() -> Dataset:
    from sklearn.datasets import load_digits  # noqa: PLC0415 - slow to import, and rarely needed

    digits = load_digits()
    images = np.pad(np.kron(digits.images, np.ones((3, 3))), ((0, 0), (2, 2), (2, 2)))
    images, labels = (images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    train, test = order[:1437], order[1437:]
    return Dataset("scikit-learn digits", (images[train], labels[train]), (images[test], labels[test]))


def _split(total: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the live samples and of all others, which are the same for every partition."""
    order = np.random.default_rng(SPLIT_SEED).permutation(total)
    return np.split(order, [int(total * LIVE_SHARE)])


@cache
def _partition_indices(data: str, of: int, alpha: float) -> list[np.ndarray]:
    """Return the indices of each client's partition."""
    labels = load(data).train[1]
    _, rest = _split(len(labels))
    return _split_skewed(rest, labels[rest], of, alpha) if alpha > 0 else np.array_split(rest, of)


def _split_skewed(rest: np.ndarray, labels: np.ndarray, of: int, alpha: float) -> list[np.ndarray]:
    """Distribute the samples of each label by a Dirichlet draw; each client gets at least one sample."""
    rng = np.random.default_rng(SPLIT_SEED)
    parts: list[list[np.ndarray]] = [[first] for first in np.array_split(rest[:of], of)]
    rest, labels = rest[of:], labels[of:]
    for label in np.unique(labels):
        ends = (np.cumsum(rng.dirichlet([alpha] * of))[:-1] * np.sum(labels == label)).astype(int)
        for part, share in zip(parts, np.split(rest[labels == label], ends), strict=True):
            part.append(share)
    return [rng.permutation(np.concatenate(part)) for part in parts]
