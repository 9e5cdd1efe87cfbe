"""Means with confidence intervals by Student's t distribution, for the few seeds of an experiment.

Student, "The Probable Error of a Mean", Biometrika 6 (1908). The quantiles are computed from the regularised
incomplete beta function by its continued fraction (Press et al., Numerical Recipes, section 6.4), so that no
statistics package is needed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Final

CONFIDENCE: Final = 0.95
MAX_ITERATIONS: Final = 300
EPSILON: Final = 1e-15
TINY: Final = 1e-300


@dataclass(frozen=True)
class Estimate:
    """A mean over *count* values and its confidence interval."""

    mean: float
    half_width: float
    """Half of the interval's width; infinite for one value, of which nothing is known."""
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    @property
    def is_different_from_zero(self) -> bool:
        """Whether the interval does not contain 0."""
        return self.low > 0 or self.high < 0


def estimate_mean(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Return the mean of *values* with its t interval.

    Raises:
        ValueError: there are no values.

    """
    if not values:
        raise ValueError("the mean of no values does not exist")
    if len(values) == 1:
        return Estimate(values[0], math.inf, 1)
    quantile = student_t_quantile((1 + confidence) / 2, len(values) - 1)
    return Estimate(fmean(values), quantile * stdev(values) / math.sqrt(len(values)), len(values))


def estimate_difference(
    first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE
) -> Estimate:
    """Return the mean of ``second - first`` with its t interval. The values are paired: the same seed at each index.

    Raises:
        ValueError: they have different lengths, or there are none.

    """
    return estimate_mean([b - a for a, b in zip(first, second, strict=True)], confidence)


def student_t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """Return the value below which a t-distributed variable lies with *probability*, by bisection.

    Raises:
        ValueError: *probability* is not between 0 and 1, or there are no degrees of freedom.

    """
    if not 0 < probability < 1 or degrees_of_freedom < 1:
        raise ValueError(
            f"no quantile for probability {probability} and {degrees_of_freedom} degrees of freedom"
        )
    if probability < 0.5:
        return -student_t_quantile(1 - probability, degrees_of_freedom)
    low, high = 0.0, 1.0
    while student_t_cdf(high, degrees_of_freedom) < probability:
        low, high = high, 2 * high
    while high - low > 1e-12 * max(1.0, high):
        middle = (low + high) / 2
        if student_t_cdf(middle, degrees_of_freedom) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def student_t_cdf(value: float, degrees_of_freedom: int) -> float:
    """Return the probability that a t-distributed variable is at most *value*."""
    square, half = value * value, degrees_of_freedom / 2
    if square < degrees_of_freedom:  # 1 - x is precise where x is near 1
        tail = 0.5 * (1 - incomplete_beta(square / (degrees_of_freedom + square), 0.5, half))
    else:
        tail = 0.5 * incomplete_beta(degrees_of_freedom / (degrees_of_freedom + square), half, 0.5)
    return 1 - tail if value >= 0 else tail


def incomplete_beta(x: float, a: float, b: float) -> float:
    """Return the regularised incomplete beta function Iₓ(a, b)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(1 - x, b, a)
    factor = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    return factor * _continued_fraction(x, a, b) / a


def _continued_fraction(x: float, a: float, b: float) -> float:
    """Evaluate the continued fraction of the incomplete beta function by Lentz's method."""
    c, d = 1.0, 1 / _avoid_zero(1 - (a + b) * x / (a + 1))
    result = d
    for m in range(1, MAX_ITERATIONS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for coefficient in (even, odd):
            d = 1 / _avoid_zero(1 + coefficient * d)
            c = _avoid_zero(1 + coefficient / c)
            result *= c * d
        if abs(c * d - 1) < EPSILON:
            break
    return result


def _avoid_zero(value: float) -> float:
    return value if abs(value) > TINY else TINY
