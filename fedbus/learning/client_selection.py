"""Client selection: the clients that train in a round, and the weight of their updates.

``[tool.fedbus.selection]`` configures it for every strategy. Messages that the strategy configured for
unselected clients are not sent. The sample count of a selected client is multiplied by its score.
"""

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

DEFAULT_SCORE: Final = 0.5
"""The score of a client without history."""
MIN_FACTOR: Final = 0.05
"""The least factor of an update. With a factor of 0, a client could never improve its score."""


@dataclass
class ClientSelection:
    """Client selection for one run. Stateful: it records the last round of each client."""

    max_clients: int | None = None
    """The number of clients in a round; None: all clients that the strategy chose."""
    explore: float = 0.2
    """The share of *max_clients* that goes to the clients that have waited longest, in 0…1."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Scores by client, in 0…1."""
    weights: Mapping[str, float] | None = None
    """Factors of the sample counts, by client; None: the sample counts stay as they are."""
    is_random: bool = False
    """Whether *max_clients* are chosen at random, instead of by their scores, for training and for evaluation."""
    seed: int | None = None
    """The seed of the random choice, which is another one in each round; None: a random seed."""
    _last_rounds: dict[str, int] = field(default_factory=dict)
    _round_count: int = 0

    def choose(self, clients: Iterable[str]) -> set[str]:
        """Select the clients of the next round: the highest scores, and some clients that have waited longest."""
        available = sorted(clients)
        self._round_count += 1
        if self.is_random:
            return self._sample(available, "train")
        selected = (
            set(available) if self.max_clients is None else set(self._select(available, self.max_clients))
        )
        self._last_rounds |= dict.fromkeys(selected, self._round_count)
        return selected

    def choose_for_evaluation(self, clients: Iterable[str]) -> set[str]:
        """Select the clients that evaluate in this round: all, or as many as train if the choice is random."""
        available = sorted(clients)
        return self._sample(available, "evaluate") if self.is_random else set(available)

    def begin_at(self, round_number: int) -> None:
        """Continue a run in this round."""
        self._round_count = round_number - 1

    def weight_factor(self, client: str) -> float:
        """Return the factor for the sample count of *client*'s update."""
        if self.weights is None:
            return 1.0
        return max(MIN_FACTOR, self.weights.get(client, DEFAULT_SCORE))

    def _sample(self, available: list[str], purpose: str) -> set[str]:
        if self.max_clients is None or len(available) <= self.max_clients:
            return set(available)
        seed = None if self.seed is None else f"{self.seed}:{purpose}:{self._round_count}"
        return set(random.Random(seed).sample(available, self.max_clients))  # noqa: S311 - no secret

    def _select(self, available: list[str], max_clients: int) -> list[str]:
        explore_count = math.ceil(self.explore * max_clients) if len(available) > max_clients else 0
        by_score = sorted(available, key=lambda client: -self.scores.get(client, DEFAULT_SCORE))
        best = by_score[: max_clients - explore_count]
        rest = [client for client in available if client not in best]
        longest_waiting = sorted(rest, key=lambda client: self._last_rounds.get(client, 0))[:explore_count]
        return [*best, *longest_waiting]
