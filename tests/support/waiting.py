"""Tests never sleep for a guessed time."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable


async def eventually(condition: Callable[[], bool | Awaitable[bool]], *, within_s: float = 20.0) -> None:
    """Wait until *condition* holds; the test fails when it does not within *within_s*."""
    async with asyncio.timeout(within_s):
        while not await _truth(condition):  # noqa: ASYNC110 (what it waits for may be anything)
            await asyncio.sleep(0.01)


async def _truth(condition: Callable[[], bool | Awaitable[bool]]) -> bool:
    answer = condition()
    return await answer if inspect.isawaitable(answer) else bool(answer)
