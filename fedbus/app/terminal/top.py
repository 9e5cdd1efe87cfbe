"""`fedbus top` at work: both streams are read, devices are heard, and the screen follows.

What moves is drawn when it moves, at most ten times a second; once a second the screen is drawn for the sake of
its clock and of how long ago each client was heard of. Nobody is asked for anything.
"""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final

from rich.console import Console
from rich.live import Live

from fedbus.agents.common.asyncio_tools import wait_within
from fedbus.app.entrypoints.signals import stop_on_signals
from fedbus.app.terminal.keyboard import HUNG_UP, read_keys
from fedbus.app.terminal.top_screen import SORT_BY_KEY, ScreenOptions, render_screen
from fedbus.app.views.federation_status import NOTE_MESSAGES, ClientStatus, EventRate, FederationOverview
from fedbus.bus.background import background_task
from fedbus.bus.bus import Bus, StoredMessage
from fedbus.bus.streams import events_stream, lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.catalogue import stream_subjects
from fedbus.contracts.client import Heartbeat
from fedbus.contracts.device import DeviceReport
from fedbus.contracts.message import Message
from fedbus.contracts.transition import Transition

FRAME_S: Final = 0.1
TICK_S: Final = 1.0
PAGE_ROWS: Final = 10
SCROLL_STEPS: Final = {
    "up": -1,
    "k": -1,
    "down": 1,
    "j": 1,
    "page up": -PAGE_ROWS,
    "page down": PAGE_ROWS,
    "home": -(10**9),
    "end": 10**9,
}


@asynccontextmanager
async def follow_federation(
    bus: Bus, overview: FederationOverview, moved: Callable[[], None]
) -> AsyncIterator[None]:
    """*overview* is what is so when the block begins, and follows; *moved* is called for each message that comes.

    Raises NoFederation, and BusClosed where the connection is gone for good.
    """
    ready = asyncio.Event()
    async with background_task(_follow(bus, overview, moved, ready), name="follow the federation"):
        await ready.wait()
        yield


async def _follow(
    bus: Bus, overview: FederationOverview, moved: Callable[[], None], ready: asyncio.Event
) -> None:
    streams = {
        lifecycle_stream(bus.fed): [subjects.wildcard_for(bus.fed, Transition)],
        events_stream(bus.fed): stream_subjects(bus.fed),
    }
    ends = {name: (await bus.sequence_range(name))[1] for name in streams}
    async with AsyncExitStack() as watching:
        comes = [
            await watching.enter_async_context(bus.watch(name, wanted, after=ends[name]))
            for name, wanted in streams.items()
        ]
        heard = [
            await watching.enter_async_context(bus.subscribe_ephemeral(kind, task="*"))
            for kind in (DeviceReport, Heartbeat)
        ]
        await load_overview(bus, overview)
        ready.set()
        async with asyncio.TaskGroup() as group:
            group.create_task(_wait_until_lost(bus), name="the connection")
            for stream in comes:
                group.create_task(_apply_stream(stream, overview, moved), name="see")
            for words in heard:
                group.create_task(_apply_reports(words, overview, moved), name="hear")


async def _wait_until_lost(bus: Bus) -> None:
    await bus.lost()


async def load_overview(bus: Bus, overview: FederationOverview) -> None:
    """Have *overview* be what is so now: the last word on everything, in the order in which it was said."""
    lives = await bus.last_per_subject(
        lifecycle_stream(bus.fed), [subjects.wildcard_for(bus.fed, Transition)]
    )
    notes = await bus.last_per_subject(
        events_stream(bus.fed), [subjects.wildcard_for(bus.fed, kind) for kind in NOTE_MESSAGES]
    )
    for seen in sorted([*lives, *notes], key=lambda seen: seen.envelope.time):
        overview.see(seen)
    for seen in await bus.latest(DeviceReport):
        overview.hear(seen.message, seen.envelope.time)


async def _apply_stream(
    stream: AsyncIterator[StoredMessage], overview: FederationOverview, moved: Callable[[], None]
) -> None:
    async for seen in stream:
        overview.see(seen)
        moved()


async def _apply_reports(
    words: AsyncIterator[Message], overview: FederationOverview, moved: Callable[[], None]
) -> None:
    async for message in words:
        overview.hear(message, datetime.now(UTC))
        moved()


class TopScreen:
    """The terminal, drawn when somebody moved, a key was pressed or its size has changed."""

    def __init__(self, console: Console, bus: Bus, look: ScreenOptions) -> None:
        self._console = console
        self._bus = bus
        self._look = look
        self._wake = asyncio.Event()
        self._over = False
        self._rate = EventRate()
        self.overview = FederationOverview()

    def moved(self) -> None:
        self._rate.count(datetime.now(UTC).timestamp())
        self._wake.set()

    async def run(self) -> None:
        """Until q, Ctrl-C, or the end of the terminal."""
        loop = asyncio.get_running_loop()
        with stop_on_signals() as stop, read_keys(sys.stdin, self._pressed), self._live() as live:
            loop.add_signal_handler(signal.SIGWINCH, self._wake.set)
            async with background_task(self._ended(stop), name="wait for the end"):
                while not self._over:
                    self._wake.clear()
                    live.update(self._picture(), refresh=True)
                    await asyncio.sleep(FRAME_S)
                    await self._next()
            loop.remove_signal_handler(signal.SIGWINCH)

    def _live(self) -> Live:
        return Live(console=self._console, screen=True, auto_refresh=False)

    async def _ended(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._leave()

    async def _next(self) -> None:
        """Wait for something to draw."""
        try:
            await wait_within(TICK_S, self._wake.wait())
        except TimeoutError:
            return

    def _picture(self) -> Any:
        now, size = datetime.now(UTC), self._console.size
        self._look.bus_is_there = self._bus.connected
        return render_screen(
            self.overview,
            self._look,
            now,
            width=size.width,
            height=size.height,
            fed=self._bus.fed,
            rate=self._rate.per_s(now.timestamp()),
        )

    def _pressed(self, key: str) -> None:
        look = self._look
        if key in ("q", "Q", HUNG_UP):
            self._leave()
        elif key == "r":
            look.reverse = not look.reverse
        elif key in SORT_BY_KEY:
            look.sort, look.first = SORT_BY_KEY[key], 0
        elif key in SCROLL_STEPS:
            look.first += SCROLL_STEPS[key]
        self._wake.set()

    def _leave(self) -> None:
        self._over = True
        self._wake.set()


def client_record(overview: FederationOverview, one: ClientStatus) -> dict[str, Any]:
    """*one* for a program."""
    heard, report = overview.heard.get(one.client), overview.devices.get(one.client)
    return {
        "client": one.client,
        "task": one.task,
        "state": one.state("client"),
        "training": one.state("fl_client"),
        "inference": one.state("inference"),
        "model_version": one.model_version,
        "code_version": one.code_version,
        "device": report.model_dump(mode="json", exclude={"client", "task"}) if report else None,
        "last_seen": heard,
        "why_not": overview.why(one),
    }
