"""Work that would block the loop, and how it ends."""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def run_in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """*work*, done in a thread. When this returns, even by a cancellation, the thread has let go:
    the caller may use the buffer again, or close the file.
    """
    job = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.wait({job})
        raise


async def open_in_thread(opening: Callable[[], T], close: Callable[[T], None]) -> T:
    """What *opening* opens in a thread; closed again where we are cancelled, so that nobody has it."""
    job = asyncio.ensure_future(asyncio.to_thread(opening))
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.wait({job})
        if job.exception() is None:
            close(job.result())
        raise
