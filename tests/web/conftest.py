"""Fixtures: Chromium on a real gateway with a simulated federation."""

from collections.abc import AsyncIterator, Iterator

import pytest
from support import NatsServer
from support.browser import BrowserPage, Chromium, find_chromium, open_tab
from support.gateway import FED
from support.simulated_federation import TRACE, SimulatedFederation

from fedbus.bus.bus import Bus, Identity


@pytest.fixture
async def simulation(nats: NatsServer) -> AsyncIterator[SimulatedFederation]:
    async with Bus.connect(nats.url, Identity(FED, "test")) as bus:
        await bus.create_streams()
        yield SimulatedFederation(bus, trace_id=TRACE)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """The browser of all tests of this worker."""
    if find_chromium() is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    browser = Chromium(lambda: tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.kill()


@pytest.fixture
async def page(chromium: Chromium) -> AsyncIterator[BrowserPage]:
    """One tab; the fixture fails the test if the console has an error."""
    async with open_tab(chromium) as page:
        await page.set_viewport()
        yield page
        assert page.errors == []
