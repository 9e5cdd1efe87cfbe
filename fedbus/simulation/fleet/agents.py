"""Agents of a simulated fleet that are restarted when they end with an error, as a supervisor does."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from fedbus.common import clock
from fedbus.simulation.fleet.bus import FleetBus

FIRST_RESTART_S: Final = 1.0
MAX_RESTART_S: Final = 30.0
STABLE_S: Final = 60.0
"""An agent that ran for so long restarts after the shortest pause again."""

RunAgent = Callable[[asyncio.Event, Callable[[FleetBus], None]], Awaitable[None]]
"""Runs an agent until the event is set; calls the function with each of its connections."""


class SupervisedAgent:
    """Runs one agent until it is stopped."""

    def __init__(self, name: str, run: RunAgent) -> None:
        self.name = name
        self.restarts = 0
        self.errors: list[BaseException] = []
        """The errors that ended the agent; crashes are none."""
        self._run = run
        self._task: asyncio.Task[None] | None = None
        self._buses: list[FleetBus] = []
        self._linked = asyncio.Event()
        self._linked.set()
        self._stop: asyncio.Event | None = None

    @property
    def is_running(self) -> bool:
        return self._task is not None

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._supervise(), name=self.name)

    async def _supervise(self) -> None:
        pause_s = FIRST_RESTART_S
        while True:
            await self._linked.wait()  # without a network it could not connect, and would be started again
            self._stop = asyncio.Event()
            self._buses = []
            began = clock.monotonic_s()
            try:
                await self._run(self._stop, self._on_connected)
            except Exception as error:  # noqa: BLE001 - a process that ends with any error is restarted
                self.errors.append(error)
            if self._stop.is_set() or self._task is not asyncio.current_task():
                return  # a crash cancels, and the errors of lost connections may hide the cancellation
            self.restarts += 1
            pause_s = FIRST_RESTART_S if clock.monotonic_s() - began > STABLE_S else pause_s
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_RESTART_S)

    def _on_connected(self, bus: FleetBus) -> None:
        self._buses.append(bus)
        if not self._linked.is_set():
            bus.connection.disconnect()

    async def crash(self) -> None:
        """Kill the agent: its connections end first, so nothing of its clean-up is sent."""
        task, self._task = self._task, None
        if task is None:
            return
        self.restarts += 1
        for bus in self._buses:
            await bus.close()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def stop(self) -> None:
        """Stop the agent in order."""
        task, self._task = self._task, None
        if task is None:
            return
        if self._stop is not None:
            self._stop.set()
        done, _ = await asyncio.wait([task], timeout=MAX_RESTART_S)
        if not done:
            task.cancel()
            await asyncio.wait([task])

    def set_linked(self, *, is_linked: bool) -> None:
        """Lose the connections of the agent, or restore them."""
        if is_linked:
            self._linked.set()
        else:
            self._linked.clear()
        for bus in self._buses:
            if is_linked:
                bus.connection.reconnect()
            else:
                bus.connection.disconnect()

    @property
    def buses(self) -> list[FleetBus]:
        return [bus for bus in self._buses if not bus.connection.is_closed]
