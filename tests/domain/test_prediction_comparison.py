"""The comparison of the predictions of two models."""

import numpy as np

from fedbus.domain.prediction_comparison import count_disagreements, prediction_psi, to_scalars


def test_several_outputs_become_the_index_of_the_highest() -> None:
    assert to_scalars(np.array([[0.1, 0.9], [0.8, 0.2]])) == [1.0, 0.0]
    assert to_scalars(np.array([7, 2])) == [7.0, 2.0]
    assert to_scalars(np.array([[0.5], [1.5]])) == [0.5, 1.5]


def test_classes_must_be_equal_and_numbers_close() -> None:
    assert count_disagreements(np.array([1, 2, 3]), np.array([1, 2, 4])) == 1
    assert count_disagreements(np.array([1.0, 100.0]), np.array([1.01, 120.0])) == 1
    assert count_disagreements(np.array([[0.1, 0.9]]), np.array([[0.2, 0.8]])) == 0
    assert count_disagreements(np.zeros(4), np.zeros((4, 2))) == 4


def test_the_psi_of_too_few_predictions_is_unknown() -> None:
    assert prediction_psi([1.0] * 10, [1.0] * 30, at_least=20) is None
    assert prediction_psi([], [], at_least=20) is None


def test_another_distribution_has_a_high_psi() -> None:
    rng = np.random.default_rng(0)
    same, other = rng.normal(size=(2, 500)).tolist()
    moved = rng.normal(2, size=500).tolist()
    near, far = prediction_psi(same, other, at_least=20), prediction_psi(same, moved, at_least=20)
    assert near is not None
    assert far is not None
    assert near < 0.1
    assert far > 0.5
    assert (prediction_psi([0.0, 1.0] * 50, [0.0] * 100, at_least=20) or 0) > 0.5
