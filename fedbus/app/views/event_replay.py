"""The past once more: what both streams held in a window of time, in order, as one sequence.

It is read and never published: nobody on the bus notices that somebody looks back.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from fedbus.agents.common.asyncio_tools import wait_within
from fedbus.app.failures import CliError, ExitCode
from fedbus.bus.bus import Bus, StoredMessage
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.run import RUN, RunData
from fedbus.contracts.transition import Transition

IDLE_TIMEOUT_S: Final = 2.0
CLOCK_RESOLUTION: Final = timedelta(milliseconds=1)
"""Envelopes have times of whole milliseconds, bodies finer ones."""
AFTER_RUN: Final = timedelta(seconds=60)
"""So long after a run its clients are still putting its model to use."""


@dataclass(frozen=True)
class TimeWindow:
    """From when, until when, and of which run."""

    since: datetime
    until: datetime
    run: str | None = None

    def holds(self, seen: StoredMessage) -> bool:
        return self.since <= seen.envelope.time <= self.until and (
            self.run is None or is_about_run(self.run, seen)
        )


def is_about_run(run: str, seen: StoredMessage) -> bool:
    """Whether a message is about *run*: by its body, or by the facts of the transition that it is."""
    message = seen.message
    about = message.facts if isinstance(message, Transition) else message
    return getattr(about, "run", None) == run


async def resolve_window(
    bus: Bus, since: datetime | None, until: datetime | None, run: str | None
) -> TimeWindow:
    """What was asked for; of a *run*, where no times are given, from its request to a little after its end.

    Raises Failure where there is no such run.
    """
    if run is None:
        assert since is not None
        return TimeWindow(since, until or datetime.now(UTC))
    seen = await bus.last(subjects.lifecycle(bus.fed, RUN.kind, run))
    if seen is None or not isinstance(seen.message, Transition):
        raise CliError(f"no run {run} in federation {bus.fed}: see fedbus run ls", ExitCode.NOT_FOUND)
    facts = seen.message.facts
    assert isinstance(facts, RunData)
    over = seen.message.target in RUN.final
    end = seen.envelope.time + AFTER_RUN if over else datetime.now(UTC)
    return TimeWindow(since or facts.requested_at - CLOCK_RESOLUTION, until or end, run)


async def read_window(bus: Bus, window: TimeWindow) -> AsyncGenerator[StoredMessage, None]:
    """What the streams held in *window*, by the time at which it was said."""
    async with AsyncExitStack() as open_things:
        streams = [
            await open_things.enter_async_context(aclosing(_read_stream(bus, name, wanted, window)))
            for name, wanted in (
                (events_stream(bus.fed), [subjects.federation_wildcard(bus.fed)]),
                (lifecycle_stream(bus.fed), [subjects.wildcard_for(bus.fed, Transition)]),
            )
        ]
        async for seen in _merge(streams):
            yield seen


async def pace(stream: AsyncIterator[StoredMessage], speed: float) -> AsyncGenerator[StoredMessage, None]:
    """*stream* at so many times the pace at which it was said; 0: at once."""
    loop, begin, began = asyncio.get_running_loop(), None, 0.0
    async for seen in stream:
        if speed:
            at = seen.envelope.time.timestamp()
            if begin is None:
                begin, began = at, loop.time()
            await asyncio.sleep(max(0.0, began + (at - begin) / speed - loop.time()))
        yield seen


async def _read_stream(
    bus: Bus, name: str, wanted: list[str], window: TimeWindow
) -> AsyncGenerator[StoredMessage, None]:
    """What one stream holds now of *window*; what comes meanwhile is not of the past."""
    _, last = await bus.sequence_range(name)
    async with bus.watch(name, wanted, since=window.since) as seen:
        with suppress(TimeoutError):  # where the last one is unreadable it never comes
            while last:
                one = await wait_within(IDLE_TIMEOUT_S, anext(seen))
                if window.holds(one):
                    yield one
                if one.sequence >= last:
                    return


async def _merge(streams: Sequence[AsyncIterator[StoredMessage]]) -> AsyncGenerator[StoredMessage, None]:
    heads = {stream: await anext(stream, None) for stream in streams}
    while waiting := {stream: head for stream, head in heads.items() if head is not None}:
        stream, head = min(waiting.items(), key=lambda one: one[1].envelope.time)
        yield head
        heads[stream] = await anext(stream, None)
