"""Every app names its metrics as it likes; a round's result has one name for each thing.

The server's own figures are ``loss``, ``accuracy`` and whatever else; the clients' evaluation has
``eval_`` before it, their training ``train_``. So ``centralized_loss`` is ``loss``, and a client's
``eval_acc`` is ``eval_accuracy``.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

_COMMON_NAMES: Final = {"loss": "loss", "losses": "loss", "acc": "accuracy", "accuracy": "accuracy"}
_QUALIFIERS: Final = frozenset(
    {"avg", "average", "mean", "weighted", "aggregated", "global", "local", "client", "server"}
    | {"central", "centralized", "centralised", "cen", "distributed", "federated", "fed"}
    | {"eval", "evaluate", "evaluation", "val", "valid", "validation", "test", "train", "training", "fit"}
)


def normalize_metrics(metrics: Mapping[str, Any], *, prefix: str = "") -> dict[str, float]:
    """The numbers among *metrics* by their common names; where two have one name, the plainest counts."""
    plainest_first = sorted(metrics.items(), key=lambda item: len(item[0]))
    named: dict[str, float] = {}
    for name, value in plainest_first:
        if isinstance(value, int | float) and not isinstance(value, bool):
            named.setdefault(prefix + common_name(name, prefix=prefix), float(value))
    return named


def common_name(name: str, *, prefix: str = "") -> str:
    """*name* without what only says whose figure it is."""
    *before, last = [word for word in re.split(r"[\s_./-]+", name.lower()) if word] or [name]
    if last in _COMMON_NAMES and _QUALIFIERS.issuperset(before):
        return _COMMON_NAMES[last]
    return name.removeprefix(prefix) or name
