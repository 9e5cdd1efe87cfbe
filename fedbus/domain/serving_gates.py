"""The gates that a new model passes on a device before it replaces the current model.

    holdout   its score on the device's own labelled samples is not worse than the current model's by more
              than *tolerance*
    shadow    it answers the same requests as the current model, without errors and with few disagreements
    canary    it answers a share of the requests with few errors
    watch     after the swap its errors and drift stay below the limits; otherwise the device rolls it back

A verdict of None means that there are too few requests to decide.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from fedbus.contracts.serving import ModelComparison
from fedbus.contracts.task.serving import ServingTable

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class GateVerdict:
    """Whether the new model passed the gate, and why not."""

    passed: bool
    reason: str = ""


PASSED = GateVerdict(passed=True)


def judge_holdout(old: float, new: float, samples: int, table: ServingTable) -> GateVerdict:
    """Judge by the scores of both models on the same labelled *samples*; a higher score is better."""
    if new >= old - table.tolerance:
        return PASSED
    return _reject(
        f"score {new:.4g} on {samples} labelled samples of this device, current model {old:.4g}: "
        f"{old - new:.4g} lower (limit {table.tolerance:g})"
    )


def judge_shadow(comparison: ModelComparison, seconds: float, table: ServingTable) -> GateVerdict | None:
    """Judge a shadow model after `shadow_samples` requests or `shadow_s` seconds, whichever is first."""
    if comparison.errors:
        return _reject(f"{_count_errors(comparison)} (limit 0)")
    over = comparison.samples >= table.shadow_samples or seconds >= table.shadow_s
    if not over:
        return None
    return _judge_agreement(comparison, table)


def judge_canary(comparison: ModelComparison, seconds: float, table: ServingTable) -> GateVerdict | None:
    """Judge a canary model after `canary_samples` requests or `canary_s` seconds, whichever is first."""
    if comparison.errors >= table.max_errors:
        return _reject(f"{_count_errors(comparison)} (limit {table.max_errors})")
    over = comparison.samples >= table.canary_samples or seconds >= table.canary_s
    return _judge_prediction_drift(comparison, table) if over else None


def judge_watch(comparison: ModelComparison, seconds: float, table: ServingTable) -> GateVerdict | None:
    """Judge a model that answers all requests; it passes after `watch_s` seconds."""
    if comparison.errors >= table.max_errors:
        return _reject(f"{_count_errors(comparison)} (limit {table.max_errors})")
    verdict = _judge_prediction_drift(comparison, table)
    if not verdict.passed:
        return verdict
    return PASSED if seconds >= table.watch_s else None


def score(outputs: Array, labels: Array) -> float:
    """Compute the accuracy if the outputs are classes, which are integers, else R². A higher score is better.

    R², the coefficient of determination, is 1 for a perfect model and 0 for one that predicts the mean of the labels.
    For probabilities of a class with the labels 0 and 1, it is the Brier skill score against the share of the class.
    The kind of score depends on the dtype of the outputs only, so that both models of a comparison have the same.

    Raises:
        ValueError: The outputs and the labels have different shapes.

    """
    if outputs.shape == (*labels.shape, 1):
        outputs = outputs[..., 0]
    if outputs.shape == labels.shape and outputs.dtype.kind in "biu":
        return float(np.mean(outputs == labels))
    if outputs.shape != labels.shape:
        raise ValueError(
            f"outputs of shape {list(outputs.shape)} cannot be compared with labels of shape "
            f"{list(labels.shape)}: name a function of the task as `score` in [tool.fedbus.serving]"
        )
    outputs, labels = outputs.astype(float), labels.astype(float)
    spread = float(np.sum((labels - labels.mean(axis=0)) ** 2))
    return 1.0 - float(np.sum((outputs - labels) ** 2)) / max(spread, 1e-12)


def _judge_agreement(comparison: ModelComparison, table: ServingTable) -> GateVerdict:
    if comparison.disagreement is None or comparison.disagreement <= table.max_disagreement:
        return PASSED
    return _reject(
        f"predictions differ from the current model on {comparison.disagreement * 100:.1f} % "
        f"of {comparison.samples} samples (limit {table.max_disagreement * 100:.1f} %)"
    )


def _judge_prediction_drift(comparison: ModelComparison, table: ServingTable) -> GateVerdict:
    limit = table.max_answer_psi
    if limit is None or comparison.answer_psi is None or comparison.answer_psi <= limit:
        return PASSED
    return _reject(
        f"the distribution of predictions differs from the current model's: PSI {comparison.answer_psi:.3g} "
        f"(limit {limit:g})"
    )


def _count_errors(comparison: ModelComparison) -> str:
    return f"{comparison.errors} errors on requests that the current model answered"


def _reject(reason: str) -> GateVerdict:
    return GateVerdict(passed=False, reason=reason)
