"""The keys of a profile.

description: Phones on a train
groups:
  phone:
    share: 0.8
    training: {slowdown: 4}
    delay: {seconds: 3, probability: 0.5}
    latency: {distribution: lognormal, median-s: 0.1, sigma: 0.5}
    bandwidth: {down-mbit-s: 20, up-mbit-s: 5}
    loss: {probability: 0.02}
    disconnections: {every-s: 600, duration: 20}
    availability: {share: 0.6, period-s: 3600}
  server-room: {}
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from fedbus.simulation.profiles.durations import (
    ConstantDuration,
    Duration,
    ExponentialDuration,
    LognormalDuration,
    NormalDuration,
    PositiveSeconds,
    ProfileSection,
    Seconds,
    UniformDuration,
    with_distribution,
)

Probability: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Megabits: TypeAlias = Annotated[float, Field(ge=0.001, le=1e6)]
DAY_S: Final = 86400.0
_HOURS: Final = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)")


def _parse_hours(value: Any) -> Any:
    """Convert ``22:00-07:00`` to seconds of the day."""
    if not isinstance(value, str):
        return value
    first, dash, last = value.partition("-")
    start, stop = _HOURS.fullmatch(first.strip()), _HOURS.fullmatch(last.strip().replace("24:00", "00:00"))
    if not dash or start is None or stop is None or start[0] == stop[0]:
        raise ValueError("write the hours as 22:00-07:00, two different times from 00:00 to 23:59")
    return tuple(int(match[1]) * 3600.0 + int(match[2]) * 60.0 for match in (start, stop))


DailyHours: TypeAlias = Annotated[tuple[float, float], BeforeValidator(_parse_hours)]
"""The first and the last second of the day; the last is smaller if the night is between them."""


def _parse_time_of_day(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 60:
        value = f"{value // 60}:{value % 60:02}"  # YAML 1.1 reads 22:30 without quotes as 22 · 60 + 30
    match = _HOURS.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError('write the time as "08:00", from 00:00 to 23:59')
    return int(match[1]) * 3600.0 + int(match[2]) * 60.0


TimeOfDay: TypeAlias = Annotated[float, BeforeValidator(_parse_time_of_day), Field(ge=0, lt=DAY_S)]
"""In seconds of the day."""


class _Chance(ProfileSection):
    probability: Probability = 1.0
    """The probability that the delay occurs."""


class ConstantDelay(_Chance, ConstantDuration):
    pass


class UniformDelay(_Chance, UniformDuration):
    pass


class NormalDelay(_Chance, NormalDuration):
    pass


class LognormalDelay(_Chance, LognormalDuration):
    pass


class ExponentialDelay(_Chance, ExponentialDuration):
    pass


AnyDelay: TypeAlias = ConstantDelay | UniformDelay | NormalDelay | LognormalDelay | ExponentialDelay
Delay: TypeAlias = Annotated[
    AnyDelay, Field(discriminator="distribution"), BeforeValidator(with_distribution)
]
"""A `Duration` that occurs with a probability."""


class TrainingTime(ProfileSection):
    """How long a client trains. At most one of *seconds* and *seconds_per_sample*."""

    slowdown: Annotated[float, Field(gt=0, le=10_000)] = 1.0
    """The factor of the measured time: 4 is a device that is four times slower. Also of the times below."""
    seconds: Duration | None = None
    """The time of each training, instead of the measured one."""
    seconds_per_sample: PositiveSeconds | None = None
    """The time for each sample that the client reports, instead of the measured time."""

    @model_validator(mode="after")
    def _check_single(self) -> Self:
        if self.seconds is not None and self.seconds_per_sample is not None:
            raise ValueError("`seconds` and `seconds-per-sample` exclude each other")
        return self

    @property
    def is_measured(self) -> bool:
        return self.seconds is None and self.seconds_per_sample is None


def _same_for_both(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"down-mbit-s": value, "up-mbit-s": value}
    return value


def _as_loss(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"probability": value} if is_number else value


class Bandwidth(ProfileSection):
    """The bandwidth of a client, in Mbit/s (10⁶ bits in a second)."""

    down_mbit_s: Megabits | None = None
    """From the server to the client; without it there is no limit."""
    up_mbit_s: Megabits | None = None
    """From the client to the server; without it there is no limit."""


class Loss(ProfileSection):
    """Messages that are lost on the way, in each direction."""

    probability: Annotated[float, Field(ge=0, lt=1)]
    then: Literal["retransmit", "drop"] = "retransmit"
    """``retransmit``: a lost message is sent again, as TCP does. ``drop``: the message, or its reply, is lost for ever;
    the round waits for it until its time limit."""
    retransmit_s: Annotated[float, Field(gt=0, le=60)] = 0.2
    """The time until the first retransmission. It doubles with each further one of the same message, as in TCP."""


class Disconnections(ProfileSection):
    """The connection breaks at random moments."""

    every_s: Annotated[float, Field(ge=0.1, le=366 * DAY_S)]
    """The mean time between the end of one interruption and the next one (exponential)."""
    duration: Duration
    """How long one interruption takes."""


class Availability(ProfileSection):
    """When a client is there: exactly one of *share*, *hours* and *intervals_s*."""

    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """The share of the time, in random intervals."""
    period_s: Annotated[float, Field(ge=1, le=366 * DAY_S)] = 3600.0
    """With *share*: the mean time from one arrival to the next."""
    hours: Sequence[DailyHours] | None = None
    """Times of the day: ``["22:00-07:00"]``."""
    spread_h: Annotated[float, Field(ge=0, le=24)] = 0.0
    """With *hours*: the clients are in time zones over so many hours."""
    intervals_s: Sequence[tuple[Seconds, Seconds]] | None = None
    """Intervals in seconds from the start: ``[[0, 3600], [7200, 9000]]``."""
    repeat_s: PositiveSeconds | None = None
    """With *intervals_s*: repeat them with this period."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        patterns = {"share": self.share, "hours": self.hours, "intervals-s": self.intervals_s}
        chosen = [name for name, value in patterns.items() if value is not None]
        if len(chosen) != 1:
            raise ValueError(
                "set exactly one of `share`, `hours` and `intervals-s`"
                + (f": {' and '.join(f'`{name}`' for name in chosen)} exclude each other" if chosen else "")
            )
        for name, owner in (("period_s", "share"), ("spread_h", "hours"), ("repeat_s", "intervals-s")):
            if name in self.model_fields_set and chosen != [owner]:
                raise ValueError(f"`{name.replace('_', '-')}` has no effect without `{owner}`")
        self._check_intervals()
        return self

    def _check_intervals(self) -> None:
        end = 0.0
        for start, stop in self.intervals_s or ():
            if not end <= start < stop:
                raise ValueError(
                    f"the interval [{start:g}, {stop:g}] must end after its start and begin after the previous one"
                )
            end = stop
        if self.repeat_s is not None and end > self.repeat_s:
            raise ValueError(f"`repeat-s` {self.repeat_s:g} must be ≥ the end of the last interval {end:g}")


