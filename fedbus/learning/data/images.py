"""Labelled images as NumPy arrays."""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]


class LabelledImages(NamedTuple):
    """Images with their labels.

    Attributes:
        images: uint8 pixels as stored, 0 to 255: grey (n, height, width), colour (n, 3, height, width) in RGB.
        labels: int64 class numbers (n,), from 0.

    """

    images: Array
    labels: Array


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A data set with its training and test samples; the arrays are read-only.

    The arrays are memory-mapped files where possible, so that all clients and all processes of a machine share one
    copy. A data set without a test set has 0 test samples.
    """

    name: str
    train: LabelledImages
    test: LabelledImages
    class_names: tuple[str, ...]
    """The name of each class, by its number."""
