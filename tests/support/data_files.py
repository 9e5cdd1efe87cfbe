"""Small data sets in the formats that users download."""

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CIFAR_RECORD_BYTES = 3073


def random_images(count: int, *shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(file: Path, array: NDArray[np.uint8]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(idx_bytes(array)) if file.suffix == ".gz" else idx_bytes(array))


def write_mnist(
    folder: Path, labels: list[int], *, test: int = 2, suffix: str = ".gz", size: int = 4
) -> NDArray[np.uint8]:
    """Write a training set with *labels*, and *test* test samples; return the training images."""
    images = random_images(len(labels), size, size)
    write_idx(folder / f"train-images-idx3-ubyte{suffix}", images)
    write_idx(folder / f"train-labels-idx1-ubyte{suffix}", np.array(labels, np.uint8))
    write_idx(folder / f"t10k-images-idx3-ubyte{suffix}", random_images(test, size, size, seed=1))
    write_idx(folder / f"t10k-labels-idx1-ubyte{suffix}", np.arange(test, dtype=np.uint8) % 10)
    return images


def write_cifar(file: Path, labels: list[int], *, seed: int = 0) -> NDArray[np.uint8]:
    """Write one file of records; return its images (n, 3, 32, 32)."""
    images = random_images(len(labels), 3, 32, 32, seed=seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(
        b"".join(bytes((label,)) + image.tobytes() for label, image in zip(labels, images, strict=True))
    )
    return images
