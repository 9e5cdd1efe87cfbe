"""The simulated trainers of a fleet, and the board on which server sessions find them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from fedbus.agents.flower_client.trainer import Heartbeats, TrainerEnd
from fedbus.bus.bus import Identity
from fedbus.bus.errors import BusUnreachable
from fedbus.bus.memory.server import MemoryServer
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.client import ClientJoined, ClientStart, RoundStarted
from fedbus.simulation.fleet.bus import FleetBus, connect_agent
from fedbus.simulation.fleet.settings import FEDERATION

LOST_AFTER_S: Final = 10.0
"""A client without contact for so long counts as lost, as in `fedbus.learning.messenger`."""


class LossListener(Protocol):
    """A server session."""

    def on_silent(self, client: str) -> None:
        """Handle that *client* has sent no heartbeat for `LOST_AFTER_S`."""


class TrainingBoard:
    """The trainers that run, by client, and the sessions that want to know which clients are silent."""

    def __init__(self) -> None:
        self.trainers: dict[str, SimulatedTrainer] = {}
        self.sessions: list[LossListener] = []
        self._silent_since: dict[str, float] = {}

    def is_silent(self, client: str) -> bool:
        """Return whether *client* has sent no heartbeat for `LOST_AFTER_S`."""
        since = self._silent_since.get(client)
        return since is not None and asyncio.get_running_loop().time() - since >= LOST_AFTER_S

    def set_silent(self, client: str) -> None:
        """Record that *client* sends no heartbeats from now on: its trainer or its connection has ended."""
        if client in self._silent_since:
            return
        loop = asyncio.get_running_loop()
        self._silent_since[client] = loop.time()
        if self.sessions:
            loop.call_later(LOST_AFTER_S, self._report, client, loop.time())

    def clear_silent(self, client: str) -> None:
        """Record that *client* sends heartbeats again."""
        self._silent_since.pop(client, None)

    def _report(self, client: str, since: float) -> None:
        if self._silent_since.get(client) == since:
            for session in list(self.sessions):
                session.on_silent(client)


@dataclass
class TrainerFaults:
    """What goes wrong in the trainers of one client."""

    load_error: str = ""
    """The task's code cannot be loaded, for this reason."""
    training_error: str = ""
    """A training fails with this reason; the trainer continues."""
    slowdown: float = 1.0
    on_start: list[Callable[[], None]] = field(default_factory=list)


class SimulatedTrainer:
    """The trainer of one client; a `TrainerLauncher` of its flower client."""

    def __init__(
        self,
        server: MemoryServer,
        board: TrainingBoard,
        client: str,
        *,
        load_s: float,
        is_linked: Callable[[], bool],
    ) -> None:
        self._server = server
        self._board = board
        self._client = client
        self._load_s = load_s
        self._is_linked = is_linked
        self._bus: FleetBus | None = None
        self._ended: asyncio.Future[TrainerEnd] | None = None
        self._has_started = False
        self._start: ClientStart | None = None
        self.faults = TrainerFaults()

    @property
    def run_name(self) -> str:
        """The run that it trains; empty if it does not train."""
        return self._start.run if self._start is not None else ""

    async def run(self, start: ClientStart, stop: asyncio.Event, heartbeats: Heartbeats) -> TrainerEnd:  # noqa: ARG002
        """Load the app, join the run, and train what sessions send. Heartbeats are the board's."""
        identity = Identity(FEDERATION, AgentName.TRAINER, self._client)
        self._ended = asyncio.get_running_loop().create_future()
        stopping = asyncio.ensure_future(stop.wait())
        try:
            async with connect_agent(self._server, identity) as bus:
                self._bus = bus
                if not self._is_linked():
                    bus.connection.disconnect()
                if await self._wait(stopping, self._load_s):
                    return TrainerEnd("the trainer was stopped")
                if self.faults.load_error:
                    return TrainerEnd(self.faults.load_error, load_failed=True)
                self._start, self._has_started = start, False
                self._board.trainers[self._client] = self
                if self._is_linked():
                    self._board.clear_silent(self._client)
                joined = ClientJoined(
                    task=start.task, client=self._client, run=start.run, code_version=start.code_version
                )
                joining = asyncio.ensure_future(bus.publish(joined))
                try:
                    ends: list[asyncio.Future[Any]] = [stopping, self._ended]
                    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    joining.cancel()
                return self._ended.result() if self._ended.done() else TrainerEnd("the trainer was stopped")
        except BusUnreachable as error:
            return TrainerEnd(f"the trainer cannot connect: {error}")
        finally:
            stopping.cancel()
            self._leave()

    async def _wait(self, stopping: "asyncio.Future[Any]", seconds: float) -> bool:
        """Wait for *seconds*; True if the trainer was stopped meanwhile."""
        await asyncio.wait([stopping], timeout=seconds * self.faults.slowdown)
        return stopping.done()

    def _leave(self) -> None:
        self._bus = self._start = self._ended = None
        if self._board.trainers.get(self._client) is self:
            del self._board.trainers[self._client]
            self._board.set_silent(self._client)

    def crash(self, reason: str) -> None:
        """End the trainer's process without a report."""
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(TrainerEnd(f"the trainer {reason}"))

    @property
    def connection_bus(self) -> FleetBus | None:
        """The trainer's connection; None if it does not run."""
        return self._bus

    def takes_first_message(self, run: str) -> bool:
        """Return True, once, if the trainer trains *run* and has got no message yet."""
        is_first = not self._has_started and self.run_name == run
        self._has_started = self._has_started or is_first
        return is_first

    async def begin(self, run: str, round_number: int) -> None:
        """Handle the first message: report that the training has begun."""
        if self._bus is None or self._start is None or self._start.run != run:
            return
        message = RoundStarted(task=self._start.task, client=self._client, run=run, round=round_number)
        await self._bus.publish(message)
