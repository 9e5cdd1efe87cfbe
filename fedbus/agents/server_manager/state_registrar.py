"""The registrar: tells each client where it stands, and nothing of anybody else.

A client with credentials may not read the life stream itself: see `fedbus.contracts.state_recall`. Its
request names the client in the subject, where the broker sees to it that nobody asks for another.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fedbus import __version__
from fedbus.bus.bus import Bus
from fedbus.contracts.state_recall import RecallLife


@asynccontextmanager
async def registrar(bus: Bus, task: str) -> AsyncIterator[None]:
    """Answer the clients of *task* for as long as the block runs."""
    await bus.make_streams()
    async with bus.serve({RecallLife: bus.recall}, task=task, version=__version__):
        yield
