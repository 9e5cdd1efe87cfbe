"""The report of a failed training, on the in-memory server and without training processes."""

import asyncio
from pathlib import Path

import pytest
from support.federation import FED, TASK, tiny_task
from support.memory_nats import memory_nats

from fedbus.agents.flower_client.agent import FlowerClient
from fedbus.agents.flower_client.trainer import Heartbeats, TrainerEnd
from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.client import ClientStart, FailTrain
from fedbus.contracts.identifiers import ClientId
from fedbus.contracts.message import Message
from fedbus.contracts.run import RunPlan
from fedbus.simulation.fleet.outbox import MemoryOutbox

RUN, CLIENT = f"{TASK}-1", ClientId("c1")


class IdleTrainer:
    """A trainer that does nothing until it is stopped."""

    def __init__(self) -> None:
        self.started = asyncio.Event()

    async def run(self, start: ClientStart, stop: asyncio.Event, heartbeats: Heartbeats) -> TrainerEnd:
        self.started.set()
        await stop.wait()
        return TrainerEnd("stopped")


async def test_a_client_killed_before_its_report_reports_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, outbox, trainer, publishing = tiny_task(tmp_path), MemoryOutbox(), IdleTrainer(), asyncio.Event()

    def make_client(bus: Bus) -> FlowerClient:
        return FlowerClient(bus, task, CLIENT, launcher=trainer, outbox=outbox)

    async def publish_nothing(message: Message) -> None:
        assert isinstance(message, FailTrain)
        publishing.set()
        await asyncio.Event().wait()

    with memory_nats() as nats:
        async with (
            asyncio.timeout(60),
            Bus.connect(nats.url, Identity(FED, "server-manager")) as server,
            Bus.connect(nats.url, Identity(FED, "client-manager", CLIENT)) as manager,
            Bus.connect(nats.url, Identity(FED, "flower-client", CLIENT)) as killed_bus,
            Bus.connect(nats.url, Identity(FED, "flower-client", CLIENT)) as bus,
        ):
            await server.create_streams()
            await server.create_client_consumer(AgentName.FLOWER_CLIENT, task=TASK, client=CLIENT)
            monkeypatch.setattr(killed_bus, "publish", publish_nothing)
            stop = asyncio.Event()
            killed = asyncio.create_task(make_client(killed_bus).run(stop))
            await manager.publish(ClientStart(task=TASK, client=CLIENT, run=RUN, plan=RunPlan()))
            await trainer.started.wait()
            stop.set()
            await publishing.wait()
            killed.cancel()
            await asyncio.wait([killed])

            stop, client = asyncio.Event(), make_client(bus)
            restarted = asyncio.create_task(client.run(stop))
            await client.ready.wait()
            reports = await server.last_per_sender(FailTrain, task=TASK)
            stop.set()
            await restarted
    assert reports == [FailTrain(task=TASK, client=CLIENT, run=RUN, reason="the FL client was restarted")]
