"""Decides when a run aggregates: which clients train on which model, and how an update counts. No I/O and no arrays.

A *version* is the global model before an aggregation, numbered as the round. The *staleness* of an update is the
number of aggregations since its client got its version: 0 if the client got the newest one.

    planner.begin(version, cohort, now)             the strategy chose the cohort for this version
    while not planner.is_complete(now, present):    until it is time to aggregate
        planner.select()                                the clients that get the newest version now
        planner.judge(client)                           how an update that has arrived counts; then
        planner.record_update(client)                   … it was valid, or
        planner.record_failure(client)                  … there was none, or it was invalid

A client trains on one version at a time: it gets no other before its update or its failure is recorded.
The sources, and what differs from them, are in docs/aggregation.md.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, TypeAlias, assert_never

from fedbus.contracts.task.aggregation import AggregationMode, AggregationTable, StalenessFunction

POLYNOMIAL_A: Final = 0.5
"""The exponent that makes the polynomial 1 / √(1 + s), as in FedBuff (Nguyen et al. 2022)."""
HINGE_A: Final = 10.0
"""The slope of the hinge in the experiments of FedAsync (Xie et al. 2019)."""


@dataclass(frozen=True)
class StalenessWeight:
    """The weight of an update in (0, 1] by its staleness; 1 without staleness."""

    function: StalenessFunction = StalenessFunction.POLYNOMIAL
    a: float | None = None
    """None: `POLYNOMIAL_A` or `HINGE_A`."""
    b: int = 4

    def __call__(self, staleness: int) -> float:
        match self.function:
            case StalenessFunction.CONSTANT:
                return 1.0
            case StalenessFunction.POLYNOMIAL:
                exponent = POLYNOMIAL_A if self.a is None else self.a
                return float((1.0 + staleness) ** -exponent)
            case StalenessFunction.HINGE:
                slope = HINGE_A if self.a is None else self.a
                return 1.0 if staleness <= self.b else 1.0 / (slope * (staleness - self.b) + 1.0)
            case _:
                assert_never(self.function)


class MergeRule(Enum):
    """What an update with the weight *w* contributes to the aggregation, as a model."""

    DELTA = auto()
    """current + w · (update - the version it began with), FedBuff's rule."""
    MIX = auto()
    """(1 - w) · current + w · update, FedAsync's rule."""


@dataclass(frozen=True)
class Merge:
    """Aggregate the update by *rule*."""

    staleness: int
    weight: float
    rule: MergeRule = MergeRule.DELTA

    @property
    def keeps_update(self) -> bool:
        """Whether the update contributes exactly as its client sent it."""
        return self.weight == 1.0 and (self.staleness == 0 or self.rule is MergeRule.MIX)


@dataclass(frozen=True)
class Drop:
    """Do not aggregate the update."""

    staleness: int


Verdict: TypeAlias = Merge | Drop


@dataclass(frozen=True)
class AggregationReport:
    """What an aggregation consists of."""

    mode: AggregationMode
    updates: int = 0
    staleness: dict[str, int] = field(default_factory=dict)
    """That of the last update of each client."""
    late_merged: int = 0
    late_dropped: int = 0


class AggregationPlanner(ABC):
    """The plan of one run. Times are in seconds of the caller's clock."""

    def __init__(self, table: AggregationTable) -> None:
        self._mode = table.mode
        self._weight = StalenessWeight(table.staleness, table.staleness_a, table.staleness_b)
        self._max_staleness = table.max_staleness
        self._running: dict[str, int] = {}
        """The version that each client trains on."""
        self._first_version = 0
        """The version with which the current training of the app began."""
        self._is_restarted = False
        # of the current aggregation
        self._version = 0
        self._cohort: list[str] = []
        self._present: AbstractSet[str] = frozenset()
        self._failed: set[str] = set()
        self._updates = 0
        self._staleness: dict[str, int] = {}
        self._late_merged = 0
        self._late_dropped = 0

    @property
    def report(self) -> AggregationReport:
        """The updates of the current aggregation so far."""
        return AggregationReport(
            self._mode, self._updates, dict(self._staleness), self._late_merged, self._late_dropped
        )

    def restart(self) -> None:
        """Begin another training of the same app with the next `begin`. Updates of the one before are dropped."""
        self._is_restarted = True

    def begin(self, version: int, cohort: Sequence[str], now: float) -> None:  # noqa: ARG002 - of the deadline
        """Begin the aggregation of *version*, on which the clients of *cohort* may train."""
        if self._is_restarted:
            self._first_version, self._is_restarted = version, False
        self._version = version
        self._cohort = list(dict.fromkeys(cohort))
        self._failed = set()
        self._updates = self._late_merged = self._late_dropped = 0
        self._staleness = {}

    def select(self) -> list[str]:
        """Return the clients that get the newest version now. Call it after `is_complete`."""
        clients = self._choose()
        self._running |= dict.fromkeys(clients, self._version)
        return clients

    def is_training(self, client: str) -> bool:
        return client in self._running

    def judge(self, client: str) -> Verdict:
        """Return how the update of *client*, which has arrived, counts if it is valid."""
        started = self._running[client]
        staleness = self._version - started
        is_too_old = self._max_staleness is not None and staleness > self._max_staleness
        if is_too_old or started < self._first_version or (staleness and self._drops_late):
            return Drop(staleness)
        return self._merge(staleness)

    def record_update(self, client: str) -> None:
        """Record the valid update of *client*, as `judge` decided."""
        verdict = self.judge(client)
        del self._running[client]
        if isinstance(verdict, Drop):
            self._late_dropped += 1
            return
        self._updates += 1
        self._late_merged += verdict.staleness > 0
        self._staleness[client] = verdict.staleness

    def record_failure(self, client: str) -> None:
        """Record that the training of *client* has no valid update."""
        del self._running[client]
        self._failed.add(client)

    def is_complete(self, now: float, present: AbstractSet[str]) -> bool:
        """Return whether to aggregate now. *present* are the clients that could train if they were idle."""
        self._present = present
        return self._is_due(now) or not (self._running or self._choose())

    @property
    def deadline(self) -> float | None:
        """The time at which `is_complete` becomes true without another update; None if it does not."""
        return None

    @property
    def _drops_late(self) -> bool:
        return False

    def _merge(self, staleness: int) -> Merge:
        return Merge(staleness, self._weight(staleness))

    @abstractmethod
    def _is_due(self, now: float) -> bool:
        """Return whether the aggregation has the updates that it needs."""

    @abstractmethod
    def _choose(self) -> list[str]:
        """Return the clients that could begin to train now."""

    def _idle_cohort(self) -> list[str]:
        """Return the clients of the cohort that could begin to train."""
        return [
            client
            for client in self._cohort
            if client in self._present and client not in self._running and client not in self._failed
        ]


