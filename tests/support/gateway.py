"""A running gateway, for tests of the dashboard."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fedbus.agents.gateway.access_control import AccessControl
from fedbus.agents.gateway.agent import Gateway
from fedbus.bus.bus import Bus, Identity
from fedbus.contracts.identifiers import FederationId
from support.browser import BrowserPage

FED = FederationId("test")
TOKEN = "correct-horse-battery"


async def list_no_models(task: str) -> dict[str, Any]:
    return {"store": "", "versions": [], "champion": None, "error": f"no models of {task}"}


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
    """Run a gateway for the federation at *url* until the block ends, and yield the URL of its dashboard."""
    async with Bus.connect(url, Identity(FED, "gateway")) as bus:
        gateway = Gateway(bus, AccessControl(hosts, token), models=models, trace_url=trace_url, port=port)
        stop = asyncio.Event()
        running = asyncio.ensure_future(gateway.run(stop))
        try:
            futures: list[asyncio.Future[Any]] = [running, gateway.url]
            await asyncio.wait(futures, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                await running
            yield gateway.url.result()
        finally:
            stop.set()
            async with asyncio.timeout(20):
                await running


@asynccontextmanager
async def run_dashboard(page: BrowserPage, url: str, **options: Any) -> AsyncIterator[str]:
    """Run a gateway whose dashboard *page* opens, and leave the page before the gateway stops.

    A page that stays open tries to connect to the stopped gateway, and Chromium logs each attempt as an error.
    """
    async with run_gateway(url, **options) as dashboard:
        try:
            yield dashboard
        finally:
            await page.open("about:blank")
