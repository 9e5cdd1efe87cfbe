"""What the streams hold and will hold, as one sequence in the order of time."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, suppress
from datetime import datetime
from typing import Any, Final

from fedbus.agents.common.asyncio_tools import within
from fedbus.bus.bus import Bus, Seen
from fedbus.bus.streams import events_stream, life_stream
from fedbus.contracts import subjects

SETTLE_S: Final = 0.05
"""Two streams are read as one: what comes within this time is put in the order of its time."""
HELD_AT_ONCE: Final = 1000


async def everything(bus: Bus, since: datetime | None) -> AsyncGenerator[Seen, None]:
    """Events and transitions from *since* on, or from now; raises BusClosed at the end."""
    streams = {
        events_stream(bus.fed): [subjects.everything(bus.fed)],
        life_stream(bus.fed): [subjects.life(bus.fed, "*", ">")],
    }
    queue: asyncio.Queue[Seen] = asyncio.Queue(HELD_AT_ONCE)
    async with AsyncExitStack() as watching:
        readers: list[asyncio.Future[Any]] = [asyncio.ensure_future(bus.lost())]
        try:
            for stream, wanted in streams.items():
                seen = await watching.enter_async_context(bus.watch(stream, wanted, since=since))
                readers.append(asyncio.create_task(_into(queue, seen), name=f"read {stream}"))
            while True:
                for one in await _settled(queue, readers):
                    yield one
        finally:
            await _end(readers)


async def until_lost(bus: Bus, stream: AsyncIterator[Seen]) -> AsyncGenerator[Seen, None]:
    """*stream* as it comes; raises BusClosed when the connection is gone for good."""
    gone: asyncio.Future[Any] = asyncio.ensure_future(bus.lost())
    pending: list[asyncio.Future[Any]] = [gone]
    try:
        while True:
            pending = [gone, asyncio.ensure_future(anext(stream))]
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                gone.result()
            yield await pending[1]
    finally:
        await _end(pending)


async def _into(queue: asyncio.Queue[Seen], stream: AsyncIterator[Seen]) -> None:
    async for seen in stream:
        await queue.put(seen)


async def _settled(queue: asyncio.Queue[Seen], readers: list[asyncio.Future[Any]]) -> list[Seen]:
    """What comes until nothing has come for a moment, sorted by time."""
    first: asyncio.Future[Any] = asyncio.ensure_future(queue.get())
    try:
        await asyncio.wait([first, *readers], return_when=asyncio.FIRST_COMPLETED)
        for reader in readers:
            if reader.done():
                reader.result()
    finally:
        if not first.done():
            first.cancel()
    held = [await first]
    with suppress(TimeoutError):
        while len(held) < HELD_AT_ONCE:
            held.append(await within(SETTLE_S, queue.get()))
    return sorted(held, key=lambda seen: seen.envelope.time)


async def _end(tasks: Sequence["asyncio.Future[Any]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