class DeadlinePlanner(AggregationPlanner):
    """One message to each client of a cohort in a round, which ends at the latest at a deadline.

    The round ends when all clients to which it sent a message have answered, or after ``deadline-s`` with at least
    ``min-updates`` updates. A client that trains longer gets no message in the rounds that begin meanwhile; its update
    is late for the round in which it arrives.
    """

    def __init__(self, table: AggregationTable) -> None:
        super().__init__(table)
        self._deadline_s = table.deadline_s
        self._min_updates = table.min_updates
        self._drops = table.late == "drop"
        self._deadline = 0.0
        self._sent: set[str] = set()
        """The clients that got this version."""
        self._awaited: set[str] = set()
        """Those of them that have not answered."""
        self._is_sent = False

    def begin(self, version: int, cohort: Sequence[str], now: float) -> None:
        super().begin(version, cohort, now)
        self._deadline = now + self._deadline_s
        self._sent = set()
        self._awaited = set()
        self._is_sent = False

    @property
    def deadline(self) -> float | None:
        has_enough = self._updates >= self._min_updates
        return self._deadline if has_enough and math.isfinite(self._deadline) else None

    def select(self) -> list[str]:
        clients = super().select()
        self._is_sent = True
        self._sent |= set(clients)
        self._awaited |= set(clients)
        return clients

    def record_update(self, client: str) -> None:
        super().record_update(client)
        self._awaited.discard(client)

    def record_failure(self, client: str) -> None:
        super().record_failure(client)
        self._awaited.discard(client)

    @property
    def _drops_late(self) -> bool:
        return self._drops

    def _is_due(self, now: float) -> bool:
        return self._updates >= self._min_updates and (now >= self._deadline or not self._awaited)

    def _choose(self) -> list[str]:
        """Choose the whole cohort once; later, clients that have become free, if the round cannot end without them."""
        if self._is_sent and (self._awaited or self._updates >= self._min_updates):
            return []
        return [client for client in self._idle_cohort() if client not in self._sent]


class BufferedPlanner(AggregationPlanner):
    """An aggregation after each *buffer_size* updates, while as many clients train as the cohort has (FedBuff).

    A client that has answered gets the newest version at once. If the cohort has more idle clients than may train,
    those go first that have been idle for longest. A client whose training failed waits for the next version.
    """

    def __init__(self, table: AggregationTable) -> None:
        super().__init__(table)
        self._buffer_size = table.buffer_size
        self._started: dict[str, int] = {}
        """The number of the last training of each client, counted over all clients."""
        self._trainings = 0

    def select(self) -> list[str]:
        clients = super().select()
        for client in clients:
            self._trainings += 1
            self._started[client] = self._trainings
        return clients

    def _is_due(self, now: float) -> bool:  # noqa: ARG002 - of the deadline
        return self._updates >= self._buffer_size

    def _choose(self) -> list[str]:
        free = max(0, len(self._cohort) - len(self._running))
        longest_idle = sorted(self._idle_cohort(), key=lambda client: self._started.get(client, 0))
        return longest_idle[:free]


class AsyncPlanner(BufferedPlanner):
    """An aggregation after each update, which is mixed into the model (FedAsync)."""

    def __init__(self, table: AggregationTable) -> None:
        super().__init__(table)
        self._buffer_size = 1
        self._alpha = table.alpha

    def _merge(self, staleness: int) -> Merge:
        return Merge(staleness, self._alpha * self._weight(staleness), MergeRule.MIX)


def make_planner(table: AggregationTable) -> AggregationPlanner | None:
    """Make the planner of the table's mode; None for ``sync``, where a round needs no plan."""
    match table.mode:
        case AggregationMode.SYNC:
            return None
        case AggregationMode.DEADLINE:
            return DeadlinePlanner(table)
        case AggregationMode.BUFFERED:
            return BufferedPlanner(table)
        case AggregationMode.ASYNC:
            return AsyncPlanner(table)
        case _:
            assert_never(table.mode)
