"""Waiting for a condition: tests never sleep for a guessed time."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable


class ConditionNotMet(TimeoutError):
    """A condition was still false when its time was up.

    `.ci/run` repeats a test that ends with this error, recognised by its text: see `only_rerun` in pyproject.toml.
    """

    def __init__(self, within_s: float, detail: str = "") -> None:
        super().__init__(f"Condition not met within {within_s:g} s{f': {detail}' if detail else ''}")


async def eventually(condition: Callable[[], bool | Awaitable[bool]], *, within_s: float = 40.0) -> None:
    """Wait until *condition* holds.

    Raises:
        ConditionNotMet: *condition* does not hold within *within_s*.
    """
    timeout = asyncio.timeout(within_s)
    try:
        async with timeout:
            while not await _truth(condition):  # noqa: ASYNC110 (the condition may be anything)
                await asyncio.sleep(0.01)
    except TimeoutError:
        if not timeout.expired():  # the condition itself raised it
            raise
        raise ConditionNotMet(within_s) from None


async def _truth(condition: Callable[[], bool | Awaitable[bool]]) -> bool:
    result = condition()
    return await result if inspect.isawaitable(result) else bool(result)
