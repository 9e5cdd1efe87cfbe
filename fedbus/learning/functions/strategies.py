"""Aggregation strategies in plain NumPy: a client's update goes in with `add`, the new weights come out.

    strategy.begin_round(weights)
    strategy.add(update)            for each valid update, in order of arrival
    strategy.end_round() -> weights, or None if the round had no update

All updates of a round have the names and shapes of the global weights. If the global weights are empty (a task without
``initial``), those of the first update count. The result has the dtypes of the global weights; integers are rounded.
The means are computed in float64, or complex128.

Weighted means (`FedAvg`, `FedAdam`) add each update to one sum, so their memory does not grow with the cohort. The
robust strategies (`FedMedian`, `TrimmedMean`, `MultiKrum`) compare the updates and keep all of a round.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import structlog

from fedbus.contracts.task.aggregation import AggregationTable, StrategyName
from fedbus.learning.functions.updates import Update, Weights
from fedbus.learning.weights import cast

BLOCK_ELEMENTS: Final = 64 * 1024
"""Elements that are multiplied and then added, few enough for the CPU cache."""

Array = np.ndarray[Any, Any]

log = structlog.get_logger("fedbus.learning")


class AggregationStrategy(ABC):
    """The aggregation of a run, round by round."""

    def __init__(self) -> None:
        self.weights: Weights = {}
        self.step = 0
        """Count of rounds since the start of this process, this one included."""

    def begin_round(self, weights: Weights) -> None:
        """Begin a round from the global *weights*, without updates."""
        self.weights = weights
        self.step += 1
        self._clear()

    @abstractmethod
    def add(self, update: Update) -> None:
        """Add a valid update with a positive weight."""

    def end_round(self) -> Weights | None:
        """Return the new global weights; None if the round had no update."""
        aggregated = self._aggregate()
        if aggregated is None:
            return None
        return {
            name: to_dtype(array, self.weights[name].dtype if name in self.weights else self._dtype_of(name))
            for name, array in aggregated.items()
        }

    @abstractmethod
    def _clear(self) -> None:
        """Remove the updates of the last round."""

    @abstractmethod
    def _aggregate(self) -> Weights | None:
        """Return the new weights in any dtype, in the order of the global weights' names."""

    @abstractmethod
    def _dtype_of(self, name: str) -> "np.dtype[Any]":
        """Return the dtype of an array in the first update."""


# --- weighted means ---------------------------------------------------------------------------


class RunningMean:
    """A weighted mean of weights, to which updates are added. It keeps one sum."""

    def __init__(self) -> None:
        self.total_weight = 0.0
        self.dtypes: dict[str, np.dtype[Any]] = {}
        self._sums: Weights = {}

    def add(self, weights: Weights, weight: float) -> None:
        """Add *weights*, whose names and shapes are those of the first ones."""
        if not self._sums:
            self.dtypes = {name: array.dtype for name, array in weights.items()}
            self._sums = {
                name: np.zeros(array.shape, _accumulator_dtype(array)) for name, array in weights.items()
            }
        for name, total in self._sums.items():
            add_scaled(total, weights[name], weight)
        self.total_weight += weight

    def add_sums(self, sums: Weights, weight: float, dtypes: Mapping[str, "np.dtype[Any]"]) -> None:
        """Add the *sums* of several updates of *dtypes*, whose weights add up to *weight*."""
        if not self._sums:
            self.dtypes = dict(dtypes)
            self._sums = {name: np.array(array) for name, array in sums.items()}
        else:
            for name, total in self._sums.items():
                np.add(total, sums[name], out=total)
        self.total_weight += weight

    @property
    def sums(self) -> Weights:
        """The weighted sums so far, in float64 or complex128."""
        return self._sums

    def mean(self) -> Weights:
        """Return the mean. The total weight is positive."""
        return {name: total / self.total_weight for name, total in self._sums.items()}


