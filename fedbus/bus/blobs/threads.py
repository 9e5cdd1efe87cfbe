"""Blocking work in threads, with safe cancellation."""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def run_in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run *work* in a thread. When this returns, even by cancellation, the thread has finished.

    So the caller may reuse the buffer, or close the file.
    """
    job = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.wait({job})
        raise


async def open_in_thread(opening: Callable[[], T], close: Callable[[T], None]) -> T:
    """Return what *opening* opens in a thread. On cancellation it is closed, since the caller never receives it."""
    job = asyncio.ensure_future(asyncio.to_thread(opening))
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.wait({job})
        if job.exception() is None:
            close(job.result())
        raise
