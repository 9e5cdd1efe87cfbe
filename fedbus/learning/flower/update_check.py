"""The check of an untrusted update, before a strategy gets it."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedXgbBagging, FedXgbCyclic, Strategy

from fedbus.learning import npy
from fedbus.learning.flower.array_records import array_records_of
from fedbus.learning.flower.compressed_records import SentArrays, find_reference
from fedbus.learning.flower.private_api import NUMPY, array_view
from fedbus.learning.stale_updates import UpdateRefused, check_finite

TREE_STRATEGIES: Final = (FedXgbBagging, FedXgbCyclic)
"""Strategies whose updates are not arrays that can be added."""


def check_update(content: RecordDict, sent: SentArrays) -> None:
    """Check the arrays of *content*, a reply to *sent*. Flower's strategies would fail, or average NaN.

    Names may differ: a client may return other arrays than it got.

    Raises:
        UpdateRefused: an array has NaN or infinity, or another shape than the sent array of its name.

    """
    for name, record in array_records_of(content).items():
        arrays = numeric_arrays(record)
        check_finite(arrays)
        reference = find_reference(name, sent)
        expected = {} if reference is None else numeric_arrays(reference)
        for key in arrays.keys() & expected.keys():
            if arrays[key].shape != expected[key].shape:
                raise UpdateRefused(
                    f"the array {key!r} has the shape {arrays[key].shape} instead of {expected[key].shape}"
                )


def has_arrays_of_the_model(strategy: Strategy) -> bool:
    """Return whether *strategy* combines updates array by array, as Flower's strategies for weights do.

    An aggregation of the app's own may take updates of any shape, and the updates of the tree strategies grow.
    """
    owner = next(cls for cls in type(strategy).__mro__ if "aggregate_train" in vars(cls))
    return (
        isinstance(strategy, FedAvg)
        and owner.__module__.partition(".")[0] == "flwr"
        and "aggregate_train" not in vars(strategy)
        and not isinstance(strategy, TREE_STRATEGIES)
    )


def numeric_arrays(record: ArrayRecord) -> Mapping[str, np.ndarray[Any, Any]]:
    """Return the NumPy arrays of *record* as views, without those that are bytes.

    Raises:
        UpdateRefused: an array is invalid.

    """
    arrays = {}
    for name, array in record.items():
        if array.stype == NUMPY:
            try:
                arrays[name] = array_view(array)
            except npy.BadArray as error:
                raise UpdateRefused(f"invalid array {name!r}: {error}") from None
    return arrays
