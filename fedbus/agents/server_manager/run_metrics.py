"""A run as figures: what its rounds came to, and how it ended."""

import math
from typing import Final

from fedbus.contracts.run import RoundResult
from fedbus.contracts.telemetry import (
    ROUND_DURATION,
    ROUND_FAILURES,
    ROUND_METRIC,
    ROUND_PARTICIPANTS,
    ROUNDS,
    RUNS,
    TASK,
    add,
    note,
    record,
)

METRICS_TOLD: Final = 20
"""Of one round: an app may have as many as it likes, and each is a series."""


def round_measured(task: str, result: RoundResult) -> None:
    """Round 0, which is the model that a run began with, has figures and is no round."""
    about = {TASK: task}
    for name in sorted(result.metrics)[:METRICS_TOLD]:
        if math.isfinite(result.metrics[name]):
            note(ROUND_METRIC, result.metrics[name], about | {"fedbus.metric": name})
    if result.round == 0:
        return
    add(ROUNDS, about)
    record(ROUND_DURATION, result.seconds, about)
    note(ROUND_PARTICIPANTS, len(result.participants), about)
    if result.failures:
        add(ROUND_FAILURES, about, len(result.failures))


def run_measured(task: str, outcome: str) -> None:
    add(RUNS, {TASK: task, "fedbus.outcome": outcome})
