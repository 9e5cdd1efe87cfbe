"""Which of the clients that a strategy would train do train in a round, and what their updates weigh.

By configuration (``[tool.fedbus.selection]``), over whatever strategy the app has: of the messages that
it has configured, those to others are not sent; a chosen client's sample count is multiplied by its score.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

DEFAULT_SCORE: Final = 0.5
"""The score of a client of which nothing is known."""
MIN_FACTOR: Final = 0.05
"""No update weighs less than this share of its samples: who could never add anything could never do better."""


@dataclass
class ClientSelection:
    """For one run; remembers who trained when."""

    most: int | None = None
    """How many train in a round; None: as many as the strategy says."""
    explore: float = 0.2
    scores: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] | None = None
    """By how much an update's samples are multiplied; None: by nothing."""
    _last: dict[str, int] = field(default_factory=dict)
    _rounds: int = 0

    def choose(self, clients: Iterable[str]) -> set[str]:
        """Who of *clients* trains in the round that begins: the best, and some of those that waited longest."""
        there = sorted(clients)
        self._rounds += 1
        chosen = set(there) if self.most is None else set(self._chosen(there, self.most))
        self._last |= dict.fromkeys(chosen, self._rounds)
        return chosen

    def factor(self, client: str) -> float:
        """By what the weight of *client*'s update is multiplied."""
        if self.weights is None:
            return 1.0
        return max(MIN_FACTOR, self.weights.get(client, DEFAULT_SCORE))

    def _chosen(self, there: list[str], most: int) -> list[str]:
        for_the_patient = math.ceil(self.explore * most) if len(there) > most else 0
        best = sorted(there, key=lambda one: -self.scores.get(one, DEFAULT_SCORE))[: most - for_the_patient]
        rest = [one for one in there if one not in best]
        patient = sorted(rest, key=lambda one: self._last.get(one, 0))[:for_the_patient]
        return [*best, *patient]
