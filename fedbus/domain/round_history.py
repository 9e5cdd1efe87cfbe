"""The bounded history of rounds in a run's data, which every transition of the run carries.

The complete history is in the log, one transition a round.
"""

from collections.abc import Mapping
from typing import Final

from fedbus.contracts.run import RoundResult

MAX_ROUNDS: Final = 300
MAX_ENTRIES: Final = 1500
"""Entries by client over all rounds; the oldest rounds lose theirs first."""
ENTRIES_PER_FAILURE: Final = 10
"""The weight of a failure in `MAX_ENTRIES`: its reason is longer than a number."""


def append_round(rounds: tuple[RoundResult, ...], new: RoundResult) -> tuple[RoundResult, ...]:
    """Append *new* to *rounds*, and drop what exceeds the limits.

    The first round and the newest rounds remain, the older of these without their entries by client. A round
    that is repeated after its server was lost replaces its first result.
    """
    before = [one for one in rounds if one.round < new.round]
    retained = [*before[:1], *before[1:][-(MAX_ROUNDS - 2) :], new]
    remaining_entries, history = MAX_ENTRIES, []
    for one in reversed(retained):
        remaining_entries -= (
            len(one.participants) + ENTRIES_PER_FAILURE * len(one.failures) + _count_entries(one.figures)
        )
        history.append(one if remaining_entries >= 0 or one is new else _without_clients(one))
    return tuple(reversed(history))


def _count_entries(figures: Mapping[str, Mapping[str, float]]) -> int:
    return sum(map(len, figures.values()))


def _without_clients(one: RoundResult) -> RoundResult:
    by_client = ("participants", "failures", "train_s", "contributions", "figures", "transfer_s", "wait_s")
    return one.model_copy(update={name: {} for name in by_client} | {"evaluation_failure": ""})
