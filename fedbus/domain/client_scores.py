"""Statistics and scores of each client, computed from the round results in the log.

rounds, failed    how many aggregates contain an update of the client, and how many of its trainings failed
reliability       (rounds + 1) / (rounds + failed + 2), Laplace's rule of succession: a new client has 0.5,
                  and no client reaches 0 or 1
contribution      the mean contribution of the client's updates, over the rounds that measured it
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from fedbus.contracts.run import RoundResult, RunData
from fedbus.contracts.transition import Transition

ScoreKind = Literal["contribution", "reliability", "data"]
DEFAULT_SCORE = 0.5
"""The score of a client whose value is not known yet."""


@dataclass(frozen=True)
class ClientStats:
    """The statistics of one client over all recorded rounds."""

    rounds: int = 0
    failed: int = 0
    samples: int = 0
    """The samples of the client's last update."""
    train_s: float | None = None
    """The mean training time, in seconds."""
    contribution: float | None = None
    last_failure: str = ""

    @property
    def reliability(self) -> float:
        return (self.rounds + 1) / (self.rounds + self.failed + 2)


def task_rounds(task: str, moves: Iterable[Transition]) -> list[RoundResult]:
    """Collect the rounds of all runs of *task*, oldest first. *moves*: the last transition of each run."""
    runs = [one.facts for one in moves if isinstance(one.facts, RunData) and one.facts.task == task]
    runs.sort(key=lambda facts: int(facts.run.rpartition("-")[2]))
    return [one for facts in runs for one in facts.rounds]


def collect_client_stats(rounds: Iterable[RoundResult]) -> dict[str, ClientStats]:
    """Compute the statistics of every client that trained or failed, sorted by client id. *rounds*: oldest first."""
    collector = ClientStatsCollector()
    for one in rounds:
        collector.add_round(one)
    return {client: collector.stats_of(client) for client in sorted(collector.clients)}


@dataclass
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass
class _ClientTotals:
    """The running totals of one client; their size does not depend on the number of rounds."""

    rounds: int = 0
    failed: int = 0
    samples: int = 0
    train_s: _Mean = field(default_factory=_Mean)
    contribution: _Mean = field(default_factory=_Mean)
    last_failure: str = ""


class ClientStatsCollector:
    """Client statistics that are updated round by round."""

    def __init__(self) -> None:
        self.clients: dict[str, _ClientTotals] = {}

    def add_round(self, result: RoundResult) -> None:
        """Add the result of the next round."""
        for client, samples in result.participants.items():
            totals = self._totals(client)
            totals.rounds += 1
            totals.samples = samples
        for client, reason in result.failures.items():
            totals = self._totals(client)
            totals.failed += 1
            totals.last_failure = reason
        for client in self.clients.keys() & result.train_s.keys():
            self.clients[client].train_s.add(result.train_s[client])
        for client in self.clients.keys() & result.contributions.keys():
            self.clients[client].contribution.add(result.contributions[client])

    def stats_of(self, client: str) -> ClientStats:
        """Return the statistics of *client* so far."""
        totals = self.clients.get(client, _ClientTotals())
        return ClientStats(
            rounds=totals.rounds,
            failed=totals.failed,
            samples=totals.samples,
            train_s=totals.train_s.value,
            contribution=totals.contribution.value,
            last_failure=totals.last_failure,
        )

    def _totals(self, client: str) -> _ClientTotals:
        return self.clients.setdefault(client, _ClientTotals())


def compute_scores(known: Mapping[str, ClientStats], by: ScoreKind) -> dict[str, float]:
    """Compute the score of each client, from 0 to 1, by the criterion *by*."""
    match by:
        case "reliability":
            return {client: one.reliability for client, one in known.items()}
        case "data":
            most = max((one.samples for one in known.values()), default=0)
            return {client: one.samples / most if most else DEFAULT_SCORE for client, one in known.items()}
        case "contribution":
            return _normalize({client: one.contribution for client, one in known.items()})


def _normalize(values: Mapping[str, float | None]) -> dict[str, float]:
    """Scale *values* linearly: the lowest is 0, the highest is 1."""
    known = [value for value in values.values() if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    if low == high:
        return dict.fromkeys(values, DEFAULT_SCORE)
    return {
        client: DEFAULT_SCORE if value is None else (value - low) / (high - low)
        for client, value in values.items()
    }
