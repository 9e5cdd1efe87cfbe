"""Whether a new model may serve on a device: what its figures have to be, at each step of its way.

    holdout   its score on the device's own labelled samples is no worse than the old one's, by *tolerance*
    shadow    it answers what the old one answers, and not too differently
    canary    it answers a share of the requests without failing
    watch     after the swap it goes on like that; else the old one is back

A *verdict* is None while there is too little to say.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from fedbus.contracts.serving import ModelComparison
from fedbus.contracts.task.serving import ServingTable

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class GateVerdict:
    """Whether the new model may go on, and why not."""

    passed: bool
    reason: str = ""


PASSED = GateVerdict(passed=True)


def judge_holdout(old: float, new: float, samples: int, table: ServingTable) -> GateVerdict:
    """Judge by the scores of both models on the same labelled *samples*; more is better."""
    if new >= old - table.tolerance:
        return PASSED
    return _reject(
        f"its score on {samples} labelled samples of this device is {new:.4g}, "
        f"and the old model's is {old:.4g}: it may be {table.tolerance:g} less"
    )


def judge_shadow(beside: ModelComparison, seconds: float, table: ServingTable) -> GateVerdict | None:
    """Judge a model that answers for the figures alone, as soon as it has answered enough, or when time is up."""
    if beside.errors:
        return _reject(f"it failed {beside.errors} of the requests that the old model answers")
    over = beside.samples >= table.shadow_samples or seconds >= table.shadow_s
    if not over:
        return None
    return _judge_agreement(beside, table)


def judge_canary(beside: ModelComparison, seconds: float, table: ServingTable) -> GateVerdict | None:
    """Judge a model that answers a share of the requests."""
    if beside.errors >= table.max_errors:
        return _reject(f"it failed {beside.errors} requests that the old model answers")
    over = beside.samples >= table.canary_samples or seconds >= table.canary_s
    return _judge_prediction_drift(beside, table) if over else None


def judge_watch(beside: ModelComparison, seconds: float, table: ServingTable) -> GateVerdict | None:
    """Judge a model that has taken the old one's place; passed when the time of the watch is over."""
    if beside.errors >= table.max_errors:
        return _reject(f"it failed {beside.errors} requests that the old model answers")
    verdict = _judge_prediction_drift(beside, table)
    if not verdict.passed:
        return verdict
    return PASSED if seconds >= table.watch_s else None


def score(outputs: Array, labels: Array) -> float:
    """Accuracy where the labels are classes, else R²: 1 is perfect, and more is better."""
    classes = np.issubdtype(labels.dtype, np.integer) or bool(np.all(labels == np.round(labels)))
    if classes and outputs.shape == labels.shape:
        return float(np.mean(outputs == labels))
    if outputs.shape != labels.shape:
        raise ValueError(
            f"outputs of shape {list(outputs.shape)} cannot be compared with labels of shape "
            f"{list(labels.shape)}: name a function of the task as `score` in [tool.fedbus.serving]"
        )
    spread = float(np.sum((labels - labels.mean(axis=0)) ** 2))
    return 1.0 - float(np.sum((outputs - labels) ** 2)) / max(spread, 1e-12)


def _judge_agreement(beside: ModelComparison, table: ServingTable) -> GateVerdict:
    if beside.disagreement is None or beside.disagreement <= table.max_disagreement:
        return PASSED
    return _reject(
        f"it answers {beside.disagreement:.1%} of {beside.samples} samples otherwise than the old model: "
        f"it may {table.max_disagreement:.1%}"
    )


def _judge_prediction_drift(beside: ModelComparison, table: ServingTable) -> GateVerdict:
    limit = table.max_answer_psi
    if limit is None or beside.answer_psi is None or beside.answer_psi <= limit:
        return PASSED
    return _reject(
        f"its answers have drifted from the old model's: PSI {beside.answer_psi:.3g}, above {limit:g}"
    )


def _reject(reason: str) -> GateVerdict:
    return GateVerdict(passed=False, reason=reason)
