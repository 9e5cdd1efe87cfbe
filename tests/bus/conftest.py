"""A bus for the server side and one for a client, on a real nats-server."""

from collections.abc import AsyncIterator

import pytest
from support import NatsServer

from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.identifiers import FederationId

FED = FederationId("test")


@pytest.fixture
async def server_bus(nats: NatsServer) -> AsyncIterator[Bus]:
    async with Bus.connect(nats.url, Identity(FED, "server-manager")) as bus:
        await bus.create_streams()
        yield bus


@pytest.fixture
async def client_bus(nats: NatsServer) -> AsyncIterator[Bus]:
    async with Bus.connect(nats.url, Identity(FED, "flower-client", "c1")) as bus:
        yield bus
