"""A bus for the server side and one for a client, on a real nats-server and on the in-memory server.

Every test of the bus runs on both. A test about nats-server or nats-py itself is marked with `nats_server_only`.
"""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import pytest
from support import NatsServer, OwnNatsServer, nats_server
from support.memory_nats import memory_nats

from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.identifiers import FederationId

FED = FederationId("test")
MEMORY: Final = "memory"


@pytest.fixture(params=["nats-server", MEMORY])
def bus_kind(request: pytest.FixtureRequest) -> str:
    """The implementation below `Bus`."""
    return str(request.param)


@pytest.fixture
async def own_nats(bus_kind: str, tmp_path: Path) -> AsyncIterator[OwnNatsServer]:
    """A server for one test, which may kill it."""
    if bus_kind == MEMORY:
        with memory_nats() as server:
            yield server
        return
    directory = tmp_path / "nats"
    directory.mkdir()
    async with nats_server(directory) as server:
        yield server


@pytest.fixture
def nats(bus_kind: str, request: pytest.FixtureRequest) -> Iterator[NatsServer]:
    """An empty server: in memory, an account of the shared server, or the `own_nats` of the test."""
    if "own_nats" in request.fixturenames:
        own = request.getfixturevalue("own_nats")
        assert isinstance(own, NatsServer)
        yield own
    elif bus_kind == MEMORY:
        with memory_nats() as server:
            yield server
    else:
        yield request.getfixturevalue("shared_nats").new_account()


@pytest.fixture
async def server_bus(nats: NatsServer) -> AsyncIterator[Bus]:
    async with Bus.connect(nats.url, Identity(FED, "server-manager")) as bus:
        await bus.create_streams()
        yield bus


@pytest.fixture
async def client_bus(nats: NatsServer) -> AsyncIterator[Bus]:
    async with Bus.connect(nats.url, Identity(FED, "flower-client", "c1")) as bus:
        yield bus