class FedAvg(AggregationStrategy):
    """The mean of the updates, weighted by their examples.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
    https://arxiv.org/abs/1602.05629. With the proximal term in the clients' training, it is FedProx (see `proximal`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._mean = RunningMean()

    def add(self, update: Update) -> None:
        self._mean.add(update.weights, update.weight)

    def add_sums(self, sums: Weights, weight: float, dtypes: Mapping[str, "np.dtype[Any]"]) -> None:
        """Add the weighted *sums* of several updates of *dtypes*, whose weights add up to *weight*."""
        self._mean.add_sums(sums, weight, dtypes)

    def _clear(self) -> None:
        self._mean = RunningMean()

    def _aggregate(self) -> Weights | None:
        return self._mean.mean() if self._mean.total_weight > 0 else None

    def _dtype_of(self, name: str) -> "np.dtype[Any]":
        return self._mean.dtypes[name]


class FedAdam(FedAvg):
    """Adam on the server, with the difference between the mean of the updates and the global weights as gradient.

    Reddi et al., "Adaptive Federated Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295, algorithm 2. The step
    is bias-corrected as in Flower: with ``Δ = mean - w`` and ``t = round + 1``::

        m = β₁·m + (1 - β₁)·Δ        v = β₂·v + (1 - β₂)·Δ²
        w = w + η·√(1 - β₂ᵗ) / (1 - β₁ᵗ) · m / (√v + τ)

    The moments are kept in this process. A run that continues from a checkpoint starts with moments of 0, as a new
    run does.
    """

    def __init__(
        self, *, eta: float = 0.1, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3
    ) -> None:
        super().__init__()
        self._eta = eta
        self._beta_1 = beta_1
        self._beta_2 = beta_2
        self._tau = tau
        self._first_moments: Weights = {}
        self._second_moments: Weights = {}

    def _aggregate(self) -> Weights | None:
        mean = super()._aggregate()
        if mean is None or not self.weights:  # without global weights there is no difference
            return mean
        exponent = self.step + 1.0
        eta = self._eta * np.sqrt(1 - self._beta_2**exponent) / (1 - self._beta_1**exponent)
        return {name: self._move(name, weights, mean[name], eta) for name, weights in self.weights.items()}

    def _move(self, name: str, weights: Array, mean: Array, eta: float) -> Array:
        difference = mean - weights
        first = self._beta_1 * self._first_moments.get(name, 0.0) + (1 - self._beta_1) * difference
        second = self._beta_2 * self._second_moments.get(name, 0.0) + (1 - self._beta_2) * difference**2
        self._first_moments[name], self._second_moments[name] = first, second
        moved: Array = weights + eta * first / (np.sqrt(second) + self._tau)
        return moved


# --- robust strategies -----------------------------------------------------------------------


class RobustStrategy(AggregationStrategy):
    """A strategy that compares the updates of a round with each other. It keeps all of them."""

    def __init__(self) -> None:
        super().__init__()
        self._updates: list[Update] = []

    def add(self, update: Update) -> None:
        self._updates.append(update)

    def _clear(self) -> None:
        self._updates = []

    def _aggregate(self) -> Weights | None:
        return self._combine(self._updates) if self._updates else None

    @abstractmethod
    def _combine(self, updates: list[Update]) -> Weights:
        """Combine at least one update."""

    def _dtype_of(self, name: str) -> "np.dtype[Any]":
        dtype: np.dtype[Any] = self._updates[0].weights[name].dtype
        return dtype


class FedMedian(RobustStrategy):
    """The median of each element over the updates, unweighted.

    Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
    https://arxiv.org/abs/1803.01498, algorithm 1, option I. Of an even number of updates, it is the mean of the two
    middle ones.
    """

    def _combine(self, updates: list[Update]) -> Weights:
        return {name: np.median(_stack(updates, name), axis=0) for name in updates[0].weights}


class TrimmedMean(RobustStrategy):
    """The mean of each element over the updates without the smallest and largest, unweighted.

    Yin et al. (see `FedMedian`), option II. Of n updates, ``int(trim_share · n)`` are cut off at each end.
    """

    def __init__(self, *, trim_share: float = 0.2) -> None:
        super().__init__()
        if not 0 <= trim_share < 0.5:
            raise ValueError(f"trim_share is {trim_share}, expected a value in [0, 0.5)")
        self._trim_share = trim_share

    def _combine(self, updates: list[Update]) -> Weights:
        cut = int(self._trim_share * len(updates))
        return {name: self._trim(_stack(updates, name), cut) for name in updates[0].weights}

    @staticmethod
    def _trim(stacked: Array, cut: int) -> Array:
        end = len(stacked) - cut
        sorted_in_part = np.partition(stacked, (cut, end - 1), axis=0)
        mean: Array = sorted_in_part[cut:end].mean(axis=0, dtype=_accumulator_dtype(stacked))
        return mean


class MultiKrum(RobustStrategy):
    """The weighted mean of the updates that are closest to their neighbours; with ``select_clients = 1``, Krum.

    Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017,
    https://arxiv.org/abs/1703.02757. Of n updates of which f may be malicious, the score of each is the sum of its
    squared distances to its ``n - f - 2`` nearest others (at least 1); the lowest scores are selected. The proof needs
    ``n > 2·f + 2``; with fewer updates a warning is logged. As in Flower, the mean is weighted by examples.
    """

    def __init__(self, *, malicious_clients: int = 0, select_clients: int = 1) -> None:
        super().__init__()
        self._malicious_clients = malicious_clients
        self._select_clients = select_clients

    def select(self, updates: list[Update]) -> list[Update]:
        """Return the selected updates, the lowest score first."""
        if self._malicious_clients and len(updates) <= 2 * self._malicious_clients + 2:
            log.warning(
                "Too few updates for Krum to tolerate the malicious clients",
                updates=len(updates),
                malicious_clients=self._malicious_clients,
            )
        distances = squared_distances([update.weights for update in updates])
        np.fill_diagonal(distances, np.inf)
        neighbours = max(1, len(updates) - self._malicious_clients - 2)
        scores = np.sort(distances, axis=1)[:, :neighbours].sum(axis=1)
        return [updates[index] for index in np.argsort(scores, kind="stable")[: self._select_clients]]

    def _combine(self, updates: list[Update]) -> Weights:
        mean = RunningMean()
        for update in self.select(updates):
            mean.add(update.weights, update.weight)
        return mean.mean()


def squared_distances(updates: list[Weights]) -> Array:
    """Return the squared Euclidean distances (n, n) between *updates*, over all their arrays together.

    They are computed as ``‖x‖² + ‖y‖² - 2·x·y`` relative to the first update: updates of one round are close to each
    other, and their differences would otherwise be lost in the rounding of their norms.
    """
    gram = np.zeros((len(updates), len(updates)))
    for name, first in updates[0].items():
        flat = np.stack(
            [np.subtract(update[name], first, dtype=_accumulator_dtype(first)).ravel() for update in updates]
        )
        gram += (flat @ flat.conj().T).real
    norms = np.diagonal(gram)
    return np.asarray(np.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0.0))


# --- arrays -----------------------------------------------------------------------------------


def make_strategy(table: AggregationTable) -> AggregationStrategy:
    """Make the strategy that ``[tool.fedbus.aggregation]`` names."""
    match table.strategy:
        case StrategyName.FEDAVG | StrategyName.FEDPROX:
            return FedAvg()
        case StrategyName.FEDADAM:
            return FedAdam(eta=table.eta, beta_1=table.beta_1, beta_2=table.beta_2, tau=table.tau)
        case StrategyName.FEDMEDIAN:
            return FedMedian()
        case StrategyName.TRIMMED_MEAN:
            return TrimmedMean(trim_share=table.trim_share)
        case StrategyName.KRUM:
            return MultiKrum(malicious_clients=table.malicious_clients, select_clients=table.select_clients)


def add_scaled(total: Array, array: Array, factor: float) -> None:
    """Add ``factor · array`` to *total* in place, without a temporary array of its size."""
    flat_total = total.reshape(-1)
    flat = np.ascontiguousarray(array).reshape(-1)
    for start in range(0, flat.size, BLOCK_ELEMENTS):
        block = flat[start : start + BLOCK_ELEMENTS]
        flat_total[start : start + BLOCK_ELEMENTS] += np.multiply(block, factor, dtype=total.dtype)


def to_dtype(array: Array, dtype: "np.dtype[Any]") -> Array:
    """Cast a mean to *dtype*. Integers are rounded and clipped to their range; a boolean is the majority."""
    if dtype.kind == "b":
        return np.asarray(array >= 0.5)
    if dtype.kind in "iu":
        array = np.clip(array, np.iinfo(dtype).min, _largest_float(dtype))
    return cast(array, dtype)


def _largest_float(dtype: "np.dtype[Any]") -> float:
    """Return the largest float64 that fits into an integer *dtype*: 2⁶³ - 1 itself does not exist."""
    largest = int(np.iinfo(dtype).max)
    return float(largest) if int(float(largest)) <= largest else float(np.nextafter(float(largest), 0.0))


def _stack(updates: list[Update], name: str) -> Array:
    stacked = np.stack([update.weights[name] for update in updates])
    return stacked.astype(np.float64) if stacked.dtype.kind == "b" else stacked


def _accumulator_dtype(array: Array) -> "np.dtype[Any]":
    return np.dtype(np.complex128 if array.dtype.kind == "c" else np.float64)
