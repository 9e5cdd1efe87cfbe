"""Connections of simulated agents."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fedbus.bus.blobs import Blobs
from fedbus.bus.bus import Bus, Identity
from fedbus.bus.errors import BusUnreachable
from fedbus.bus.memory.client import MemoryClient
from fedbus.bus.memory.server import MemoryServer
from fedbus.bus.nats.connection import Connection


class FleetBus(Bus):
    """A bus on an in-memory connection, without its own blob transfer: simulated downloads have no bytes."""

    def __init__(self, client: MemoryClient, identity: Identity) -> None:
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        blobs = Blobs(client, identity.fed, identity.blob_holder)
        super().__init__(Connection(client, self._closed), identity, blobs)
        self.connection = client

    async def close(self) -> None:
        """Close at once, as when the process is killed. What it has sent has been received."""
        self._closed.cancel()
        await self.connection.close()


@asynccontextmanager
async def connect_agent(server: MemoryServer, identity: Identity) -> AsyncIterator[FleetBus]:
    """Connect an agent for the duration of the block.

    Raises:
        BusUnreachable: The server is stopped.

    """
    if server.is_stopped:
        raise BusUnreachable(server.url, "the server is stopped")
    client = server.connect(f"{identity.agent} {identity.owner}", identity.inbox)
    bus = FleetBus(client, identity)
    try:
        yield bus
    finally:
        await bus.close()
