"""The idx files of MNIST and Fashion-MNIST, gzip-compressed or not.

An idx file is a magic number (0, 0, type, dimensions), the sizes of the dimensions as big-endian uint32, and the
values; here the type is unsigned bytes. Source: http://yann.lecun.com/exdb/mnist.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import Final

import numpy as np

from fedbus.learning.data.array_cache import cached_arrays, content_key
from fedbus.learning.data.errors import DataNotFound, InvalidDataFile
from fedbus.learning.data.files import file_identity
from fedbus.learning.data.images import Array, ImageDataset, LabelledImages

UNSIGNED_BYTES: Final = 8
IMAGE_DIMENSIONS: Final = 3
LABEL_DIMENSIONS: Final = 1
SPLITS: Final = ("train", "t10k")


def has_idx_files(folder: Path) -> bool:
    return any(
        _find(folder, split, kind, dimensions) is not None
        for split in SPLITS
        for kind, dimensions in (("images", IMAGE_DIMENSIONS), ("labels", LABEL_DIMENSIONS))
    )


def load_idx_files(name: str, folder: Path) -> ImageDataset:
    """Load the four idx files in *folder*: images (n, height, width) and labels of the training and the test set.

    Raises:
        DataNotFound: one of the files does not exist.
        InvalidDataFile: a file is damaged, or images and labels differ in number.

    """
    train, test = (_load_split(folder, split) for split in SPLITS)
    classes = int(max(train.labels.max(initial=-1), test.labels.max(initial=-1))) + 1
    return ImageDataset(name, train, test, tuple(map(str, range(classes))))


def read_idx(file: Path) -> Array:
    """Read an idx file of unsigned bytes: memory-mapped, or decompressed into memory if it ends with ``.gz``.

    Raises:
        InvalidDataFile: the file is not of this format, truncated or too long.

    """
    try:
        content: Array = (
            np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8)
            if file.suffix == ".gz"
            else np.memmap(file, np.uint8, mode="r")
        )
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InvalidDataFile(f"{file} is truncated or damaged: {error}. Download it again") from None
    except ValueError:  # mmap refuses an empty file
        raise InvalidDataFile(f"{file} is empty. Download it again") from None
    if len(content) < 4 or bytes(content[:3]) != bytes((0, 0, UNSIGNED_BYTES)):
        raise InvalidDataFile(
            f"{file} is not an idx file of bytes: it begins with {bytes(content[:4]).hex(' ')}, expected 00 00 08. "
            "Download it again"
        )
    dimensions = int(content[3])
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise InvalidDataFile(f"{file} is truncated: it ends in its header. Download it again")
    shape = np.frombuffer(bytes(content[4:header]), ">u4").tolist()
    if len(content) - header != math.prod(shape):
        expected = header + math.prod(shape)
        raise InvalidDataFile(
            f"{file} has {len(content)} bytes, but its header announces {expected}. Download it again"
        )
    return content[header:].reshape(shape)


def _load_split(folder: Path, split: str) -> LabelledImages:
    images_file = _require(folder, split, "images", IMAGE_DIMENSIONS)
    labels_file = _require(folder, split, "labels", LABEL_DIMENSIONS)
    labels = _read(labels_file, LABEL_DIMENSIONS).astype(np.int64)
    if images_file.suffix == ".gz":
        key = content_key("idx", file_identity(images_file))
        images = cached_arrays(key, lambda: {"images": _read(images_file, IMAGE_DIMENSIONS)})["images"]
    else:
        images = _read(images_file, IMAGE_DIMENSIONS)
    if len(images) != len(labels):
        raise InvalidDataFile(
            f"{images_file} has {len(images)} images, but {labels_file} has {len(labels)} labels. "
            "Use two files of the same data set"
        )
    labels.setflags(write=False)
    return LabelledImages(images, labels)


def _read(file: Path, dimensions: int) -> Array:
    array = read_idx(file)
    if array.ndim != dimensions:
        kind = "images" if dimensions == IMAGE_DIMENSIONS else "labels"
        raise InvalidDataFile(
            f"{file} has {array.ndim} dimensions, but a file of {kind} has {dimensions}. Download it again"
        )
    return array


def _require(folder: Path, split: str, kind: str, dimensions: int) -> Path:
    if (file := _find(folder, split, kind, dimensions)) is None:
        raise DataNotFound(
            f"{folder / _file_name(split, kind, dimensions)} does not exist, with or without .gz. "
            "Put it there: the data set has four files"
        )
    return file


def _find(folder: Path, split: str, kind: str, dimensions: int) -> Path | None:
    name = _file_name(split, kind, dimensions)
    names = (name, name.replace("-idx", ".idx"))  # some mirrors write train-images.idx3-ubyte
    files = (folder / f"{one}{suffix}" for suffix in ("", ".gz") for one in names)
    return next((file for file in files if file.is_file()), None)


def _file_name(split: str, kind: str, dimensions: int) -> str:
    return f"{split}-{kind}-idx{dimensions}-ubyte"
