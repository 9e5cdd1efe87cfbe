"""Errors about data sets and partitions; each message names the file or the option to change."""

from typing import Final

SIMULATION_EXTRA: Final = "pip install 'fedbus[simulation]'"


class DataError(Exception):
    """A data set cannot be read, or cannot be partitioned as asked."""


class DataNotFound(DataError):
    """A folder or file of a data set does not exist."""


class InvalidDataFile(DataError):
    """A file of a data set is damaged, or does not fit the others."""


class InvalidPartitioning(DataError, ValueError):
    """A partitioning is not valid text, or not possible for these labels and this number of clients."""


class DataPackageMissing(DataError):
    """An optional package is not installed; the message has the pip command."""
