"""The binary files of CIFAR-10: records of one byte label and 3 × 32 × 32 bytes red, green and blue.

Source: https://www.cs.toronto.edu/~kriz/cifar.html, "binary version".
"""

import re
from pathlib import Path
from typing import Final

import numpy as np

from fedbus.learning.data.array_cache import cached_arrays, content_key
from fedbus.learning.data.errors import DataNotFound, InvalidDataFile
from fedbus.learning.data.files import file_identity
from fedbus.learning.data.images import Array, ImageDataset, LabelledImages

IMAGE_SHAPE: Final = (3, 32, 32)
RECORD_BYTES: Final = 1 + 3 * 32 * 32
CLASSES: Final = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
TEST_FILE: Final = "test_batch.bin"
_TRAIN_FILE: Final = re.compile(r"data_batch_(\d+)\.bin")


def has_cifar_files(folder: Path) -> bool:
    return (folder / TEST_FILE).is_file() or bool(_train_files(folder))


def load_cifar_files(name: str, folder: Path) -> ImageDataset:
    """Load all ``data_batch_N.bin`` of *folder* in the order of N, and ``test_batch.bin``: images (n, 3, 32, 32).

    Raises:
        DataNotFound: there is no file of training data, or none of test data.
        InvalidDataFile: a file is truncated or has a label above 9.

    """
    train_files = _train_files(folder)
    expected = [f"data_batch_{number}.bin" for number in range(1, max(1, len(train_files)) + 1)]
    for file_name in (*expected, TEST_FILE):
        if not (folder / file_name).is_file():
            raise DataNotFound(f"{folder / file_name} does not exist. Unpack cifar-10-binary.tar.gz again")
    return ImageDataset(name, _load(train_files), _load([folder / TEST_FILE]), CLASSES)


def read_cifar(file: Path) -> LabelledImages:
    """Read one file of records.

    Raises:
        InvalidDataFile: the file is empty, truncated or has a label above 9.

    """
    content = np.fromfile(file, np.uint8)
    if not len(content) or len(content) % RECORD_BYTES:
        raise InvalidDataFile(
            f"{file} has {len(content)} bytes, which is not a number of records of {RECORD_BYTES} bytes. "
            "Download it again"
        )
    records = content.reshape(-1, RECORD_BYTES)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= len(CLASSES):
        raise InvalidDataFile(
            f"{file} has the label {labels.max()}, but CIFAR-10 has the labels 0 to 9. Download the binary version"
        )
    return LabelledImages(records[:, 1:].reshape(-1, *IMAGE_SHAPE), labels)


def _load(files: list[Path]) -> LabelledImages:
    def build() -> dict[str, Array]:
        batches = [read_cifar(file) for file in files]
        return {
            "images": np.concatenate([batch.images for batch in batches]),
            "labels": np.concatenate([batch.labels for batch in batches]),
        }

    arrays = cached_arrays(content_key("cifar", file_identity(*files)), build)
    return LabelledImages(arrays["images"], arrays["labels"])


def _train_files(folder: Path) -> list[Path]:
    return sorted(
        (file for file in folder.glob("data_batch_*.bin") if _TRAIN_FILE.fullmatch(file.name)), key=_number
    )


def _number(file: Path) -> int:
    match = _TRAIN_FILE.fullmatch(file.name)
    assert match is not None
    return int(match[1])
