"""The contribution of each client's update to a round, on the server's own test data, at a bounded cost.

    leave-one-out       v(all) - v(all without the client)
    truncated Shapley   the mean marginal value of the client over random orders of the clients

v is the result of the app's ``evaluate_fn``: the negative loss if it returns one, else the accuracy. The second
method is Truncated Monte Carlo Shapley (Ghorbani and Zou, "Data Shapley", ICML 2019).

The weighted mean without a client is ``(sum - w·x) / (W - w)``. So a round needs the sum of all updates and, for
each measured client (a *player*), its update. Players' updates are written to disk on arrival, so that the memory
of a round does not grow with its cohort.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog
from flwr.app import Array, ArrayRecord, Message

from fedbus.learning.flower.array_records import single_array_record
from fedbus.learning.flower.replies import update_weight
from fedbus.learning.round_metrics import normalize_metrics
from fedbus.learning.weights import cast

TRUNCATION_TOLERANCE: Final = 1e-3
"""A random order ends when its value differs from the value of all updates by less than this share of it."""

NEGLIGIBLE_SHARE: Final = 1e-9
"""A smaller share of the total weight is a rounding error."""

Sums = dict[str, np.ndarray[Any, Any]]
Evaluate = Callable[[int, ArrayRecord], Any]
"""The `evaluate_fn` of Flower's `Strategy.start`."""

log = structlog.get_logger("fedbus.learning")


@dataclass(frozen=True)
class ContributionLimits:
    """Limits of the measurement, from ``[tool.fedbus.contribution]``."""

    every: int = 0
    """Measure every n-th round; 0: never."""
    clients: int = 10
    """Players of a round."""
    seconds: float = 30.0
    """Time of a round's measurement."""
    permutations: int = 0
    """Random orders of truncated Shapley; 0: leave-one-out."""


class ContributionEvaluator:
    """Measures contributions in one run. Stateful: it records the last measured round of each client."""

    def __init__(self, limits: ContributionLimits, *, seed: int = 0) -> None:
        self._limits = limits
        self._last_measured: dict[str, int] = {}
        self._random = np.random.default_rng(seed)

    @property
    def is_enabled(self) -> bool:
        return self._limits.every > 0

    def is_due(self, round_number: int) -> bool:
        """Return whether the contributions of this round are measured."""
        return self._limits.every > 0 and round_number % self._limits.every == 0

    def select_players(self, clients: Iterable[str]) -> list[str]:
        """Select the players of a round: those of *clients* that were not measured for the longest time."""
        return sorted(sorted(clients), key=lambda client: self._last_measured.get(client, 0))[
            : self._limits.clients
        ]

    def evaluate_updates(
        self, updates: "RoundUpdates", evaluate: Evaluate, round_number: int
    ) -> dict[str, float]:
        """Measure the contributions by client. Clients for which the time is too short have no entry."""
        deadline = time.monotonic() + self._limits.seconds
        value = _ValueFunction(evaluate, round_number)
        contributions = (
            self._shapley(updates, value, deadline)
            if self._limits.permutations
            else self._leave_one_out(updates, value, deadline)
        )
        self._last_measured |= dict.fromkeys(contributions, round_number)
        return contributions

    def _leave_one_out(
        self, updates: "RoundUpdates", value: "_ValueFunction", deadline: float
    ) -> dict[str, float]:
        value_of_all = value.evaluate(updates.mean())
        contributions: dict[str, float] = {}
        for client in updates.clients:
            if time.monotonic() > deadline or value_of_all is None:
                break
            value_without = value.evaluate(updates.mean(without=client))
            if value_without is not None:
                contributions[client] = value_of_all - value_without
        return contributions

    def _shapley(self, updates: "RoundUpdates", value: "_ValueFunction", deadline: float) -> dict[str, float]:
        """Return the mean marginals over the orders that completed before *deadline*."""
        value_of_all = value.evaluate(updates.mean())
        marginals: dict[str, list[float]] = {client: [] for client in updates.clients}
        for _ in range(self._limits.permutations):
            if time.monotonic() > deadline or value_of_all is None:
                break
            for client, marginal in self._marginals(updates, value, value_of_all, deadline).items():
                marginals[client].append(marginal)
        return {client: float(np.mean(values)) for client, values in marginals.items() if values}

    def _marginals(
        self, updates: "RoundUpdates", value: "_ValueFunction", value_of_all: float, deadline: float
    ) -> dict[str, float]:
        """Return the marginal values along one random order; empty if it did not complete."""
        order = [str(client) for client in self._random.permutation(updates.clients)]
        running = updates.without_players()
        before = value.evaluate(running.mean())
        marginals: dict[str, float] = {}
        tolerance = TRUNCATION_TOLERANCE * max(abs(value_of_all), 1e-12)
        for position, client in enumerate(order):
            if before is not None and abs(value_of_all - before) <= tolerance:
                return marginals | dict.fromkeys(order[position:], 0.0)
            if time.monotonic() > deadline:
                return {}
            running.add(*updates.load_update(client))
            after = value.evaluate(running.mean())
            if after is None:
                return {}
            marginals[client] = after - before if before is not None else 0.0
            before = after
        return marginals


