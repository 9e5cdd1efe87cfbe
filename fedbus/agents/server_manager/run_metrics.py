"""Metrics of a run: the results of its rounds, and how it ended."""

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
    increment,
    record,
    set_gauge,
)

MAX_METRICS: Final = 20
"""Of one round: an app may report any number of metrics, and each is a time series."""


def record_round(task: str, result: RoundResult) -> None:
    """Record the metrics of a round. Round 0 is the model that a run begins with, and does not count as a round."""
    attributes = {TASK: task}
    for name in sorted(result.metrics)[:MAX_METRICS]:
        if math.isfinite(result.metrics[name]):
            set_gauge(ROUND_METRIC, result.metrics[name], attributes | {"fedbus.metric": name})
    if result.round == 0:
        return
    increment(ROUNDS, attributes)
    record(ROUND_DURATION, result.seconds, attributes)
    set_gauge(ROUND_PARTICIPANTS, len(result.participants), attributes)
    if result.failures:
        increment(ROUND_FAILURES, attributes, len(result.failures))


def record_run(task: str, outcome: str) -> None:
    """Count a run that has ended."""
    increment(RUNS, {TASK: task, "fedbus.outcome": outcome})
