"""The gateway at work, for tests."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fedbus.agents.gateway.access_control import AccessControl
from fedbus.agents.gateway.agent import Gateway
from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.identifiers import FederationId

FED = FederationId("test")
TOKEN = "correct-horse-battery"


async def list_no_models(task: str) -> dict[str, Any]:
    return {"store": "", "versions": [], "champion": None, "error": f"nothing of {task} here"}


@asynccontextmanager
async def run_gateway(
    url: str,
    *,
    token: str = "",
    trace_url: str = "",
    hosts: Sequence[str] = (),
    port: int = 0,
    models: Any = list_no_models,
) -> AsyncIterator[str]:
    """Where the dashboard of the federation on *url* is, for as long as the block runs."""
    async with Bus.connect(url, Identity(FED, "gateway")) as bus:
        serves = Gateway(bus, AccessControl(hosts, token), models=models, trace_url=trace_url, port=port)
        stop = asyncio.Event()
        running = asyncio.ensure_future(serves.run(stop))
        try:
            first: list[asyncio.Future[Any]] = [running, serves.url]
            await asyncio.wait(first, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                await running
            yield serves.url.result()
        finally:
            stop.set()
            async with asyncio.timeout(20):
                await running
