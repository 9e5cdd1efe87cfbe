"""An in-memory server with the interface of the real nats-servers of the tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import pytest

from fedbus.bus.memory.server import MemoryServer
from support.nats_server import NatsServer, OwnNatsServer

_NUMBERS = count(1)


class MemoryNats(OwnNatsServer):
    """One in-memory server; killing it loses its connections, and nothing else."""

    def __init__(self) -> None:
        self.server = MemoryServer(f"test-{next(_NUMBERS)}")
        NatsServer.__init__(self, self.server.url)

    async def start(self) -> None:
        self.server.start()

    async def stop(self, _: object = None) -> None:
        self.server.stop()

    @contextmanager
    def freeze(self) -> Iterator[None]:
        with self.server.freeze():
            yield


def nats_server_only(reason: str) -> pytest.MarkDecorator:
    """Mark a test of the bus that does not run on the in-memory server, for *reason*."""
    assert reason
    return pytest.mark.parametrize("bus_kind", ["nats-server"], indirect=True)


@contextmanager
def memory_nats() -> Iterator[MemoryNats]:
    nats = MemoryNats()
    with nats.server:
        yield nats
