"""The metrics of a client's training and evaluation, as a message carries them: numbers by name.

    {"train_loss": 0.42, "train_accuracy": 0.87, "train_num-examples": 1200.0, "eval_loss": 0.51}

An app, or a malicious client, may report anything. A message therefore keeps only finite values with valid
names of at most `MAX_NAME_CHARS` characters, and at most `MAX_METRICS` of them, loss and accuracy first. The
others are dropped without rejecting the message.
"""

import math
from typing import Annotated, Final, TypeAlias

from pydantic import AfterValidator

MAX_METRICS: Final = 8
"""The limit for one client in one round."""
MAX_NAME_CHARS: Final = 40
PRIORITY_SUFFIXES: Final = ("loss", "accuracy", "num-examples", "num_examples")
"""Metrics with these suffixes are kept first."""


def limit_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Select the metrics that a message carries."""
    valid = {name: value for name, value in metrics.items() if math.isfinite(value) and _is_valid_name(name)}
    return {name: valid[name] for name in sorted(valid, key=_sort_key)[:MAX_METRICS]}


def _is_valid_name(name: str) -> bool:
    return 0 < len(name) <= MAX_NAME_CHARS and name.isprintable()


def _sort_key(name: str) -> tuple[bool, str]:
    return not name.endswith(PRIORITY_SUFFIXES), name


ClientMetrics: TypeAlias = Annotated[dict[str, float], AfterValidator(limit_metrics)]
"""Numbers by name, limited by `limit_metrics`."""
