"""Fixtures: the keys of a federation, and a nats-server that trusts them."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.trusted_bus import FED, TrustedBus, trusted_bus

from fedbus.app.provision.federation import Federation


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    folder = tmp_path_factory.mktemp("federation") / "trust"
    return Federation.create(folder, FED, hosts=["localhost"], port=4222)


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[TrustedBus]:
    async with trusted_bus(tmp_path) as bus:
        yield bus