class Group(ProfileSection):
    """A group of clients with the same conditions: by *share*, by *count* or by name; without these, all others."""

    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """The share of all clients."""
    count: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """The number of clients."""
    clients: Sequence[Annotated[str, StringConstraints(min_length=1, max_length=63)]] | None = None
    """The names of the clients. ``*`` stands for any characters: ``jetson-*``."""
    training: TrainingTime = TrainingTime()
    evaluation: TrainingTime | None = None
    """As *training*, for the evaluation of a model and for queries. Default: the measured time with the same
    slowdown; 0 s if the time of *training* is not measured."""
    delay: Delay | None = None
    """The delay after each training, before the reply is sent."""
    latency: Delay | None = None
    """The delay of each message on the network, in each direction."""
    bandwidth: Annotated[Bandwidth, BeforeValidator(_same_for_both)] = Bandwidth()
    """One number, in Mbit/s, is that of both directions."""
    loss: Annotated[Loss, BeforeValidator(_as_loss)] | None = None
    """One number is the probability."""
    disconnections: Disconnections | None = None
    availability: Availability | None = None

    @model_validator(mode="after")
    def _check_selection(self) -> Self:
        chosen = [name for name in ("share", "count", "clients") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(f'`{name}`' for name in chosen)} exclude each other")
        return self

    @property
    def is_rest(self) -> bool:
        """Whether the group takes the clients that no other group takes."""
        return self.share is None and self.count is None and self.clients is None


GroupName: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]{0,62}$")]


class Profile(ProfileSection):
    """The conditions of all clients."""

    description: str = ""
    parameters: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Values that a user may set without another file, with their defaults; ``$name`` stands for one."""
    seed: int = 0
    """The seed of all random values, unless the command sets one."""
    day_starts_at: TimeOfDay = Field(default=0.0, validate_default=False)
    """The time of the day at the start of virtual time: ``"08:00"``. A real federation uses the clock."""
    groups: Annotated[dict[GroupName, Group], Field(min_length=1, max_length=1000)]

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        rest = [name for name, group in self.groups.items() if group.is_rest]
        if len(rest) > 1:
            raise ValueError(
                f"the groups {' and '.join(rest)} have no `share`, `count` or `clients`: only one group can take "
                "the clients that are left"
            )
        total = sum(group.share or 0.0 for group in self.groups.values())
        if total > 1 + 1e-9:
            raise ValueError(f"the shares of the groups add up to {total:g} (limit 1)")
        return self
