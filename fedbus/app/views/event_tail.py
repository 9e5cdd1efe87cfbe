"""What the streams hold and will hold, as one sequence in the order of time."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, suppress
from datetime import datetime
from typing import Any, Final

from fedbus.agents.common.asyncio_tools import wait_within
from fedbus.bus.bus import Bus, StoredMessage
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.contracts import subjects

SETTLE_S: Final = 0.05
"""Two streams are read as one: what comes within this time is put in the order of its time."""
MAX_BATCH: Final = 1000


async def follow_streams(bus: Bus, since: datetime | None) -> AsyncGenerator[StoredMessage, None]:
    """Events and transitions from *since* on, or from now; raises BusClosed at the end."""
    streams = {
        events_stream(bus.fed): [subjects.federation_wildcard(bus.fed)],
        lifecycle_stream(bus.fed): [subjects.lifecycle(bus.fed, "*", ">")],
    }
    queue: asyncio.Queue[StoredMessage] = asyncio.Queue(MAX_BATCH)
    async with AsyncExitStack() as watching:
        readers: list[asyncio.Future[Any]] = [asyncio.ensure_future(bus.lost())]
        try:
            for stream, wanted in streams.items():
                seen = await watching.enter_async_context(bus.watch(stream, wanted, since=since))
                readers.append(asyncio.create_task(_forward(queue, seen), name=f"read {stream}"))
            while True:
                for one in await _next_batch(queue, readers):
                    yield one
        finally:
            await _cancel_all(readers)


async def read_until_lost(
    bus: Bus, stream: AsyncIterator[StoredMessage]
) -> AsyncGenerator[StoredMessage, None]:
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
        await _cancel_all(pending)


async def _forward(queue: asyncio.Queue[StoredMessage], stream: AsyncIterator[StoredMessage]) -> None:
    async for seen in stream:
        await queue.put(seen)


async def _next_batch(
    queue: asyncio.Queue[StoredMessage], readers: list[asyncio.Future[Any]]
) -> list[StoredMessage]:
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
        while len(held) < MAX_BATCH:
            held.append(await wait_within(SETTLE_S, queue.get()))
    return sorted(held, key=lambda seen: seen.envelope.time)


async def _cancel_all(tasks: Sequence["asyncio.Future[Any]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
