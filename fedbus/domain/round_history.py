"""What a run remembers of its rounds: bounded, because every transition of the run carries it.

The whole history is in the log, one transition a round; the facts keep what people look at.
"""

from collections.abc import Mapping
from typing import Final

from fedbus.contracts.run import RoundResult

MAX_ROUNDS: Final = 300
MAX_ENTRIES: Final = 1500
"""Of who took part, over all rounds, the newest first."""
ENTRIES_PER_FAILURE: Final = 10
"""What a failure counts for: it has its reason with it."""


def append_round(rounds: tuple[RoundResult, ...], new: RoundResult) -> tuple[RoundResult, ...]:
    """*rounds* and *new* after them: the first one and the newest, the older ones without who took part.

    A round that comes again, after its server was lost, takes the place of the one before.
    """
    before = [one for one in rounds if one.round < new.round]
    kept = [*before[:1], *before[1:][-(MAX_ROUNDS - 2) :], new]
    left, remembered = MAX_ENTRIES, []
    for one in reversed(kept):
        left -= len(one.participants) + ENTRIES_PER_FAILURE * len(one.failures) + _count_entries(one.figures)
        remembered.append(one if left >= 0 or one is new else _without_clients(one))
    return tuple(reversed(remembered))


def _count_entries(figures: Mapping[str, Mapping[str, float]]) -> int:
    return sum(map(len, figures.values()))


def _without_clients(one: RoundResult) -> RoundResult:
    by_client = ("participants", "failures", "train_s", "contributions", "figures", "transfer_s", "wait_s")
    return one.model_copy(update={name: {} for name in by_client})
