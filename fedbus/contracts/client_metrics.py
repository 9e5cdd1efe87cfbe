"""What a ClientApp says of its training and evaluation: numbers by name, as a message carries them.

    {"train_loss": 0.42, "train_accuracy": 0.87, "train_num-examples": 1200.0, "eval_loss": 0.51}

An app reports what it likes, and so may a client that means ill. So a message takes in only what is finite, under
names that are no longer than `LONGEST_NAME`, and no more than `MOST_FIGURES`, loss and accuracy before the rest:
what is left out costs nobody the message.
"""

import math
from typing import Annotated, Final, TypeAlias

from pydantic import AfterValidator

MAX_METRICS: Final = 8
"""Of one client in one round."""
MAX_NAME_CHARS: Final = 40
"""In characters."""
PRIORITY_SUFFIXES: Final = ("loss", "accuracy", "num-examples", "num_examples")
"""What people look at: these are kept where there are too many."""


def limit_metrics(figures: dict[str, float]) -> dict[str, float]:
    """Those of *figures* that a message carries."""
    told = {name: value for name, value in figures.items() if math.isfinite(value) and _is_valid_name(name)}
    return {name: told[name] for name in sorted(told, key=_sort_key)[:MAX_METRICS]}


def _is_valid_name(name: str) -> bool:
    return 0 < len(name) <= MAX_NAME_CHARS and name.isprintable()


def _sort_key(name: str) -> tuple[bool, str]:
    return not name.endswith(PRIORITY_SUFFIXES), name


ClientMetrics: TypeAlias = Annotated[dict[str, float], AfterValidator(limit_metrics)]
"""Numbers by name, bounded."""
