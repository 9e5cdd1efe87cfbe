"""Durations in seconds: a number, or a distribution of random numbers."""

import math
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from fedbus.contracts.task.base import ConfigSection
from fedbus.simulation.profiles.draws import exponential_quantile, normal_quantile

MAX_SECONDS: Final = 366 * 86400.0

Seconds: TypeAlias = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
PositiveSeconds: TypeAlias = Annotated[float, Field(gt=0, le=MAX_SECONDS)]


class ProfileSection(ConfigSection):
    """A mapping of a profile. Unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(allow_inf_nan=False)


class ConstantDuration(ProfileSection):
    """Always *seconds*."""

    distribution: Literal["constant"] = "constant"
    seconds: Seconds

    @property
    def mean_s(self) -> float:
        return self.seconds

    def quantile(self, probability: float) -> float:  # noqa: ARG002 - it is the same for all
        return self.seconds


class UniformDuration(ProfileSection):
    """Each value between *min_s* and *max_s* is equally likely."""

    distribution: Literal["uniform"]
    min_s: Seconds
    max_s: Seconds

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.max_s < self.min_s:
            raise ValueError(f"`max-s` {self.max_s:g} must be ≥ `min-s` {self.min_s:g}")
        return self

    @property
    def mean_s(self) -> float:
        return (self.min_s + self.max_s) / 2

    def quantile(self, probability: float) -> float:
        return self.min_s + (self.max_s - self.min_s) * probability


class NormalDuration(ProfileSection):
    """The normal distribution. Values below *min_s* become *min_s*, values above *max_s* become *max_s*."""

    distribution: Literal["normal"]
    mean_s: Seconds
    std_s: Seconds
    min_s: Seconds = 0.0
    max_s: Seconds = MAX_SECONDS

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.max_s < self.min_s:
            raise ValueError(f"`max-s` {self.max_s:g} must be ≥ `min-s` {self.min_s:g}")
        return self

    def quantile(self, probability: float) -> float:
        return min(max(self.mean_s + self.std_s * normal_quantile(probability), self.min_s), self.max_s)


class LognormalDuration(ProfileSection):
    """The logarithm is normal with the standard deviation *sigma*; half of the values are above *median_s*."""

    distribution: Literal["lognormal"]
    median_s: PositiveSeconds
    sigma: Annotated[float, Field(ge=0, le=5)]
    max_s: Seconds = MAX_SECONDS

    @property
    def mean_s(self) -> float:
        """The mean without *max_s*."""
        return self.median_s * math.exp(self.sigma**2 / 2)

    def quantile(self, probability: float) -> float:
        return min(self.median_s * math.exp(self.sigma * normal_quantile(probability)), self.max_s)


class ExponentialDuration(ProfileSection):
    """The time until an event that is equally likely at each moment."""

    distribution: Literal["exponential"]
    mean_s: PositiveSeconds
    max_s: Seconds = MAX_SECONDS

    def quantile(self, probability: float) -> float:
        return min(self.mean_s * exponential_quantile(probability), self.max_s)


def with_distribution(value: Any) -> Any:
    """Accept a number for a constant duration, and a mapping without ``distribution``."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"distribution": "constant", "seconds": value}
    if isinstance(value, dict) and "distribution" not in value:
        return {"distribution": "constant", **value}
    return value


AnyDuration: TypeAlias = (
    ConstantDuration | UniformDuration | NormalDuration | LognormalDuration | ExponentialDuration
)
Duration: TypeAlias = Annotated[
    AnyDuration, Field(discriminator="distribution"), BeforeValidator(with_distribution)
]
"""A number of seconds, or a mapping with ``distribution`` and its parameters."""
