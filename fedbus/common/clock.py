"""The clock and the source of chance of the running event loop.

On an ordinary event loop they are those of the operating system. A loop for virtual time carries its own, as the
attribute `clock`; the agents, the bus and the messages on it then have the times, ids and pauses of that loop, so that
a seed determines them. In a thread without an event loop they are those of the operating system.
"""

import asyncio
import os
import time
from datetime import UTC, datetime
from typing import Final, Protocol

from fedbus.common.jitter import JITTER


class Clock(Protocol):
    """What the code that runs on one event loop reads instead of `time`, `random` and `os.urandom`."""

    def time_ns(self) -> int:
        """Return the nanoseconds since the epoch."""

    def monotonic(self) -> float:
        """Return seconds from an arbitrary start, which never decrease."""

    def uniform(self, low: float, high: float) -> float:
        """Return a random number between *low* and *high*."""

    def random_bits(self, count: int) -> int:
        """Return *count* random bits."""


class SystemClock:
    """The clock and the randomness of the operating system."""

    def time_ns(self) -> int:
        return time.time_ns()

    def monotonic(self) -> float:
        return time.monotonic()

    def uniform(self, low: float, high: float) -> float:
        return JITTER.uniform(low, high)

    def random_bits(self, count: int) -> int:
        return int.from_bytes(os.urandom((count + 7) // 8), "big") >> (-count % 8)


SYSTEM_CLOCK: Final = SystemClock()


def current_clock() -> Clock:
    """Return the clock of the running event loop, else that of the operating system."""
    clock: Clock = getattr(asyncio._get_running_loop(), "clock", SYSTEM_CLOCK)  # noqa: SLF001 - None without a loop
    return clock


def now() -> datetime:
    """Return the current time in UTC."""
    return datetime.fromtimestamp(current_clock().time_ns() / 1e9, UTC)


def time_ns() -> int:
    """Return the nanoseconds since the epoch."""
    return current_clock().time_ns()


def time_s() -> float:
    """Return the seconds since the epoch."""
    return current_clock().time_ns() / 1e9


def monotonic_s() -> float:
    """Return seconds from an arbitrary start, which never decrease."""
    return current_clock().monotonic()


def uniform(low: float, high: float) -> float:
    """Return a random number between *low* and *high*; not for secrets."""
    return current_clock().uniform(low, high)


def random_bits(count: int) -> int:
    """Return *count* random bits; the operating system's, so fit for secrets, except under virtual time."""
    return current_clock().random_bits(count)
