"""Whether what a run came to takes the place of the model that is served.

One figure of each is compared, the same on both sides: the one that the task's gate names, else the loss or
the accuracy on test data. The candidate may be worse by the gate's tolerance, since two evaluations of one
model are rarely equal. A figure that is no number is never good enough, gate or no gate.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fedbus.contracts.task.task import GateTable

DEFAULT_METRICS: Final = ("loss", "eval_loss", "accuracy", "eval_accuracy")
"""What is compared where the gate names nothing: the server's own test first, then the clients'."""
_LOWER_IS_BETTER: Final = ("loss", "error", "perplexity", "mse", "mae", "rmse")


@dataclass(frozen=True)
class PromotionVerdict:
    """What becomes of a candidate, and why, in words."""

    promote: bool
    reason: str
    judged: bool = True
    """Whether the candidate was held against the champion; else this says nothing of the code that made it."""


def judge_candidate(
    gate: GateTable, candidate: Mapping[str, float], champion: Mapping[str, float]
) -> PromotionVerdict:
    """Whether a model with the metrics *candidate* is served instead of one with those of *champion*."""
    for name in (gate.metric, *DEFAULT_METRICS, "train_loss"):
        if not math.isfinite(candidate.get(name, 0.0)):
            return PromotionVerdict(promote=False, reason=f"its {name} is {candidate[name]}")
    if not gate.enabled:
        return PromotionVerdict(promote=True, reason="the task has no gate")
    name = gate.metric or next((one for one in DEFAULT_METRICS if one in candidate and one in champion), "")
    if gate.metric and gate.metric not in candidate:
        return PromotionVerdict(promote=False, reason=f"it has no {gate.metric}, which the gate compares")
    if name not in champion or not math.isfinite(champion[name]):
        return PromotionVerdict(promote=True, reason="there is nothing to compare it with")
    return _compare(gate, name, candidate[name], champion[name])


def _compare(gate: GateTable, name: str, new: float, old: float) -> PromotionVerdict:
    higher_is_better = _is_higher_better(name) if gate.higher_is_better is None else gate.higher_is_better
    worse_by = (old - new) if higher_is_better else (new - old)
    figures = f"{name} {new:.4g} against {old:.4g} of the served model"
    if worse_by <= gate.tolerance * abs(old):
        return PromotionVerdict(promote=True, reason=figures)
    by = f"{worse_by / abs(old):.1%} worse" if old else "worse"
    return PromotionVerdict(promote=False, reason=f"{figures}: {by}, {gate.tolerance:.0%} is allowed")


def _is_higher_better(name: str) -> bool:
    return not any(part in name.lower().replace("-", "_").split("_") for part in _LOWER_IS_BETTER)
