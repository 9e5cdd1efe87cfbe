"""Images and labels from the Hugging Face Hub. Needs `datasets`, pillow and, the first time, the network."""

from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from fedbus.learning.data.array_cache import cached_arrays, content_key
from fedbus.learning.data.errors import (
    SIMULATION_EXTRA,
    DataNotFound,
    DataPackageMissing,
    InvalidDataFile,
)
from fedbus.learning.data.images import Array, ImageDataset, LabelledImages

PREFIX: Final = "hf:"
TEST_SPLITS: Final = ("test", "validation", "valid")


def load_hugging_face(name: str) -> ImageDataset:
    """Load ``hf:PATH[:CONFIGURATION][@REVISION]``; images are grey (n, height, width) or colour (n, 3, height, width).

    The arrays stay in the cache of fedbus, so that later processes need neither the network nor `datasets`.

    Raises:
        DataNotFound: the data set does not exist, or there is no network.
        InvalidDataFile: the data set has no images, no labels or images of several sizes.
        DataPackageMissing: `datasets` is not installed.

    """
    arrays = cached_arrays(content_key("hugging-face", name), lambda: _download(name))
    return ImageDataset(
        name,
        LabelledImages(arrays["train_images"], arrays["train_labels"]),
        LabelledImages(arrays["test_images"], arrays["test_labels"]),
        tuple(arrays["class_names"].tolist()),
    )


def _download(name: str) -> dict[str, Array]:
    try:
        import datasets  # noqa: PLC0415 - optional, and slow to import
    except ImportError:
        raise DataPackageMissing(
            f"{name} needs the package datasets. Install it: {SIMULATION_EXTRA}"
        ) from None
    path, _, revision = name.removeprefix(PREFIX).partition("@")
    path, _, configuration = path.partition(":")
    try:
        splits = datasets.load_dataset(path, configuration or None, revision=revision or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataNotFound(
            f"cannot load {name}: {' '.join(str(error).split())}. Check the name, and that this machine reaches "
            "https://huggingface.co; without a network, use a folder of files"
        ) from None
    if "train" not in splits:
        raise InvalidDataFile(f"{name} has no split train, only {', '.join(splits)}. Use another data set")
    train = splits["train"]
    test = next((splits[split] for split in TEST_SPLITS if split in splits), train.select(range(0)))
    image_column, label_column = _find_columns(name, train.features)
    labels = train.features[label_column]
    names = labels.names if isinstance(labels, datasets.ClassLabel) else None
    train_images, test_images = (_stack(name, split[image_column]) for split in (train, test))
    train_labels, test_labels = (np.asarray(split[label_column], np.int64) for split in (train, test))
    if train_images.shape[1:] != test_images.shape[1:]:
        test_images = test_images.reshape(0, *train_images.shape[1:]) if not len(test_images) else test_images
    if train_images.shape[1:] != test_images.shape[1:]:
        raise InvalidDataFile(
            f"{name} has images of several sizes. Download and resize them, and use the folder"
        )
    return {
        "train_images": train_images,
        "train_labels": train_labels,
        "test_images": test_images,
        "test_labels": test_labels,
        "class_names": np.array(names or [str(number) for number in range(int(train_labels.max()) + 1)]),
    }


def _find_columns(name: str, features: Any) -> tuple[str, str]:
    """Return the columns of the images and of the labels; of several labels, ``label`` or the first."""
    import datasets  # noqa: PLC0415 - slow to import

    images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not labels and getattr(features.get("label"), "dtype", "").startswith(("int", "uint")):
        labels = ["label"]
    if not images or not labels:
        raise InvalidDataFile(
            f"{name} has the columns {', '.join(features)}, but needs one of images and one of class labels"
        )
    return images[0], "label" if "label" in labels else labels[0]


def _stack(name: str, images: Iterable[Any]) -> Array:
    """Return the images of pillow as one array."""
    images = list(images)
    is_grey = all(image.mode in {"1", "L", "LA"} for image in images)
    pixels = [np.asarray(image.convert("L" if is_grey else "RGB")) for image in images]
    if len({one.shape for one in pixels}) > 1:
        raise InvalidDataFile(
            f"{name} has images of several sizes. Download and resize them, and use the folder"
        )
    if not pixels:
        return np.empty((0, 0, 0), np.uint8)
    stacked = np.stack(pixels)
    return stacked if is_grey else np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))