class _RunningMean:
    """A weighted mean in float64 to which updates are added. Without updates, it is *start*."""

    def __init__(
        self,
        sums: Sums,
        weight: float,
        dtypes: Mapping[str, np.dtype[Any]],
        start: ArrayRecord | None = None,
    ) -> None:
        self._start = start
        self._sums = sums
        self.weight = weight
        self._dtypes = dtypes

    def add(self, arrays: Mapping[str, np.ndarray[Any, Any]], weight: float) -> None:
        _add_weighted(self._sums, arrays, weight)
        self.weight += weight

    def mean(self) -> ArrayRecord | None:
        return _to_record(self._sums, self.weight, self._dtypes) if self._sums else self._start


class RoundUpdates:
    """The updates of one round: their sum in memory, and those of *players* as files in *directory*.

    *start* is the global model at the start of the round, which is the mean of no updates.
    """

    def __init__(self, directory: Path, players: Iterable[str], *, start: ArrayRecord | None = None) -> None:
        self._directory = directory
        self._start = start
        self._players = set(players)
        self._sums: Sums = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._weight = 0.0
        self._weights: dict[str, float] = {}

    @property
    def clients(self) -> list[str]:
        """The players whose updates have arrived, sorted."""
        return sorted(self._weights)

    def add(self, client: str, arrays: Mapping[str, np.ndarray[Any, Any]], weight: float) -> None:
        """Add an update. One without a positive weight, or with other tensor names, is ignored."""
        if weight <= 0 or (self._dtypes and arrays.keys() != self._dtypes.keys()):
            return
        self._dtypes = self._dtypes or {name: array.dtype for name, array in arrays.items()}
        _add_weighted(self._sums, arrays, weight)
        self._weight += weight
        if client in self._players:
            numbered: dict[str, Any] = {f"a{index}": array for index, array in enumerate(arrays.values())}
            np.savez(self._file(client), **numbered)
            self._weights[client] = weight

    def load_update(self, client: str) -> tuple[dict[str, np.ndarray[Any, Any]], float]:
        """Read the update and the weight of a player."""
        with np.load(self._file(client), allow_pickle=False) as file:
            arrays = {name: file[f"a{index}"] for index, name in enumerate(self._dtypes)}
        return arrays, self._weights[client]

    def mean(self, *, without: str | None = None) -> ArrayRecord | None:
        """Return the weighted mean of all updates, or of all *without* one; the start model if none is left."""
        if without is None:
            return _to_record(self._sums, self._weight, self._dtypes) if self._weight else self._start
        arrays, weight = self.load_update(without)
        if self._weight - weight <= NEGLIGIBLE_SHARE * self._weight:
            return self._start
        rest = {
            name: self._sums[name] - np.multiply(array, weight, dtype=np.float64)
            for name, array in arrays.items()
        }
        return _to_record(rest, self._weight - weight, self._dtypes)

    def without_players(self) -> _RunningMean:
        """Return the mean of the updates of all other clients, to which players can be added."""
        running = _RunningMean(
            {name: total.copy() for name, total in self._sums.items()}, self._weight, self._dtypes
        )
        for client in self.clients:
            arrays, weight = self.load_update(client)
            running.add(arrays, -weight)
        if running.weight <= NEGLIGIBLE_SHARE * self._weight:
            return _RunningMean({}, 0.0, self._dtypes, self._start)
        return running

    def _file(self, client: str) -> Path:
        return self._directory / f"{client}.npz"


class _ValueFunction:
    """The app's evaluation of a model as one number; higher is better."""

    def __init__(self, evaluate: Evaluate, round_number: int) -> None:
        self._evaluate = evaluate
        self._round = round_number

    def evaluate(self, arrays: ArrayRecord | None) -> float | None:
        """Return the negative loss, else the accuracy; None if there is neither, or it is not finite."""
        if arrays is None:
            return None
        metrics = normalize_metrics(self._evaluate(self._round, arrays) or {})
        value = -metrics["loss"] if "loss" in metrics else metrics.get("accuracy")
        return value if value is not None and np.isfinite(value) else None


class UpdateRecorder:
    """Copies each reply of a round to *updates* before the aggregation takes it."""

    def __init__(self, updates: RoundUpdates, client_of: Callable[[int], str], weighted_by: str) -> None:
        self._updates = updates
        self._client_of = client_of
        self._weighted_by = weighted_by

    def record(self, reply: Message) -> None:
        if reply.has_error():
            return
        record = single_array_record(reply.content)
        weight = update_weight(reply.content, self._weighted_by)
        if record is not None and weight is not None:
            arrays = {name: array.numpy() for name, array in record.items()}
            self._updates.add(self._client_of(reply.metadata.src_node_id), arrays, weight)


def make_update_directory() -> "tempfile.TemporaryDirectory[str]":
    """Create the temporary directory for the updates of a round."""
    return tempfile.TemporaryDirectory(prefix="fedbus-updates-")


def _add_weighted(sums: Sums, arrays: Mapping[str, np.ndarray[Any, Any]], weight: float) -> None:
    for name, array in arrays.items():
        sums[name] = sums.get(name, 0.0) + np.multiply(array, weight, dtype=np.float64)


def _to_record(sums: Sums, weight: float, dtypes: Mapping[str, np.dtype[Any]]) -> ArrayRecord:
    return ArrayRecord({name: Array(cast(total / weight, dtypes[name])) for name, total in sums.items()})
