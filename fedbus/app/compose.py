"""Agents put together: which objects each needs, and which run in one process.

Every agent has a bus of its own, whether it shares its process or not: no agent knows another,
and moving one to a process, a container or a machine of its own changes nothing for it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog

from fedbus.agents.client_manager import ClientManager
from fedbus.agents.flower_client import FlowerClient
from fedbus.agents.flower_server import FlowerServer
from fedbus.agents.inference import Inference
from fedbus.agents.inference_server import InferenceServer
from fedbus.agents.launch import Order, TrainerOrder
from fedbus.agents.server_manager import ServerManager
from fedbus.agents.tasks import first_of
from fedbus.agents.workflow_scheduler import WorkflowScheduler
from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.client import ClientStart
from fedbus.contracts.identifiers import ClientId, FederationId
from fedbus.contracts.run import RunPlan
from fedbus.contracts.subjects import SERVER_SIDE
from fedbus.contracts.task import ScheduleTable, Task
from fedbus.learning import apps
from fedbus.learning.predictor import TorchPredictor
from fedbus.stores.captured import CapturedData
from fedbus.stores.models import open_store
from fedbus.stores.outbox import Outbox

log = structlog.get_logger("fedbus.compose")
Scalar = bool | int | float | str
PROBES: Final = 8
"""How many samples a new model must answer before it may serve."""


@dataclass(frozen=True)
class Site:
    """Where agents run: their bus, their files, their task."""

    nats_url: str
    federation: FederationId
    home: Path
    task: Task
    store: str = ""
    """The model repository; left out: a directory under *home*."""
    plan: RunPlan | None = None
    schedule: ScheduleTable | None = None
    """Both in the place of the task's own, where given."""

    @property
    def store_url(self) -> str:
        return self.store or str(self.home / "models")

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    def order(self) -> Order:
        return Order(nats_url=self.nats_url, federation=self.federation, task=self.task)

    @asynccontextmanager
    async def bus(self, agent: str, owner: str = SERVER_SIDE) -> AsyncIterator[Bus]:
        async with Bus.connect(self.nats_url, Identity(self.federation, agent, owner)) as bus:
            yield bus


@dataclass(frozen=True)
class Device:
    """One client of a site: what is its own."""

    site: Site
    client: ClientId
    node_config: Mapping[str, Scalar] = field(default_factory=dict)
    """As Flower's SuperNode has it: ``partition-id``, ``num-partitions`` and whatever the app reads."""
    host: str = "127.0.0.1"
    port: int = 0

    @property
    def directory(self) -> Path:
        return self.site.home / "clients" / self.client / self.site.task.id

    def outbox(self, agent: str) -> Outbox:
        self.directory.mkdir(parents=True, exist_ok=True)
        return Outbox(self.directory / f"outbox-{agent}.db")

    def captured(self) -> Path:
        return self.directory / "captured.db"

    def trainer_order(self, start: ClientStart) -> TrainerOrder:
        return TrainerOrder(
            **dict(self.site.order()),
            client=self.client,
            run=start.run,
            plan=start.plan,
            node_config=dict(self.node_config),
            captured=str(self.captured()),
        )


Agent = Callable[[asyncio.Event], Coroutine[Any, Any, None]]
"""Runs until the event is set."""


# --- the server side ---------------------------------------------------------------------------


async def server_manager(site: Site, stop: asyncio.Event) -> None:
    async with site.bus("server-manager") as bus:
        manager = ServerManager(bus, site.task, open_store(site.store_url, site.task.id))
        await first_of(manager.run(stop), bus.lost())


async def workflow_scheduler(site: Site, stop: asyncio.Event) -> None:
    async with site.bus("workflow-scheduler") as bus:
        scheduler = WorkflowScheduler(bus, site.task, plan=site.plan, schedule=site.schedule)
        await first_of(scheduler.run(stop), bus.lost())


async def flower_server(site: Site, stop: asyncio.Event) -> None:
    async with site.bus("flower-server") as bus:
        models = open_store(site.store_url, site.task.id)
        await first_of(
            FlowerServer(bus, site.order(), models, logs=site.logs / "server").run(stop), bus.lost()
        )


# --- a client ------------------------------------------------------------------------------------


async def client_manager(device: Device, stop: asyncio.Event) -> None:
    async with device.site.bus("client-manager", device.client) as bus:
        manager = ClientManager(
            bus,
            device.site.task,
            device.client,
            directory=device.directory,
            outbox=device.outbox("client-manager"),
        )
        await first_of(manager.run(stop), bus.lost())


async def flower_client(device: Device, stop: asyncio.Event) -> None:
    async with device.site.bus("flower-client", device.client) as bus:
        trainer = FlowerClient(
            bus,
            device.site.task,
            device.client,
            order=device.trainer_order,
            outbox=device.outbox("flower-client"),
            logs=device.site.logs / device.client,
        )
        await first_of(trainer.run(stop), bus.lost())


async def inference(device: Device, stop: asyncio.Event) -> None:
    task, outbox = device.site.task, device.outbox("inference")
    probe = await asyncio.to_thread(_probe, device)
    async with device.site.bus("inference", device.client) as bus, _capturing(device) as captured:
        agent = Inference(
            bus,
            task,
            device.client,
            InferenceServer(captured),
            load=lambda path: TorchPredictor(task, path),
            probe=probe,
            outbox=outbox,
            directory=device.directory,
            host=device.host,
            port=device.port,
        )
        await first_of(agent.run(stop), bus.lost())


def _probe(device: Device) -> np.ndarray[Any, Any] | None:
    """Samples of the device's own that a new model must answer, where the task names any."""
    task = device.site.task
    if task.table.samples is None:
        return None
    of = apps.load_function(Path(task.path), task.table.samples)
    number, count = device.node_config.get("partition-id", 0), device.node_config.get("num-partitions", 1)
    inputs, _ = of(number, count)
    samples: np.ndarray[Any, Any] = inputs[:PROBES]
    return samples


@asynccontextmanager
async def _capturing(device: Device) -> AsyncIterator[CapturedData | None]:
    """What the device keeps of its predictions, where the task has it keep any."""
    table = device.site.task.table.capture
    if not table.enabled:
        yield None
        return
    captured = CapturedData(
        device.captured(),
        max_rows=table.max_rows,
        on_failure=lambda reason: log.warning("capture rests", reason=reason),
    )
    try:
        yield captured
    finally:
        await captured.close()


SERVER_AGENTS: Final = {
    "server-manager": server_manager,
    "workflow-scheduler": workflow_scheduler,
    "flower-server": flower_server,
}


CLIENT_AGENTS: Final = {
    "client-manager": client_manager,
    "flower-client": flower_client,
    "inference": inference,
}


async def run_together(agents: Mapping[str, Agent], stop: asyncio.Event) -> None:
    """Several agents in this process: the first that breaks ends them all, and the process with them."""
    async with asyncio.TaskGroup() as group:
        for name, agent in agents.items():
            group.create_task(agent(stop), name=name)
