"""The gates for a new model on a device, decided from metrics alone."""

import numpy as np
import pytest

from fedbus.contracts.serving import ModelComparison
from fedbus.contracts.task.serving import ServingTable
from fedbus.domain.serving_gates import PASSED, judge_canary, judge_holdout, judge_shadow, judge_watch, score


def table(**entries: float) -> ServingTable:
    return ServingTable.model_validate({name.replace("_", "-"): value for name, value in entries.items()})


SHADOW = table(shadow_samples=100, shadow_s=10, max_disagreement=0.2)
CANARY = table(canary_share=0.1, canary_samples=100, canary_s=10, max_errors=3)
WATCH = table(watch_s=60, max_errors=3, max_answer_psi=0.25)


@pytest.mark.parametrize(
    ("old", "new", "passed"), [(0.9, 0.9, True), (0.9, 0.86, True), (0.9, 0.84, False), (0.5, 0.9, True)]
)
def test_a_holdout_score_may_be_lower_by_the_tolerance(old: float, new: float, passed: bool) -> None:
    verdict = judge_holdout(old, new, 100, table(tolerance=0.05))
    assert verdict.passed == passed
    assert passed or "100 labelled samples" in verdict.reason


def test_a_shadow_runs_until_enough_samples_or_the_time_limit() -> None:
    assert judge_shadow(ModelComparison(samples=99), 9, SHADOW) is None
    assert judge_shadow(ModelComparison(samples=100, disagreement=0.1), 1, SHADOW) == PASSED
    assert judge_shadow(ModelComparison(samples=3), 10, SHADOW) == PASSED


def test_a_shadow_with_errors_or_disagreements_is_rejected() -> None:
    for comparison in (ModelComparison(samples=1, errors=1), ModelComparison(samples=100, disagreement=0.3)):
        verdict = judge_shadow(comparison, 1, SHADOW)
        assert verdict is not None
        assert not verdict.passed


def test_a_canary_is_rejected_at_the_error_limit() -> None:
    assert judge_canary(ModelComparison(samples=50, errors=2), 1, CANARY) is None
    assert judge_canary(ModelComparison(samples=100, errors=2), 1, CANARY) == PASSED
    verdict = judge_canary(ModelComparison(samples=50, errors=3), 1, CANARY)
    assert verdict is not None
    assert verdict.reason == "3 errors on requests that the current model answered (limit 3)"


def test_a_watched_model_is_rolled_back_on_errors_or_drift() -> None:
    assert judge_watch(ModelComparison(samples=10**6, answer_psi=0.1), 59, WATCH) is None
    assert judge_watch(ModelComparison(samples=10), 60, WATCH) == PASSED
    for comparison in (ModelComparison(errors=3), ModelComparison(answer_psi=0.3)):
        verdict = judge_watch(comparison, 1, WATCH)
        assert verdict is not None
        assert not verdict.passed


def test_classes_are_scored_by_accuracy_and_numbers_by_r_squared() -> None:
    assert score(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])) == 0.75
    labels = np.array([0.5, 1.5, 2.5])
    assert score(labels, labels) == 1.0
    assert score(np.full(3, 1.5), labels) == pytest.approx(0.0)
    with pytest.raises(ValueError, match=r"name a function of the task as `score`"):
        score(np.zeros((3, 2)), labels)


def test_the_gates_end_before_the_client_manager_times_out() -> None:
    with pytest.raises(ValueError, match=r"\(limit 90 s\)"):
        table(shadow_samples=1, shadow_s=60, canary_share=0.1, canary_s=60)
    assert table(shadow_s=60, canary_s=60)  # neither is asked for


def test_fractional_outputs_are_scored_by_r2_whatever_the_labels_are() -> None:
    labels = np.array([0, 1, 1, 0])
    assert score(np.array([0.1, 0.9, 0.9, 0.1]), labels) == pytest.approx(0.96)
    assert score(np.array([[0.0], [1.0], [1.0], [0.0]]), labels) == 1.0
    assert score(np.full(4, 0.5), labels) == pytest.approx(0.0)
