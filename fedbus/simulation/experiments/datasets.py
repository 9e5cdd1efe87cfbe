"""The data sets of the experiments, and where they are on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedbus.learning.data import DataError, DataNotFound, load_dataset
from fedbus.simulation.experiments.errors import ExperimentDataMissing, InvalidExperiment


@dataclass(frozen=True)
class BenchmarkDataset:
    """A data set of images in ten classes."""

    key: str
    """Its folder in the data folder."""
    title: str


DATASETS: Final = (
    BenchmarkDataset("mnist", "MNIST"),
    BenchmarkDataset("fashion-mnist", "Fashion-MNIST"),
    BenchmarkDataset("cifar-10", "CIFAR-10"),
)
_BY_KEY: Final = {one.key: one for one in DATASETS}


@dataclass(frozen=True)
class FoundDatasets:
    """The data sets on this machine."""

    present: Sequence[BenchmarkDataset]
    skipped: Sequence[str]
    """A line for each data set that is missing, with the reason."""


def find_datasets(keys: Sequence[str], data_dir: Path | None) -> FoundDatasets:
    """Find the data sets *keys* in *data_dir*; None is the default folder.

    Raises:
        InvalidExperiment: a key is unknown.
        ExperimentDataMissing: none of them is there, or a file is damaged.

    """
    present, skipped = [], []
    for key in keys:
        dataset = _BY_KEY.get(key)
        if dataset is None:
            raise InvalidExperiment(f"unknown data set {key!r}. Choose from {', '.join(_BY_KEY)}")
        try:
            load_dataset(key, data_dir)
        except DataNotFound as error:
            skipped.append(f"{dataset.title} is skipped: {error}")
        except DataError as error:
            raise ExperimentDataMissing(str(error)) from error
        else:
            present.append(dataset)
    if not present:
        reason = skipped[-1].partition(": ")[2] if skipped else "no data set was chosen"
        titles = " or ".join(_BY_KEY[key].title for key in keys)
        raise ExperimentDataMissing(f"the experiment needs the data of {titles}: {reason}")
    return FoundDatasets(present, skipped)
