"""Drift: equal distributions have none, shifted ones do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.domain import drift
from fedbus.domain.drift import DriftLimits, FeatureShift

LIMITS = DriftLimits()
RNG = np.random.default_rng
counts = st.lists(st.integers(0, 1000), min_size=2, max_size=12)


def test_the_psi_has_its_standard_definition() -> None:
    """Computed by hand: (0.5 − 0.25) ln(0.5/0.25) + (0.5 − 0.75) ln(0.5/0.75)."""
    assert drift.psi_of_counts(np.array([50, 50]), np.array([25, 75])) == pytest.approx(0.274653, abs=1e-6)


@given(counts)
def test_the_psi_of_equal_counts_is_zero(some: list[int]) -> None:
    assert drift.psi_of_counts(np.array(some), np.array(some)) == pytest.approx(0, abs=1e-12)


@given(counts, st.data())
def test_the_psi_is_symmetric_finite_and_not_negative(some: list[int], data: st.DataObject) -> None:
    other = data.draw(st.lists(st.integers(0, 1000), min_size=len(some), max_size=len(some)))
    there, back = (drift.psi_of_counts(np.array(a), np.array(b)) for a, b in ((some, other), (other, some)))
    assert there == pytest.approx(back)
    assert there >= -1e-12
    assert np.isfinite(there)


@pytest.mark.parametrize("shape", [(3,), (28, 28)], ids=["few numbers", "an image"])
def test_inputs_like_the_reference_have_not_drifted(shape: tuple[int, ...]) -> None:
    reference = drift.build_reference(RNG(0).normal(size=(1000, *shape)).astype(np.float32))
    shifts = reference.compare(RNG(1).normal(size=(500, *shape)).astype(np.float32))
    assert drift.most_drifted(shifts, LIMITS) is None
    assert len(shifts) <= drift.MAX_FEATURES
    assert all(sum(one.counts) == 500 for one in shifts)


@pytest.mark.parametrize("shape", [(3,), (28, 28)], ids=["few numbers", "an image"])
def test_shifted_inputs_have_drifted(shape: tuple[int, ...]) -> None:
    reference = drift.build_reference(RNG(0).normal(size=(1000, *shape)).astype(np.float32))
    worst = drift.most_drifted(
        reference.compare(RNG(1).normal(1.5, size=(300, *shape)).astype(np.float32)), LIMITS
    )
    assert worst is not None
    assert worst[0].psi > LIMITS.psi
    assert worst[0].p is not None
    assert worst[0].p < 0.001


def test_a_few_noisy_rows_are_not_drift() -> None:
    """Their PSI is high, but the KS test is not significant."""
    shift = FeatureShift("x", (1, 2, 3), psi=0.9, ks=0.3, p=0.2)
    assert not shift.is_drift(LIMITS, 1)
    assert FeatureShift("x", (1, 2, 3), psi=0.9, ks=0.9, p=0.0001).is_drift(LIMITS, 16)


def test_predictions_are_compared_as_classes_or_as_numbers() -> None:
    classes = drift.build_prediction_reference(np.array([0.0] * 50 + [1.0] * 50))
    same = classes.compare(np.array([0.0] * 500 + [1.0] * 500))
    assert same.psi < 0.05
    other = classes.compare(np.array([0.0] * 100 + [7.0] * 100))
    assert other.counts == (100, 0, 100)
    assert other.psi > 1
    numbers = drift.build_prediction_reference(RNG(0).normal(size=1000))
    assert numbers.compare(RNG(1).normal(size=500)).psi < 0.1
    assert numbers.compare(RNG(1).normal(2, size=500)).psi > 0.5


def test_a_constant_feature_is_compared_too() -> None:
    reference = drift.build_reference(np.zeros((100, 2), np.float32))
    assert all(
        one.psi == pytest.approx(0, abs=0.02) for one in reference.compare(np.zeros((100, 2), np.float32))
    )
    worst = drift.most_drifted(reference.compare(np.ones((100, 2), np.float32)), LIMITS)
    assert worst is not None
