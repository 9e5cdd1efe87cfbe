"""Retry with backoff: pauses that grow from attempt to attempt, with jitter, up to a limit.

    pause after attempt n = uniform(0.5, 1.0) * min(max_s, first_s * 2**n)

`retry` is the loop for a call that either succeeds or raises. A loop of another shape uses a `RetryBackoff`; a state
machine that sets timers uses `backoff_s`.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from fedbus.common import clock

MIN_PAUSE_S: Final = 0.1
MAX_PAUSE_S: Final = 5.0
_MAX_DOUBLINGS: Final = 30

T = TypeVar("T")
Errors = type[Exception] | tuple[type[Exception], ...]


def backoff_s(attempt: int, *, first_s: float = MIN_PAUSE_S, max_s: float = MAX_PAUSE_S) -> float:
    """Return the pause after failed attempt number *attempt*, counted from 0, in seconds."""
    longest = min(max_s, first_s * 2.0 ** min(attempt, _MAX_DOUBLINGS))
    return clock.uniform(0.5, 1.0) * longest


class RetryBackoff:
    """The pauses between attempts.

    *limit_s* bounds the time since the start or the last `reset`; `is_exhausted` is True after that.
    """

    def __init__(
        self, *, first_s: float = MIN_PAUSE_S, max_s: float = MAX_PAUSE_S, limit_s: float = math.inf
    ) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._limit_s = limit_s
        self.reset()

    def reset(self) -> None:
        """Restart with the shortest pause and the whole limit: an attempt succeeded or made progress."""
        self.attempts = 0
        self._deadline = clock.monotonic_s() + self._limit_s

    @property
    def is_exhausted(self) -> bool:
        return clock.monotonic_s() >= self._deadline

    async def pause(self, stop: asyncio.Event | None = None) -> None:
        """Wait before the next attempt, and no longer than until *stop* is set."""
        pause_s = backoff_s(self.attempts, first_s=self._first_s, max_s=self._max_s)
        self.attempts += 1
        if stop is None:
            await asyncio.sleep(pause_s)
            return
        try:
            async with asyncio.timeout(pause_s):
                await stop.wait()
        except TimeoutError:
            return


async def retry(
    attempt: Callable[[], Awaitable[T]],
    *,
    on: Errors,
    backoff: RetryBackoff | None = None,
    on_failure: Callable[[Exception, int], None] | None = None,
) -> T:
    """Call *attempt* until it succeeds, with a pause after each error of the types *on*; other errors are raised.

    *on_failure* gets each such error and the number of attempts that failed before it; it may raise to give up.
    If the limit of *backoff* is exhausted, the error is raised.
    """
    pauses = backoff or RetryBackoff()
    while True:
        try:
            return await attempt()
        except on as error:
            if on_failure is not None:
                on_failure(error, pauses.attempts)
            if pauses.is_exhausted:
                raise
            await pauses.pause()
