"""A connection without `Bus`, for tests that publish or read raw messages."""

from typing import Any

import nats
from nats.aio.client import Client

from fedbus.bus.memory.server import MemoryServer


async def connect_raw(url: str, **options: Any) -> Client:
    """Connect to a nats-server, or to an in-memory server of this process, which has no *options*."""
    if (server := MemoryServer.at(url)) is not None:
        return server.connect("test")
    return await nats.connect(url, connect_timeout=30, **options)
