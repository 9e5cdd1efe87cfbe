"""What each client's update was worth to a round, on the server's own test data, at a bounded cost.

    leave one out       v(all) - v(all without it)
    Shapley, truncated  the mean of what it adds to those before it, over random orders

v is what the app's ``evaluate_fn`` says: minus the loss where it gives one, else the accuracy. For a
weighted mean the others' mean is ``(sum - w·x) / (W - w)``: so a round needs the sum and, of the clients
that are looked at, each update once. Those are put aside on disk as they come by, so that the memory
of a round does not grow with its cohort; the rest only go into the sum.
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

from fedbus.learning.round_metrics import normalize_metrics

TRUNCATION_TOLERANCE: Final = 1e-3
"""A random order is cut short when what it has come to is this close, in shares, to what all come to."""

NEGLIGIBLE_SHARE: Final = 1e-9
"""Less than this share of the weight is only what rounding has left."""

Sums = dict[str, np.ndarray[Any, Any]]
Evaluate = Callable[[int, ArrayRecord], Any]

log = structlog.get_logger("fedbus.learning")


@dataclass(frozen=True)
class ContributionLimits:
    """What it may cost. See ``[tool.fedbus.contribution]``."""

    every: int = 0
    clients: int = 10
    seconds: float = 30.0
    permutations: int = 0


class ContributionEvaluator:
    """For one run; remembers who was looked at when."""

    def __init__(self, bounds: ContributionLimits, *, seed: int = 0) -> None:
        self._bounds = bounds
        self._looked: dict[str, int] = {}
        self._random = np.random.default_rng(seed)

    @property
    def active(self) -> bool:
        return self._bounds.every > 0

    def looks_at(self, round_number: int) -> bool:
        return self._bounds.every > 0 and round_number % self._bounds.every == 0

    def players(self, clients: Iterable[str]) -> list[str]:
        """Whose updates are looked at: of *clients*, those that were not for longest."""
        return sorted(sorted(clients), key=lambda one: self._looked.get(one, 0))[: self._bounds.clients]

    def worth(self, updates: "RoundUpdates", evaluate: Evaluate, round_number: int) -> dict[str, float]:
        """What each update was worth; of those that there was no time for, nothing."""
        until = time.monotonic() + self._bounds.seconds
        value = _ValueFunction(evaluate, round_number)
        found = (
            self._shapley(updates, value, until)
            if self._bounds.permutations
            else self._left_out(updates, value, until)
        )
        self._looked |= dict.fromkeys(found, round_number)
        return found

    def _left_out(self, updates: "RoundUpdates", value: "_ValueFunction", until: float) -> dict[str, float]:
        whole = value.of(updates.mean())
        found: dict[str, float] = {}
        for client in updates.clients:
            if time.monotonic() > until or whole is None:
                break
            without = value.of(updates.mean(without=client))
            if without is not None:
                found[client] = whole - without
        return found

    def _shapley(self, updates: "RoundUpdates", value: "_ValueFunction", until: float) -> dict[str, float]:
        """The mean of the marginals over the orders that there was time for: only whole ones count."""
        whole = value.of(updates.mean())
        marginals: dict[str, list[float]] = {client: [] for client in updates.clients}
        for _ in range(self._bounds.permutations):
            if time.monotonic() > until or whole is None:
                break
            for client, marginal in self._along_one_order(updates, value, whole, until).items():
                marginals[client].append(marginal)
        return {client: float(np.mean(each)) for client, each in marginals.items() if each}

    def _along_one_order(
        self, updates: "RoundUpdates", value: "_ValueFunction", whole: float, until: float
    ) -> dict[str, float]:
        order = [str(one) for one in self._random.permutation(updates.clients)]
        growing = updates.without_players()
        before = value.of(growing.mean())
        found: dict[str, float] = {}
        for position, client in enumerate(order):
            if before is not None and abs(whole - before) <= TRUNCATION_TOLERANCE * max(abs(whole), 1e-12):
                return found | dict.fromkeys(order[position:], 0.0)
            if time.monotonic() > until:
                return {}
            growing.add(*updates.put_aside(client))
            after = value.of(growing.mean())
            if after is None:
                return {}
            found[client] = after - before if before is not None else 0.0
            before = after
        return found


class _RunningMean:
    """A weighted mean to which updates are added."""

    def __init__(
        self,
        sums: Sums,
        weight: float,
        like: Mapping[str, np.dtype[Any]],
        start: ArrayRecord | None = None,
    ) -> None:
        self._start = start
        self._sums = sums
        self.weight = weight
        self._like = like

    def add(self, arrays: Mapping[str, np.ndarray[Any, Any]], weight: float) -> None:
        for name, array in arrays.items():
            self._sums[name] = self._sums.get(name, 0.0) + np.multiply(array, weight, dtype=np.float64)
        self.weight += weight

    def mean(self) -> ArrayRecord | None:
        return _to_record(self._sums, self.weight, self._like) if self._sums else self._start


class RoundUpdates:
    """The updates of one round: their sum, and those of *players* put aside in *directory*."""

    def __init__(self, directory: Path, players: Iterable[str], *, start: ArrayRecord | None = None) -> None:
        self._directory = directory
        self._start = start
        """The model that the round began with: what there is where nobody adds anything."""
        self._players = set(players)
        self._sums: Sums = {}
        self._like: dict[str, np.dtype[Any]] = {}
        self._weight = 0.0
        self._weights: dict[str, float] = {}

    @property
    def clients(self) -> list[str]:
        """Whose updates are there to be looked at."""
        return sorted(self._weights)

    def add(self, client: str, arrays: Mapping[str, np.ndarray[Any, Any]], weight: float) -> None:
        if weight <= 0 or (self._like and arrays.keys() != self._like.keys()):
            return
        self._like = self._like or {name: array.dtype for name, array in arrays.items()}
        for name, array in arrays.items():
            self._sums[name] = self._sums.get(name, 0.0) + np.multiply(array, weight, dtype=np.float64)
        self._weight += weight
        if client in self._players:
            aside: dict[str, Any] = {f"a{number}": one for number, one in enumerate(arrays.values())}
            np.savez(self._file(client), **aside)
            self._weights[client] = weight

    def put_aside(self, client: str) -> tuple[dict[str, np.ndarray[Any, Any]], float]:
        with np.load(self._file(client), allow_pickle=False) as kept:
            arrays = {name: kept[f"a{number}"] for number, name in enumerate(self._like)}
        return arrays, self._weights[client]

    def mean(self, *, without: str | None = None) -> ArrayRecord | None:
        """The weighted mean of all, or of all but one; the model as it was where nobody is left."""
        if without is None:
            return _to_record(self._sums, self._weight, self._like) if self._weight else self._start
        arrays, weight = self.put_aside(without)
        if self._weight - weight <= NEGLIGIBLE_SHARE * self._weight:
            return self._start
        rest = {
            name: self._sums[name] - np.multiply(array, weight, dtype=np.float64)
            for name, array in arrays.items()
        }
        return _to_record(rest, self._weight - weight, self._like)

    def without_players(self) -> _RunningMean:
        """The others, to whom players are added one by one."""
        growing = _RunningMean(
            {name: total.copy() for name, total in self._sums.items()}, self._weight, self._like
        )
        for client in self.clients:
            arrays, weight = self.put_aside(client)
            growing.add(arrays, -weight)
        if growing.weight <= NEGLIGIBLE_SHARE * self._weight:
            return _RunningMean({}, 0.0, self._like, self._start)
        return growing

    def _file(self, client: str) -> Path:
        return self._directory / f"{client}.npz"


class _ValueFunction:
    """What the app's own evaluation says of a model, as one number: more is better."""

    def __init__(self, evaluate: Evaluate, round_number: int) -> None:
        self._evaluate = evaluate
        self._round = round_number

    def of(self, arrays: ArrayRecord | None) -> float | None:
        if arrays is None:
            return None
        metrics = normalize_metrics(self._evaluate(self._round, arrays) or {})
        value = -metrics["loss"] if "loss" in metrics else metrics.get("accuracy")
        return value if value is not None and np.isfinite(value) else None


