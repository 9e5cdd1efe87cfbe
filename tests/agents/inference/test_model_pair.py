"""Which model of a pair answers a request, and the metrics of their comparison."""

import pytest
from support.loaded_model import loaded_model

from fedbus.agents.inference.model_pair import ComparisonRole, ModelPair
from fedbus.contracts.serving import ModelComparison


def make_pair(role: ComparisonRole, *, share: float = 0.0) -> ModelPair:
    return ModelPair(loaded_model(1), loaded_model(2), role, share)


@pytest.mark.parametrize(("share", "answered"), [(0.0, 0), (0.25, 25), (0.5, 50), (1.0, 100)])
def test_a_canary_answers_exactly_its_share(share: float, answered: int) -> None:
    pair = make_pair(ComparisonRole.CANARY, share=share)
    assert sum(pair.routes_to_canary() for _ in range(100)) == answered


def test_a_comparison_without_samples_has_no_figures() -> None:
    comparison = make_pair(ComparisonRole.SHADOW).compare()
    assert comparison == ModelComparison(samples=0, errors=0, disagreement=None, old_ms=None, new_ms=None)


def test_a_comparison_has_the_share_of_disagreements_and_median_times() -> None:
    pair = make_pair(ComparisonRole.SHADOW)
    pair.samples, pair.compared_samples, pair.disagreements = 10, 8, 2
    pair.old_s.extend([0.25, 0.5, 9.0])
    pair.new_s.append(1.0)
    expected = ModelComparison(samples=10, errors=0, disagreement=0.25, old_ms=500.0, new_ms=1000.0)
    assert pair.compare() == expected
