"""The promotion gate: whether a candidate model replaces the champion.

The gate compares one metric of both models: the metric that the task names, else the loss or the accuracy on
test data. The candidate may be worse by the gate's tolerance, because two evaluations of the same model rarely
give the same value. A candidate with a metric that is NaN or infinite is never promoted, with or without a gate.
A candidate that every client failed to evaluate, and that has no other metric of an evaluation, does not pass a gate.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fedbus.contracts.task.task import GateTable

DEFAULT_METRICS: Final = ("loss", "eval_loss", "accuracy", "eval_accuracy")
"""The metrics to compare if the gate names none: the server's own evaluation first, then the clients'."""
TRAINING_PREFIX: Final = "train_"
"""The prefix of metrics of the clients' training, which are no evaluation of the aggregated model."""
_LOWER_IS_BETTER: Final = ("loss", "error", "perplexity", "mse", "mae", "rmse")


@dataclass(frozen=True)
class PromotionVerdict:
    """Whether a candidate is promoted, and why."""

    promote: bool
    reason: str
    was_compared: bool = True
    """False if the candidate was not compared with the champion; then the verdict does not concern its code."""


def judge_candidate(
    gate: GateTable,
    candidate: Mapping[str, float],
    champion: Mapping[str, float],
    *,
    evaluation_failure: str = "",
) -> PromotionVerdict:
    """Decide whether a model with the metrics *candidate* replaces the one with the metrics *champion*.

    *evaluation_failure* is the reason if every client failed to evaluate the candidate.
    """
    for name in (gate.metric, *DEFAULT_METRICS, "train_loss"):
        if not math.isfinite(candidate.get(name, 0.0)):
            return PromotionVerdict(promote=False, reason=f"{name} is {candidate[name]}")
    if not gate.enabled:
        return PromotionVerdict(promote=True, reason="the task has no gate")
    name = gate.metric or next((one for one in DEFAULT_METRICS if one in candidate and one in champion), "")
    if gate.metric and gate.metric not in candidate:
        cause = f": {evaluation_failure}" if evaluation_failure else ""
        return PromotionVerdict(
            promote=False, reason=f"the run reported no {gate.metric}, which the gate compares{cause}"
        )
    if evaluation_failure and not gate.metric and not _has_evaluation(candidate):
        return PromotionVerdict(promote=False, reason=evaluation_failure)
    if name not in champion or not math.isfinite(champion[name]):
        return PromotionVerdict(promote=True, reason="no metric of the champion to compare with")
    return _compare(gate, name, candidate[name], champion[name])


def _has_evaluation(metrics: Mapping[str, float]) -> bool:
    return not all(name.startswith(TRAINING_PREFIX) for name in metrics)


def _compare(gate: GateTable, name: str, new: float, old: float) -> PromotionVerdict:
    higher_is_better = _is_higher_better(name) if gate.higher_is_better is None else gate.higher_is_better
    worse_by = (old - new) if higher_is_better else (new - old)
    figures = f"{name} {new:.4g}, champion {old:.4g}"
    if worse_by <= gate.tolerance * abs(old):
        return PromotionVerdict(promote=True, reason=figures)
    by = f"{worse_by / abs(old) * 100:.1f} % worse" if old else "worse"
    return PromotionVerdict(promote=False, reason=f"{figures}: {by} (limit {gate.tolerance * 100:.0f} %)")


def _is_higher_better(name: str) -> bool:
    return not any(part in name.lower().replace("-", "_").split("_") for part in _LOWER_IS_BETTER)
