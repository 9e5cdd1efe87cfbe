"""Normalisation of metric names. Apps choose their names freely; a round's result has one name for each metric.

The server's own metrics are ``loss``, ``accuracy`` and others; metrics of the clients' evaluation have the
prefix ``eval_``, of their training ``train_``. So ``centralized_loss`` becomes ``loss``, and a client's
``eval_acc`` becomes ``eval_accuracy``.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

_COMMON_NAMES: Final = {"loss": "loss", "losses": "loss", "acc": "accuracy", "accuracy": "accuracy"}
_QUALIFIERS: Final = frozenset(
    {"avg", "average", "mean", "weighted", "aggregated", "global", "local", "client", "server"}
    | {"central", "centralized", "centralised", "cen", "distributed", "federated", "fed"}
    | {"eval", "evaluate", "evaluation", "val", "valid", "validation", "test", "train", "training", "fit"}
)


def normalize_metrics(metrics: Mapping[str, Any], *, prefix: str = "") -> dict[str, float]:
    """Return the numeric *metrics* by their common names. Of several with the same name, the shortest original wins."""
    shortest_first = sorted(metrics.items(), key=lambda item: len(item[0]))
    normalized: dict[str, float] = {}
    for name, value in shortest_first:
        if isinstance(value, int | float) and not isinstance(value, bool):
            normalized.setdefault(prefix + common_name(name, prefix=prefix), float(value))
    return normalized


@lru_cache(maxsize=4096)  # the same few names come from every client in every round
def common_name(name: str, *, prefix: str = "") -> str:
    """Return *name* without the qualifiers that only name its origin (``centralized``, ``test``, …)."""
    *qualifiers, last = [part for part in re.split(r"[\s_./-]+", name.lower()) if part] or [name]
    if last in _COMMON_NAMES and _QUALIFIERS.issuperset(qualifiers):
        return _COMMON_NAMES[last]
    return name.removeprefix(prefix) or name
