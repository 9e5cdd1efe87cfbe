"""A real browser before a real gateway, on a federation that is told of."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import NatsServer
from support.chromium import Page, chromium, found_chromium
from support.dashboards import FED
from support.told import TRACE, Told

from fedbus.bus.bus import Bus, Identity


@pytest.fixture
async def told(nats: NatsServer) -> AsyncIterator[Told]:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        await bus.make_streams()
        yield Told(bus, trace=TRACE)


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    """One tab; at the end of the test nothing was complained of."""
    if found_chromium() is None:
        pytest.skip("there is no Chromium on this machine: apt-get install chromium")
    async with chromium(tmp_path / "profile") as page:
        await page.look()
        yield page
        assert page.complaints == []
