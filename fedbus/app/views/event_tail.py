"""Follow both streams as one sequence, in the order of time."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, suppress
from datetime import datetime
from typing import Any, Final

from fedbus.agents.common.asyncio_tools import wait_within
from fedbus.bus.bus import Bus
from fedbus.bus.stream_reader import StoredMessage
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.contracts import subjects

SETTLE_S: Final = 0.05
"""A batch ends when no message has come for this time; its messages are sorted by time."""
MAX_BATCH: Final = 1000


async def follow_streams(bus: Bus, since: datetime | None) -> AsyncGenerator[StoredMessage, None]:
    """Yield events and transitions from *since* on, or from now.

    Raises:
        BusClosed: The connection is lost for good.

    """
    streams = {
        events_stream(bus.fed): [subjects.federation_wildcard(bus.fed)],
        lifecycle_stream(bus.fed): [subjects.lifecycle(bus.fed, "*", ">")],
    }
    queue: asyncio.Queue[StoredMessage] = asyncio.Queue(MAX_BATCH)
    async with AsyncExitStack() as stack:
        readers: list[asyncio.Future[Any]] = [asyncio.ensure_future(bus.wait_closed())]
        try:
            for stream, wanted in streams.items():
                messages = await stack.enter_async_context(bus.read_stream(stream, wanted, since=since))
                readers.append(asyncio.create_task(_forward(queue, messages), name=f"read {stream}"))
            while True:
                for stored in await _next_batch(queue, readers):
                    yield stored
        finally:
            await _cancel_all(readers)


async def read_until_lost(
    bus: Bus, stream: AsyncIterator[StoredMessage]
) -> AsyncGenerator[StoredMessage, None]:
    """Yield the messages of *stream*.

    Raises:
        BusClosed: The connection is lost for good.

    """
    closed: asyncio.Future[Any] = asyncio.ensure_future(bus.wait_closed())
    pending: list[asyncio.Future[Any]] = [closed]
    try:
        while True:
            pending = [closed, asyncio.ensure_future(anext(stream))]
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if closed.done():
                closed.result()
            yield await pending[1]
    finally:
        await _cancel_all(pending)


async def _forward(queue: asyncio.Queue[StoredMessage], stream: AsyncIterator[StoredMessage]) -> None:
    async for stored in stream:
        await queue.put(stored)


async def _next_batch(
    queue: asyncio.Queue[StoredMessage], readers: list[asyncio.Future[Any]]
) -> list[StoredMessage]:
    """Wait for a message and return it with those that follow within `SETTLE_S` of each other, sorted by time."""
    first: asyncio.Future[Any] = asyncio.ensure_future(queue.get())
    try:
        await asyncio.wait([first, *readers], return_when=asyncio.FIRST_COMPLETED)
        for reader in readers:
            if reader.done():
                reader.result()
    finally:
        if not first.done():
            first.cancel()
    batch = [await first]
    with suppress(TimeoutError):
        while len(batch) < MAX_BATCH:
            batch.append(await wait_within(SETTLE_S, queue.get()))
    return sorted(batch, key=lambda stored: stored.envelope.time)


async def _cancel_all(tasks: Sequence["asyncio.Future[Any]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
