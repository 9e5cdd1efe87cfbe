"""Whether data are still as they were when the model was trained: PSI and KS, by SciPy.

The population stability index compares counts in bins that hold equal shares of the reference; it is
the relative entropy in both directions, added up, which `scipy.stats.entropy` gives. The Kolmogorov-Smirnov
test (`scipy.stats.ks_2samp`) compares the distributions themselves and says how sure it is.

A *feature* is drifting where its PSI is above the limit and, where it is a number, the KS test is as sure as
asked for; the second keeps a few noisy rows from being called drift. What has many numbers in a sample
is looked at by summaries of a sample and a few of its numbers, so that the cost does not grow with it.

SciPy is imported when it is needed (`pip install 'fedbus[drift]'`); `available` says whether it is there.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np

MAX_FEATURES: Final = 16
"""Looked at in one sample, at most."""
BINS: Final = 10
MAX_REFERENCE_VALUES: Final = 2000
"""Values of each feature that are kept of the reference, for the KS test."""
_EMPTY_BIN_COUNT: Final = 0.5
"""Counts as so much where a bin has nothing: the index is not infinite for one empty bin."""

Array: TypeAlias = np.ndarray[Any, Any]


def is_scipy_available() -> bool:
    """Whether SciPy is installed."""
    return importlib.util.find_spec("scipy") is not None


@dataclass(frozen=True)
class DriftLimits:
    """From when on it is drift: the PSI, and how sure the KS test is over all features together."""

    psi: float = 0.25
    p: float = 0.01


@dataclass(frozen=True)
class FeatureShift:
    """One feature, against the reference."""

    feature: str
    counts: tuple[int, ...]
    """In the bins of the reference; where its edges are stays with the reference."""
    psi: float
    ks: float | None = None
    p: float | None = None

    def is_drift(self, limits: DriftLimits, features: int) -> bool:
        sure = self.p is None or self.p < limits.p / features  # of many tests one is always odd
        return self.psi > limits.psi and sure


@dataclass(frozen=True)
class NumericReference:
    """One feature that is a number, as the reference has it."""

    name: str
    values: Array

    @cached_property
    def edges(self) -> Array:
        """Inner edges of bins with equal shares of the reference; fewer where many values are the same."""
        return np.unique(np.quantile(self.values, np.linspace(0, 1, BINS + 1)[1:-1]))

    @cached_property
    def counts(self) -> Array:
        return self._binned(self.values)

    def shift(self, now: Array) -> FeatureShift:
        from scipy.stats import ks_2samp  # noqa: PLC0415 - takes long, and is an extra

        counts = self._binned(now)
        test = ks_2samp(self.values, now)
        psi = psi_of_counts(self.counts, counts)
        return FeatureShift(self.name, _to_ints(counts), psi, float(test.statistic), float(test.pvalue))

    def _binned(self, values: Array) -> Array:
        inside = np.searchsorted(self.edges, values, side="left")
        return np.bincount(inside, minlength=len(self.edges) + 1)


@dataclass(frozen=True)
class CategoricalReference:
    """A feature that is one of a few, as the reference has it; what the reference never had is the last bin."""

    name: str
    known: Array
    counts: Array

    def shift(self, now: Array) -> FeatureShift:
        counts = np.array([np.sum(now == one) for one in self.known] + [0])
        counts[-1] = len(now) - counts.sum()
        return FeatureShift(self.name, _to_ints(counts), psi_of_counts(self.counts, counts))


@dataclass(frozen=True)
class ReferenceDistribution:
    """What inputs looked like when the model was trained, feature by feature."""

    features: tuple[NumericReference, ...]
    _picked: Array

    def shifts(self, inputs: Array) -> list[FeatureShift]:
        """How each feature of *inputs* (n, …) stands to the reference."""
        _, columns = _extract_features(inputs, self._picked)
        return [one.shift(column) for one, column in zip(self.features, columns, strict=True)]


def build_reference(inputs: Array) -> ReferenceDistribution:
    """Remember *inputs* (n, …), as far as is needed."""
    kept = inputs[:: max(1, len(inputs) // MAX_REFERENCE_VALUES)]
    picked = _select_columns(kept)
    names, columns = _extract_features(kept, picked)
    return ReferenceDistribution(
        tuple(NumericReference(*one) for one in zip(names, columns, strict=True)), picked
    )


def build_prediction_reference(answers: Array) -> NumericReference | CategoricalReference:
    """Remember *answers* (n,): classes, or numbers where there are many different ones."""
    known, counts = np.unique(answers, return_counts=True)
    if len(known) > 2 * BINS:
        return NumericReference("answer", answers[:: max(1, len(answers) // MAX_REFERENCE_VALUES)])
    return CategoricalReference("class", known, np.append(counts, 0))


def most_drifted(shifts: list[FeatureShift], limits: DriftLimits) -> tuple[FeatureShift, int] | None:
    """The feature that has drifted most, and how many have; None where none has."""
    drifted = [one for one in shifts if one.is_drift(limits, len(shifts))]
    return (max(drifted, key=lambda one: one.psi), len(drifted)) if drifted else None


def psi_of_counts(before: Array, now: Array) -> float:
    """The population stability index of two counts over the same bins."""
    from scipy.stats import entropy  # noqa: PLC0415

    p, q = (
        np.maximum(counts, _EMPTY_BIN_COUNT) / np.maximum(counts, _EMPTY_BIN_COUNT).sum()
        for counts in (before, now)
    )
    return float(entropy(p, q) + entropy(q, p))


def _select_columns(inputs: Array) -> Array:
    """Which numbers of a sample to look at: all of a few, else those that vary most."""
    flat = inputs.reshape(len(inputs), -1)
    if flat.shape[1] <= MAX_FEATURES:
        return np.arange(flat.shape[1])
    spread = flat.astype(np.float64).std(axis=0)
    room = MAX_FEATURES - len(_SUMMARIES)
    return np.sort(np.argsort(-spread, kind="stable")[:room])


_SUMMARIES: Final[dict[str, Callable[[Array], Array]]] = {
    "mean": lambda flat: flat.mean(axis=1),
    "spread": lambda flat: flat.std(axis=1),
    "least": lambda flat: flat.min(axis=1),
    "greatest": lambda flat: flat.max(axis=1),
}


def _extract_features(inputs: Array, picked: Array) -> tuple[list[str], list[Array]]:
    """The names and columns of what is looked at in *inputs*."""
    flat = inputs.reshape(len(inputs), -1).astype(np.float64)
    names = [f"input[{at}]" for at in picked]
    columns = [flat[:, at] for at in picked]
    if flat.shape[1] > MAX_FEATURES:
        names = [*_SUMMARIES, *names]
        columns = [*(of(flat) for of in _SUMMARIES.values()), *columns]
    return names, columns


def _to_ints(counts: Array) -> tuple[int, ...]:
    return tuple(int(one) for one in counts)
