"""Data sets for apps, divided among clients: the same code on devices of the fleet and in simulation.

    from fedbus.learning.data import client_data

    data = client_data("mnist", context.node_config, partition="dirichlet:0.3")
    images, labels = data.train

Loading needs NumPy only. Partitions other than IID need flwr-datasets, once for each partitioning (the extra
``simulation``); folders of images need pillow.
"""

from fedbus.learning.data.client_data import ClientDataset, client_data
from fedbus.learning.data.errors import (
    DataError,
    DataNotFound,
    DataPackageMissing,
    InvalidDataFile,
    InvalidPartitioning,
)
from fedbus.learning.data.images import ImageDataset, LabelledImages
from fedbus.learning.data.label_distribution import LabelDistribution
from fedbus.learning.data.loading import load_dataset
from fedbus.learning.data.partitioning import Partitioning
from fedbus.learning.data.partitions import Partitions, partition_labels

__all__ = [
    "ClientDataset",
    "DataError",
    "DataNotFound",
    "DataPackageMissing",
    "ImageDataset",
    "InvalidDataFile",
    "InvalidPartitioning",
    "LabelDistribution",
    "LabelledImages",
    "Partitioning",
    "Partitions",
    "client_data",
    "load_dataset",
    "partition_labels",
]
