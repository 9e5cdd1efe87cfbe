"""The statistics of experiments, compared with SciPy."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedbus.simulation.experiments.statistics import (
    estimate_difference,
    estimate_mean,
    student_t_cdf,
    student_t_quantile,
)


@given(st.floats(0.001, 0.999), st.integers(1, 200))
def test_the_quantile_is_that_of_scipy(probability: float, degrees: int) -> None:
    expected = stats.t.ppf(probability, degrees)
    assert student_t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-8, abs=1e-9)


@given(st.floats(-50, 50), st.integers(1, 200))
def test_the_cdf_is_that_of_scipy(value: float, degrees: int) -> None:
    assert student_t_cdf(value, degrees) == pytest.approx(stats.t.cdf(value, degrees), rel=1e-8, abs=1e-12)


def test_the_interval_is_that_of_a_t_test() -> None:
    values = [0.91, 0.93, 0.9, 0.95, 0.92]
    estimate = estimate_mean(values)
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))
    assert estimate.mean == pytest.approx(0.922)


def test_the_difference_is_that_of_a_paired_t_test() -> None:
    first, second = [0.9, 0.8, 0.85, 0.7], [0.92, 0.83, 0.86, 0.74]
    difference = estimate_difference(first, second)
    interval = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
    assert difference.is_different_from_zero


def test_one_value_has_no_interval() -> None:
    estimate = estimate_mean([0.5])
    assert (estimate.mean, estimate.half_width) == (0.5, math.inf)
    assert not estimate.is_different_from_zero


def test_equal_values_have_an_interval_of_width_zero() -> None:
    assert estimate_difference([1, 2, 3], [2, 3, 4]).half_width == 0
    assert not estimate_difference([1, 2], [1, 2]).is_different_from_zero


@pytest.mark.parametrize(("probability", "degrees"), [(0.0, 3), (1.0, 3), (0.9, 0)])
def test_an_impossible_quantile_is_an_error(probability: float, degrees: int) -> None:
    with pytest.raises(ValueError, match="no quantile"):
        student_t_quantile(probability, degrees)


def test_values_without_a_partner_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        estimate_difference([1, 2], [1])
    with pytest.raises(ValueError, match="no values"):
        estimate_mean([])
