"""One simulated device: the real client manager and flower client, with a simulated disk, network and inference."""

import asyncio
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedbus.agents.client_manager.agent import ClientManager
from fedbus.agents.client_manager.eligibility import DeviceFacts
from fedbus.agents.client_manager.events import ModelAnnouncement
from fedbus.agents.flower_client.agent import FlowerClient
from fedbus.bus.blobs import BlobUnavailable
from fedbus.bus.bus import Identity
from fedbus.bus.memory.server import MemoryServer
from fedbus.common import clock
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.client import InferReady, InferRefused, InferStart
from fedbus.contracts.identifiers import ClientId
from fedbus.contracts.model import BlobRef, ModelRef
from fedbus.domain.eligibility import clock_inputs
from fedbus.simulation.fleet.agents import SupervisedAgent
from fedbus.simulation.fleet.bus import FleetBus, connect_agent
from fedbus.simulation.fleet.outbox import MemoryOutbox
from fedbus.simulation.fleet.settings import FEDERATION, FleetSettings
from fedbus.simulation.fleet.training import SimulatedTrainer, TrainingBoard
from fedbus.simulation.profiles.conditions import Conditions
from fedbus.stores.code.open import CodeRepository

ENDPOINT: Final = "http://127.0.0.1:0"
DISK: Final = Path("/simulated")
FACTS: Final[Mapping[str, float | None]] = {
    "labelled": 1000.0,
    "unlabelled": 0.0,
    "cpu": 10.0,
    "idle": 1.0,
    "memory": 30.0,
    "disk": 30.0,
    "temperature": 40.0,
    "gpu": 0.0,
    "battery": 100.0,
    "charging": 1.0,
    "model_age": 0.0,
}
"""What the eligibility rules of simulated devices read, in addition to the clock."""


def read_simulated_facts(
    names: AbstractSet[str],
    directory: Path,  # noqa: ARG001
    model_file: Path | None,  # noqa: ARG001
    /,
    *,
    holdout_share: float,  # noqa: ARG001
) -> DeviceFacts:
    """Return the facts of a device that is idle and charged, at the virtual time of day."""
    facts: DeviceFacts = {**FACTS, **clock_inputs(clock.now())}
    return {name: facts.get(name) for name in sorted(names)}


@dataclass
class DeviceFaults:
    """What goes wrong on one device."""

    download_error: str = ""
    """Models cannot be downloaded, for this reason."""
    refusal: str = ""
    """The inference agent refuses models, for this reason."""
    is_mute: bool = False
    """The inference agent does not answer."""


class SimulatedModels:
    """The model files of a device; a download takes the time of the profile."""

    __slots__ = ("_client", "_conditions", "_downloads", "_faults", "_present", "_size_bytes")

    def __init__(self, client: str, conditions: Conditions, size_bytes: int, faults: DeviceFaults) -> None:
        self._client = client
        self._conditions = conditions
        self._size_bytes = size_bytes
        self._faults = faults
        self._present: set[str] = set()
        self._downloads = 0

    def check_signature(self, announcement: ModelAnnouncement) -> None:
        """Accept every model: a simulated fleet signs none."""

    async def fetch(self, model: ModelRef, blob: BlobRef, *, attempts: int) -> Path:  # noqa: ARG002
        """Wait for the download.

        Raises:
            BlobUnavailable: The device cannot download it.

        """
        if model.sha256 not in self._present:
            self._downloads += 1
            now = asyncio.get_running_loop().time()
            device = self._conditions.device(self._client)
            seconds = device.transfer("download", -self._downloads, now, self._size_bytes).at - now
            await asyncio.sleep(min(seconds, 30.0))
            if self._faults.download_error or seconds > 30.0:
                raise BlobUnavailable(blob, self._faults.download_error or "no data for 30 s")
            self._present = {model.sha256}
        return self.path_of(model)

    def path_of(self, model: ModelRef) -> Path:
        return DISK / model.sha256


