"""Fixtures: Chromium on a real gateway with a simulated federation."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import NatsServer
from support.browser import BrowserPage, find_chromium, run_chromium
from support.gateway import FED
from support.simulated_federation import TRACE, SimulatedFederation

from fedbus.bus.bus import Bus, Identity


@pytest.fixture
async def simulation(nats: NatsServer) -> AsyncIterator[SimulatedFederation]:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        await bus.create_streams()
        yield SimulatedFederation(bus, trace_id=TRACE)


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[BrowserPage]:
    """One tab; the fixture fails the test if the console has an error."""
    if find_chromium() is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    async with run_chromium(tmp_path / "profile") as page:
        await page.set_viewport()
        yield page
        assert page.errors == []
