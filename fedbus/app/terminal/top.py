"""The live screen of `fedbus top`: it draws a `FederationView` that follows the bus.

It draws after a change, at most ten times a second, and once a second to keep the clock and the ages current. It sends
no requests.
"""

import asyncio
import signal
import sys
from datetime import UTC, datetime
from typing import Any, Final

from rich.console import Console
from rich.live import Live

from fedbus.agents.common.asyncio_tools import wait_within
from fedbus.app.entrypoints.signals import stop_on_signals
from fedbus.app.terminal.keyboard import TERMINAL_CLOSED, read_keys
from fedbus.app.terminal.top_screen import SORT_BY_KEY, ScreenOptions, render_screen
from fedbus.app.views.federation_status import EventRate
from fedbus.bus.background import background_task
from fedbus.bus.bus import Bus
from fedbus.domain.federation_view import ClientView, FederationView

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


class TopScreen:
    """The terminal; it is drawn after a message, a key or a change of its size."""

    def __init__(self, console: Console, bus: Bus, options: ScreenOptions) -> None:
        self._console = console
        self._bus = bus
        self._options = options
        self._wake = asyncio.Event()
        self._is_closed = False
        self._rate = EventRate()
        self.view = FederationView()

    def on_message(self) -> None:
        """Count a message and draw soon."""
        self._rate.count(datetime.now(UTC).timestamp())
        self._wake.set()

    async def run(self) -> None:
        """Draw until q, Ctrl-C or the end of the terminal."""
        loop = asyncio.get_running_loop()
        with stop_on_signals() as stop, read_keys(sys.stdin, self._on_key), self._live() as live:
            loop.add_signal_handler(signal.SIGWINCH, self._wake.set)
            async with background_task(self._close_on(stop), name="wait for a signal"):
                while not self._is_closed:
                    self._wake.clear()
                    live.update(self._render(), refresh=True)
                    await asyncio.sleep(FRAME_S)
                    await self._wait_for_change()
            loop.remove_signal_handler(signal.SIGWINCH)

    def _live(self) -> Live:
        return Live(console=self._console, screen=True, auto_refresh=False)

    async def _close_on(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._close()

    async def _wait_for_change(self) -> None:
        try:
            await wait_within(TICK_S, self._wake.wait())
        except TimeoutError:
            return

    def _render(self) -> Any:
        now, size = datetime.now(UTC), self._console.size
        self._options.is_connected = self._bus.is_connected
        return render_screen(
            self.view,
            self._options,
            now,
            width=size.width,
            height=size.height,
            fed=self._bus.fed,
            rate=self._rate.per_s(now.timestamp()),
        )

    def _on_key(self, key: str) -> None:
        options = self._options
        if key in ("q", "Q", TERMINAL_CLOSED):
            self._close()
        elif key == "r":
            options.reverse = not options.reverse
        elif key in SORT_BY_KEY:
            options.sort, options.first = SORT_BY_KEY[key], 0
        elif key in SCROLL_STEPS:
            options.first += SCROLL_STEPS[key]
        self._wake.set()

    def _close(self) -> None:
        self._is_closed = True
        self._wake.set()


def client_record(view: FederationView, client: ClientView) -> dict[str, Any]:
    """Return *client* as JSON data."""
    device = view.presence.devices.get(client.client)
    return {
        "client": client.client,
        "task": client.task,
        "state": client.state,
        "training": client.training_state,
        "inference": client.inference_state,
        "model_version": client.model_version,
        "not_served": client.not_served,
        "code_version": client.code_version,
        "device": device.report.model_dump(mode="json", exclude={"client", "task"}) if device else None,
        "last_seen": view.presence.last_seen.get(client.client),
        "why_not": view.not_training_reason(client),
    }
