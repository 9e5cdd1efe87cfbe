"""What each client has done so far, folded from the rounds in the log, and what it scores by that.

rounds, failed    how often its update was in an aggregate, and how often it was asked for and failed
reliability       (rounds + 1) / (rounds + failed + 2): a new client is at one half, and nobody ever at 0 or 1
contribution      the mean of what its updates were worth, where that was looked at
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from fedbus.contracts.run import RoundResult, RunData
from fedbus.contracts.transition import Transition

ScoreKind = Literal["contribution", "reliability", "data"]
DEFAULT_SCORE = 0.5
"""The score of a client of which that is not known yet."""


@dataclass(frozen=True)
class ClientStats:
    """One client, over all rounds that are remembered."""

    rounds: int = 0
    failed: int = 0
    samples: int = 0
    """Of its last update."""
    train_s: float | None = None
    """How long a training took it, on average."""
    contribution: float | None = None
    last_failure: str = ""

    @property
    def reliability(self) -> float:
        return (self.rounds + 1) / (self.rounds + self.failed + 2)


def task_rounds(task: str, moves: Iterable[Transition]) -> list[RoundResult]:
    """All rounds that the log remembers of the *task*'s runs, oldest first; *moves*: the last of each run."""
    runs = [one.facts for one in moves if isinstance(one.facts, RunData) and one.facts.task == task]
    runs.sort(key=lambda facts: int(facts.run.rpartition("-")[2]))
    return [one for facts in runs for one in facts.rounds]


def collect_client_stats(rounds: Iterable[RoundResult]) -> dict[str, ClientStats]:
    """Every client that was ever asked to train, in the order of their names. *rounds*: oldest first."""
    told = ClientStatsCollector()
    for one in rounds:
        told.see(one)
    return {client: told.of(client) for client in sorted(told.clients)}


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
    """What is remembered of one client, whatever the number of rounds."""

    rounds: int = 0
    failed: int = 0
    samples: int = 0
    train_s: _Mean = field(default_factory=_Mean)
    contribution: _Mean = field(default_factory=_Mean)
    last_failure: str = ""


class ClientStatsCollector:
    """Standings that go on from round to round."""

    def __init__(self) -> None:
        self.clients: dict[str, _ClientTotals] = {}

    def see(self, result: RoundResult) -> None:
        """A round further."""
        for client, samples in result.participants.items():
            mine = self._record(client)
            mine.rounds += 1
            mine.samples = samples
        for client, reason in result.failures.items():
            mine = self._record(client)
            mine.failed += 1
            mine.last_failure = reason
        for client in self.clients.keys() & result.train_s.keys():
            self.clients[client].train_s.add(result.train_s[client])
        for client in self.clients.keys() & result.contributions.keys():
            self.clients[client].contribution.add(result.contributions[client])

    def of(self, client: str) -> ClientStats:
        """Where *client* stands now."""
        mine = self.clients.get(client, _ClientTotals())
        return ClientStats(
            rounds=mine.rounds,
            failed=mine.failed,
            samples=mine.samples,
            train_s=mine.train_s.value,
            contribution=mine.contribution.value,
            last_failure=mine.last_failure,
        )

    def _record(self, client: str) -> _ClientTotals:
        return self.clients.setdefault(client, _ClientTotals())


def compute_scores(known: Mapping[str, ClientStats], by: ScoreKind) -> dict[str, float]:
    """Each client's score from 0 to 1, by what *by* names."""
    match by:
        case "reliability":
            return {client: one.reliability for client, one in known.items()}
        case "data":
            most = max((one.samples for one in known.values()), default=0)
            return {client: one.samples / most if most else DEFAULT_SCORE for client, one in known.items()}
        case "contribution":
            return _normalize({client: one.contribution for client, one in known.items()})


def _normalize(values: Mapping[str, float | None]) -> dict[str, float]:
    """From the least, which is 0, to the most, which is 1."""
    found = [value for value in values.values() if value is not None]
    low, high = min(found, default=0.0), max(found, default=0.0)
    if low == high:
        return dict.fromkeys(values, DEFAULT_SCORE)
    return {
        client: DEFAULT_SCORE if value is None else (value - low) / (high - low)
        for client, value in values.items()
    }
