"""The Grid on the real bus: a nats-server, durable events, blobs in chunks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
from flwr.app import Message, RecordDict
from learning.flower.memory_bus import (
    QUERY_APP,
    RUN,
    TASK,
    MemoryFederation,
    initial_model,
    open_memory_federation,
)
from support import NatsServer, eventually

from fedbus.bus.bus import Bus, Delivery, Identity
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.client import ClientJoined, FailTrain, Heartbeat, RoundReply
from fedbus.contracts.identifiers import FederationId
from fedbus.contracts.round_messages import RoundMessage
from fedbus.learning import bus_protocol
from fedbus.learning.flower.array_records import to_record
from fedbus.learning.flower.client_app_host import ClientAppHost
from fedbus.learning.flower.grid import MessengerGrid
from fedbus.learning.flower.node_ids import node_id
from fedbus.learning.flower.private_api import set_process_identity
from fedbus.learning.library import ClientJob
from fedbus.learning.memory_bus import MemoryDevice
from fedbus.learning.messenger import BusMessenger

FED = FederationId("test")


def as_learning_bus(bus: Bus) -> bus_protocol.BusProtocol:
    return bus


@asynccontextmanager
async def run_on_nats(
    url: str, fed: MemoryFederation, clients: dict[str, dict[str, int]]
) -> AsyncIterator[BusMessenger]:
    """Run the task of *fed* with a messenger and clients that each have a NATS connection."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(Bus.connect(url, Identity(FED, "flower-server")))
        await server.create_streams()
        messenger = BusMessenger(as_learning_bus(server), task=TASK, run=RUN, plan=fed.plan)
        stack.callback(messenger.close, "the test is over")
        group = await stack.enter_async_context(asyncio.TaskGroup())
        consumers = [group.create_task(_consume_for_server(server, messenger))]
        for client, node_config in clients.items():
            await server.create_client_consumer(AgentName.TRAINER, task=TASK, client=client)
            bus = await stack.enter_async_context(Bus.connect(url, Identity(FED, "trainer", client)))
            consumers.append(group.create_task(_consume_for_client(bus, fed, client, node_config)))
        await eventually(lambda: len(messenger.clients()) == len(clients))
        yield messenger
        for task in consumers:
            task.cancel()


async def _consume_for_server(bus: Bus, messenger: BusMessenger) -> None:
    async with bus.consume(AgentName.FLOWER_SERVER_GRID, task=TASK) as inbox:
        async for delivery in inbox:
            match delivery.message:
                case ClientJoined() | RoundReply() | FailTrain() | Heartbeat() as event:
                    messenger.deliver(event)
                case _:
                    pass
            await delivery.ack()


async def _consume_for_client(
    bus: Bus, fed: MemoryFederation, client: str, node_config: dict[str, int]
) -> None:
    job = ClientJob(task=fed.task({}), client=client, run=RUN, plan=fed.plan, node_config=node_config)
    host = ClientAppHost(job)
    async with asyncio.TaskGroup() as group, bus.consume(AgentName.TRAINER, task=TASK) as inbox:
        await bus.publish(ClientJoined(task=TASK, client=client, run=RUN))
        device = MemoryDevice(
            host, client, bus, lambda reply: group.create_task(bus.publish(reply)), {**node_config}
        )
        async for delivery in inbox:
            await _handle(device, delivery)


async def _handle(device: MemoryDevice, delivery: Delivery) -> None:
    await delivery.ack()
    assert isinstance(delivery.message, RoundMessage)
    device.receive(delivery.message)


async def test_fedavg_trains_over_a_real_bus(nats: NatsServer, tmp_path: Path) -> None:
    clients = {"c1": {"step": 1, "samples": 30}, "c2": {"step": 2, "samples": 10}}
    async with (
        open_memory_federation(tmp_path, rounds=3) as fed,
        run_on_nats(nats.url, fed, clients) as messenger,
    ):
        fed.messenger = messenger
        final = await fed.run(initial_model())

    np.testing.assert_allclose(final["w"], 3 * 1.25, rtol=1e-6)
    assert [result.participants for result in fed.results[1:]] == [{"c1": 30, "c2": 10}] * 3


async def test_a_no_op_round_has_all_replies(nats: NatsServer, tmp_path: Path) -> None:
    async with (
        open_memory_federation(tmp_path, client=QUERY_APP) as fed,
        run_on_nats(nats.url, fed, {"c0": {}, "c1": {}}) as messenger,
    ):
        grid = MessengerGrid(messenger)
        set_process_identity(grid.run.run_id)
        content = RecordDict({"arrays": to_record({"w": np.zeros(65536, np.float32)})})

        def run_rounds(rounds: int) -> list[bool]:
            return [
                reply.has_content()
                for _ in range(rounds)
                for reply in grid.send_and_receive(
                    [Message(content, node_id(client), "query") for client in ("c0", "c1")]
                )
            ]

        assert await asyncio.to_thread(run_rounds, 5) == [True] * 10
