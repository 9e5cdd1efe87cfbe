"""When a client is connected, as a function of time in seconds: periodic, or random from a seed."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Final, Protocol

MAX_CHANGES: Final = 100_000
"""The limit of changes that a search for the next one passes over."""


class ConnectionSchedule(Protocol):
    """A state that changes at known times."""

    def is_on(self, at: float) -> bool: ...

    def next_change(self, at: float) -> float:
        """Return the first time after *at* at which the state changes; infinity if there is none."""


class PeriodicSchedule:
    """On in *intervals*, which do not overlap and are sorted; repeated with *period_s* if it is finite.

    Time 0 of the intervals is at *-shift_s*.
    """

    def __init__(
        self, intervals: Sequence[tuple[float, float]], period_s: float = math.inf, *, shift_s: float = 0.0
    ) -> None:
        self._intervals = [(start, stop) for start, stop in intervals if start < stop]
        self._period_s = period_s
        self._shift_s = shift_s
        self._edges = sorted(
            edge
            for edge in {edge % period_s for interval in self._intervals for edge in interval}
            if self._contains(edge) != self._contains_before(edge)
        )

    def is_on(self, at: float) -> bool:
        return self._contains(self._phase(at)[1])

    def next_change(self, at: float) -> float:
        if not self._edges:
            return math.inf
        start, phase = self._phase(at)
        index = bisect_right(self._edges, phase)
        if index < len(self._edges):
            change = start + self._edges[index]
        elif math.isinf(self._period_s):
            return math.inf
        else:
            change = start + self._period_s + self._edges[0]
        return change if change > at else math.nextafter(at, math.inf)

    def _phase(self, at: float) -> tuple[float, float]:
        """Return the start of the period of *at*, and the time since then."""
        at_of_intervals = at + self._shift_s
        if math.isinf(self._period_s):
            return -self._shift_s, at_of_intervals
        start = math.floor(at_of_intervals / self._period_s) * self._period_s
        return start - self._shift_s, at_of_intervals - start

    def _contains(self, phase: float) -> bool:
        return any(start <= phase < stop for start, stop in self._intervals)

    def _contains_before(self, phase: float) -> bool:
        """Return the state just before *phase*; before 0 it is the end of the previous period."""
        if phase == 0 and math.isfinite(self._period_s):
            return any(stop >= self._period_s for _, stop in self._intervals)
        return any(start < phase <= stop for start, stop in self._intervals)


class RandomSchedule:
    """On and off by turns. *duration(number)* is the length of each interval from number 0 on, which begins at 0.

    Later intervals are computed when a query needs them, so that the order of queries has no influence.
    """

    def __init__(self, duration: Callable[[int, bool], float], *, starts_on: bool = True) -> None:
        self._duration = duration
        self._starts_on = starts_on
        self._ends: list[float] = []

    def is_on(self, at: float) -> bool:
        return (self._index(at) % 2 == 0) == self._starts_on

    def next_change(self, at: float) -> float:
        return self._ends[self._index(at)]

    def _index(self, at: float) -> int:
        ends = self._ends
        while not ends or ends[-1] <= at:
            number = len(ends)
            is_on = (number % 2 == 0) == self._starts_on
            start = ends[-1] if ends else 0.0
            ends.append(max(start + self._duration(number, is_on), math.nextafter(start, math.inf)))
        return bisect_right(ends, at)


class AlwaysOn:
    """A state that never changes."""

    def is_on(self, at: float) -> bool:  # noqa: ARG002 - the signature of `ConnectionSchedule`
        return True

    def next_change(self, at: float) -> float:  # noqa: ARG002 - the signature of `ConnectionSchedule`
        return math.inf


class AllOf:
    """On while all *schedules* are on."""

    def __init__(self, schedules: Sequence[ConnectionSchedule]) -> None:
        self._schedules = schedules

    def is_on(self, at: float) -> bool:
        return all(schedule.is_on(at) for schedule in self._schedules)

    def next_change(self, at: float) -> float:
        state, change = self.is_on(at), at
        for _ in range(MAX_CHANGES):
            change = min((schedule.next_change(change) for schedule in self._schedules), default=math.inf)
            if math.isinf(change) or self.is_on(change) != state:
                return change
        return math.inf