class SimulatedDevice:
    """One device of the fleet."""

    def __init__(
        self,
        client: str,
        server: MemoryServer,
        settings: FleetSettings,
        conditions: Conditions,
        board: TrainingBoard,
        code: CodeRepository,
    ) -> None:
        self.client = client
        self.faults = DeviceFaults()
        self.is_linked = True
        self._server = server
        self._settings = settings
        self._task = settings.task
        self._board = board
        self._code = code
        self._outbox, self._training_outbox = MemoryOutbox(), MemoryOutbox()
        self._models = SimulatedModels(client, conditions, settings.model_bytes, self.faults)
        self.trainer = SimulatedTrainer(
            server, board, client, load_s=settings.load_s, is_linked=lambda: self.is_linked
        )
        self.client_manager = SupervisedAgent(f"client manager of {client}", self._run_client_manager)
        self.flower_client = SupervisedAgent(f"flower client of {client}", self._run_flower_client)
        self.inference = SupervisedAgent(f"inference of {client}", self._run_inference)

    @property
    def agents(self) -> tuple[SupervisedAgent, ...]:
        return (self.client_manager, self.flower_client, self.inference)

    def start(self) -> None:
        for agent in self.agents:
            agent.start()

    async def stop(self) -> None:
        await asyncio.gather(*(agent.stop() for agent in self.agents))

    async def crash(self) -> None:
        """Lose the power: all agents end at once."""
        for agent in self.agents:
            await agent.crash()

    def set_linked(self, *, is_linked: bool) -> None:
        """Lose the network, or get it back."""
        self.is_linked = is_linked
        for agent in self.agents:
            agent.set_linked(is_linked=is_linked)
        if (bus := self.trainer.connection_bus) is not None:
            if is_linked:
                bus.connection.reconnect()
            else:
                bus.connection.disconnect()
        if is_linked and self.trainer.run_name:
            self._board.clear_silent(self.client)
        elif not is_linked:
            self._board.set_silent(self.client)

    # --- the agents -----------------------------------------------------------------------------------

    def _identity(self, agent: AgentName) -> Identity:
        return Identity(FEDERATION, agent, self.client)

    async def _run_client_manager(
        self, stop: asyncio.Event, on_connected: Callable[[FleetBus], None]
    ) -> None:
        async with connect_agent(self._server, self._identity(AgentName.CLIENT_MANAGER)) as bus:
            on_connected(bus)
            await ClientManager(
                bus,
                self._task,
                ClientId(self.client),
                directory=DISK,
                outbox=self._outbox,
                code=self._code,
                labels=self._settings.labels,
                models=self._models,
                read_facts=read_simulated_facts,
                bootstrap_s=self._settings.bootstrap_s,
            ).run(stop)

    async def _run_flower_client(self, stop: asyncio.Event, on_connected: Callable[[FleetBus], None]) -> None:
        async with connect_agent(self._server, self._identity(AgentName.FLOWER_CLIENT)) as bus:
            on_connected(bus)
            await FlowerClient(
                bus,
                self._task,
                ClientId(self.client),
                launcher=self.trainer,
                outbox=self._training_outbox,
            ).run(stop)

    async def _run_inference(self, stop: asyncio.Event, on_connected: Callable[[FleetBus], None]) -> None:
        async with connect_agent(self._server, self._identity(AgentName.INFERENCE)) as bus:
            on_connected(bus)
            serving = asyncio.ensure_future(self._serve(bus))
            try:
                await stop.wait()
            finally:
                serving.cancel()
                await asyncio.wait([serving])

    async def _serve(self, bus: FleetBus) -> None:
        """Answer each model as the inference agent does, without loading it."""
        task = self._task.id
        served: ModelRef | None = None
        async with bus.consume(AgentName.INFERENCE, task=self._task.id) as inbox:
            async for delivery in inbox:
                message = delivery.message
                assert isinstance(message, InferStart)
                with delivery.process():
                    await asyncio.sleep(self._settings.serve_s)
                    if self.faults.refusal:
                        await bus.publish(self._refuse(message, served))
                    elif not self.faults.is_mute:
                        served = message.model
                        await bus.publish(
                            InferReady(
                                task=task,
                                client=self.client,
                                model=message.model,
                                endpoint=ENDPOINT,
                                code_version=message.code_version,
                            )
                        )
                await delivery.ack()

    def _refuse(self, message: InferStart, served: ModelRef | None) -> InferRefused:
        return InferRefused(
            task=self._task.id,
            client=self.client,
            model=message.model,
            reason=self.faults.refusal,
            serving=served.version if served else None,
            still=served,
            code_version=message.code_version,
        )