class UpdateRecorder:
    """Sees each reply of a round go by, on its way into the aggregate."""

    def __init__(self, updates: RoundUpdates, client_of: Callable[[int], str], weighted_by: str) -> None:
        self._updates = updates
        self._client_of = client_of
        self._weighted_by = weighted_by

    def see(self, reply: Message) -> None:
        if reply.has_error():
            return
        records = list(reply.content.array_records.values())
        metrics = next(iter(reply.content.metric_records.values()), None)
        weight = None if metrics is None else metrics.get(self._weighted_by)
        if len(records) == 1 and isinstance(weight, int | float):
            arrays = {name: array.numpy() for name, array in records[0].items()}
            self._updates.add(self._client_of(reply.metadata.src_node_id), arrays, float(weight))


def make_update_directory() -> "tempfile.TemporaryDirectory[str]":
    """Where updates are put aside: gone with the round."""
    return tempfile.TemporaryDirectory(prefix="fedbus-updates-")


def _to_record(sums: Sums, weight: float, like: Mapping[str, np.dtype[Any]]) -> ArrayRecord:
    return ArrayRecord({name: Array(_cast(like[name], total / weight)) for name, total in sums.items()})


def _cast(dtype: np.dtype[Any], mean: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(np.rint(mean) if dtype.kind in "iu" else mean).astype(dtype)
