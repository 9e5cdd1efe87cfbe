"""Data drift: whether the inputs still have the distribution of the training data, by PSI and the KS test.

The population stability index (PSI) compares counts in bins that hold equal shares of the reference. It is
the sum of the relative entropies in both directions (`scipy.stats.entropy`). The two-sample Kolmogorov-Smirnov
test (`scipy.stats.ks_2samp`) compares the distributions themselves and returns a p-value.

A feature drifts if its PSI is above the limit and, for a numeric feature, the p-value of the KS test is below
its limit; the KS test prevents a few noisy rows from counting as drift. Of large samples, such as images, only
summaries and a few numbers are compared, so that the cost does not grow with the sample size.

SciPy is an extra (`pip install 'fedbus[drift]'`) and is imported on use; see `is_scipy_available`.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np

MAX_FEATURES: Final = 16
"""Features that are compared in one sample, at most."""
BINS: Final = 10
MAX_REFERENCE_VALUES: Final = 2000
"""Values of each reference feature that are stored for the KS test."""
_EMPTY_BIN_COUNT: Final = 0.5
"""The count that an empty bin is given, so that the PSI stays finite."""

Array: TypeAlias = np.ndarray[Any, Any]


def is_scipy_available() -> bool:
    """Return whether SciPy is installed."""
    return importlib.util.find_spec("scipy") is not None


@dataclass(frozen=True)
class DriftLimits:
    """The limits beyond which a feature drifts: its PSI, and the p-value of the KS test over all features together."""

    psi: float = 0.25
    p: float = 0.01


@dataclass(frozen=True)
class FeatureShift:
    """The comparison of one feature with the reference."""

    feature: str
    counts: tuple[int, ...]
    """Counts in the bins of the reference. The bin edges are values of samples and do not leave the device."""
    psi: float
    ks: float | None = None
    p: float | None = None

    def is_drift(self, limits: DriftLimits, features: int) -> bool:
        significant = self.p is None or self.p < limits.p / features  # Bonferroni correction
        return self.psi > limits.psi and significant


@dataclass(frozen=True)
class NumericReference:
    """The reference distribution of a numeric feature."""

    name: str
    values: Array

    @cached_property
    def edges(self) -> Array:
        """The inner edges of bins with equal shares of the reference; fewer if many values are equal."""
        return np.unique(np.quantile(self.values, np.linspace(0, 1, BINS + 1)[1:-1]))

    @cached_property
    def counts(self) -> Array:
        return self._bin_counts(self.values)

    def compare(self, now: Array) -> FeatureShift:
        from scipy.stats import ks_2samp  # noqa: PLC0415 - an extra that is slow to import

        counts = self._bin_counts(now)
        test = ks_2samp(self.values, now)
        psi = psi_of_counts(self.counts, counts)
        return FeatureShift(self.name, _to_ints(counts), psi, float(test.statistic), float(test.pvalue))

    def _bin_counts(self, values: Array) -> Array:
        inside = np.searchsorted(self.edges, values, side="left")
        return np.bincount(inside, minlength=len(self.edges) + 1)


@dataclass(frozen=True)
class CategoricalReference:
    """The reference distribution of a categorical feature; the last bin counts values that are not in the reference."""

    name: str
    categories: Array
    counts: Array

    def compare(self, now: Array) -> FeatureShift:
        counts = np.array([np.sum(now == one) for one in self.categories] + [0])
        counts[-1] = len(now) - counts.sum()
        return FeatureShift(self.name, _to_ints(counts), psi_of_counts(self.counts, counts))


@dataclass(frozen=True)
class ReferenceDistribution:
    """The distribution of the training inputs, feature by feature."""

    features: tuple[NumericReference, ...]
    _selected: Array

    def compare(self, inputs: Array) -> list[FeatureShift]:
        """Compare each feature of *inputs* (n, …) with the reference."""
        _, columns = _extract_features(inputs, self._selected)
        return [one.compare(column) for one, column in zip(self.features, columns, strict=True)]


def build_reference(inputs: Array) -> ReferenceDistribution:
    """Build the reference from *inputs* (n, …), with at most about 2 × `MAX_REFERENCE_VALUES` rows."""
    sample = inputs[:: max(1, len(inputs) // MAX_REFERENCE_VALUES)]
    selected = _select_columns(sample)
    names, columns = _extract_features(sample, selected)
    return ReferenceDistribution(
        tuple(NumericReference(*one) for one in zip(names, columns, strict=True)), selected
    )


def build_prediction_reference(answers: Array) -> NumericReference | CategoricalReference:
    """Build the reference from the predictions *answers* (n,): categorical, or numeric if many values are distinct."""
    known, counts = np.unique(answers, return_counts=True)
    if len(known) > 2 * BINS:
        return NumericReference("answer", answers[:: max(1, len(answers) // MAX_REFERENCE_VALUES)])
    return CategoricalReference("class", known, np.append(counts, 0))


def most_drifted(shifts: list[FeatureShift], limits: DriftLimits) -> tuple[FeatureShift, int] | None:
    """Return the feature with the highest PSI among those that drift, and their number; None if none drifts."""
    drifted = [one for one in shifts if one.is_drift(limits, len(shifts))]
    return (max(drifted, key=lambda one: one.psi), len(drifted)) if drifted else None


def psi_of_counts(before: Array, now: Array) -> float:
    """Compute the population stability index of two counts over the same bins."""
    from scipy.stats import entropy  # noqa: PLC0415 - an extra

    p, q = (
        np.maximum(counts, _EMPTY_BIN_COUNT) / np.maximum(counts, _EMPTY_BIN_COUNT).sum()
        for counts in (before, now)
    )
    return float(entropy(p, q) + entropy(q, p))


def _select_columns(inputs: Array) -> Array:
    """Select the columns of a flattened sample to compare: all of a few, else those with the highest variance."""
    flat = inputs.reshape(len(inputs), -1)
    if flat.shape[1] <= MAX_FEATURES:
        return np.arange(flat.shape[1])
    spread = flat.astype(np.float64).std(axis=0)
    available = MAX_FEATURES - len(_SUMMARIES)
    return np.sort(np.argsort(-spread, kind="stable")[:available])


_SUMMARIES: Final[dict[str, Callable[[Array], Array]]] = {
    "mean": lambda flat: flat.mean(axis=1),
    "spread": lambda flat: flat.std(axis=1),
    "least": lambda flat: flat.min(axis=1),
    "greatest": lambda flat: flat.max(axis=1),
}


def _extract_features(inputs: Array, selected: Array) -> tuple[list[str], list[Array]]:
    """Return the names and the values of the compared features of *inputs*."""
    flat = inputs.reshape(len(inputs), -1).astype(np.float64)
    names = [f"input[{at}]" for at in selected]
    columns = [flat[:, at] for at in selected]
    if flat.shape[1] > MAX_FEATURES:
        names = [*_SUMMARIES, *names]
        columns = [*(of(flat) for of in _SUMMARIES.values()), *columns]
    return names, columns


def _to_ints(counts: Array) -> tuple[int, ...]:
    return tuple(int(one) for one in counts)
