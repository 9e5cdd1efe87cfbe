"""What only the in-memory server can do: faults of one connection, and a bounded history."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from fedbus.bus import stream_reader, streams
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.errors import BusUnreachable
from fedbus.bus.memory.client import MemoryClient
from fedbus.bus.memory.server import MemoryServer
from fedbus.contracts.agent_names import AgentName
from fedbus.contracts.client import ClientJoined
from fedbus.contracts.identifiers import FederationId

FED = FederationId("test")


def joined(number: int) -> ClientJoined:
    return ClientJoined(task="mnist", client="c1", run=f"mnist-{number}")


@pytest.fixture
def server() -> Iterator[MemoryServer]:
    with MemoryServer("unit", history=1) as server:
        yield server


@asynccontextmanager
async def two_buses(server: MemoryServer) -> AsyncIterator[tuple[Bus, Bus]]:
    async with (
        Bus.connect(server.url, Identity(FED, "server-manager")) as manager,
        Bus.connect(server.url, Identity(FED, "flower-client", "c1")) as client,
    ):
        await manager.create_streams()
        yield manager, client


def connection_of(bus: Bus) -> MemoryClient:
    assert isinstance(bus._client, MemoryClient)
    return bus._client


async def test_a_disconnected_client_publishes_when_it_is_back(server: MemoryServer) -> None:
    async with two_buses(server) as (manager, client):
        connection_of(client).disconnect()
        publishing = asyncio.ensure_future(client.publish(joined(1)))
        await asyncio.sleep(0.05)
        assert not publishing.done()
        assert not client.is_connected
        connection_of(client).reconnect()
        await asyncio.wait_for(publishing, 5)
        _, last = await manager.sequence_range(streams.events_stream(FED))
    assert last == 1


async def test_a_lost_answer_stores_the_message_once(
    server: MemoryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_reader, "ACK_TIMEOUT_S", 0.05)
    async with two_buses(server) as (manager, client):
        answers = iter([True, True, False])
        connection_of(client).loses_answer = lambda: next(answers, False)
        await asyncio.wait_for(client.publish(joined(1)), 5)
        _, last = await manager.sequence_range(streams.events_stream(FED))
    assert last == 1


async def test_late_messages_keep_their_order(server: MemoryServer) -> None:
    async with (
        two_buses(server) as (manager, client),
        manager.consume(AgentName.SERVER_MANAGER, task="mnist") as inbox,
    ):
        delays = iter([0.2, 0.0, 0.1])
        connection_of(manager).delay = lambda: next(delays, 0.0)
        for number in range(3):
            await client.publish(joined(number))
        runs = [(await asyncio.wait_for(anext(inbox), 5)).message for _ in range(3)]
    assert runs == [joined(0), joined(1), joined(2)]


async def test_a_bounded_history_keeps_what_is_not_delivered(server: MemoryServer) -> None:
    async with two_buses(server) as (manager, client):
        async with manager.consume(AgentName.SERVER_MANAGER, task="mnist"):
            pass
        for number in range(3):
            await client.publish(joined(number))
        assert len(server.stream(streams.events_stream(FED)).records) == 1
        async with manager.consume(AgentName.SERVER_MANAGER, task="mnist") as inbox:
            found = [(await asyncio.wait_for(anext(inbox), 5)).message for _ in range(3)]
    assert found == [joined(0), joined(1), joined(2)]


async def test_an_address_without_a_server_is_unreachable() -> None:
    with pytest.raises(BusUnreachable, match="no in-memory server of this process has this name"):
        async with Bus.connect("memory://nowhere", Identity(FED, "server-manager")):
            pass
