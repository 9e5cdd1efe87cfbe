"""Read a time window of both streams as one sequence, in the order of time.

A replay only reads: it publishes nothing and creates no durable consumer.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from fedbus.agents.common.asyncio_tools import wait_within
from fedbus.app.failures import CliError, ExitCode
from fedbus.bus.bus import Bus
from fedbus.bus.stream_reader import StoredMessage
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.run import RUN, RunData
from fedbus.contracts.transition import Transition

IDLE_TIMEOUT_S: Final = 2.0
CLOCK_RESOLUTION: Final = timedelta(milliseconds=1)
"""The resolution of times in envelopes; times in bodies are finer."""
AFTER_RUN: Final = timedelta(seconds=60)
"""The time after the end of a run in which its clients may still apply its model."""


@dataclass(frozen=True)
class TimeWindow:
    """A period, and the run whose messages are wanted; None: all messages."""

    since: datetime
    until: datetime
    run: str | None = None

    def contains(self, stored: StoredMessage) -> bool:
        return self.since <= stored.envelope.time <= self.until and (
            self.run is None or is_about_run(self.run, stored)
        )


def is_about_run(run: str, stored: StoredMessage) -> bool:
    """Return whether the body of a message, or the data of a transition, names *run*."""
    message = stored.message
    content = message.facts if isinstance(message, Transition) else message
    return getattr(content, "run", None) == run


async def resolve_window(
    bus: Bus, since: datetime | None, until: datetime | None, run: str | None
) -> TimeWindow:
    """Complete a time window: for *run*, it is by default from the run's request to `AFTER_RUN` after its end.

    Raises:
        CliError: There is no such run, or neither *since* nor *run* is given.

    """
    if run is None:
        if since is None:
            raise CliError("no time window. Set --since 10m or --run RUN", ExitCode.USAGE)
        return TimeWindow(since, until or datetime.now(UTC))
    stored = await bus.last_on_subject(subjects.lifecycle(bus.fed, RUN.kind, run))
    if stored is None or not isinstance(stored.message, Transition):
        raise CliError(f"no run {run} in federation {bus.fed}: see fedbus run ls", ExitCode.NOT_FOUND)
    facts = stored.message.facts
    assert isinstance(facts, RunData)
    is_finished = stored.message.target in RUN.final
    end = stored.envelope.time + AFTER_RUN if is_finished else datetime.now(UTC)
    return TimeWindow(since or facts.requested_at - CLOCK_RESOLUTION, until or end, run)


async def read_window(bus: Bus, window: TimeWindow) -> AsyncGenerator[StoredMessage, None]:
    """Yield the messages of both streams in *window*, in the order of their times."""
    async with AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(aclosing(_read_stream(bus, name, wanted, window)))
            for name, wanted in (
                (events_stream(bus.fed), [subjects.federation_wildcard(bus.fed)]),
                (lifecycle_stream(bus.fed), [subjects.wildcard_for(bus.fed, Transition)]),
            )
        ]
        async for stored in _merge(streams):
            yield stored


async def pace(stream: AsyncIterator[StoredMessage], speed: float) -> AsyncGenerator[StoredMessage, None]:
    """Yield *stream* at *speed* times its original pace; 0: without pauses."""
    loop, first_time, started_at = asyncio.get_running_loop(), None, 0.0
    async for stored in stream:
        if speed:
            time = stored.envelope.time.timestamp()
            if first_time is None:
                first_time, started_at = time, loop.time()
            await asyncio.sleep(max(0.0, started_at + (time - first_time) / speed - loop.time()))
        yield stored


async def _read_stream(
    bus: Bus, name: str, wanted: list[str], window: TimeWindow
) -> AsyncGenerator[StoredMessage, None]:
    """Yield the messages of one stream in *window*, up to the message that is the last one now."""
    _, last = await bus.sequence_range(name)
    async with bus.read_stream(name, wanted, since=window.since) as stream:
        with suppress(TimeoutError):  # an undecodable last message is never delivered
            while last:
                stored = await wait_within(IDLE_TIMEOUT_S, anext(stream))
                if window.contains(stored):
                    yield stored
                if stored.sequence >= last:
                    return


async def _merge(streams: Sequence[AsyncIterator[StoredMessage]]) -> AsyncGenerator[StoredMessage, None]:
    heads = {stream: await anext(stream, None) for stream in streams}
    while pending := {stream: head for stream, head in heads.items() if head is not None}:
        stream, head = min(pending.items(), key=lambda item: item[1].envelope.time)
        yield head
        heads[stream] = await anext(stream, None)
