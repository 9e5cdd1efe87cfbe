"""The registrar: answers each client with the last transition of its own lifecycles, and of no others.

A client with credentials may not read the lifecycle stream itself: see `fedbus.contracts.state_recall`. Its request
names the client in the subject, where NATS permissions make sure that no client asks for another.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fedbus import __version__
from fedbus.bus.bus import Bus
from fedbus.contracts.state_recall import GetLastTransition


@asynccontextmanager
async def serve_registrar(bus: Bus, task: str) -> AsyncIterator[None]:
    """Answer the clients of *task* for as long as the block runs."""
    await bus.create_streams()
    async with bus.serve({GetLastTransition: bus.answer_last_transition}, task=task, version=__version__):
        yield
